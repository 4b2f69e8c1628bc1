"""Models with quantized weights on a GPU, each beside its floor.

    python benchmarks/quantized.py --json benchmarks/results/quantized.json

Random weights in the form that a checkpoint's files would say. A decode step and the reading of prompts of
1,024 tokens, through the engine, as ``bench`` does it. ``floor_ms``: weights, of experts those that so many
tokens are expected to choose, and K and V of every token, over the bandwidth of a copy of the same run.
``activations``: what the linears of a step multiply float8 weights by. ``load_tokens_per_s``: new tokens, of
64 requests of 1,024 tokens in and as many out, all at once, through ``generate``.

``--smoke`` runs all of it with small shapes on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx
from transformers import LlamaConfig, PretrainedConfig

from ad_flashinfer_pass.config import KvDtype
from ad_flashinfer_pass.deployment.bench import bench, copy_bandwidth, machine
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.runtime.cached_model import CachedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.decode import llama_8b
from benchmarks.experts import PACKAGES, SMALL, build_model, gpt_oss_20b, graph_of, installed, qwen3_30b_a3b
from benchmarks.load import lengths_of_loads, seconds_of

_FLOAT8 = {"num_bits": 8, "type": "float"}
DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FLOAT8, "strategy": "channel"},
            "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True},
        }
    },
}
BLOCKS = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head", "mlp.gate"],
}
INTEGERS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 128,
                "symmetric": True,
            },
        }
    },
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": None}
_LINEAR = torch.ops.ad_flashinfer.linear.default
_QUANTIZED = torch.ops.ad_flashinfer.quantized_linear.default
_NUMBERS = {"small_gemm": "16 bits", "small_gemm_w8a8": "float8"}


MODELS: dict[str, tuple[PretrainedConfig, dict[str, Any], KvDtype]] = {
    "Llama-3.1-8B, float8 by channel and token, fp8 cache": (llama_8b(32), DYNAMIC, "fp8"),
    "Qwen3-30B-A3B, float8 by blocks": (qwen3_30b_a3b(48), BLOCKS, "auto"),
    "Llama-3.1-8B, 4 bits by groups of 128, fp8 cache": (llama_8b(32), INTEGERS, "fp8"),
    "gpt-oss-20b, MXFP4 experts": (gpt_oss_20b(), MXFP4, "auto"),
}
_SMALL = (
    LlamaConfig(**SMALL),
    qwen3_30b_a3b(2, **{**SMALL, "moe_intermediate_size": 64}),
    LlamaConfig(**{**SMALL, "hidden_size": 128, "intermediate_size": 256}),
    gpt_oss_20b(**SMALL),
)


def activations(model: CachedModel, batch: int) -> str:
    """What the float8 linears of a decode step multiply by, those that are most first."""
    found = []
    for graph in graph_of(model, batch).modules():  # what Inductor compiled lies in graphs of its own
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            if g.is_op(node, torch.ops.ad_flashinfer.scaled_mm.default):
                found.append("float8")
            elif g.is_op(node, _LINEAR, _QUANTIZED):
                found += _of_linear(g.op_args(node), batch)
    return " and ".join(sorted(set(found), key=found.count, reverse=True)) or "-"


def _of_linear(args: dict[str, Any], batch: int) -> list[str]:
    if args["weight_scale"] is None:
        return []
    name = KernelPlan.parse(args.get("plan", "torch")).at(batch).name
    return [_NUMBERS.get(name, "float8" if args["activation"] in ("tensor", "token") else "16 bits")]


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One of ``MODELS``."""
    shape, settings, kv_dtype = MODELS[name]
    shape = _SMALL[list(MODELS).index(name)] if args.smoke else shape
    load, _ = lengths_of_loads(args.smoke)["1k in, 1k out"]
    longest = argparse.Namespace(**{**vars(args), "new": max(args.new, *(new for _, new in load))})
    llm, seconds = build_model(shape, longest, device, settings, kv_dtype)
    model = llm.model
    assert isinstance(model, CachedModel)
    steps = bench(llm, input_len=args.context, output_len=args.new, concurrencies=args.batches)
    prompts = bench(llm, input_len=args.context, output_len=1, concurrencies=args.batches)
    rows = [
        {
            "sequences": row.concurrency,
            "step_ms": row.step_ms,
            "floor_ms": row.floor_ms,
            "activations": activations(model, row.concurrency),
            "prompt_tokens_per_s": prompt_row.prompt_tokens_per_s,
            "first_token_ms": prompt_row.first_token.p50,
        }
        for row, prompt_row in zip(steps.rows, prompts.rows, strict=True)
    ]
    seconds_of(llm, load[:4], 0)
    speed = sum(new for _, new in load) / seconds_of(llm, load, 0)
    return {"name": name, "build_seconds": seconds, "rows": rows, "load_tokens_per_s": speed}


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    models: list[dict[str, Any]] = []
    results = {
        "machine": machine(device),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": copy_bandwidth(device),
        "models": models,
    }
    for name in args.models:
        models.append(measure(name, args, device))
        print(json.dumps(models[-1]), flush=True)
        if args.json is not None:  # after each, so that an interrupted run leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
