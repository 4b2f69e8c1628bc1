"""Mixtures of experts on a GPU: the kernels alone and whole models, each beside its floor.

    python benchmarks/experts.py --json benchmarks/results/experts.json

Random bfloat16 weights. The bandwidth of a large copy is measured in the same run.

``kernels``: experts alone, of the shape of Qwen3-30B-A3B, layer after layer in one captured graph; what the
layers read is at least ten times the L2 cache. ``us``: a layer, by the fastest kernel, which is named.
``torch_us``: by torch's kernels. ``floor_us``: the chosen experts' weights over the bandwidth.

``models``: a decode step and the reading of prompts of 1,024 tokens through the engine, as ``bench`` does it.
``chosen``: distinct experts of a layer, the mean over layers and steps, counted in a second run of the same
requests. ``floor_ms``: their weights, all others, and K and V of every token, over the bandwidth.

``--smoke`` runs all of it with small shapes on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from transformers import GptOssConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from ad_flashinfer_pass import build
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, KvDtype
from ad_flashinfer_pass.deployment.bench import bench, copy_bandwidth, machine, step_bytes
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams

EXPERTS = torch.ops.ad_flashinfer.experts
PACKAGES = ("ad-flashinfer-pass", "torch", "transformers", "triton", "flashinfer-python")
NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 128, 8, 2048, 768
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def qwen3_30b_a3b(layers: int, **changes: Any) -> PretrainedConfig:
    """Qwen/Qwen3-30B-A3B's shape."""
    shape = {
        "vocab_size": 151936,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **{**shape, **changes})


def gpt_oss_20b(**changes: Any) -> PretrainedConfig:
    """openai/gpt-oss-20b's shape, which is the default of its class but for the layers."""
    shape = {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4}
    return GptOssConfig(architectures=["GptOssForCausalLM"], **{**shape, **changes})


def mixtral_8x7b(**changes: Any) -> PretrainedConfig:
    """mistralai/Mixtral-8x7B-v0.1's shape, which is the default of its class."""
    return MixtralConfig(architectures=["MixtralForCausalLM"], **changes)


MODELS: dict[str, Callable[..., PretrainedConfig]] = {
    "Qwen3-30B-A3B, 8 layers": partial(qwen3_30b_a3b, 8),
    "Qwen3-30B-A3B, 48 layers": partial(qwen3_30b_a3b, 48),
    "gpt-oss-20b": gpt_oss_20b,
    "Mixtral-8x7B": mixtral_8x7b,
}


def layer_us(run: Callable[[Tensor, Tensor, Tensor], object], layers: Sequence[Sequence[Tensor]]) -> float:
    """Microseconds of a layer, where all run in turn."""
    launches = [partial(run, *layer) for layer in layers]
    if layers[0][0].device.type == "cuda":
        from ad_flashinfer_pass.kernels.measure import microseconds

        return microseconds(launches)
    start = time.perf_counter()
    for launch in launches:
        launch()
    return 1e6 * (time.perf_counter() - start) / len(launches)


def measure_kernels(num_tokens: int, bandwidth: float, device: torch.device, smoke: bool) -> dict[str, Any]:
    """One row of ``kernels``."""
    experts, top_k, hidden, width = (8, 2, 64, 32) if smoke else (NUM_EXPERTS, TOP_K, HIDDEN, WIDTH)
    dtype = torch.float32 if smoke else torch.bfloat16
    bytes_each = 3 * hidden * width * dtype.itemsize
    num_layers = 2
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        num_layers = max(2, math.ceil(10 * cache / (min(experts, num_tokens * top_k) * bytes_each)))
    generator = torch.Generator(device).manual_seed(0)
    new: dict[str, Any] = {"device": device, "generator": generator, "dtype": dtype}
    layers = []
    for _ in range(num_layers):
        best, index = torch.rand(num_tokens, experts, **new).float().topk(top_k)
        up = torch.randn(experts, 2 * width, hidden, **new)
        layers.append((index, best.to(dtype), up, torch.randn(experts, hidden, width, **new)))
    x = torch.randn(num_tokens, hidden, **new)
    names = ["torch"]
    if device.type == "cuda":
        from ad_flashinfer_pass.kernels.experts import select

        names += [str(kernel) for kernel in select.candidates(num_tokens, top_k, experts, device)]
    with torch.inference_mode():
        times = {
            name: layer_us(lambda *layer, name=name: EXPERTS(x, *layer, plan=name), layers) for name in names
        }
    best_name = min(times, key=lambda name: times[name])
    chosen = statistics.mean(len(index.unique()) for index, *_ in layers)
    return {
        "tokens": num_tokens,
        "layers": num_layers,
        "chosen": chosen,
        "kernel": best_name,
        "us": times[best_name],
        "torch_us": times["torch"],
        "floor_us": 1e6 * chosen * bytes_each / bandwidth,
    }


def build_model(
    shape: PretrainedConfig,
    args: argparse.Namespace,
    device: torch.device,
    quantization: dict[str, Any] | None = None,
    kv_dtype: KvDtype = "auto",
    token_buckets: list[int] | None = None,
) -> tuple[LLM, float]:
    """The model, and the seconds that it took to build.

    Args:
        shape: its config.
        args: of the command.
        device: that takes it.
        quantization: what stands in config.json as quantization_config.
        kv_dtype: of the cache.
        token_buckets: of steps with prompts; None for all that are usual.
    """
    with tempfile.TemporaryDirectory() as directory:
        shape.save_pretrained(directory)
        if quantization is not None:
            file = Path(directory) / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
        config = AutoDeployConfig(
            model=directory,
            skip_loading_weights=True,
            generation_config="none",
            dtype="bfloat16",
            device=str(device),
            compile_backend=args.compile_backend,
            max_batch_size=max(args.batches),
            max_seq_len=args.context + args.new + 16,
            max_num_tokens=args.max_num_tokens,
            cuda_graph_batch_sizes=args.batches,
            cuda_graph_token_buckets=token_buckets,
            kv_cache_config=KvCacheConfig(dtype=kv_dtype, enable_block_reuse=False),
        )
        start = time.perf_counter()
        llm = build.build_model(config, on_event=lambda name: print(f"  {name}", file=sys.stderr, flush=True))
        return llm, time.perf_counter() - start


class Chosen(fx.Interpreter):
    """Runs a graph and counts the distinct experts of each layer."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.numbers: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        """As in the base class."""
        if g.is_op(n, EXPERTS):
            self.numbers.append(len(self.env[g.op_args(n)["top_k_index"]].unique()))
        return super().run_node(n)


def graph_of(model: CachedModel, batch: int) -> fx.GraphModule:
    """What a decode step of that many sequences runs."""
    module: Any = getattr(model.module, "eager", model.module)
    if not isinstance(module, fx.GraphModule):
        module = module.small if batch <= module.limit else module.large
    return module


def count_chosen(llm: LLM, batch: int, args: argparse.Namespace) -> float:
    """Distinct experts of a layer in the decode steps of the requests that ``bench`` makes.

    The engine's next step is run once more, which writes to the pages what that step writes.
    """
    model = llm.model
    assert isinstance(model, CachedModel)
    generator = torch.Generator().manual_seed(0)
    for _ in range(batch):
        prompt = torch.randint(model.vocab_size, (args.context,), generator=generator)
        params = SamplingParams(max_new_tokens=args.new, ignore_eos=True)
        llm.engine.add_request(prompt.tolist(), params)
    found: list[float] = []
    num_tokens, num_steps = 0, 0
    while llm.engine.has_work:
        num_tokens += sum(output.token_id is not None for output in llm.engine.step())
        num_steps += 1
        inputs = {**model.sequence_info.named_args(), **model.caches}
        is_decode = num_tokens >= batch and inputs["input_ids"].numel() == batch
        if is_decode and llm.engine.has_work and num_steps % 8 == 0:
            graph = graph_of(model, batch)
            counter = Chosen(graph)
            with torch.inference_mode():
                counter.run(*(inputs[node.name] for node in graph.graph.find_nodes(op="placeholder")))
            found.append(statistics.mean(counter.numbers))
    return statistics.mean(found)


def measure_model(
    name: str, args: argparse.Namespace, bandwidth: float, device: torch.device
) -> dict[str, Any]:
    """One of ``models``."""
    llm, seconds = build_model(MODELS[name](**(SMALL if args.smoke else {})), args, device)
    model = llm.model
    assert isinstance(model, CachedModel)
    steps = bench(llm, input_len=args.context, output_len=args.new, concurrencies=args.batches)
    prompts = bench(llm, input_len=args.context, output_len=1, concurrencies=args.batches)
    pieces = None if steps.eager_pieces is None else str(steps.eager_pieces)
    rows = []
    for row, prompt_row in zip(steps.rows, prompts.rows, strict=True):
        batch = row.concurrency
        chosen = count_chosen(llm, batch, args)
        expected = model.weights.bytes_at(batch) - model.weights.always
        read = sum(chosen * site.bytes_each for site in model.weights.experts)
        floor = (step_bytes(model, batch, args.context + args.new // 2) - expected + read) / bandwidth
        rows.append(
            {
                "sequences": batch,
                "step_ms": row.step_ms,
                "floor_ms": 1e3 * floor,
                "chosen": chosen,
                "prompt_tokens_per_s": prompt_row.prompt_tokens_per_s,
            }
        )
    return {"name": name, "build_seconds": seconds, "eager_pieces": pieces, "rows": rows}


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 2, 4, 8, 32, 128, 8192])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=48, help="tokens generated for each prompt")
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    bandwidth = copy_bandwidth(device)
    kernels: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    results = {
        "machine": machine(device),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": bandwidth,
        "kernels": kernels,
        "models": models,
        "note": f"Not run: {', '.join(name for name in MODELS if name not in args.models) or 'none'}",
    }

    def note(kind: list[dict[str, Any]], row: dict[str, Any]) -> None:
        kind.append(row)
        print(json.dumps(row), flush=True)
        if args.json is not None:  # after each row, so that an interrupted run leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for num_tokens in args.tokens:
        note(kernels, measure_kernels(num_tokens, bandwidth, device, args.smoke))
    for name in args.models:
        note(models, measure_model(name, args, bandwidth, device))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def installed(package: str) -> str | None:
    """Its version, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
