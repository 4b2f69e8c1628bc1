"""Models of one, two or more GPUs: a decode step and prefill, beside the floor of a GPU's memory.

    python benchmarks/parallel.py --shape 8b --ranks 2 --json benchmarks/results/parallel_8b_2.json

Random weights, prompts of 1,024 random tokens, through the engine as ``bench`` does it. ``floor_ms`` is that
of one GPU: what it holds of the weights, and of K and V, over the bandwidth of a copy of the same run.
``where_us``: kernel time of a step on the first rank by what it is for; ``sums`` has the waiting for the
others in it. ``plans``: by what sums of so many rows run, with the times measured at the build.

``--smoke`` runs all of it with a small shape on the CPU, over gloo, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.deployment.bench import as_tables, bench
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceStep

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks import decode
from benchmarks.experts import PACKAGES, SMALL, installed
from benchmarks.quantized import BLOCKS


def llama_70b(layers: int) -> LlamaConfig:
    """meta-llama/Llama-3.1-70B's shape."""
    config = decode.llama_8b(layers)
    config.update({"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64})
    return config


SHAPES = {"8b": (decode.llama_8b, 32), "70b": (llama_70b, 80)}
SUMS = {"sums": ("all_reduce", "ncclDevKernel", "AllReduce", "Broadcast", "AllGather"), **decode.PURPOSES}


def build(args: argparse.Namespace, folder: str) -> LLM:
    """The model, its weights drawn part by part."""
    shape, layers = SHAPES[args.shape]
    config = LlamaConfig(**SMALL) if args.smoke else shape(args.layers or layers)
    config.save_pretrained(folder)
    if args.float8:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": BLOCKS}))
    deploy = AutoDeployConfig(
        model=folder,
        skip_loading_weights=True,
        generation_config="none",
        dtype="float32" if args.smoke else "bfloat16",
        device="cpu" if args.smoke else "cuda",
        world_size=args.ranks,
        compile_backend="torch-simple" if args.smoke else args.compile_backend,
        max_batch_size=max(args.batches),
        max_seq_len=args.context + args.new,
        max_num_tokens=args.max_num_tokens,
        cuda_graph_batch_sizes=args.batches,
        cuda_graph_token_buckets=args.token_buckets,
    )
    say = lambda name: print(f"  {time.perf_counter() - START:.0f} s {name}", file=sys.stderr, flush=True)  # noqa: E731
    if args.ranks > 1:
        return build_model(deploy, on_event=say)
    # As of several ranks: one weight after the other is drawn, so that 70B fit.
    loaded = load_model(deploy.model_copy(update={"world_size": 2}))
    whole = loaded.resolved.model_copy(update={"world_size": 1})
    model, reports = transform_module(loaded.module, whole, on_event=say, stored=loaded.stored)
    return LLM(model, loaded.tokenizer, (), reports, steps_ahead=whole.steps_ahead)


def where_the_time_goes(model: CachedModel, batch: int, context: int) -> dict[str, float]:
    """Microseconds of a greedy decode step, and of its kernels by purpose, on the first rank."""
    pages = (context + 40) // model.sequence_info.tokens_per_block + 1
    tables = [list(range(1 + i * pages, 1 + (i + 1) * pages)) for i in range(batch)]
    model.nest(
        [SequenceStep([5], context, table, slot=1 + i) for i, table in enumerate(tables)],
        [RowParams()] * batch,
    )

    def step() -> None:
        with model.leading(batch, is_greedy=True):
            model.forward()
            model.sample_and_advance(is_greedy=True)

    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    whole = statistics.median(times[5:])
    found = decode.time_by_purpose(step, 5)
    return {"step": whole, **found, "between": whole - sum(found.values())}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Steps, prefill, and where the time goes."""
    with tempfile.TemporaryDirectory() as folder:
        llm = build(args, folder)
    built = time.perf_counter() - START
    print(f"built in {built:.0f} s", flush=True)
    model = llm.model
    assert isinstance(model, CachedModel)
    steps = bench(llm, input_len=args.context, output_len=args.new, concurrencies=args.batches)
    Console(width=150).print(*as_tables(steps))
    most = min(32, max(args.batches))
    prefill = bench(llm, input_len=args.context, output_len=1, concurrencies=[most]).rows[0]
    print(f"prefill of {most} prompts: {prefill.prompt_tokens_per_s:,.0f} tokens/s", flush=True)
    where = {}
    if not args.smoke:
        decode.PURPOSES = SUMS
        context = args.context + args.new // 4
        where = {batch: where_the_time_goes(model, batch, context) for batch in args.batches}
        for batch, parts in where.items():
            print(f"B{batch}: " + ", ".join(f"{name} {us:.0f} us" for name, us in parts.items()), flush=True)
    notes = {report.name: report.notes for report in llm.reports}
    return {
        "shape": args.shape,
        "ranks": args.ranks,
        "float8": args.float8,
        **asdict(steps),
        "prefill": asdict(prefill),
        "where_us": where,
        "build_seconds": built,
        "plans": notes["tune_all_reduce"],
        "shard": notes["shard"],
        "packages": {name: installed(name) for name in PACKAGES},
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--float8", action="store_true", help="weights in float8 by blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--compile-backend", default="torch-opt")
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--token-buckets", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--smoke", action="store_true", help="a small shape on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.batches, args.context, args.new = [1, 2], 32, 8
        args.max_num_tokens, args.token_buckets = 64, None
    results = measure(args)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    gc.collect()
    return 0


START = time.perf_counter()

if __name__ == "__main__":
    sys.exit(main())
