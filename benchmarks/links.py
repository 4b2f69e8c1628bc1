"""What lies between the GPUs of this machine: bandwidth, and the time of a sum over all of them by size.

Needs torch alone. Each way to sum is captured in a CUDA graph of many, as a model's step is; a time is that
of the slowest rank. ``--smoke`` runs it over gloo on a CPU, without graphs and symmetric memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# NVLink multicast stays off: it is not used here, and not every driver has it.
MULTICAST_OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
os.environ.update(MULTICAST_OFF)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from torch import Tensor  # noqa: E402

SIZES = [8 << 10 << shift for shift in range(14)]  # 8 KiB to 64 MiB
SMOKE_SIZES = [8 << 10, 64 << 10]
LARGEST_OF_SYMMETRIC_MEMORY = 16 << 20
LAUNCHES, REPEATS = 20, 5


def main() -> None:
    """Start a process for each GPU and print, or write, what the first found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    mp.spawn(run, (args.ranks, args.smoke, args.output), nprocs=args.ranks)


def run(rank: int, size: int, smoke: bool, output: Path | None) -> None:
    """One rank."""
    device = torch.device("cpu" if smoke else f"cuda:{rank}")
    if smoke:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if smoke else "cpu:gloo,cuda:nccl", rank=rank, world_size=size)
    found: dict[str, Any] = {**machine(device, size), "copies": copies(rank, device), "sums": []}
    for num_bytes in SMOKE_SIZES if smoke else SIZES:
        found["sums"].append(sums(num_bytes, rank, size, device))
        if rank == 0:
            print(json.dumps(found["sums"][-1]), flush=True)
    if rank == 0:
        text = json.dumps(found, indent=1) + "\n"
        print(text)
        if output is not None:
            output.write_text(text)
    dist.destroy_process_group()


def machine(device: torch.device, size: int) -> dict[str, Any]:
    """Where this ran, and what links the GPUs."""
    found: dict[str, Any] = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": size,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["peer_access"] = [
            [i == j or torch.cuda.can_device_access_peer(i, j) for j in range(size)] for i in range(size)
        ]
        for name, command in (("topology", "topo -m"), ("nvlink", "nvlink --status -i 0")):
            try:
                told = subprocess.run(
                    ["nvidia-smi", *command.split()], capture_output=True, text=True, timeout=20
                )
                found[name] = told.stdout.splitlines()[:24]
            except (OSError, subprocess.TimeoutExpired) as err:
                found[name] = [f"{type(err).__name__}: {err}"]
    return found


def copies(rank: int, device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy of 256 MiB from the first GPU to the second, by the first alone."""
    found: dict[str, float] = {}
    if device.type == "cuda" and rank == 0 and torch.cuda.device_count() > 1:
        source = torch.empty(256 << 20, dtype=torch.uint8, device=device)
        for name, there in (("peer", torch.device("cuda:1")), ("own", device)):
            target = torch.empty_like(source, device=there)
            target.copy_(source)
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(10):
                target.copy_(source)
            end.record()
            end.synchronize()
            found[f"{name}_gb_per_s"] = round(10 * source.nbytes / start.elapsed_time(end) / 1e6, 1)
    dist.barrier()
    return found


def sums(num_bytes: int, rank: int, size: int, device: torch.device) -> dict[str, Any]:
    """Microseconds of a sum of that many bytes of bfloat16, by each way."""
    x = torch.randn(num_bytes // 2, generator=torch.Generator().manual_seed(rank)).bfloat16().to(device)
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x)
    wanted = torch.stack([part.float() for part in parts]).sum(0)
    row: dict[str, Any] = {"bytes": num_bytes}
    for name, way in ways(x, device).items():
        try:
            out = way().clone()
            dist.all_gather(parts, out)
            error = float((out.float() - wanted).abs().max())
            alike = all(torch.equal(part, out) for part in parts)
            row[name] = {
                "us": round(slowest(timed(way, device), device), 2),
                "alike": alike,
                "error": round(error, 4),
            }
        except RuntimeError as err:
            row[name] = f"{type(err).__name__}: {str(err).splitlines()[0][:200]}"
    return row


def ways(x: Tensor, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """How the sum can be made."""
    total = torch.empty_like(x)

    def by_library() -> Tensor:
        total.copy_(x)
        dist.all_reduce(total)
        return total

    if device.type == "cpu":
        return {"gloo": by_library}
    found: dict[str, Callable[[], Tensor]] = {"nccl": by_library}
    if x.nbytes > LARGEST_OF_SYMMETRIC_MEMORY:
        return found
    import torch.distributed._symmetric_memory as symmetric_memory

    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name
    buffer = symmetric_memory.empty(x.numel(), dtype=x.dtype, device=device)
    symmetric_memory.rendezvous(buffer, group)
    out = torch.empty_like(x)

    def one_shot() -> Tensor:
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(buffer, x, "sum", group, out)
        return out

    def two_shot() -> Tensor:
        buffer.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", group, out)
        return out

    return {**found, "one_shot": one_shot, "two_shot": two_shot}


def timed(way: Callable[[], Tensor], device: torch.device) -> float:
    """Microseconds of one, of many in a graph; the best of some replays."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            way()
        return 1e6 * (time.perf_counter() - began) / LAUNCHES
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        way()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(LAUNCHES):
            way()
    best = float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        dist.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # both ranks are in step after it
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, 1e3 * start.elapsed_time(end) / LAUNCHES)
    return best


def slowest(microseconds: float, device: torch.device) -> float:
    """The largest of what the ranks measured."""
    found = torch.tensor([microseconds], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


if __name__ == "__main__":
    main()
