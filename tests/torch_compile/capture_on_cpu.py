"""Capture through torch.compile on a CPU, where a replay runs the graph again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_flashinfer_pass import registry
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime import inductor
from ad_flashinfer_pass.transforms import compile_model, fuse_rope_append, fuse_small_batch

Result = tuple[nn.Module, TransformReport]


def capturing(monkeypatch: pytest.MonkeyPatch, *, by_inductor: bool) -> list[str]:
    """Let torch-opt be captured here.

    Args:
        monkeypatch: undoes it.
        by_inductor: what lies between our ops is compiled, which takes seconds.

    Returns:
        Names of the transforms that need a GPU otherwise, as they run.
    """
    if not by_inductor:
        monkeypatch.setattr(inductor, "compile_pieces", lambda model: (model, []))
    names: list[str] = []
    transforms = {name: registry.get(name) for name in ("tune_attention", "compile_model")}

    def tune_attention(model: nn.Module, ctx: TransformContext) -> Result:
        op = torch.ops.ad_flashinfer.cached_attention.default
        assert isinstance(model, torch.fx.GraphModule)
        num_sites = len(model.graph.find_nodes(op="call_function", target=op))
        assert num_sites == len(ctx.sites) == len(ctx.caches) > 0
        names.append("tune_attention")
        return transforms["tune_attention"](model, ctx)

    def fuse_rotations(model: nn.Module, ctx: TransformContext) -> Result:
        assert isinstance(model, torch.fx.GraphModule)
        num_matches, skipped = fuse_rope_append.fuse(model)
        names.append(f"fuse_rope_append: {num_matches} of {num_matches + len(skipped)}")
        return model, TransformReport("fuse_rope_append", num_matches, skipped)

    def fuse_linears(model: nn.Module, ctx: TransformContext) -> Result:
        assert isinstance(model, torch.fx.GraphModule)
        ctx.small_batch_model, num_matches, _ = fuse_small_batch.with_fused_linears(model)
        names.append("fuse_small_batch")
        return model, TransformReport("fuse_small_batch", num_matches)

    def capture(model: nn.Module, ctx: TransformContext) -> Result:
        compiled, report = transforms["compile_model"](model, ctx)
        names.append("compile_model")
        return compile_model._captured(compiled, ctx, report), report

    for name, transform in (
        ("fuse_rope_append", fuse_rotations),
        ("tune_attention", tune_attention),
        ("fuse_small_batch", fuse_linears),
        ("compile_model", capture),
    ):
        monkeypatch.setitem(registry._TRANSFORMS, name, transform)
    return names
