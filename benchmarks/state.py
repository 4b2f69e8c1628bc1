"""Hybrid and recurrent models on a GPU, each beside its floor.

    python benchmarks/state.py --json benchmarks/results/state.json

Published shapes with few layers, random bfloat16 weights. Through the engine, as ``bench`` does it: a
decode step after prompts of 1,024 tokens, captured, and one prompt of 8,192, read in one step. ``floor_ms``:
weights, of experts those that so many tokens are expected to choose, states read and written, and K and V of
every token, over the bandwidth of a copy of the same run. ``state_bytes``: of one sequence.
``transformers_prompt_ms``, with ``--transformers``: the long prompt by its own model, which takes
flash-linear-attention, mamba-ssm and causal-conv1d where they are installed, as ``versions`` says.

``--smoke`` runs all of it with small shapes on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Lfm2Config,
    Mamba2Config,
    NemotronHConfig,
    PretrainedConfig,
    Qwen3NextConfig,
)

from ad_flashinfer_pass.deployment.bench import bench, copy_bandwidth, machine
from ad_flashinfer_pass.runtime.cached_model import CachedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.experts import PACKAGES, SMALL, build_model, installed

LIBRARIES = ("flash-linear-attention", "mamba-ssm", "causal-conv1d")
_BLOCKS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
_SMALL_MAMBA = {"n_groups": 2, "expand": 2, "chunk_size": 32}


def qwen3_next_80b(**changes: Any) -> PretrainedConfig:
    """Qwen/Qwen3-Next-80B-A3B-Instruct's shape, which is the default of its class, with 8 of 48 layers."""
    shape = {"num_hidden_layers": 8, "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}}
    return Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"], **{**shape, **changes})


def nemotron_h_8b(**changes: Any) -> PretrainedConfig:
    """nvidia/Nemotron-H-8B-Base-8K's shape, which is the default of its class, with 10 of 52 layers."""
    shape = {"layers_block_type": [_BLOCKS[kind] for kind in "M-M-M-M*-M"], "max_position_embeddings": 8448}
    changes.pop("num_hidden_layers", None)
    return NemotronHConfig(architectures=["NemotronHForCausalLM"], **{**shape, **changes})


def falcon_h1_7b(**changes: Any) -> PretrainedConfig:
    """tiiuae/Falcon-H1-7B-Base's shape, with 6 of 44 layers."""
    shape: dict[str, Any] = {
        "vocab_size": 130049,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 16384,
        "mamba_d_ssm": 3072,
        "mamba_n_heads": 24,
        "mamba_d_head": 128,
        "mamba_d_state": 256,
    }
    return FalconH1Config(architectures=["FalconH1ForCausalLM"], **{**shape, **changes})


def lfm2_1b(**changes: Any) -> PretrainedConfig:
    """LiquidAI/LFM2-1.2B's shape."""
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}
    return Lfm2Config(architectures=["Lfm2ForCausalLM"], **{**shape, **changes})


def mamba2_3b(**changes: Any) -> PretrainedConfig:
    """state-spaces/mamba2-2.7b's shape, with 16 of 64 layers."""
    shape: dict[str, Any] = {
        "vocab_size": 50288,
        "hidden_size": 2560,
        "num_hidden_layers": 16,
        "num_heads": 80,
        "n_groups": 1,
        "tie_word_embeddings": True,
    }
    return Mamba2Config(architectures=["Mamba2ForCausalLM"], **{**shape, **changes})


MODELS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any]]] = {
    "Qwen3-Next-80B-A3B, 8 layers": (
        qwen3_next_80b,
        {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4},
    ),
    "Nemotron-H-8B, 10 layers": (nemotron_h_8b, {"mamba_num_heads": 8, "mamba_head_dim": 16}),
    "Falcon-H1-7B, 6 layers": (
        falcon_h1_7b,
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    "LFM2-1.2B": (lfm2_1b, {"num_hidden_layers": 3, "full_attn_idxs": [2]}),
    "Mamba2-2.7B, 16 layers": (mamba2_3b, {"num_heads": 8, "head_dim": 16}),
}
"""With what is small of each."""


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One of ``MODELS``."""
    config, small = MODELS[name]
    longest = argparse.Namespace(**{**vars(args), "context": max(args.context, args.prompt)})
    shape = config(**({**SMALL, **small} if args.smoke else {}))
    # One graph for all steps with prompts: it is full, and to capture the usual ones takes a minute.
    llm, seconds = build_model(shape, longest, device, token_buckets=[args.max_num_tokens])
    model = llm.model
    assert isinstance(model, CachedModel)
    steps = bench(llm, input_len=args.context, output_len=args.new, concurrencies=args.batches)
    prompt = bench(llm, input_len=args.prompt, output_len=1, concurrencies=[1], requests_each=3)
    return {
        "name": name,
        "build_seconds": seconds,
        "state_bytes": sum(state[0].nbytes for state in model.states),
        "rows": [
            {"sequences": row.concurrency, "step_ms": row.step_ms, "floor_ms": row.floor_ms}
            for row in steps.rows
        ],
        "prompt_tokens": args.prompt,
        "prompt_ms": prompt.rows[0].first_token.p50,
        "eager_steps": {**steps.eager_steps, **prompt.eager_steps},
    }


def transformers_prompt_ms(name: str, args: argparse.Namespace, device: torch.device) -> float:
    """A prompt through transformers' model, into its cache; the median of five."""
    config, small = MODELS[name]
    shape = config(**({**SMALL, **small} if args.smoke else {}))
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
        prompt = torch.randint(shape.vocab_size, (1, args.prompt))
    times = []
    with torch.inference_mode():
        for _ in range(7):
            start = time.perf_counter()
            logits = model(prompt, use_cache=True, logits_to_keep=1).logits
            logits[:, -1:].argmax().item()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt that is timed")
    parser.add_argument("--new", type=int, default=48, help="tokens generated for each prompt")
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--transformers", action="store_true", help="time its own models, too")
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    models: list[dict[str, Any]] = []
    results = {
        "machine": machine(device),
        "versions": {name: found for name in (*PACKAGES, *LIBRARIES) if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": copy_bandwidth(device),
        "models": models,
    }
    for name in args.models:
        models.append(measure(name, args, device))
        release(device)
        if args.transformers:
            models[-1]["transformers_prompt_ms"] = transformers_prompt_ms(name, args, device)
            release(device)
        print(json.dumps(models[-1]), flush=True)
        if args.json is not None:  # after each, so that an interrupted run leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def release(device: torch.device) -> None:
    """The memory of models that are no more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
