"""What a user of ``LLM.generate`` waits for, of Llama-3.1-8B's shape on a GPU, in one run.

    python benchmarks/load.py --json benchmarks/results/load.json

Random bfloat16 weights, random prompts, greedy unless said. ``start_seconds``: from nothing to ready, with
what is on disk. ``prompts``: of 1,024 tokens, all at once. ``first_token_ms``: one new token each, the median
of some runs, and beside it the time in which kernels ran. ``decode_ms``: (129 new tokens - 1) / 128, so that
steps that read prompts and decode count. ``step_ms`` and ``floor_ms``: as ``bench`` has them. ``loads``: all
requests at once, at most 128 in a step.

``--smoke`` runs all of it with a small shape on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from ad_flashinfer_pass.deployment.bench import bench, copy_bandwidth, machine
from ad_flashinfer_pass.runtime.cuda_graph import default_batch_sizes
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.decode import llama_8b
from benchmarks.experts import PACKAGES, SMALL, build_model, installed

Lengths = Sequence[tuple[int, int]]
"""Of requests: tokens of the prompt, and new ones."""
_RUNS = {1: 12, 8: 8, 32: 4, 128: 2}


def lengths_of_loads(smoke: bool) -> dict[str, tuple[Lengths, dict[str, float]]]:
    """The loads by name, with their sampling."""
    rng, scale = random.Random(0), 16 if smoke else 1
    mixed = [(rng.randint(64, 1023) // scale, rng.randint(16, 511) // scale) for _ in range(384 // scale)]
    even = [(1024 // scale, 1024 // scale)] * (64 // scale)
    sampled = {"temperature": 0.8, "top_p": 0.95}
    return {"mixed": (mixed, {}), "mixed, sampled": (mixed, sampled), "1k in, 1k out": (even, {})}


def seconds_of(llm: LLM, lengths: Lengths, seed: int, **sampling: float) -> float:
    """All requests at once, through ``generate``."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 250) for _ in range(n)] for n, _ in lengths]
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True, **sampling) for _, n in lengths]  # type: ignore[arg-type]
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start


def device_seconds(llm: LLM, lengths: Lengths, runs: int) -> float | None:
    """The time of a run in which a kernel ran; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for seed in range(runs):
            seconds_of(llm, lengths, seed)
    kernels = [e.time_range for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = end = 0.0
    for span in sorted(kernels, key=lambda span: span.start):
        busy += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return busy / 1e6 / runs


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--smoke", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    scale = 16 if args.smoke else 1
    prompt, new, args.max_num_tokens = 1024 // scale, 129 // scale, 8192 // scale
    args.context, args.new, args.batches = 1024, 1024 + 64, default_batch_sizes(128 // scale)
    device = torch.device("cpu") if args.smoke else torch.device("cuda", 0)
    shape = LlamaConfig(architectures=["LlamaForCausalLM"], **SMALL) if args.smoke else llama_8b(32)
    llm, seconds = build_model(shape, args, device)
    results: dict[str, Any] = {
        "machine": machine(device),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_s": copy_bandwidth(device),
        "start_seconds": seconds,
        "prompts": [],
        "loads": [],
    }

    def show(kind: str, row: dict[str, Any]) -> None:
        results[kind].append(row)
        print(json.dumps(row), flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for batch in dict.fromkeys(max(1, batch // scale) for batch in args.sequences):
        lengths: Lengths = [(prompt, 1)] * batch
        runs = _RUNS.get(batch, 2)
        seconds_of(llm, lengths, 0)
        first = statistics.median(seconds_of(llm, lengths, 1 + run) for run in range(runs))
        busy = device_seconds(llm, lengths, runs)
        whole = min(seconds_of(llm, [(prompt, new)] * batch, run) for run in range(2))
        (row,) = bench(llm, input_len=prompt, output_len=48 // scale, concurrencies=[batch]).rows
        prefill = {"first_token_ms": 1e3 * first, "device_ms": None if busy is None else 1e3 * busy}
        decode = {"decode_ms": 1e3 * (whole - first) / (new - 1), "step_ms": row.step_ms}
        show("prompts", {"sequences": batch, **prefill, **decode, "floor_ms": row.floor_ms})
    for name, (lengths, sampling) in lengths_of_loads(args.smoke).items():
        seconds_of(llm, lengths[:4], 0, **sampling)
        taken = seconds_of(llm, lengths, 0, **sampling)
        tokens = sum(n for _, n in lengths)
        show("loads", {"name": name, "requests": len(lengths), "tokens_per_s": tokens / taken})
    print("eager steps:", llm.engine.metrics.eager_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
