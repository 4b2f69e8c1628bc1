"""Every decoder-only causal LM family of the installed transformers, through export, pass and generation.

    python benchmarks/architectures.py [--only FAMILY ...] [--jobs N] [--json FILE] [--render]

Each family is built from its config class with small sizes and random weights, in a process of its own. The
pass must give the greedy tokens of transformers' generate for a ragged batch, with and without chunked
prefill, or refuse in one line. Results go to a JSON file, and from there to docs/architectures.md; ``--only``
replaces some of them, ``--render`` writes the page again. The file keeps the outcomes of each version of
transformers; a run with another one adds its own, and the page lists what differs. Exit code 1 if a family is
a defect, or is served with another version and not with this one.

Left out, with the reason on the page: encoder-decoders, families that also have a masked-LM head (encoders),
configs that wrap a text stack which is a family of its own, and drafts that read another model's cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import AdFlashinferError, PackingError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is all that it can import from
from tests import architectures  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
RESULTS = ROOT / "docs" / "architectures.json"
TIMEOUT_SECONDS = 400.0
NUM_NEW_TOKENS = 64
# Two of one length and one last token: if they continue alike, attention does not matter in this model.
PROMPT_LENGTHS = (5, 17, 17, 30, 1)

Outcome = Literal["same", "refused", "defect", "skipped"]


@dataclass
class Row:
    """What was found for one family."""

    family: str
    model_class: str
    outcome: Outcome
    detail: str = ""
    """The refusal or defect, on one line."""
    attention: str = ""
    """The attn_implementation that was used."""
    features: list[str] = field(default_factory=list)
    pass_seconds: float = 0.0
    """Export and transforms."""
    seconds: float = 0.0
    """All of it: model, pass, both generations."""


def reason_to_skip(family: str) -> str | None:
    """Why a family is not a decoder-only language model of its own, None if it is one."""
    if family.endswith("_assistant"):
        return "a draft model: it reads the KV cache of another model"
    config_class = CONFIG_MAPPING[family]
    try:
        config = config_class()
    except StrictDataclassError:  # up to transformers 5.22
        return "made of other models: its config has no defaults"
    if config.is_encoder_decoder:
        return "the decoder of an encoder-decoder"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder: it has a masked-LM head"
    text = config_class.sub_configs.get("text_config")
    if text is not None and text is not transformers.AutoConfig:
        stack = text.model_type
    else:
        stack = getattr(getattr(config, "text_config", None), "model_type", None)
    if stack in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"a wrapper of {stack}"
    return None


def try_family(family: str) -> Row:
    """Build, pass, generate and compare; every failure becomes the row's outcome."""
    started = time.perf_counter()
    row = Row(family, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]), "skipped")
    try:
        model = architectures.random_model(architectures.small_config(family))
    except ImportError as err:
        row.detail = f"needs a package: {_one_line(err)}"
        return row
    row.attention = model.config._attn_implementation
    row.features = features(model)
    _run(model, row)
    elsewhere = row.detail.startswith(PackingError.__name__)  # outside attention, which eager does not change
    if row.outcome == "refused" and row.attention != "eager" and not elsewhere:
        eager = Row(family, row.model_class, "skipped", attention="eager", features=row.features)
        try:
            _run(architectures.random_model(architectures.small_config(family), "eager"), eager)
        except ValueError as err:  # transformers has no eager attention for this model
            eager.detail = _one_line(err)
        if eager.outcome in ("same", "defect"):
            row = eager
    row.seconds = time.perf_counter() - started
    return row


def _run(model: transformers.PreTrainedModel, row: Row) -> None:
    """Fill in the outcome for one model."""
    config = AutoDeployConfig(
        device="cpu",
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16),
    )
    started = time.perf_counter()
    try:
        cached, _ = transform_module(model, config)
    except AdFlashinferError as err:
        row.outcome = "defect" if "\n" in str(err) else "refused"
        row.detail = f"{type(err).__name__}: {_without_folders(str(err))}"
        return
    except Exception as err:  # a crash of the pass is what this program looks for
        row.outcome, row.detail = "defect", f"the pass raised {type(err).__name__}: {_one_line(err)}"
        return
    finally:
        row.pass_seconds = time.perf_counter() - started
    row.outcome, row.detail = _compare(model, cached)


def _compare(model: nn.Module, cached: CachedModel) -> tuple[Outcome, str]:
    prompts = architectures.prompts_with_one_end(PROMPT_LENGTHS, cached.vocab_size)
    try:
        expected = architectures.generated_by_transformers(model, prompts, NUM_NEW_TOKENS)
    except Exception as err:  # whatever a model's own code raises
        return "skipped", f"no tokens to compare with: transformers' generate raised {_one_line(err)}"
    if expected[1] == expected[2]:
        return "defect", "the comparison is empty: two different prompts have the same continuation"
    note = ""
    for options in ({}, {"prefill_chunk_tokens": 7}):
        try:
            found = architectures.generated_by_engine(cached, prompts, NUM_NEW_TOKENS, **options)
        except Exception as err:  # a crash of a step is what this program looks for
            return "defect", f"the step raised {type(err).__name__}: {_one_line(err)}"
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if ours != theirs:
                at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                uncached = architectures.generated_by_transformers(
                    model, [prompts[number]], NUM_NEW_TOKENS, use_cache=False
                )
                if uncached != [ours]:
                    return "defect", f"wrong tokens: prompt {number} ({options}) differs at token {at}"
                note = (
                    f"from token {at} of prompt {number} on as transformers without its cache, which differs"
                )
    return "same", note


def features(model: transformers.PreTrainedModel) -> list[str]:
    """Attention features, read from the config and the modules' names."""
    config = model.config.get_text_config()
    return list(_features(config, dict(model.named_modules()), {n for n, _ in model.named_parameters()}))


def _features(config: Any, modules: dict[str, nn.Module], parameters: set[str]) -> Iterator[str]:
    fields = config.to_dict()
    last = {name.rpartition(".")[2] for name in modules}
    flat = {name: value for name, value in _flat(fields)}
    kinds = [str(kind) for kind in fields.get("layer_types") or fields.get("attention_layers") or ()]
    if fields.get("kv_lora_rank"):
        yield "MLA"
    elif (ratio := _group(config)) > 1:
        yield f"GQA {ratio}"
    if last & {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "qk_norm"}:
        yield "qk-norm"
    factors = [v for name, v in flat.items() if name in ("partial_rotary_factor", "rotary_pct") and v]
    if any(factor < 1 for factor in factors) or fields.get("rotary_dim"):
        yield "partial rotary"
    everywhere = not kinds and fields.get("sliding_window")
    if everywhere or any("sliding" in kind or kind == "local" for kind in kinds):
        yield "window"
    if any("chunk" in kind for kind in kinds):
        yield "chunked"
    if len(set(kinds)) > 1:
        yield "per-layer pattern"
    if fields.get("attn_logit_softcapping"):
        yield "cap"
    if any("sink" in name for name in parameters):
        yield "sinks"
    if flat.get("alibi") or config.model_type == "bloom":
        yield "ALiBi"
    if fields.get("num_kv_shared_layers"):
        yield "shared KV"
    if any(getattr(module, "use_rope", 1) in (0, False) for module in modules.values()) or (
        None in (fields.get("rope_parameters") or {}).values()
    ):
        yield "NoPE"
    if fields.get("index_topk") or fields.get("indexer_n_heads"):
        yield "sparse index"
    if any(re.search(r"\b(q|k|v|qkv|query|c_attn|query_key_value)(_proj)?\.bias$", n) for n in parameters):
        yield "biases"
    if last & {"wpe", "embed_positions", "position_embeddings", "positions_embed"}:
        yield "learned positions"
    if "experts" in last:
        yield "experts"
    if any(re.search("linear_att|mamba|conv|recurrent|rwkv|xlstm", c) for c in [config.model_type, *kinds]):
        yield "recurrent layers"


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def _group(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None) or 1
    if getattr(config, "multi_query", False):
        return heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)


def _one_line(err: BaseException) -> str:
    return _without_folders(" ".join(str(err).split())[:400])


def _without_folders(text: str) -> str:
    """Paths inside packages are the same for every reader, what is before them is not."""
    return re.sub(r"[^\s(\"']*/(site-packages|lib/python3\.\d+)/", "", text)


def _child(family: str, sender: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch.export prints whole graphs when it refuses
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    try:
        row = try_family(family)
    except Exception as err:  # the small config or the model itself
        row = Row(family, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]), "skipped")
        row.detail = f"no small model: {type(err).__name__}: {_one_line(err)}"
    sender.send(asdict(row))


@dataclass
class _Job:
    """One family in a process of its own."""

    family: str
    process: BaseProcess
    receiver: Connection
    started: float

    def row(self) -> Row:
        """Its row, once it has sent one, ended or run out of time; then the process is gone."""
        row = Row(self.family, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.family]), "defect")
        try:
            if self.receiver.poll():
                row = Row(**self.receiver.recv())
            else:
                self.process.kill()
                row.detail = f"no result after {TIMEOUT_SECONDS:.0f} s"
        except EOFError:
            self.process.join()
            row.detail = f"the process ended with exit code {self.process.exitcode}"
        self.process.join()
        return row


def run_all(families: Sequence[str], jobs: int) -> Iterator[Row]:
    """Rows as they come; a crash or a hang of a family is its own defect."""
    # Forked, so that torch and transformers are imported once; this process has a single thread.
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(families))
    running: list[_Job] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(family, sender))
            process.start()
            sender.close()
            running.append(_Job(family, process, receiver, time.perf_counter()))
        ready = connection.wait([job.receiver for job in running], timeout=1.0)
        now = time.perf_counter()
        for job in list(running):
            if job.receiver in ready or now - job.started > TIMEOUT_SECONDS:
                running.remove(job)
                row = job.row()
                left = f"{len(waiting) + len(running)} left"
                print(
                    f"{left}: {row.family} {row.outcome} {row.seconds:.1f} s {row.detail[:160]}",
                    file=sys.stderr,
                )
                yield row


_TITLES: dict[Outcome, str] = {
    "defect": "Defects",
    "same": "Same tokens",
    "refused": "Refused",
    "skipped": "Not tried",
}


def render(results: dict[str, Any]) -> str:
    """docs/architectures.md."""
    rows = [Row(**row) for row in results["rows"]]
    counts = Counter(row.outcome for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Architectures",
        "",
        f"Written by `python benchmarks/architectures.py` with {versions}.",
        "",
        f"Of the {len(rows)} families that transformers lists as causal language models: **{counts['same']} "
        f"give the same tokens**, {counts['refused']} are refused, {counts['skipped']} are not decoder-only "
        f"models that can be tried, {counts['defect']} are defects.",
        "",
        "Each model is built from its config class with small sizes and random weights (3 or more layers, "
        f"one of each kind at least), in float32 on the CPU. {len(PROMPT_LENGTHS)} prompts of "
        f"{', '.join(map(str, PROMPT_LENGTHS))} tokens are continued by {NUM_NEW_TOKENS} greedy tokens in "
        "one ragged batch, again with prefill in chunks of 7, and compared with transformers' generate for "
        "each prompt alone. Windows and chunks are 12 tokens. *Attention* is the attn_implementation of the "
        "exported model: the one that transformers picks, or eager where the pass refuses that. *Pass* "
        "is the time of export and transforms.",
        "",
    ]
    lines += _by_version(results["outcomes"])
    for outcome, title in _TITLES.items():
        chosen = [row for row in rows if row.outcome == outcome]
        if chosen:
            lines += [f"## {title} ({len(chosen)})", "", *_table(outcome, chosen), ""]
    return "\n".join(lines)


def _by_version(outcomes: dict[str, dict[str, str]]) -> Iterator[str]:
    """What each version of transformers serves, and the families that differ."""
    versions = sorted(outcomes, key=Version)
    yield from ("## By version of transformers", "", "| version | same tokens | refused | defects |")
    yield "|---|---|---|---|"
    for version in versions:
        counts = Counter(outcomes[version].values())
        yield f"| {version} | {counts['same']} | {counts['refused']} | {counts['defect']} |"
    yield ""
    differing = changed(outcomes)
    if differing:
        yield from (f"| family | {' | '.join(versions)} |", "|---" * (len(versions) + 1) + "|")
        for family, found in differing.items():
            yield f"| {family} | {' | '.join(found.get(version, '-') for version in versions)} |"
        yield ""


def _table(outcome: Outcome, rows: Sequence[Row]) -> Iterator[str]:
    if outcome == "same":
        yield "| family | attention | features | pass, s | all, s |"
        yield "|---|---|---|---|---|"
        for row in rows:
            found = ", ".join([*row.features, *([f"*{row.detail}*"] if row.detail else [])])
            yield f"| {row.family} | {row.attention} | {found} | {row.pass_seconds:.1f} | {row.seconds:.1f} |"
        return
    yield "| family | features | what was said |"
    yield "|---|---|---|"
    for row in rows:
        detail = row.detail.replace("|", "\\|")
        yield f"| {row.family} | {', '.join(row.features)} | {detail} |"


def main() -> int:
    """Parse arguments, run, write the results and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--render", action="store_true", help="write the page from the results, run nothing")
    args = parser.parse_args()
    unknown = set(args.only) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    found = json.loads(args.json.read_text()) if args.json.exists() else {}
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    rows = found.get("rows", []) if args.only or args.render else []
    results = {
        "versions": found["versions"] if args.render else versions,
        "outcomes": found.get("outcomes", {}),
        "rows": {row["family"]: row for row in rows},
    }
    if not args.render:
        mine = results["outcomes"].setdefault(architectures.minor_version(), {})
        if not args.only:
            mine.clear()
        for row in _rows(args.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), args.jobs):
            results["rows"][row.family] = asdict(row)
            mine[row.family] = row.outcome
            _write(results, args.json, args.page)
    _write(results, args.json, args.page)
    counts = Counter(row["outcome"] for row in results["rows"].values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    here = results["outcomes"].get(architectures.minor_version(), {})
    lost = [
        family
        for family, outcomes in changed(results["outcomes"]).items()
        if here.get(family) in ("refused", "defect") and "same" in outcomes.values()
    ]
    if lost:
        print(f"served with another version of transformers and not with this one: {', '.join(lost)}")
    return 1 if counts["defect"] or lost else 0


def changed(outcomes: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Families that not all versions of transformers that have them serve alike, with the outcome of each."""
    by_family: dict[str, dict[str, str]] = {}
    for version in sorted(outcomes, key=Version):
        for family, outcome in outcomes[version].items():
            by_family.setdefault(family, {})[version] = outcome
    return {family: found for family, found in sorted(by_family.items()) if len({*found.values()}) > 1}


def _write(results: dict[str, Any], results_path: Path, page: Path) -> None:
    outcomes = {version: dict(sorted(each.items())) for version, each in results["outcomes"].items()}
    rows = [row for _, row in sorted(results["rows"].items())]
    results = {"versions": results["versions"], "outcomes": outcomes, "rows": rows}
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    page.write_text(render(results))


def _rows(families: Sequence[str], jobs: int) -> Iterator[Row]:
    skipped = {family: reason for family in families if (reason := reason_to_skip(family))}
    for family, reason in skipped.items():
        yield Row(family, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]), "skipped", reason)
    yield from run_all([family for family in families if family not in skipped], jobs)


if __name__ == "__main__":
    sys.exit(main())
