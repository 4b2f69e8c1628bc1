"""Append and attend of one decode step inside a captured graph, beside the raw kernels and the roofline.

    python benchmarks/attention.py --json benchmarks/results/attention.json

A graph holds several layers of 32 query and 8 KV heads of size 128, a bfloat16 query, a cache of bfloat16
or fp8, and pages of 32 tokens in random order. Microseconds a layer of: ``nodes``, our two ops; ``raw``,
the same two kernels called with buffers made beforehand; ``fa2``, FlashInfer's FA2 wrapper, planned for
these lengths, without an append; ``split``, our Triton kernel, without an append; ``sdpa``, torch's
attention on a dense, contiguous bfloat16 cache, without an append; ``copy``, the KV that must be read over
the bandwidth of a large copy (bytes read plus bytes written) in the same run.

Then prompts without a past, causal, in bfloat16, by each kernel that prefills, and by ``sdpa`` over dense K
and V; ``fa3 plan`` and ``fa2 plan`` are what a plan on the host takes in addition, once a step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flashinfer.xqa import xqa as raw_xqa
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention import fa2, fa3, fmha_v2, split_decode, xqa
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.cache import append

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 32
MIN_LAYERS, MAX_LAYERS = 8, 128
DEVICE = torch.device("cuda", 0)
PREFILL = {"fmha_v2": fmha_v2, "fa3": fa3, "fa2": fa2}
KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# The pools of a graph: more than the L2 cache, so that no layer finds its pages there; what fits in memory.
_MIN_BYTES, _MAX_BYTES = 2**29, 2**35
_ROUNDS, _SLOW_ROUNDS, _SLOW_US = 30, 9, 20_000


def kv_bytes(kv: str) -> int:
    """Of one token of a layer."""
    return 2 * KV_HEADS * DIM * KV_DTYPES[kv].itemsize


class Layers:
    """Pools and one decode step of ``batch`` sequences of ``context`` tokens."""

    def __init__(self, batch: int, context: int, kv: str) -> None:
        width = context // PAGE
        pages = batch * width
        num_pools = min(MAX_LAYERS, -(-_MIN_BYTES // (batch * context * kv_bytes(kv))))
        self.num_layers = max(MIN_LAYERS, num_pools)
        shape = (pages + 1, 2, KV_HEADS, PAGE, DIM)
        self.pools = [torch.empty(shape, device=DEVICE, dtype=KV_DTYPES[kv]) for _ in range(num_pools)]
        for pool in self.pools:
            for page in pool.view(torch.uint8).split(2**14):
                page.copy_(
                    torch.randn(page.view(pool.dtype).shape, device=DEVICE).to(pool.dtype).view(torch.uint8)
                )
        self.table = (torch.randperm(pages, device=DEVICE) + 1).to(torch.int32).view(batch, width)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        self.slots = self.table[:, -1].long() * PAGE + PAGE - 1
        self.cu_seqlen = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32)
        self.info = torch.tensor([0, 0, 0, 0, batch, batch, context, width, 2, batch, batch, 1]).int()
        qkv = torch.randn(batch, 1, HEADS + 2 * KV_HEADS, DIM, device=DEVICE).bfloat16()
        query, self.key, self.value = qkv.split((HEADS, KV_HEADS, KV_HEADS), 2)
        self.query = query.contiguous()
        self.out = torch.empty_like(self.query)

    def nodes(self, pool: Tensor) -> None:
        """Our ops."""
        ops.append_kv(self.key, self.value, self.slots, pool)
        metadata = (self.info, self.cu_seqlen, self.lens, self.table)
        ops.cached_attention(self.query, pool, *metadata, DIM**-0.5, DIM, decode_kernel="xqa")

    def raw(self, pool: Tensor) -> None:
        """The kernels alone."""
        append.append(self.key, self.value, self.slots, pool)
        ours = workspaces.get(xqa.Workspace, DEVICE)
        raw_xqa(
            self.query,
            pool[:, 0],
            pool[:, 1],
            self.table,
            self.lens[:, None],
            self.out,
            ours.scratch,
            ours.semaphores,
            KV_HEADS,
            PAGE,
            kv_layout="HND",
            sm_count=ours.num_processors,
            enable_pdl=False,
        )

    def sdpa(self, pool: Tensor) -> None:
        """Dense attention over as many keys, laid out as torch likes them."""
        batch = self.query.shape[0]
        k, v = pool[1:].view(2, batch, KV_HEADS, -1, DIM)
        F.scaled_dot_product_attention(self.query.transpose(1, 2), k, v, enable_gqa=True)

    def split(self, pool: Tensor) -> None:
        """Our Triton kernel, as it is launched without a choice by measurement."""
        args = (self.query[:, 0], pool, self.lens, self.table, AttentionSpec(DIM**-0.5))
        split_decode.decode(*args)

    def fa2(self, pool: Tensor) -> None:
        """FlashInfer's wrapper, by our provider, which plans at the first call."""
        spec = AttentionSpec(DIM**-0.5)
        fa2.decode(self.query[:, 0], pool, self.lens, self.table, spec)

    def captured(self, layer: Callable[[Tensor], None]) -> tuple[torch.cuda.CUDAGraph, workspaces.GraphState]:
        """A graph of that layer, many times, each on the next pool, and what its kernels keep."""

        def run() -> None:
            for index in range(self.num_layers):
                layer(self.pools[index % len(self.pools)])

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        state = workspaces.GraphState()
        with state.begin_capture():
            with torch.cuda.stream(stream):
                run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
        return graph, state


class Prompts:
    """A step of ``batch`` prompts of ``length`` tokens."""

    def __init__(self, batch: int, length: int) -> None:
        width = length // PAGE
        pool = torch.randn(batch * width + 1, 2, KV_HEADS, PAGE, DIM, device=DEVICE).bfloat16()
        self.query = torch.randn(batch, length, HEADS, DIM, device=DEVICE).bfloat16()
        self.table = (torch.randperm(batch * width, device=DEVICE) + 1).to(torch.int32).view(batch, width)
        bounds = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * length
        self.args = (self.query.flatten(0, 1), pool, bounds, bounds[1:] - bounds[:-1])
        self.dense = pool[1:].view(2, batch, KV_HEADS, length, DIM)

    def run(self, name: str) -> None:
        """One launch."""
        if name == "sdpa":
            k, v = self.dense
            F.scaled_dot_product_attention(self.query.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
        else:
            spec = AttentionSpec(DIM**-0.5)
            PREFILL[name].prefill(*self.args, self.table, spec)

    def captured(self, name: str) -> Callable[[], None]:
        """A replay of some launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(name)  # plans
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(MIN_LAYERS):
                self.run(name)
        return graph.replay

    def with_plan(self, name: str) -> float:
        """Microseconds of the call that plans and of its launch, the median of some."""
        times = []
        for _ in range(_SLOW_ROUNDS):
            self.table = self.table.clone()  # the table of another step
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.run(name)
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)


def measure_prefill(batch: int, length: int) -> dict[str, Any]:
    """One row of the second table."""
    prompts = Prompts(batch, length)
    names = [*PREFILL, "sdpa"]
    times = microseconds([prompts.captured(name) for name in names], _SLOW_ROUNDS)
    row = {name: t / MIN_LAYERS for name, t in zip(names, times, strict=True)}
    plans = {f"{name} plan": prompts.with_plan(name) - row[name] for name in ("fa3", "fa2")}
    return {"batch": batch, "length": length, **row, **plans}


def microseconds(runs: Sequence[Callable[[], object]], rounds: int = _ROUNDS) -> list[float]:
    """Median time of each, run in turn, each round in a random order; the first rounds are not counted."""
    times: list[list[float]] = [[] for _ in runs]
    rng = random.Random(0)
    for _ in range(rounds):
        # What ran before leaves its caches and power draw: in a fixed order one kernel always pays for it.
        for index in rng.sample(range(len(runs)), len(runs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            runs[index]()
            end.record()
            end.synchronize()
            times[index].append(start.elapsed_time(end) * 1e3)
    return [statistics.median(its_times[rounds // 6 :]) for its_times in times]


def copy_bandwidth() -> float:
    """Bytes read plus bytes written in a microsecond by a large copy."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    (duration,) = microseconds([lambda: target.copy_(source)])
    return 2 * source.nbytes / duration


def measure(batch: int, context: int, kv: str, bandwidth: float) -> dict[str, Any]:
    """One row of the results."""
    layers = Layers(batch, context, kv)
    columns = ("nodes", "raw", "split", "fa2", "sdpa")
    names = columns if kv == "bf16" else columns[:-1]
    graphs = [layers.captured(getattr(layers, name)) for name in names]
    copy = batch * context * kv_bytes(kv) / bandwidth
    rounds = _SLOW_ROUNDS if copy * layers.num_layers > _SLOW_US else _ROUNDS
    durations = microseconds([graph.replay for graph, _ in graphs], rounds)
    row = {name: duration / layers.num_layers for name, duration in zip(names, durations, strict=True)}
    given = {"kv": kv, "batch": batch, "context": context}
    times = {name: row.get(name) for name in columns}
    return {**given, **times, "copy": copy, "nodes/raw": row["nodes"] / row["raw"]}


def main() -> int:
    """Parse arguments, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384, 131072])
    parser.add_argument("--kv", nargs="+", choices=list(KV_DTYPES), default=list(KV_DTYPES))
    prompts = ["1x1024", "1x4096", "1x16384", "8x1024", "16x2048"]
    parser.add_argument("--prompts", nargs="*", default=prompts, metavar="BATCHxLENGTH")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    grid = [(b, c, kv) for kv in args.kv for b in args.batch for c in args.context]
    rows: list[dict[str, Any]] = []
    prefill_rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(DEVICE),
        "versions": {name: version(name) for name in ("torch", "triton", "flashinfer-python")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "copy_bytes_per_microsecond": bandwidth,
        "microseconds": rows,
        "prefill_microseconds": prefill_rows,
    }

    def note(row: dict[str, Any]) -> None:
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), sep=", ")
        if args.json is not None:  # after each row, so that an interrupted run leaves what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    for batch, context, kv in grid:
        if batch * context * kv_bytes(kv) > _MAX_BYTES:
            continue
        rows.append(measure(batch, context, kv, bandwidth))
        note(rows[-1])
    for case in args.prompts:
        prefill_rows.append(measure_prefill(*map(int, case.split("x"))))
        note(prefill_rows[-1])
    print(f"copy: {bandwidth / 1e6:.2f} TB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
