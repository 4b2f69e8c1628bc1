"""Generation in bfloat16 on a GPU against the uncached model there, for many architectures.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end.json

Greedy tokens of the captured model, prompts of 1 to 60 tokens, half of which join late. Each is compared with
the best token of the uncached model on the same GPU, given the same tokens so far. bfloat16 puts an error on
the logits of both, so a token may differ where the best two are near each other: how far apart they are is
given in units in the last place of the best logit (``ulps``), and as a share of the uncached model's own
largest error against float32 (``rounding``). Each step of the captured model is also run eagerly, and must
give the same bits.

Controls say what the uncached model itself does: the tokens that it gives when it sees each prefix alone
(``prefixes``: the same weights and kernels, other matrix shapes) and with another of torch's attention
kernels (``sdpa``), each against the same logits as ours; and how far its logits and tokens are from those of
float32, as against how far ours are at the same tokens (``error_ratio``, ``num_unlike_float32``). All models
also run without the transforms that join roundings: what is left comes from attention and matrix shapes.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, KvDtype, TransformConfig
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from tests import architectures

VOCAB, NEW_TOKENS = 512, 48
PROMPTS = architectures.random_prompts((1, 2, 5, 9, 31, 32, 33, 60), vocab_size=VOCAB)
# Heads of 64, which the kernels have, in place of the tests' 16.
_SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
_FUSIONS = ("fuse_gemms", "fuse_rope_append", "fuse_small_batch")
# The second of each is for what the first cannot do.
_SDPA = ([SDPBackend.MATH], [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@dataclass(frozen=True, kw_only=True)
class Control:
    """The uncached model's tokens, computed in another way, against its logits."""

    num_different: int
    largest_ulps: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """One architecture."""

    name: str
    kernels: dict[str, str]
    """By phase; several are joined with +."""
    num_tokens: int
    num_different: int
    margins: list[float]
    """Of each different token: the uncached model's best logit less that of the token."""
    largest_ulps: float
    """Of the margins, in units in the last place of the best logit in bfloat16."""
    rounding: float
    """The uncached model's largest error against float32."""
    largest_share: float
    """The largest margin over ``rounding``."""
    prefixes: Control
    sdpa: Control | None
    """None if the model does not call torch's attention."""
    error_ratio: float
    """Of root mean squares: the cached model's error against float32 over the uncached one's."""
    num_unlike_float32: tuple[int, int]
    """Best tokens other than float32's, given the same tokens: of the cached model, of the uncached one."""
    num_equal_steps: int
    """Steps whose captured logits had the bits of the eager ones."""
    num_unequal_steps: int
    eager_steps: dict[str, int]
    """Steps that no graph holds, by reason."""


def config_of(name: str) -> PretrainedConfig:
    """The tests' config of that name, with heads of 64."""
    config = architectures.CONFIGS[name]()
    keys = config.to_dict()
    sizes = {key: value for key, value in _SIZES.items() if key != "head_dim" or key in keys}
    return type(config)(**{**keys, **sizes, "initializer_range": 0.15})


def measure(name: str, kv_dtype: KvDtype = "auto", *, is_fused: bool = True) -> Result:
    """Generate with one architecture and compare."""
    attention = "eager" if name == "gemma2" else "sdpa"  # transformers has no sdpa for its logit cap
    model: nn.Module = architectures.random_model(config_of(name), attention)
    model = model.to(device="cuda", dtype=torch.bfloat16)
    config = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        compile_backend="torch-cudagraph",
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=128,
        cuda_graph_batch_sizes=[1, 3, 8],
        cuda_graph_token_buckets=[64, 128],
        kv_cache_config=KvCacheConfig(dtype=kv_dtype),
        transforms={} if is_fused else {fusion: TransformConfig(enabled=False) for fusion in _FUSIONS},
    )
    cached, reports = transform_module(model, config)
    module = cached.module
    assert isinstance(module, CudaGraphModule)
    equal = [0, 0]
    replay = module.forward

    def both(**inputs: Tensor) -> Tensor:
        num_replays = module.num_replays
        result = replay(**inputs)
        if module.num_replays > num_replays:
            # The eager run writes the same K and V to the same slots once more.
            with GraphState().begin_capture():  # its plans are those of a graph
                equal[torch.equal(result, module.eager(**inputs))] += 1
        return result

    module.forward = both  # type: ignore[method-assign]
    generated = architectures.generated_by_engine(cached, PROMPTS, NEW_TOKENS)
    module.forward = replay  # type: ignore[method-assign]
    kind = f", {kv_dtype} cache" if kv_dtype != "auto" else "" if is_fused else ", not fused"
    notes = [note.split(",")[0].split(": ") for r in reports for note in r.notes if "sites: " in note]
    return Result(
        name=f"{name}{kind}",
        kernels={p: "+".join(sorted({k for q, k, *_ in notes if p == q})) for p in ("prefill", "decode")},
        num_equal_steps=equal[1],
        num_unequal_steps=equal[0],
        eager_steps=dict(module.fallbacks),
        **compared(model, generated),
        **controls(model, cached, generated),
    )


def compared(model: nn.Module, generated: list[list[int]]) -> dict[str, Any]:
    """Continuations of ``PROMPTS`` against the uncached model, on its device; fields of ``Result``."""
    exact = copy.deepcopy(model).float()
    margins, ulps, rounding = [], [0.0], 0.0
    for prompt, tokens in zip(PROMPTS, generated, strict=True):
        logits = _uncached(model, prompt, tokens)
        rounding = max(rounding, (logits - _uncached(exact, prompt, tokens)).abs().max().item())
        its_margins, its_ulps = _margins(logits, torch.tensor(tokens))
        margins += its_margins
        ulps += its_ulps
    return {
        "num_tokens": sum(len(tokens) for tokens in generated),
        "num_different": len(margins),
        "margins": sorted(margins, reverse=True),
        "largest_ulps": max(ulps),
        "rounding": rounding,
        "largest_share": max(margins, default=0.0) / rounding,
    }


def controls(model: nn.Module, cached: CachedModel, generated: list[list[int]]) -> dict[str, Any]:
    """What the uncached model does by itself, see the top; fields of ``Result``."""
    exact = copy.deepcopy(model).float()
    calls_sdpa = model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    ours = _cached(cached, generated)
    prefixes, sdpa, errors, unlike = [], [], torch.zeros(2, dtype=torch.float64), torch.zeros(2).int()
    for prompt, tokens, our_logits in zip(PROMPTS, generated, ours, strict=True):
        logits, wide = _uncached(model, prompt, tokens), _uncached(exact, prompt, tokens)
        unlike += torch.stack([(x.argmax(-1) != wide.argmax(-1)).sum() for x in (our_logits, logits)]).cpu()
        errors += torch.stack([(x - wide).double().square().sum() for x in (our_logits, logits)]).cpu()
        alone = [_uncached(model, [*prompt, *tokens[:n]], tokens[n : n + 1]) for n in range(len(tokens))]
        prefixes += _margins(logits, torch.cat(alone).argmax(-1))[1]
        for kernels in _SDPA if calls_sdpa else ():
            with sdpa_kernel(kernels, set_priority=True):
                sdpa.append(_margins(logits, _uncached(model, prompt, tokens).argmax(-1))[1])
    most = [max((ulps for its in sdpa[i::2] for ulps in its), default=0.0) for i in range(2)]
    count = [sum(len(its) for its in sdpa[i::2]) for i in range(2)]
    return {
        "prefixes": Control(num_different=len(prefixes), largest_ulps=max(prefixes, default=0.0)),
        "sdpa": Control(num_different=max(count), largest_ulps=max(most)) if calls_sdpa else None,
        "error_ratio": (errors[0] / errors[1]).sqrt().item(),
        "num_unlike_float32": tuple(unlike.tolist()),
    }


def _uncached(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits from which each token follows, float32 [tokens, vocab]."""
    ids = torch.tensor([[*prompt, *tokens]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits: Tensor = model(ids[:, :-1]).logits[0, len(prompt) - 1 :].float()
    return logits


def _cached(cached: CachedModel, generated: list[list[int]]) -> list[Tensor]:
    """Likewise, from the cached model: each prompt alone, then all sequences token by token."""
    size = cached.sequence_info.tokens_per_block
    pages, free = [], 1
    for prompt, tokens in zip(PROMPTS, generated, strict=True):
        num_pages = -(-(len(prompt) + len(tokens)) // size)
        pages.append(list(range(free, free + num_pages)))
        free += num_pages
    first = [cached.step([SequenceStep(p, 0, own)]) for p, own in zip(PROMPTS, pages, strict=True)]
    logits = [torch.cat(first)]
    for n in range(NEW_TOKENS - 1):
        sequences = zip(PROMPTS, generated, pages, strict=True)
        steps = [SequenceStep([tokens[n]], len(prompt) + n, own) for prompt, tokens, own in sequences]
        logits.append(cached.step(steps))
    return list(torch.stack(logits, 1).float())


def _margins(logits: Tensor, tokens: Tensor) -> tuple[list[float], list[float]]:
    """How much better the best token is than the given one, where it is: as it is, and in ulps."""
    best = logits.max(-1).values
    margin = best - logits.gather(1, tokens.to(logits.device)[:, None])[:, 0]
    ulps = margin / torch.exp2(best.abs().log2().floor() - 7)
    return margin[margin > 0].tolist(), ulps[margin > 0].tolist()


def _measured(case: tuple[str, KvDtype, bool]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    name, kv_dtype, is_fused = case
    return asdict(measure(name, kv_dtype, is_fused=is_fused))


def main() -> int:
    """Parse arguments, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(architectures.CONFIGS))
    parser.add_argument("--fp8", nargs="*", default=["llama_gqa4", "qwen3"], help="also with an fp8 cache")
    parser.add_argument(
        "--unfused", nargs="*", default=list(architectures.CONFIGS), help="also without fusions"
    )
    parser.add_argument("--jobs", type=int, default=4, help="processes at once, on the one GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases: list[tuple[str, KvDtype, bool]] = [(name, "auto", True) for name in args.names]
    cases += [(name, "auto", False) for name in args.unfused]
    cases += [(name, "fp8", True) for name in args.fp8]
    rows: list[dict[str, Any]] = []
    results = {
        "machine": torch.cuda.get_device_name(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "triton", "flashinfer-python")
        },
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "results": rows,
    }
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for row in pool.imap(_measured, cases):
            rows.append(row)
            if args.json is not None:  # after each row, so that an interrupted run leaves what it has
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(results, indent=1) + "\n")
            shown = {key: value for key, value in row.items() if key not in ("margins", "eager_steps")}
            print(
                *(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), sep=", "
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
