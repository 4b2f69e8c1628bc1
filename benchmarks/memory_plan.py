"""The memory plan of a model beside what a GPU has in use at each phase of building it.

    python benchmarks/memory_plan.py --json benchmarks/results/memory_plan.json

The model has the shape of Llama 3.1 8B and random weights. Bytes are those that the driver reports as used by
all that this process does: less the context, they are what ``plan`` must account for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from ad_flashinfer_pass import pipeline
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.inspection.plan import MemoryPlan, plan
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule

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


_START = time.perf_counter()


def say(text: str) -> None:
    """What is being done, on stderr."""
    print(f"{time.perf_counter() - _START:5.1f} s  {text}", file=sys.stderr, flush=True)


def used() -> int:
    """Bytes in use on the device."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


class Phases(dict[str, int]):
    """Bytes in use after each phase, by its name, and those that torch's tensors had of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, int] = {}

    def __setitem__(self, name: str, size: int) -> None:
        super().__setitem__(name, size)
        self.tensors[name] = torch.cuda.memory_allocated()


def measure(config: AutoDeployConfig) -> tuple[Phases, list[tuple[str, int]]]:
    """Bytes in use after each phase, and what each captured graph took."""
    torch.zeros(1, device="cuda")
    phases = Phases()
    phases["context"] = used()
    say("weights")
    loaded = load_model(config)
    phases["weights"] = used()
    ctx, transforms = pipeline.context(config, say), pipeline.Pipeline.of(config)
    phases["metadata"] = used()
    gm, _ = transforms.without("compile_model").run(loaded.module, ctx)
    phases["pools"] = used()
    compiled, _ = transforms.since("compile_model").run(gm, ctx)
    phases["graphs"] = used()
    assert isinstance(compiled, CudaGraphModule)
    return phases, [(str(cost.bucket), cost.bytes) for cost in compiled.costs]


def main() -> None:
    """Plan, build, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--layers", type=int, default=_LLAMA_8B["num_hidden_layers"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(**{**_LLAMA_8B, "num_hidden_layers": args.layers}).save_pretrained(directory)
        config = AutoDeployConfig(
            model=directory,
            skip_loading_weights=True,
            device="cuda",
            compile_backend="torch-cudagraph",
            max_batch_size=64,
            max_seq_len=4096,
            max_num_tokens=2048,
        )
        major, minor = torch.cuda.get_device_capability()
        planned = plan(config, memory=torch.cuda.mem_get_info()[1], sm=10 * major + minor, on_event=say)
        phases, graphs = measure(config)
    show(planned, phases, graphs)
    if args.json is not None:
        args.json.write_text(json.dumps(record(planned, phases, graphs), indent=1) + "\n")


def show(planned: MemoryPlan, phases: Phases, graphs: list[tuple[str, int]]) -> None:
    """Tables on stdout."""
    console = Console(width=160)
    rows = Table("planned", "bytes", "how")
    for row in planned.rows:
        rows.add_row(row.name, f"{row.bytes:,}", row.arithmetic)
    measured = Table("after", "bytes in use", "more than before", "of tensors")
    before = 0
    for name, size in phases.items():
        measured.add_row(name, f"{size:,}", f"{size - before:,}", f"{phases.tensors[name]:,}")
        before = size
    captured = Table("graph", "bytes")
    for bucket, size in graphs:
        captured.add_row(bucket, f"{size:,}")
    for table in (rows, measured, captured):
        console.print(table)


def record(planned: MemoryPlan, phases: Phases, graphs: list[tuple[str, int]]) -> dict[str, Any]:
    """The numbers with machine, versions, date and command."""
    return {
        "command": " ".join(["python", "benchmarks/memory_plan.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "planned": {row.name: row.bytes for row in planned.rows},
        "in_use": phases,
        "tensors": phases.tensors,
        "graphs": dict(graphs),
    }


if __name__ == "__main__":
    main()
