"""``tune_attention``: what it leaves alone, and the provider that a config pins."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.records import TransformContext, TransformReport
from tests.transforms.small_models import SmallModel, context, exported, find, run, sdpa


def tuned(ctx: TransformContext) -> tuple[fx.GraphModule, TransformReport]:
    matched = exported(SmallModel(sdpa), "match_repeat_kv", "match_attention", "classify_mask", ctx=ctx)
    gm, reports = run(matched, ctx, "insert_cached_attention", "tune_attention")
    return gm, reports["tune_attention"]


def kernels(gm: fx.GraphModule) -> set[str]:
    attends = find(gm, torch.ops.ad_flashinfer.cached_attention)
    return {g.op_args(node)["decode_kernel"] for node in attends}


def test_without_capture_the_kernels_stay() -> None:
    """On a CPU nothing is timed, and the report says why."""
    gm, report = tuned(context())
    assert kernels(gm) == {"reference"}
    assert report.num_matches == 0
    assert report.notes == ["steps are not captured: kernels as declared"]


def test_a_pinned_provider_runs_every_site() -> None:
    """The YAML's name stands in the graph and in the report of the sites."""
    ctx = context(transforms={"tune_attention": {"decode": "reference"}})
    gm, report = tuned(ctx)
    assert kernels(gm) == {"reference"}
    assert report.num_matches == len(ctx.sites)
    assert {site.decode.reason for site in ctx.sites} == {"pinned by transforms.tune_attention.decode"}


def test_a_pinned_provider_must_cover_the_site() -> None:
    """A pin is no way round the ledger: what the provider lacks is named."""
    with pytest.raises(UnsupportedError, match=r"decode is split_decode, which cannot .*device cpu"):
        tuned(context(transforms={"tune_attention": {"decode": "split_decode"}}))


def test_an_unknown_provider_is_refused() -> None:
    """The message lists the providers that there are."""
    known = ", ".join(map(repr, ["auto", *select.PROVIDERS][:-1]))
    says = rf"^transforms.tune_attention.decode: input should be {known} or 'reference', got 'fastest'\.$"
    with pytest.raises(ConfigError, match=says):
        context(transforms={"tune_attention": {"decode": "fastest"}})
