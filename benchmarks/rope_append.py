"""Rotation and append in one kernel, beside the append alone and beside a rotation in torch before it.

    python benchmarks/rope_append.py --json benchmarks/results/rope_append.json

32 query and 8 KV heads of size 128 in bfloat16, views of one projection; K and V go to random slots of one
layer of an 8-layer pool with pages of 32 tokens. Microseconds a call, inside a captured graph of 20.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.cache import append, rope_append

HEADS, KV_HEADS, DIM, PAGE, LAYERS, CALLS = 32, 8, 128, 32, 8, 20
DEVICE = torch.device("cuda", 0)


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, the least of five runs of ten replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / (10 * CALLS))
    return best


def measure(tokens: int) -> dict[str, float]:
    """One row of the results."""
    qkv = torch.randn(1, tokens, HEADS + 2 * KV_HEADS, DIM, device=DEVICE).bfloat16()
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 2)
    pages = tokens // PAGE + 64
    pool = torch.zeros(pages, LAYERS, 2, KV_HEADS, PAGE, DIM, device=DEVICE, dtype=torch.bfloat16)
    cache = pool[:, LAYERS // 2]
    slots = torch.randperm(pages * PAGE, device=DEVICE)[:tokens]
    inverse = 10000.0 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM)
    angles = torch.arange(4096, device=DEVICE)[:, None] * inverse
    cos, sin, positions = angles.cos(), angles.sin(), torch.arange(tokens, device=DEVICE)
    full = torch.cat((angles, angles), -1)
    cos16, sin16 = full.cos().bfloat16(), full.sin().bfloat16()

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), -1)
        return x * cos16[positions][None, :, None] + half * sin16[positions][None, :, None]

    def in_torch() -> None:
        rotated(q)
        append.append(rotated(k), v, slots, cache)

    return {
        "tokens": tokens,
        "rope_append": microseconds(
            lambda: rope_append.rope_append(q, k, v, cache, slots, cos, sin, positions)
        ),
        "append": microseconds(lambda: append.append(k, v, slots, cache)),
        "rope in torch, append": microseconds(in_torch),
    }


def main() -> None:
    """Print the rows, and write them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for tokens in (1, 8, 32, 128, 1024):
        rows.append(measure(tokens))
        print(", ".join(f"{name} {value:.5g}" for name, value in rows[-1].items()), flush=True)
    results = {
        "machine": torch.cuda.get_device_name(DEVICE),
        "versions": {name: version(name) for name in ("torch", "triton")},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "microseconds": rows,
    }
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
