"""Decode step and prefill of the Llama-3.1-8B shape on a GPU, beside the floor, and transformers beside it.

    python benchmarks/decode.py --transformers --json benchmarks/results/decode.json

Random bfloat16 weights, prompts of 1024 random tokens. ``step``: median time between two tokens of a request,
all that the engine does included; ``floor``: the weights, and K and V of every token, over the bandwidth
of a large copy of the same run. ``prefill``: 32 prompts read, one token of each made. ``where_us``: kernel
time of one step by what it is for; ``between`` is what of the device's step is no kernel. transformers runs
the same shape with a static cache and torch.compile(mode="reduce-overhead").
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from ad_flashinfer_pass import build
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, TransformConfig
from ad_flashinfer_pass.deployment.bench import as_tables, bench
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceStep

DEVICE = torch.device("cuda", 0)
# The first that a kernel's name contains says what the kernel is for.
PURPOSES = {
    "attention": ("kernel_mha", "split_decode", "_decode", "fmha", "BatchDecode", "PrefillWith", "flash"),
    "linears": ("_gemv", "_skinny", "nvjet", "cutlass", "gemm", "splitK"),
    "RoPE and append": ("_rope_append", "_append"),
    "metadata": ("_prepare",),
    "sampling": ("_look", "_count", "_weigh", "_choose", "_sample"),
    "norms and the rest": ("",),
}


def llama_8b(layers: int) -> LlamaConfig:
    """meta-llama/Llama-3.1-8B's shape."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        eos_token_id=128001,
    )


def build_ours(args: argparse.Namespace) -> tuple[LLM, float]:
    """The model, and the seconds that it took to build."""
    with tempfile.TemporaryDirectory() as directory:
        llama_8b(args.layers).save_pretrained(directory)
        config = AutoDeployConfig(
            model=directory,
            skip_loading_weights=True,
            generation_config="none",
            dtype="bfloat16",
            device="cuda",
            compile_backend=args.compile_backend,
            max_batch_size=max(args.batches),
            max_seq_len=args.context + args.new,
            max_num_tokens=args.max_num_tokens,
            cuda_graph_batch_sizes=args.batches,
            kv_cache_config=KvCacheConfig(dtype=args.kv_dtype),
            transforms={name: TransformConfig(enabled=False) for name in args.without},
        )
        start = time.perf_counter()
        llm = build.build_model(config, on_event=lambda name: print(f"  {name}", file=sys.stderr, flush=True))
        return llm, time.perf_counter() - start


def time_by_purpose(step: Callable[[], object], rounds: int) -> dict[str, float]:
    """Microseconds of the kernels of a step.

    Kernels overlap: each counts from the end of those before it, or from its own start if that is later.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    found, reached = dict.fromkeys(PURPOSES, 0.0), 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        purpose = next(p for p, words in PURPOSES.items() if any(word in event.name for word in words))
        found[purpose] += max(0.0, event.time_range.end - max(reached, event.time_range.start)) / rounds
        reached = max(reached, event.time_range.end)
    return {purpose: time for purpose, time in found.items() if time}


def where_the_time_goes(model: CachedModel, batch: int, context: int) -> dict[str, float]:
    """Microseconds of one greedy decode step by purpose."""
    rounds, warm_ups = 5, 25
    page_size = model.sequence_info.tokens_per_block
    pages = (context + rounds + warm_ups) // page_size + 1
    tables = [list(range(1 + i * pages, 1 + (i + 1) * pages)) for i in range(batch)]
    model.nest(
        [SequenceStep([5], context, table, slot=1 + i) for i, table in enumerate(tables)],
        [RowParams()] * batch,
    )

    def step() -> None:
        model.forward()
        model.sample_and_advance(is_greedy=True)

    times = []
    for _ in range(warm_ups):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    found = time_by_purpose(step, rounds)
    whole = statistics.median(times[5:])
    return {
        "step": whole,
        **found,
        "between": whole - sum(found.values()),
    }


def prefill_steps(model: CachedModel, context: int, num_steps: int = 8) -> dict[str, Any]:
    """Steps of as many prompts as one step holds, one enqueued behind the other: times, and where they go."""
    page_size, num_prompts = (
        model.sequence_info.tokens_per_block,
        model.sequence_info.max_num_tokens // context,
    )
    num_prompts = min(num_prompts, model.sequence_info.max_batch_size)
    pages = -(-context // page_size)
    ids = torch.randint(1000, (context,)).tolist()
    model.nest(
        [
            SequenceStep(ids, 0, list(range(1 + i * pages, 1 + (i + 1) * pages)), slot=1 + i)
            for i in range(num_prompts)
        ]
    )
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    for mark in marks:
        mark.record()
        model.forward()
    torch.cuda.synchronize()
    return {
        "prompts": num_prompts,
        "ms": [before.elapsed_time(after) for before, after in pairwise(marks)],
        "where_us": time_by_purpose(model.forward, 3),
    }


def transformers_step_ms(layers: int, batch: int, context: int) -> float:
    """Median decode step of transformers with a static cache and torch.compile(mode="reduce-overhead")."""
    config = llama_8b(layers)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = StaticCache(config=config, max_cache_len=context + 64)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.inference_mode():
        token = torch.randint(1000, (batch, 1), device=DEVICE)
        model(
            torch.randint(1000, (batch, context), device=DEVICE),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for index in range(40):
            torch.cuda.synchronize()
            start = time.perf_counter()
            position = torch.tensor([[context + index]], device=DEVICE)
            logits = compiled(token, position_ids=position, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1).clone()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Steps, prefill and where the time goes."""
    llm, seconds = build_ours(args)
    steps = bench(llm, input_len=args.context, output_len=args.new, concurrencies=args.batches)
    Console(width=150).print(*as_tables(steps))
    most = min(32, max(args.batches))
    prefill = bench(llm, input_len=args.context, output_len=1, concurrencies=[most]).rows[0]
    print(f"prefill of {most} prompts: {prefill.prompt_tokens_per_s:,.0f} tokens/s", flush=True)
    assert isinstance(llm.model, CachedModel)
    prompts = prefill_steps(llm.model, args.context)
    print("prefill steps: " + ", ".join(f"{ms:.1f}" for ms in prompts["ms"]) + " ms", flush=True)
    print("prefill: " + ", ".join(f"{name} {us:.0f} us" for name, us in prompts["where_us"].items()))
    where = {
        batch: where_the_time_goes(llm.model, batch, args.context + args.new // 2) for batch in args.profile
    }
    for batch, parts in where.items():
        print(f"B{batch}: " + ", ".join(f"{name} {us:.0f} us" for name, us in parts.items()), flush=True)
    notes = [note for report in llm.reports for note in report.notes]
    return {
        **asdict(steps),
        "prefill": asdict(prefill),
        "prefill_steps": prompts,
        "where_us": where,
        "build_seconds": seconds,
        "notes": [note for note in notes if "capture" in note or "small_gemm" in note or "decode" in note],
    }


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-dtype", default="auto", help="auto or fp8")
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--without", nargs="*", default=[], help="transforms to switch off")
    parser.add_argument("--profile", type=int, nargs="*", default=[1, 8, 32, 128])
    parser.add_argument(
        "--transformers", type=int, nargs="*", default=None, help="at these batches; 1 and 32"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = measure_ours(args)
    results["versions"].update({name: version(name) for name in ("triton", "flashinfer-python")})
    results["kv_dtype"], results["without"] = args.kv_dtype, args.without
    results["command"] = " ".join(["python", *sys.argv])
    _write(args.json, results)
    if args.transformers is not None:
        results["transformers_step_ms"] = {}
        for batch in args.transformers or [1, 32]:
            gc.collect()
            torch.cuda.empty_cache()
            step = transformers_step_ms(args.layers, batch, args.context)
            results["transformers_step_ms"][batch] = step
            print(f"transformers, B{batch}: {step:.2f} ms", flush=True)
            _write(args.json, results)
    return 0


def _write(file: Path | None, results: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
