"""Attention over a latent on a GPU: the kernel, and DeepSeek-V2-Lite beside its floor and expanded K and V.

    python benchmarks/latent.py --json benchmarks/results/latent.json

Random bfloat16 weights, empty pages. The bandwidth of a large copy is measured in the same run.

``kernels``: attention of DeepSeek-V2-Lite (16 heads) and of DeepSeek-V3 (128), one layer after the other in a
captured graph; what the layers read is at least ten times the L2 cache. ``of_copy``: the bytes of the rows
over the time, as a share of the copy's bandwidth; ``tflops``: two products of every head and row.

``prompts``: the same with W_UK and W_UV, of one sequence with ``new`` tokens behind a ``past``: ``us`` with K
and V expanded where ``latent`` does so, ``absorbed_us`` over the latent; ``tflops``: the products of
attention over K and V of each head, whatever was computed.

``models``: a decode step of DeepSeek-V2-Lite by replay, tokens chosen; ``floor_ms``: weights, of the experts
those that were chosen, and rows of every token over the bandwidth. ``latent`` is false where ``cache_latent``
is left out: K and V of each head. With ``new``: a step of that many tokens of one prompt, behind ``context``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV2Config

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, TransformConfig
from ad_flashinfer_pass.deployment.bench import copy_bandwidth, machine, step_bytes
from ad_flashinfer_pass.kernels.attention import latent
from ad_flashinfer_pass.kernels.attention.absorbing import absorbing
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.measure import microseconds
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceStep
from benchmarks.experts import PACKAGES, Chosen, graph_of, installed

RANK, WIDTH, PAGE = 512, 576, 32
_BUDGET = 2048
"""Tokens of a step."""
DEVICE = torch.device("cuda", 0)
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "q_lora_rank": None,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": WIDTH - RANK,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
}


def measure_kernel(heads: int, batch: int, context: int, bandwidth: float) -> dict[str, Any]:
    """One row of ``kernels``, by the best number of splits."""
    size = batch * context * WIDTH * 2
    layers = max(4, math.ceil(10 * torch.cuda.get_device_properties(DEVICE).L2_cache_size / size))
    pages = batch * context // PAGE
    pools = torch.randn(layers, pages + 1, 1, 1, PAGE, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    table = (torch.randperm(pages, device=DEVICE) + 1).to(torch.int32).view(batch, -1)
    query = torch.randn(batch, heads, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    spec = AttentionSpec(WIDTH**-0.5, v_head_dim=RANK)
    times = {
        splits: microseconds(
            [partial(latent.decode, query, pool, lens, table, spec, splits) for pool in pools]
        )
        for splits in (1, 2, 4, 8, 16, 32, 64)
    }
    best = min(times, key=lambda splits: times[splits])
    return {
        "heads": heads,
        "sequences": batch,
        "context": context,
        "splits": best,
        "us": times[best],
        "of_copy": size / times[best] * 1e6 / bandwidth,
        "tflops": 2 * heads * batch * context * (WIDTH + RANK) / times[best] / 1e6,
    }


def measure_prompt(heads: int, past: int, new: int) -> dict[str, Any]:
    """One row of ``prompts``."""
    pages = (past + new) // PAGE
    pools = torch.randn(4, pages + 1, 1, 1, PAGE, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    table = (torch.randperm(pages, device=DEVICE) + 1).to(torch.int32)[None]
    query = torch.randn(new, heads, 128 + WIDTH - RANK, device=DEVICE, dtype=torch.bfloat16)
    up = torch.randn(heads, 256, RANK, device=DEVICE, dtype=torch.bfloat16) * RANK**-0.5
    spec = AttentionSpec(192**-0.5, v_head_dim=RANK, key_up=up[:, :128], value_up=up[:, 128:])
    bounds = torch.tensor([0, new], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([past + new], dtype=torch.int32, device=DEVICE)

    def timed(prefill: Any) -> float:
        return microseconds([partial(prefill, query, pool, bounds, lens, table, spec) for pool in pools])

    us, pairs = timed(latent.prefill), new * past + new * (new + 1) // 2
    return {
        "heads": heads,
        "past": past,
        "new": new,
        "us": us,
        "absorbed_us": timed(absorbing(partial(latent.extend, max_len=new), spec)),
        "tflops": 2 * heads * pairs * 320 / us / 1e6,
    }


def prompt_ms(model: CachedModel, past: int, new: int) -> float:
    """Median of steps with so many tokens of one sequence."""
    pages = -(-(past + new) // model.sequence_info.tokens_per_block)
    step = SequenceStep([5] * new, past, list(range(1, 1 + pages)), slot=1)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(8)]
    for start, end in marks:
        model.nest([step], [RowParams()])
        start.record()
        model.forward()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks[2:])


def step_ms(model: CachedModel, batch: int, context: int) -> tuple[float, float]:
    """Median of decode steps by replay, each with the choice of its tokens; and the experts of a layer."""
    pages = context // model.sequence_info.tokens_per_block + 2
    tables = [range(1 + i * pages, 1 + (i + 1) * pages) for i in range(batch)]
    steps = [SequenceStep([5], context, list(table), slot=1 + i) for i, table in enumerate(tables)]
    model.nest(steps, [RowParams()] * batch)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for mark in marks:
        mark.record()
        model.forward()
        model.sample_and_advance(is_greedy=True)
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(marks[10:])]
    graph = graph_of(model, batch)
    inputs, counter = {**model.sequence_info.named_args(), **model.caches}, Chosen(graph)
    with torch.inference_mode():
        counter.run(*(inputs[node.name] for node in graph.graph.find_nodes(op="placeholder")))
    return statistics.median(times), statistics.mean(counter.numbers)


def measure_model(is_latent: bool, args: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """Rows of ``models``: of each batch and context whose pages there is room for."""
    directory = Path(args.directory)
    DeepseekV2Config(**{**V2_LITE, "num_hidden_layers": args.layers}).save_pretrained(directory)
    config = AutoDeployConfig(
        model=str(directory),
        skip_loading_weights=True,
        generation_config="none",
        dtype="bfloat16",
        device="cuda",
        compile_backend=args.compile_backend,
        max_batch_size=max(args.batches),
        max_seq_len=max(args.contexts) + 64,
        max_num_tokens=_BUDGET,
        cuda_graph_batch_sizes=args.batches,
        cuda_graph_token_buckets=[_BUDGET],
        kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=0.9),
        transforms={} if is_latent else {"cache_latent": TransformConfig(enabled=False)},
    )
    llm = build_model(config, on_event=lambda name: print(f"  {name}", file=sys.stderr, flush=True))
    model, rows = llm.model, []
    assert isinstance(model, CachedModel)
    for batch, context in ((b, c) for c in args.contexts for b in args.batches):
        if batch * (context // PAGE + 2) < model.num_pages:
            ms, chosen = step_ms(model, batch, context)
            expected = model.weights.bytes_at(batch) - model.weights.always
            read = sum(chosen * site.bytes_each for site in model.weights.experts)
            floor = 1e3 * (step_bytes(model, batch, context) - expected + read) / bandwidth
            row = {"latent": is_latent, "sequences": batch, "context": context, "chosen": chosen}
            rows.append({**row, "floor_ms": floor, "step_ms": ms})
    for past in (0, *(context - _BUDGET for context in args.contexts if context > _BUDGET)):
        row = {"latent": is_latent, "sequences": 1, "context": past, "new": _BUDGET}
        rows.append({**row, "step_ms": prompt_ms(model, past, _BUDGET)})
    print(*(note for report in llm.reports for note in report.notes if "decode of" in note), sep="\n")
    return rows


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--forms", nargs="*", choices=["latent", "expanded"], default=["latent", "expanded"])
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--directory", default="/tmp/deepseek_v2_lite", help="takes the model's config")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth(DEVICE)
    results: dict[str, Any] = {
        "machine": machine(DEVICE),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": bandwidth,
        "kernels": [],
        "prompts": [],
        "models": [],
    }

    def note(kind: str, rows: list[dict[str, Any]]) -> None:
        results[kind] += rows
        print(*map(json.dumps, rows), sep="\n", flush=True)
        if args.json is not None:  # after each part, so that an interrupted run leaves what it has
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for heads in (16, 128):
        sizes = [(batch, context) for context in args.contexts for batch in args.batches]
        note("kernels", [measure_kernel(heads, *size, bandwidth) for size in sizes])
        prompts = [(0, 512), (0, 2048), (0, 8192), (6144, 2048), (8000, 192)]
        note("prompts", [measure_prompt(heads, *size) for size in prompts])
    for form in args.forms:
        note("models", measure_model(form == "latent", args, bandwidth))
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
