"""Tables of README and of the pages in docs/ from the JSON of the benchmarks.

    python benchmarks/tables.py

Each stands between two comments with its name; ``tests/test_tables.py`` checks that they are up to date.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _read(name: str) -> dict[str, Any]:
    """A file of results."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def attention() -> list[str]:
    """Of ``attention.json``."""
    data = _read("attention")
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


def end_to_end() -> list[str]:
    """Of ``end_to_end.json``."""
    data = _read("end_to_end")
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


def inspection() -> list[str]:
    """Of ``inspection.json``: a row a command, its seconds and memory for each model."""
    data = _read("inspection")
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


def compile_backend(name: str = "compile_backend") -> list[str]:
    """Of ``compile_backend.json``: both ways of each compile backend, and what was compiled."""
    data = _read(name)
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


def compile_backend_cudagraph() -> list[str]:
    """Of ``compile_backend_cudagraph.json``, another run of the same."""
    return compile_backend("compile_backend_cudagraph")


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


def experts() -> list[str]:
    """Of ``experts.json``: whole models beside vLLM, then the kernels alone."""
    data = _read("experts")
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

_VLLM_FLOAT8_LOAD = 8742


def quantized() -> list[str]:
    """Of ``quantized.json``: float8 models beside vLLM."""
    data = _read("quantized")
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
    lines += [
        "",
        f"64 requests of 1k in and 1k out, tokens/s (vLLM 0.24, the first: {_VLLM_FLOAT8_LOAD:,}): {loads}.",
    ]
    return [*lines, "", f"Built in: {built}. {data['note']}.", "", _source(data)]


_VLLM_LOAD = {1: (4.99, 41_100), 8: (5.26, 43_800), 32: (6.28, 42_900), 128: (10.96, 43_100)}
"""Decode, ms, and prompt tokens/s, of vLLM 0.24 through its own generate, on another day."""
_VLLM_LOADS = {"mixed": 7163, "mixed, sampled": 4631, "1k in, 1k out": 6374}


def load() -> list[str]:
    """Of ``load.json``: what a user waits for, beside vLLM."""
    data = _read("load")
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


def measured() -> list[str]:
    """Of ``load.json``, ``quantized.json`` and ``experts.json``: what README says beside vLLM."""
    prompts = {row["sequences"]: row for row in _read("load")["prompts"]}
    loads = {row["name"]: row["tokens_per_s"] for row in _read("load")["loads"]}
    float8, qwen = _read("quantized")["models"][0], _read("experts")["models"][0]
    lines = _heading("", "here", "vLLM 0.24", "")

    def add(what: str, ours: list[float], theirs: list[float], form: str, is_time: bool = False) -> None:
        cells = [" / ".join(f"{value:{form}}" for value in values) for values in (ours, theirs)]
        lines.append(f"| {what} | {' | '.join(cells)} | {_compared(ours, theirs, is_time=is_time)} |")

    def add_model(model: dict[str, Any], known: dict[int, tuple[float, int]], what: str) -> None:
        steps = [row["step_ms"] for row in model["rows"]]
        speeds = [row["prompt_tokens_per_s"] / 1e3 for row in model["rows"]]
        step, prompts = zip(*known.values(), strict=True)
        add(f"{what}, decode step, ms", steps, list(step), ".2f", is_time=True)
        add("the same, prefill, thousand tokens/s", speeds, [n / 1e3 for n in prompts], ".0f")

    decode, speed = zip(*_VLLM_LOAD.values(), strict=True)
    add(
        "decode step of 1 / 8 / 32 / 128 sequences, ms",
        [row["decode_ms"] for row in prompts.values()],
        list(decode),
        ".2f",
        is_time=True,
    )
    add(
        "64 requests, 1k in and 1k out, tokens/s",
        [loads["1k in, 1k out"]],
        [_VLLM_LOADS["1k in, 1k out"]],
        ",.0f",
    )
    add("384 mixed requests, greedy, tokens/s", [loads["mixed"]], [_VLLM_LOADS["mixed"]], ",.0f")
    add(
        "384 mixed requests, temperature 0.8, top-p 0.95, tokens/s",
        [loads["mixed, sampled"]],
        [_VLLM_LOADS["mixed, sampled"]],
        ",.0f",
    )
    add(
        "one prompt to its first token, ms",
        [prompts[1]["first_token_ms"]],
        [1024e3 / speed[0]],
        ".1f",
        is_time=True,
    )
    add(
        "prefill of 1 / 8 / 32 / 128 prompts, thousand tokens/s",
        [1024 * n / row["first_token_ms"] for n, row in prompts.items()],
        [n / 1e3 for n in speed],
        ".1f",
    )
    add_model(float8, _VLLM_QUANTIZED[float8["name"]], "float8 weights and fp8 cache")
    add(
        "the same, 64 requests, 1k in and 1k out, tokens/s",
        [float8["load_tokens_per_s"]],
        [_VLLM_FLOAT8_LOAD],
        ",.0f",
    )
    add_model(qwen, _VLLM_EXPERTS[qwen["name"]], qwen["name"])
    return lines


def _compared(ours: list[float], theirs: list[float], *, is_time: bool) -> str:
    """Of 1, 8, 32 and 128 sequences, or one load: ahead, level within 2 %, or behind."""
    groups: dict[str, dict[int, int]] = {"ahead": {}, "level": {}, "**behind**": {}}
    for batch, mine, other in zip((1, 8, 32, 128), ours, theirs, strict=False):
        more = (other - mine if is_time else mine - other) / other
        name = "ahead" if more > 0.02 else "level" if more >= -0.02 else "**behind**"
        groups[name][batch] = round(100 * abs(more))
    said = []
    for name, shares in groups.items():
        if shares:
            by = dict.fromkeys((min(shares.values()), max(shares.values())))
            where = f" for {' / '.join(map(str, shares))}" * (len(shares) < len(ours))
            said.append(name + f" by {' to '.join(map(str, by))} %" * (name != "level") + where)
    return "; ".join(said)


def state() -> list[str]:
    """Of ``state.json``: decode steps beside their floors, then a long prompt."""
    data = _read("state")
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


def contexts() -> list[str]:
    """Of ``contexts.json``: steps over long contexts beside their floors."""
    data = _read("contexts")
    lines = _heading("shape", "sequences x context", "step, ms", "floor, ms", "of floor")
    for row in data["rows"]:
        step, floor = row["step_ms"], row["floor_ms"]
        size = f"{row['sequences']} x {row['context']:,}"
        lines.append(f"| {row['name']} | {size} | {step:.2f} | {floor:.2f} | {floor / step:.0%} |")
    return [*lines, "", _source(data)]


def latent() -> list[str]:
    """Of ``latent.json``: whole models with and without latents, then the kernels alone."""
    data = _read("latent")
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


def serve() -> list[str]:
    """Of ``serve.json``: what serving adds to the engine, and what a known beginning saves."""
    data = _read("serve")
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


def drafts() -> list[str]:
    """Of ``drafts.json``: what a step that verifies costs, and what drafts give."""
    data = _read("drafts")
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


def drafts_eagle3() -> list[str]:
    """Of ``drafts_eagle3.json``: the same with an EAGLE-3 head of random weights."""
    data = _read("drafts_eagle3")
    columns = ["sequences", "decode, ms", f"verifies {data['num_tokens']}, ms", "ratio", "plain, tokens/s"]
    lines = _heading(*columns, "3 of a step", "4")
    for step in data["steps"]:
        forced = {row["tokens"]: row for row in data["forced"] if row["batch"] == step["batch"]}
        cells = [f"{step['decode_ms']:.2f}", f"{step['verify_ms']:.2f}", f"{step['ratio']:.2f}"]
        cells += [f"{forced[3]['plain']:,.0f}", *(f"{forced[n]['tokens_per_s']:,.0f}" for n in (3, 4))]
        lines.append(f"| {step['batch']} | {' | '.join(cells)} |")
    return [*lines, "", _source(data)]


_SWITCHED = ("tune_attention", "fuse_rope_append", "fuse_small_batch")


def steps() -> list[str]:
    """Of ``decode.json`` and ``decode_fp8.json``: steps beside those with an fp8 cache, and transformers'."""
    data, theirs = _read("decode"), _read("decode")["transformers_step_ms"]
    lines = _heading("sequences", "floor, ms", "step, ms", "of floor", "fp8 cache, ms", "transformers, ms")
    for row, eight in zip(data["rows"], _read("decode_fp8")["rows"], strict=True):
        step, floor, batch = row["step_ms"], row["floor_ms"], str(row["concurrency"])
        cells = [batch, f"{floor:.2f}", f"{step:.2f}", f"{floor / step:.0%}", f"{eight['step_ms']:.2f}"]
        lines.append(f"| {' | '.join([*cells, _number(theirs.get(batch), '.2f')])} |")
    return [*lines, "", _source(data)]


def where() -> list[str]:
    """Of ``decode.json`` and its like: where a step's time goes, with all transforms and without each."""
    runs = {"all": "decode", **{f"without `{name}`": f"decode_without_{name}" for name in _SWITCHED}}
    found = {title: _read(name) for title, name in {**runs, "none": "decode_plain"}.items()}
    lines = list[str]()
    for batch in found["all"]["where_us"]:
        parts = {title: data["where_us"][batch] for title, data in found.items() if batch in data["where_us"]}
        lines += _heading(f"B{batch}, us", *parts)
        for purpose in dict.fromkeys(purpose for times in parts.values() for purpose in times):
            lines.append(
                f"| {purpose} | {' | '.join(f'{times.get(purpose, 0):,.0f}' for times in parts.values())} |"
            )
        lines.append("")
    prompts = found["all"]["prefill_steps"]
    times = ", ".join(f"{name} {us / 1e3:,.1f}" for name, us in prompts["where_us"].items())
    return [
        *lines,
        f"A step of {prompts['prompts']} prompts, {statistics.median(prompts['ms']):.1f} ms: {times}.",
    ]


def transforms() -> list[str]:
    """Of ``decode.json`` and its like: a step with each transform switched off."""
    runs = {
        "all transforms": "decode",
        **{f"without `{name}`": f"decode_without_{name}" for name in _SWITCHED},
    }
    runs["none of them, nor Inductor or `fuse_gemms`"] = "decode_plain"
    lines = _heading("step, ms", *(f"B{row['concurrency']}" for row in _read("decode")["rows"]))
    for title, name in runs.items():
        times = [f"{row['step_ms']:.2f}" for row in _read(name)["rows"]]
        lines.append(f"| {title} | {' | '.join(times)} |")
    return lines


def loop() -> list[str]:
    """Of ``decode_loop.json``: what stands between two steps."""
    data = _read("decode_loop")
    ahead = ("none ahead, ms", "one", "two")
    lines = _heading("step", *ahead, "gap us, median", "longest", "metadata and sampling us", "waits a step")
    for row in data["rows"]:
        for kind in ("greedy", "sampled"):
            trace, times = row[f"trace_{kind}"], [f"{row[f'{kind}_{n}_ahead_ms']:.2f}" for n in (0, 1, 2)]
            gap, ours = trace["gap_us"], trace["metadata_and_sampling_us"]
            # The trace itself ends with two waits for the whole device, which the loop does not have.
            waits = trace["waits_a_step"].get("cudaEventSynchronize", 0)
            cells = [f"{gap['median']:.1f}", f"{gap['max']:.1f}"]
            cells += [f"{ours:.0f} ({trace['metadata_and_sampling_share']:.1%})", f"{waits:.2f}"]
            lines.append(f"| B{row['batch']}, {kind} | {' | '.join(times + cells)} |")
    return [*lines, "", _source(data)]


def cpu_generate() -> list[str]:
    """Of ``cpu_generate.json``: generate and transformers' own."""
    data = _read("cpu_generate")
    lines = _heading(
        "model", "prompts, tokens", "new tokens each", "s", "transformers, s", "transformers / ours"
    )
    for row in data["rows"]:
        lengths = row["prompts"]
        low, high, num = min(lengths), max(lengths), len(lengths)
        prompts = f"{num} of {low:,}" if low == high else f"{num} of {low:,} to {high:,}"
        times = [f"{row[key]:.2f}" for key in ("seconds", "transformers_seconds")]
        cells = [row["model"], prompts, str(row["tokens"]), *times, _number(row["ratio"], ".2f", above=1.0)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _source(data)]


def capture() -> list[str]:
    """Of ``decode_loop.json``: what the graphs took to capture, of steps with prefill and of decode steps."""
    kinds: dict[str, list[dict[str, Any]]] = {"steps with prefill": [], "decode steps": []}
    for cost in _read("decode_loop")["captures"]:
        kinds["steps with prefill" if "tokens" in cost["bucket"] else "decode steps"].append(cost)
    lines = _heading("graphs of", "number", "seconds", "MiB, the largest", "MiB, the others")
    for kind, costs in kinds.items():
        seconds = sum(cost["seconds"] for cost in costs)
        first, *others = (cost["bytes"] / 2**20 for cost in costs)
        lines.append(f"| {kind} | {len(costs)} | {seconds:.2f} | {first:,.0f} | {sum(others):,.0f} |")
    return lines


def memory() -> list[str]:
    """Of ``memory_plan.json``: planned beside used, by the phases in which a model is built."""
    data = _read("memory_plan")
    planned, used, before = data["planned"], data["in_use"], 0
    parts = {
        "CUDA's context": ("context", ["context"]),
        "weights": ("weights", [name for name in planned if name.startswith("weights")]),
        "metadata": ("metadata", ["metadata"]),
        "KV cache": ("pools", [name for name in planned if "KV cache" in name]),
    }
    counted = {name for _, names in parts.values() for name in names}
    parts["workspaces, intermediate results, graphs"] = ("graphs", [n for n in planned if n not in counted])
    lines = _heading("MiB", "planned", "in use", "apart")
    for title, (phase, names) in parts.items():
        expected, size = sum(planned[name] for name in names), used[phase] - before
        before = used[phase]
        lines.append(f"| {title} | {expected / 2**20:,.1f} | {size / 2**20:,.1f} | |")
    expected, size = sum(planned.values()), used["graphs"]
    apart = abs(size - expected) / size
    lines.append(f"| all | {expected / 2**20:,.1f} | {size / 2**20:,.1f} | {apart:.1%} |")
    return [*lines, "", f"{_source(data)} {data['note']}"]


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
    "README.md": (measured,),
    "docs/kernels.md": (attention, end_to_end),
    "docs/debugging.md": (inspection,),
    "docs/performance.md": (
        *(load, contexts, steps, where, loop, experts, quantized, state, latent, capture, memory, transforms),
        *(drafts, drafts_eagle3, cpu_generate),
    ),
    "docs/serving.md": (serve,),
    "docs/torch_compile.md": (compile_backend, compile_backend_cudagraph),
}


def updated(name: str) -> str:
    """A page with its tables made anew."""
    page = (ROOT / name).read_text()
    for make in PAGES[name]:
        table = make.__name__
        before, begin, rest = page.partition(f"<!-- {table} -->")
        _, end, after = rest.partition(f"<!-- end of {table} -->")
        if not begin or not end:
            raise ValueError(f"{name} must have the comments <!-- {table} --> and <!-- end of {table} -->")
        page = "\n".join([before + begin, *make(), end + after])
    return page


def main() -> int:
    """Write the pages."""
    for name in PAGES:
        (ROOT / name).write_text(updated(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
