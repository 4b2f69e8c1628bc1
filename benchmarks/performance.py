"""Writes docs/performance.md's tables from benchmarks/results.

    python benchmarks/performance.py

The text between the marks stays as it is; ``--check`` fails if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
# vLLM 0.24.0 on another H200: FlashAttention 3, full CUDA graphs, the same shape, context and batch sizes.
VLLM_STEP_MS = {1: 4.97, 8: 5.25, 32: 6.31, 128: 10.82}
VLLM_PREFILL = 43_500
SWITCHED = ("tune_attention", "fuse_rope_append", "fuse_small_batch")


def read(name: str) -> dict[str, Any] | None:
    """A file of results, None where it was not measured."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_table() -> str:
    """Decode steps beside the floor, transformers and vLLM."""
    ours, fp8 = read("decode"), read("decode_fp8")
    assert ours is not None
    hf = ours.get("transformers_step_ms", {})
    fp8_rows = {row["concurrency"]: row for row in fp8["rows"]} if fp8 else {}
    rows = []
    for row in ours["rows"]:
        batch = row["concurrency"]
        eight = fp8_rows.get(batch)
        rows.append(
            [
                str(batch),
                f"{row['floor_ms']:.2f}",
                f"**{row['step_ms']:.2f}**",
                f"{row['floor_ms'] / row['step_ms']:.0%}",
                f"{eight['step_ms']:.2f}" if eight else "-",
                f"{hf[str(batch)]:.2f}" if str(batch) in hf else "-",
                f"{VLLM_STEP_MS[batch]:.2f}" if batch in VLLM_STEP_MS else "-",
                f"{row['output_tokens_per_s']:,.0f}",
                f"{row['first_token']['p50']:,.0f}",
                f"{row['prompt_tokens_per_s']:,.0f}",
            ]
        )
    head = [
        "sequences",
        "floor ms",
        "step ms",
        "of floor",
        "fp8 cache",
        "transformers",
        "vLLM 0.24",
        "tokens/s",
        "first token ms",
        "prompt tokens/s",
    ]
    note = f"{ours['machine']}, torch {ours['versions']['torch']}, {ours['date']}: `{ours['command']}`"
    prefill = ours["prefill"]["prompt_tokens_per_s"]
    prompts = f"{ours['prefill']['concurrency']} prompts of {ours['input_len']} tokens"
    speed = f"{prefill:,.0f} tokens/s (vLLM: {VLLM_PREFILL:,})"
    return f"{table(head, rows)}\n\n{note}. Prefill of {prompts}: {speed}."


def where_table() -> str:
    """Where the time of a step goes, with all transforms and with each switched off."""
    runs = {"all": "decode", **{f"without `{name}`": f"decode_without_{name}" for name in SWITCHED}}
    found = {
        title: result for title, name in {**runs, "none": "decode_plain"}.items() if (result := read(name))
    }
    parts = []
    for batch in found["all"]["where_us"]:
        where = {
            title: result["where_us"][batch] for title, result in found.items() if batch in result["where_us"]
        }
        purposes = dict.fromkeys(purpose for times in where.values() for purpose in times)
        rows = [[p, *(f"{times.get(p, 0):,.0f}" for times in where.values())] for p in purposes]
        parts.append(table([f"B{batch}, us", *where], rows))
    steps = found["all"].get("prefill_steps")
    if steps is not None:
        times = ", ".join(f"{name} {us / 1e3:,.1f}" for name, us in steps["where_us"].items())
        each = statistics.median(steps["ms"])
        parts.append(f"A step of {steps['prompts']} prompts, {each:.1f} ms: {times}.")
    return "\n\n".join(parts)


def transforms_table() -> str:
    """A step with each transform switched off."""
    whole = read("decode")
    assert whole is not None
    rows = [["all transforms", *(f"{row['step_ms']:.2f}" for row in whole["rows"])]]
    for name in SWITCHED:
        less = read(f"decode_without_{name}")
        if less is not None:
            rows.append([f"without `{name}`", *(f"{row['step_ms']:.2f}" for row in less["rows"])])
    plain = read("decode_plain")
    if plain is not None:
        rows.append(
            [
                "none of them, nor Inductor or `fuse_gemms`",
                *(f"{row['step_ms']:.2f}" for row in plain["rows"]),
            ]
        )
    return table(["step ms", *(f"B{row['concurrency']}" for row in whole["rows"])], rows)


def loop_table() -> str:
    """What stands between two steps."""
    loop = read("decode_loop")
    if loop is None:
        return "Not measured."
    rows = []
    for row in loop["rows"]:
        for kind in ("greedy", "sampled"):
            times = [f"{row[f'{kind}_{ahead}_ahead_ms']:.2f}" for ahead in (0, 1, 2)]
            rows.append([f"B{row['batch']}, {kind}", *times, *_trace_cells(row.get(f"trace_{kind}"))])
    head = [
        "step ms",
        "none ahead",
        "one",
        "two",
        "gap us, median",
        "longest",
        "metadata and sampling us",
        "waits a step",
    ]
    machine = f"{loop['device']}, torch {loop['versions']['torch']}, {loop['date']}: `{loop['command']}`"
    return "\n\n".join(filter(None, [table(head, rows), f"{machine}.", loop.get("note")]))


def _trace_cells(trace: dict[str, Any] | None) -> list[str]:
    if trace is None:
        return ["-"] * 4
    gap, ours = trace["gap_us"], trace["metadata_and_sampling_us"]
    # The trace itself ends with two waits for the whole device, which the loop does not have.
    waits = trace["waits_a_step"].get("cudaEventSynchronize", 0)
    share = f"{ours:.0f} ({trace['metadata_and_sampling_share']:.1%})"
    return [f"{gap['median']:.1f}", f"{gap['max']:.1f}", share, f"{waits:.2f}"]


def capture_table() -> str:
    """What the graphs took to capture, those of decode steps and those of steps with prefill."""
    loop = read("decode_loop")
    if loop is None or "captures" not in loop:
        return "Not measured."
    kinds: dict[str, list[dict[str, Any]]] = {"steps with prefill": [], "decode steps": []}
    for cost in loop["captures"]:
        kinds["steps with prefill" if "tokens" in cost["bucket"] else "decode steps"].append(cost)
    rows = [
        [
            kind,
            str(len(costs)),
            f"{sum(cost['seconds'] for cost in costs):.2f}",
            f"{costs[0]['bytes'] / 2**20:,.0f}",
            f"{sum(cost['bytes'] for cost in costs[1:]) / 2**20:,.0f}",
        ]
        for kind, costs in kinds.items()
        if costs
    ]
    return table(["graphs of", "number", "seconds", "MiB, the largest", "MiB, the others"], rows)


def memory_table() -> str:
    """Planned beside used, by the phases in which a model is built."""
    found = read("memory_plan")
    if found is None or "context" not in found["planned"]:
        return "Not measured."
    planned, used, before = dict(found["planned"]), found["in_use"], 0
    parts = {
        "CUDA's context": ("context", ["context"]),
        "weights": ("weights", [name for name in planned if name.startswith("weights")]),
        "metadata": ("metadata", ["metadata"]),
        "KV cache": ("pools", [name for name in planned if "KV cache" in name]),
    }
    counted = {name for _, names in parts.values() for name in names}
    parts["workspaces, intermediate results, graphs"] = ("graphs", [n for n in planned if n not in counted])
    rows = []
    for title, (phase, names) in parts.items():
        expected, size = sum(planned[name] for name in names), used[phase] - before
        before = used[phase]
        rows.append([title, f"{expected / 2**20:,.1f}", f"{size / 2**20:,.1f}", ""])
    expected, size = sum(planned.values()), used["graphs"]
    rows.append(
        ["all", f"{expected / 2**20:,.1f}", f"{size / 2**20:,.1f}", f"{abs(size - expected) / size:.1%}"]
    )
    machine = f"{found['device']}, torch {found['versions']['torch']}, {found['date']}: `{found['command']}`"
    note = f" {found['note']}" if "note" in found else ""
    return f"{table(['MiB', 'planned', 'in use', 'apart'], rows)}\n\n{machine}.{note}"


TABLES = {
    "steps": steps_table,
    "where": where_table,
    "transforms": transforms_table,
    "loop": loop_table,
    "capture": capture_table,
    "memory": memory_table,
}


def written(text: str) -> str:
    """The document with its tables made anew."""
    for name, make in TABLES.items():
        start, end = f"<!-- {name}: benchmarks/performance.py -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{DOCUMENT}: no place for the table {name!r}: {start} ... {end}")
        replacement = f"{start}\n{make()}\n{end}"
        text = pattern.sub(lambda _, new=replacement: new, text)  # type: ignore[misc]
    return text


def main() -> int:
    """Write or check the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = DOCUMENT.read_text()
    new = written(text)
    if args.check:
        return int(new != text)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
