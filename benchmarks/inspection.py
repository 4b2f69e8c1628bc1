"""Seconds and memory of the commands that look at a graph, on models too large to have here.

    python benchmarks/inspection.py --json benchmarks/results/inspection.json

Each command runs in a process of its own, with two threads, on a config.json alone; ``check`` draws weights.
A line is printed as each ends, and the results so far are written. ``python benchmarks/tables.py`` makes the
table of docs/debugging.md from them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": _ROPE,
    "dtype": "bfloat16",
}
_MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama 3.1 70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
_COMMANDS = {
    "dump": ["--output", "out.txt"],
    "diff": [],
    "explain": ["--sm", "90"],
    "lint": ["--sm", "90"],
    "plan": ["--sm", "90", "--memory", "282GB", "--max-seq-len", "4096"],
    "report": ["--sm", "90", "--output", "out.html"],
    "check": ["--random-weights"],
}
_THREADS = 2


def run(command: str, model: str, directory: str) -> dict[str, Any]:
    """One command; its exit code tells of differences or findings, 2 of wrong usage."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ad_flashinfer_pass", command, "-m", model, "-q", *_COMMANDS[command]],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": str(_THREADS)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if "error:" in errors or process.returncode not in (0, 1):
        raise SystemExit(f"{command} of {model}: {errors}")
    return {
        "command": command,
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "gib": round(usage.ru_maxrss / 2**20, 2),  # ru_maxrss is in KiB
    }


def main() -> None:
    """Run every command on every model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/inspection.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} processors, {_THREADS} threads",
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, sizes in _MODELS.items():
            model = str(Path(directory, name.replace(" ", "_")))
            LlamaConfig(**_COMMON, **sizes).save_pretrained(model)
            for command in _COMMANDS if "8B" in name else ("dump", "diff", "explain"):
                print(f"{name}: {command} ...", end=" ", flush=True)
                row = {"model": name, **run(command, model, directory)}
                print(f"{row['seconds']} s, {row['gib']} GiB", flush=True)
                record["rows"].append(row)
                if args.json is not None:
                    args.json.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    """The machine's, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
