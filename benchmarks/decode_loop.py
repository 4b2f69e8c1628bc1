"""What stands between two decode steps: gaps between graph launches, host waits, metadata and sampling.

    python benchmarks/decode_loop.py --json benchmarks/results/decode_loop.json

The model has the shape of Llama 3.1 8B and random weights. For each batch size the engine decodes, first
timed with and without steps ahead, then under torch.profiler. From its trace:

- a *gap* is the time in which nothing runs on the device between the kernels of one CUDA graph launch and
  those of the next;
- a *wait* is a call of the CUDA runtime in which the host waits for the device; one for each step, the one
  that reads the tokens of an earlier step, is what the loop needs;
- *metadata and sampling* is the time of the kernels that are not the model's: of copies, of
  ``prepare_metadata``, and of the graph that chooses tokens and advances.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams

_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "dtype": "bfloat16",
}
_CONTEXT = 1024
_NUM_PROFILED = 20
_WAITS = (
    "cudaEventSynchronize",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaMemcpy",
)
_SMALL_GRAPH = 64
"""Kernels of a graph that chooses tokens and advances, at most; one of the model has hundreds."""


def build(args: argparse.Namespace) -> CachedModel:
    """The transformed model, with its graphs captured."""
    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(**{**_LLAMA_8B, "num_hidden_layers": args.layers}).save_pretrained(directory)
        config = AutoDeployConfig(
            model=directory,
            skip_loading_weights=True,
            device="cuda",
            compile_backend=args.backend,
            max_batch_size=max(args.batch),
            max_seq_len=2048,
            max_num_tokens=2048,
            cuda_graph_batch_sizes=args.graphs,
        )
        module = load_model(config).module
    return transform_module(module, config, on_event=lambda text: print(text, file=sys.stderr))[0]


class Decoding:
    """Requests that have their prompts behind them and decode, all in one batch."""

    def __init__(self, model: CachedModel, batch: int, steps_ahead: int, params: SamplingParams) -> None:
        self.engine = Engine(model, steps_ahead=steps_ahead)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(model.vocab_size, (batch, _CONTEXT), generator=generator).tolist()
        self.requests = [self.engine.add_request(prompt, params) for prompt in prompts]

    def __enter__(self) -> Engine:
        while self.engine.metrics.num_generated_tokens < len(self.requests) * 8:
            self.engine.step()
        return self.engine

    def __exit__(self, *_: object) -> None:
        for request_id in self.requests:
            self.engine.cancel(request_id)
        while self.engine.has_work:
            self.engine.step()
        torch.cuda.synchronize()


def timed(engine: Engine, num_steps: int) -> float:
    """Milliseconds a step, from the tokens of one step to those of the last one."""
    engine.step()
    start = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    milliseconds = (time.perf_counter() - start) / num_steps * 1e3
    torch.cuda.synchronize()
    return milliseconds


def traced(engine: Engine, num_steps: int, path: Path | None) -> list[dict[str, Any]]:
    """The events of a profiler trace of some steps; the trace is kept at ``path``."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json" if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        prof.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def analysed(events: list[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Gaps, waits, and shares of a trace; times in microseconds."""
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device.sort(key=lambda e: float(e["ts"]))
    runtime = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    launched = {e["args"]["correlation"] for e in runtime if "GraphLaunch" in e["name"]}
    graphs: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in device:
        if event["args"].get("correlation") in launched:
            graphs[event["args"]["correlation"]].append(event)
    launches = sorted(graphs.values(), key=lambda kernels: float(kernels[0]["ts"]))
    model = [kernels for kernels in launches if len(kernels) > _SMALL_GRAPH]
    if len(model) < 2:
        found = Counter((e.get("cat"), e["name"][:40]) for e in events).most_common(20)
        raise RuntimeError(f"no graph of the model was launched twice; the trace has {found}")
    gaps = [_idle(device, _end(before), float(after[0]["ts"])) for before, after in pairwise(launches)]
    periods = [float(after[0]["ts"]) - float(before[0]["ts"]) for before, after in pairwise(model)]
    in_model = {id(kernel) for kernels in model for kernel in kernels}
    is_models = [e for e in device if id(e) in in_model and not e["name"].startswith("_prepare")]
    first, last = float(model[0][0]["ts"]), _end(model[-1])
    # Kernels overlap, so it is the time in which something runs, less that in which the model's kernels do.
    outside = _busy(device, first, last) - _busy(is_models, first, last)
    waits = Counter(e["name"] for e in runtime if e["name"] in _WAITS)
    host = [float(e["dur"]) for e in runtime if "GraphLaunch" in e["name"]]
    step = statistics.median(periods)
    return {
        "num_steps": len(model),
        "kernels_of_a_step": len(model[0]),
        "step_us": step,
        "gap_us": {"median": statistics.median(gaps), "max": max(gaps)},
        "idle_share": 1 - _busy(device, first, last) / (last - first),
        "metadata_and_sampling_us": outside / len(model),
        "metadata_and_sampling_share": outside / len(model) / step,
        "graph_launches_a_step": len(launches) / len(model),
        "graph_launch_host_us": statistics.median(host),
        "waits_a_step": {name: count / num_steps for name, count in waits.items()},
    }


def _end(kernels: list[dict[str, Any]]) -> float:
    return max(float(kernel["ts"]) + float(kernel["dur"]) for kernel in kernels)


def _busy(device: list[dict[str, Any]], start: float, end: float) -> float:
    """Time within [start, end] in which something ran on the device; events are sorted by start."""
    busy, reached = 0.0, start
    for event in device:
        begin, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if stop > reached and begin < end:
            busy += min(stop, end) - max(begin, reached)
            reached = min(stop, end)
    return busy


def _idle(device: list[dict[str, Any]], start: float, end: float) -> float:
    return max(end - start, 0.0) - (_busy(device, start, end) if end > start else 0.0)


GREEDY = SamplingParams(max_new_tokens=900, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=900, ignore_eos=True, temperature=0.8, top_p=0.95, top_k=50, seed=0)
KINDS = {"greedy": GREEDY, "sampled": SAMPLED}


def times(model: CachedModel, batch: int, num_steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind of request and steps ahead."""
    row: dict[str, Any] = {"batch": batch}
    for name, params in KINDS.items():
        for ahead in (0, 1, 2):
            with Decoding(model, batch, ahead, params) as engine:
                row[f"{name}_{ahead}_ahead_ms"] = timed(engine, num_steps)
    return row


def traces(model: CachedModel, batch: int, directory: Path | None) -> dict[str, Any]:
    """What the profiler tells of steps with one step ahead, by kind of request."""
    row: dict[str, Any] = {}
    for name, params in KINDS.items():
        with Decoding(model, batch, 1, params) as engine:
            path = None if directory is None else directory / f"decode_loop_{name}_{batch}.json"
            row[f"trace_{name}"] = analysed(traced(engine, _NUM_PROFILED, path), _NUM_PROFILED)
    return row


def main() -> None:
    """Build, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--layers", type=int, default=_LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--graphs", type=int, nargs="+", default=None, help="cuda_graph_batch_sizes")
    parser.add_argument("--backend", default="torch-cudagraph")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--traces", type=Path, help="keep the profiler's traces in this folder")
    args = parser.parse_args()
    start = time.perf_counter()
    model = build(args)
    build_seconds = time.perf_counter() - start
    rows = []
    for batch in args.batch:
        rows.append({**times(model, batch, args.steps), **traces(model, batch, args.traces)})
        print(json.dumps(rows[-1], indent=1), flush=True)
    assert isinstance(model.module, CudaGraphModule)
    costs = [
        {"bucket": str(cost.bucket), "seconds": round(cost.seconds, 4), "bytes": cost.bytes}
        for cost in model.module.costs
    ]
    show(rows)
    found = {
        "command": " ".join(["python", "benchmarks/decode_loop.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "backend": args.backend,
        "layers": args.layers,
        "build_seconds": round(build_seconds, 1),
        "capture_seconds": round(sum(cost.seconds for cost in model.module.costs), 2),
        "capture_bytes": sum(cost.bytes for cost in model.module.costs),
        "captures": costs,
        "eager_steps": model.eager_steps,
        "rows": rows,
    }
    summary = {name: value for name, value in found.items() if name not in ("rows", "captures")}
    print(json.dumps(summary, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    """A table on stdout."""
    table = Table(
        "batch",
        "tokens",
        "0 / 1 / 2 ahead, ms",
        "gap median / max, us",
        "metadata + sampling",
        "waits a step",
    )
    for row in rows:
        for name in ("greedy", "sampled"):
            trace = row[f"trace_{name}"]
            times = " / ".join(f"{row[f'{name}_{ahead}_ahead_ms']:.2f}" for ahead in (0, 1, 2))
            gap = trace["gap_us"]
            table.add_row(
                str(row["batch"]),
                name,
                times,
                f"{gap['median']:.1f} / {gap['max']:.1f}",
                f"{trace['metadata_and_sampling_us']:.0f} us, {trace['metadata_and_sampling_share']:.1%}",
                ", ".join(f"{wait} {count:.2f}" for wait, count in trace["waits_a_step"].items()),
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
