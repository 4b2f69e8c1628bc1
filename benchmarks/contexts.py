"""Long contexts, and the 70B shape with one sequence and eight: decode steps on a GPU beside the floor.

    python benchmarks/contexts.py --json benchmarks/results/contexts.json

Random bfloat16 weights, 8 layers of Llama-3.1-8B's shape and 6 of Llama-3.1-70B's, measured as ``bench``
does. With few layers the last linear and the sampling have a larger part in a step than in the whole model.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ad_flashinfer_pass.deployment.bench import bench

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.decode import llama_8b
from benchmarks.experts import build_model
from benchmarks.parallel import llama_70b

SHAPES: dict[str, tuple[LlamaConfig, list[tuple[int, int]]]] = {
    "Llama-3.1-8B, 8 layers": (llama_8b(8), [(1, 8192), (8, 8192), (1, 32768), (8, 32768), (1, 130944)]),
    "Llama-3.1-70B, 6 layers": (llama_70b(6), [(1, 1024), (8, 1024)]),
}
"""By name: the shape, and sequences with their contexts."""
NEW = 64


def main() -> int:
    """Parse arguments, measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "rows": []}
    for name, (shape, cases) in SHAPES.items():
        sizes = argparse.Namespace(
            batches=sorted({batch for batch, _ in cases}),
            context=max(context for _, context in cases),
            new=NEW,
            max_num_tokens=8192,
            compile_backend="torch-opt",
        )
        llm, _ = build_model(shape, sizes, torch.device("cuda", 0), token_buckets=[8192])
        for batch, context in cases:
            found = bench(llm, input_len=context, output_len=NEW, concurrencies=[batch])
            (row,) = found.rows
            head = {"machine": found.machine, "versions": found.versions, "date": found.date}
            results = {**head, "copy_bytes_per_s": found.copy_bytes_per_s, **results}
            step = {"step_ms": row.step_ms, "floor_ms": row.floor_ms, "first_token": asdict(row.first_token)}
            results["rows"].append({"name": name, "sequences": batch, "context": context, **step})
            print(json.dumps(results["rows"][-1]), flush=True)
            if args.json is not None:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(results, indent=1) + "\n")
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
