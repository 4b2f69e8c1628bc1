"""Tables of the pages in docs/ from the JSON of the benchmarks.

    python benchmarks/tables.py

Each stands between two comments with its name; ``tests/test_tables.py`` checks that they are up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def attention(data: dict[str, Any]) -> list[str]:
    """Of ``attention.json``."""
    lines = _heading(
        "cache",
        "batch",
        "context",
        "our nodes, us",
        "raw kernels",
        "nodes / raw",
        "split_decode",
        "FA2 wrapper",
        "SDPA, dense",
        "KV at copy speed",
    )
    for row in data["microseconds"]:
        times = [
            f"{row[key]:.4g}" if row[key] is not None else "" for key in ("split", "fa2", "sdpa", "copy")
        ]
        ours = f"{row['nodes']:.4g} | {row['raw']:.4g} | {row['nodes/raw']:.3f}"
        lines.append(f"| {row['kv']} | {row['batch']} | {row['context']} | {ours} | {' | '.join(times)} |")
    speed = data["copy_bytes_per_microsecond"] / 1e6
    prompts = "Prompts without a past, causal, in bfloat16; a plan is made on the host, once a step:"
    lines += ["", prompts, "", *_prefill(data["prefill_microseconds"])]
    return [*lines, "", f"A large copy: {speed:.2f} TB/s, read and write together. {_source(data)}"]


def _prefill(rows: list[dict[str, Any]]) -> list[str]:
    columns = ["fmha_v2", "fa3", "fa2", "sdpa", "fa3 plan", "fa2 plan"]
    heading = [
        "batch",
        "tokens each",
        "fmha_v2, us",
        "fa3",
        "fa2",
        "SDPA, dense",
        "plan of fa3",
        "plan of fa2",
    ]
    lines = _heading(*heading)
    for row in rows:
        times = " | ".join(f"{row[column]:.4g}" for column in columns)
        lines.append(f"| {row['batch']} | {row['length']} | {times} |")
    return lines


def end_to_end(data: dict[str, Any]) -> list[str]:
    """Of ``end_to_end.json``."""
    lines = _heading(
        "model",
        "prefill",
        "decode",
        "tokens",
        "different",
        "largest margin, ulps",
        "as a share of rounding",
        "prefixes alone",
        "another SDPA",
        "error / uncached's",
        "unlike float32: ours, uncached",
        "steps with equal bits",
    )
    for row in data["results"]:
        kernels = f"{row['kernels']['prefill']} | {row['kernels']['decode']}"
        margins = f"{row['num_different']} | {row['largest_ulps']:.0f} | {row['largest_share']:.0%}"
        own = " | ".join(
            f"{c['num_different']}, {c['largest_ulps']:.0f} ulps" if c else ""
            for c in (row["prefixes"], row["sdpa"])
        )
        equal = f"{row['num_equal_steps']} of {row['num_equal_steps'] + row['num_unequal_steps']}"
        cells = [row["name"], kernels, row["num_tokens"], margins, own, f"{row['error_ratio']:.2f}"]
        cells += [", ".join(map(str, row["num_unlike_float32"])), equal]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, "", _source(data)]


def inspection(data: dict[str, Any]) -> list[str]:
    """Of ``inspection.json``: a row a command, its seconds and memory for each model."""
    rows = data["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {
        (
            row["command"],
            row["model"],
        ): f"{row['seconds']:.0f} s ({row['processor_seconds']:.0f}), {row['gib']:.1f} GiB"
        for row in rows
    }
    lines = _heading("command", *models)
    for command in dict.fromkeys(row["command"] for row in rows):
        lines.append(f"| `{command}` | {' | '.join(cells.get((command, model), '') for model in models)} |")
    return [*lines, "", _source(data)]


def compile_backend(data: dict[str, Any]) -> list[str]:
    """Of ``compile_backend.json``: both ways of each compile backend, and what was compiled."""
    lines = _heading(
        "compile_backend", "batch", "standalone, ms", "torch.compile, ms", "ratio", "tokens that differ"
    )
    for result in data["results"]:
        for row in result["steps"]:
            times = f"{row['standalone_ms']:.3f} | {row['torch.compile_ms']:.3f} | {row['ratio']:.3f}"
            tokens = f"{row['num_different']} of {row['num_tokens']}"
            lines.append(f"| {result['compile_backend']} | {row['batch']} | {times} | {tokens} |")
    for result in data["results"]:
        records = [f"{record['what']} {record['seconds']:.1f} s" for record in result["compiles"][1:]]
        first, again, replays = (
            result[key] for key in ("first_calls_seconds", "compiled_again", "num_replays")
        )
        lines += [
            "",
            f"{result['compile_backend']}: one graph of Dynamo's, {', '.join(records)}; first calls "
            f"{first:.0f} s in all; compiled again later: {again}. {replays} steps were replays.",
        ]
    return [*lines, "", _source(data)]


def compile_backend_cudagraph(data: dict[str, Any]) -> list[str]:
    """Of ``compile_backend_cudagraph.json``, another run of the same."""
    return compile_backend(data)


# vLLM 0.24.0 on another H200, by model and sequences: milliseconds of a step, prompt tokens a second.
_VLLM_EXPERTS = {
    "Qwen3-30B-A3B, 8 layers": {
        1: (1.75, 75_000),
        8: (1.83, 315_000),
        32: (2.94, 397_000),
        128: (4.00, 404_000),
    }
}


_BESIDE_VLLM = ("step, ms", "floor, ms", "vLLM 0.24, ms", "prompts, tokens/s", "vLLM 0.24, tokens/s")


def _beside_vllm(row: dict[str, Any], known: dict[int, tuple[float, int]]) -> list[str]:
    """The cells of ``_BESIDE_VLLM``."""
    step, prompts = known.get(row["sequences"], (None, None))
    return [
        _number(row["step_ms"], ".2f", below=step),
        _number(row["floor_ms"], ".2f"),
        _number(step, ".2f"),
        _number(row["prompt_tokens_per_s"], ",.0f", above=prompts),
        _number(prompts, ",.0f"),
    ]


def experts(data: dict[str, Any]) -> list[str]:
    """Of ``experts.json``: whole models beside vLLM, then the kernels alone."""
    lines = _heading("model", "sequences", *_BESIDE_VLLM, "experts of a layer")
    for model in data["models"]:
        for row in model["rows"]:
            cells = _beside_vllm(row, _VLLM_EXPERTS.get(model["name"], {}))
            cells = [model["name"], str(row["sequences"]), *cells, _number(row["chosen"], ".1f")]
            lines.append(f"| {' | '.join(cells)} |")
    built = [f"{m['name']} {m['build_seconds']:.0f} s" for m in data["models"] if m["build_seconds"]]
    lines += ["", f"Built in: {', '.join(built)}. {data['note']}.", ""]
    lines += _heading("tokens", "experts of a layer, us", "floor, us", "of floor", "by torch, us")
    for row in data["kernels"]:
        share = row["floor_us"] and row["floor_us"] / row["us"]
        cells = [f"{row['tokens']:,}", _number(row["us"], ".4g"), _number(row["floor_us"], ".4g")]
        cells += [_number(share, ".0%"), _number(row["torch_us"], ".4g")]
        lines.append(f"| {' | '.join(cells)} |")
    speed = f"A large copy: {data['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and write together."
    if data["command"] is not None:
        return [*lines, "", f"{speed} {_source(data)}"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    where = f"{data['machine']}, {versions}, {data['date']}, commit {data['commit']}"
    return [*lines, "", f"{speed} {where}: {data['how']}."]


_VLLM_QUANTIZED = {
    "Llama-3.1-8B, float8 by channel and token, fp8 cache": {
        1: (3.59, 49_000),
        8: (3.78, 67_000),
        32: (5.22, 66_000),
        128: (8.40, 66_000),
    }
}


def quantized(data: dict[str, Any]) -> list[str]:
    """Of ``quantized.json``: float8 models beside vLLM."""
    lines = _heading("model", "sequences", "activations", *_BESIDE_VLLM)
    for model in data["models"]:
        for row in model["rows"]:
            cells = _beside_vllm(row, _VLLM_QUANTIZED.get(model["name"], {}))
            cells = [model["name"], str(row["sequences"]), row["activations"], *cells]
            lines.append(f"| {' | '.join(cells)} |")
    built = "; ".join(f"{m['name']}: {m['build_seconds']:.0f} s" for m in data["models"])
    loads = "; ".join(
        f"{m['name']}: {m['load_tokens_per_s']:,.0f}" for m in data["models"] if "load_tokens_per_s" in m
    )
    lines += ["", f"64 requests of 1k in and 1k out, tokens/s (vLLM 0.24, the first: 8,742): {loads}."]
    return [*lines, "", f"Built in: {built}. {data['note']}.", "", _source(data)]


_VLLM_LOAD = {1: (4.99, 41_100), 8: (5.26, 43_800), 32: (6.28, 42_900), 128: (10.96, 43_100)}
"""Decode, ms, and prompt tokens/s, of vLLM 0.24 through its own generate, on another day."""
_VLLM_LOADS = {"mixed": 7163, "mixed, sampled": 4631, "1k in, 1k out": 6374}


def load(data: dict[str, Any]) -> list[str]:
    """Of ``load.json``: what a user waits for, beside vLLM."""
    lines = _heading(
        "prompts of 1,024 at once",
        "all first tokens, ms",
        "kernels of it, ms",
        "tokens/s",
        "vLLM 0.24, tokens/s",
        "decode, ms",
        "vLLM 0.24, ms",
        "step, ms",
        "floor, ms",
    )
    for row in data["prompts"]:
        decode, speed = _VLLM_LOAD[row["sequences"]]
        tokens = 1024 * row["sequences"] / row["first_token_ms"] * 1e3
        cells = [str(row["sequences"]), f"{row['first_token_ms']:.1f}", f"{row['device_ms']:.1f}"]
        cells += [_number(tokens, ",.0f", above=speed), f"{speed:,}"]
        cells += [_number(row["decode_ms"], ".2f", below=decode), f"{decode:.2f}"]
        cells += [f"{row['step_ms']:.2f}", f"{row['floor_ms']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_heading("load", "requests", "tokens/s", "vLLM 0.24")]
    for row in data["loads"]:
        theirs = _VLLM_LOADS[row["name"]]
        ours = _number(row["tokens_per_s"], ",.0f", above=theirs)
        lines.append(f"| {row['name']} | {row['requests']} | {ours} | {theirs:,} |")
    return [*lines, "", f"Ready after {data['start_seconds']:.0f} s. {_source(data)}"]


def state(data: dict[str, Any]) -> list[str]:
    """Of ``state.json``: decode steps beside their floors, then a long prompt."""
    lines = _heading("model", "state of a sequence, MiB", "sequences", "step, ms", "floor, ms", "of floor")
    for model in data["models"]:
        for row in model["rows"]:
            step, floor = row["step_ms"], row["floor_ms"]
            cells = [model["name"], f"{model['state_bytes'] / 2**20:.2f}", str(row["sequences"])]
            lines.append(f"| {' | '.join(cells)} | {step:.2f} | {floor:.2f} | {floor / step:.0%} |")
    columns = ("prompt, tokens", "first token, ms", "transformers, ms", "tokens/s", "built in, s")
    lines += ["", *_heading("model", *columns)]
    for model in data["models"]:
        num, ms, theirs = model["prompt_tokens"], model["prompt_ms"], model.get("transformers_prompt_ms")
        cells = [model["name"], f"{num:,}", _number(ms, ".1f", below=theirs), _number(theirs, ".1f")]
        cells += [f"{1e3 * num / ms:,.0f}", f"{model['build_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    speed = f"A large copy: {data['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and write together."
    return [*lines, "", f"{speed} {_source(data)}"]


def contexts(data: dict[str, Any]) -> list[str]:
    """Of ``contexts.json``: steps over long contexts beside their floors."""
    lines = _heading("shape", "sequences x context", "step, ms", "floor, ms", "of floor")
    for row in data["rows"]:
        step, floor = row["step_ms"], row["floor_ms"]
        size = f"{row['sequences']} x {row['context']:,}"
        lines.append(f"| {row['name']} | {size} | {step:.2f} | {floor:.2f} | {floor / step:.0%} |")
    return [*lines, "", _source(data)]


def latent(data: dict[str, Any]) -> list[str]:
    """Of ``latent.json``: whole models with and without latents, then the kernels alone."""
    forms: dict[tuple[int, int, int], dict[bool, dict[str, Any]]] = {}
    for row in data["models"]:
        key = (row["sequences"], row["context"], row.get("new", 0))
        forms.setdefault(key, {})[row["latent"]] = row
    lines = _heading("sequences x context", "latent, ms a step", "floor, ms", "expanded, ms")
    for (batch, context, new), both in forms.items():
        name = f"{batch} x {context:,}" if not new else f"a prompt: {new:,} tokens behind {context:,}"
        mine, other = both[True], both.get(False, {})
        cells = [_number(mine["step_ms"], ".2f", below=other.get("step_ms"))]
        cells += [_number(mine.get("floor_ms"), ".2f"), _number(other.get("step_ms"), ".2f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_heading("heads", "decode, sequences x context", "us", "of a copy", "TFLOP/s")]
    for row in data["kernels"]:
        what = f"{row['heads']} | {row['sequences']} x {row['context']:,}"
        lines.append(f"| {what} | {row['us']:.1f} | {row['of_copy']:.0%} | {row['tflops']:.0f} |")
    lines += ["", *_heading("heads", "a prompt, past + new", "absorbed, us", "expanded, us", "TFLOP/s")]
    for row in data["prompts"]:
        times = f"{row['absorbed_us']:,.0f} | {_number(row['us'], ',.0f', below=row['absorbed_us'])}"
        what = f"{row['heads']} | {row['past']:,} + {row['new']:,}"
        lines.append(f"| {what} | {times} | {row['tflops']:.0f} |")
    return [*lines, "", _source(data)]


def serve(data: dict[str, Any]) -> list[str]:
    """Of ``serve.json``: what serving adds to the engine, and what a known beginning saves."""
    cost, prefix, grammar = data["overhead"], data["prefix"], data["grammar"]
    lines = _heading("what", "without", "with", "share")
    streams, tokens, batch = cost["streams"], prefix["tokens"], grammar["batch"]
    lines += [
        f"| {streams} streams, tokens/s: the engine alone, and through HTTP | {cost['tokens_per_s']:,.0f} | "
        f"{cost['served_tokens_per_s']:,.0f} | {-cost['less']:+.1%} |",
        f"| first token of a prompt of {tokens:,} tokens, nine tenths of them known, ms | "
        f"{prefix['first_token_ms']:.0f} | {prefix['known_first_token_ms']:.0f} | "
        f"1 / {prefix['times']:.1f} |",
        f"| a step of {batch} drawn requests whose text is JSON of a schema, ms | {grammar['step_ms']:.2f} | "
        f"{grammar['guided_step_ms']:.2f} | {grammar['more']:+.1%} |",
    ]
    return [*lines, "", _source(data)]


def drafts(data: dict[str, Any]) -> list[str]:
    """Of ``drafts.json``: what a step that verifies costs, and what drafts give."""
    names = {2: "2 of a step", 3: "3", 4: "4"}
    columns = ["sequences", "decode, ms", f"verifies {data['num_tokens']}, ms", "ratio", "plain, tokens/s"]
    lines = _heading(*columns, *names.values(), "text in circles", "random text")
    for step in data["steps"]:
        batch = step["batch"]
        forced = {row["tokens"]: row for row in data["forced"] if row["batch"] == batch}
        texts = {row["text"]: row for row in data["texts"] if row["batch"] == batch}
        cells = [str(batch), f"{step['decode_ms']:.2f}", f"{step['verify_ms']:.2f}", f"{step['ratio']:.2f}"]
        cells += [f"{forced[2]['plain']:,.0f}", *(f"{forced[n]['tokens_per_s']:,.0f}" for n in names)]
        cells += [
            _number(texts["circle"]["times"], ".2f"),
            _number(texts["random"]["times"], ".2f", above=1.0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _source(data)]


def drafts_eagle3(data: dict[str, Any]) -> list[str]:
    """Of ``drafts_eagle3.json``: the same with an EAGLE-3 head of random weights."""
    columns = ["sequences", "decode, ms", f"verifies {data['num_tokens']}, ms", "ratio", "plain, tokens/s"]
    lines = _heading(*columns, "3 of a step", "4")
    for step in data["steps"]:
        forced = {row["tokens"]: row for row in data["forced"] if row["batch"] == step["batch"]}
        cells = [f"{step['decode_ms']:.2f}", f"{step['verify_ms']:.2f}", f"{step['ratio']:.2f}"]
        cells += [f"{forced[3]['plain']:,.0f}", *(f"{forced[n]['tokens_per_s']:,.0f}" for n in (3, 4))]
        lines.append(f"| {step['batch']} | {' | '.join(cells)} |")
    return [*lines, "", _source(data)]


def _number(value: float | None, form: str, *, below: float | None = None, above: float | None = None) -> str:
    """A number, in bold if it is worse than it should be; a dash for what was not measured."""
    if value is None:
        return "-"
    is_behind = (below is not None and value > below) or (above is not None and value < above)
    return f"**{value:{form}}**" if is_behind else f"{value:{form}}"


def _heading(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _source(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{data['machine']}, {versions}, {data['date']}: `{data['command']}`."


# By page, the tables that stand in it.
PAGES = {
    "kernels.md": (attention, end_to_end),
    "debugging.md": (inspection,),
    "performance.md": (load, contexts, experts, quantized, state, latent, drafts, drafts_eagle3),
    "serving.md": (serve,),
    "torch_compile.md": (compile_backend, compile_backend_cudagraph),
}


def updated(name: str) -> str:
    """A page of the documentation with its tables made anew."""
    page = (DOCS / name).read_text()
    for make in PAGES[name]:
        table = make.__name__
        file = RESULTS / f"{table}.json"
        lines = make(json.loads(file.read_text())) if file.exists() else ["Not measured."]
        before, begin, rest = page.partition(f"<!-- {table} -->")
        _, end, after = rest.partition(f"<!-- end of {table} -->")
        if not begin or not end:
            raise ValueError(f"{name} must have the comments <!-- {table} --> and <!-- end of {table} -->")
        page = "\n".join([before + begin, *lines, end + after])
    return page


def main() -> int:
    """Write the pages."""
    for name in PAGES:
        (DOCS / name).write_text(updated(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
