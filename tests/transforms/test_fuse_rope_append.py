"""``fuse_rope_append``: which rotations are fused with the append, and that the logits stay the same."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, fx

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.records import Skip, TransformContext
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.transforms.fuse_rope_append import fuse
from tests import architectures
from tests.transforms.small_models import find

aten = torch.ops.aten


@cache
def transformed(name: str) -> tuple[fx.GraphModule, TransformContext]:
    model = architectures.random_model(architectures.CONFIGS[name](num_layers=2), "eager")
    ctx = context(AutoDeployConfig(max_batch_size=3, max_seq_len=128))
    gm, _ = Pipeline.of(ctx.config).without("compile_model").run(model, ctx)
    assert isinstance(gm, fx.GraphModule)
    return gm, ctx


def logits(gm: fx.GraphModule, ctx: TransformContext) -> Tensor:
    """Of two prefills, a chunk and a decode step over them."""
    tokens = architectures.random_prompts((40, 12), vocab_size=128)
    steps = [
        [SequenceStep(tokens[0][:30], 0, [1]), SequenceStep(tokens[1][:11], 0, [3])],
        [SequenceStep(tokens[0][30:39], 30, [1, 2]), SequenceStep(tokens[1][11:], 11, [3])],
        [SequenceStep(tokens[0][39:], 39, [1, 2])],
    ]
    rows = []
    for step in steps:
        ctx.sequence_info.nest_sequences(step)
        rows.append(gm(**ctx.sequence_info.named_args(), **ctx.caches)[0])
    return torch.cat(rows)


def fused(name: str, change: Callable[[fx.GraphModule], None] = lambda gm: None) -> tuple[int, list[Skip]]:
    gm, ctx = transformed(name)
    gm = deepcopy(gm)
    change(gm)
    before = logits(gm, ctx)
    count, skipped = fuse(gm)
    torch.testing.assert_close(logits(gm, ctx), before, atol=1e-4, rtol=1e-4)
    return count, skipped


@pytest.mark.parametrize("name", ["llama_gqa4", "qwen3", "phi3", "gemma3_text", "mixtral", "stablelm"])
def test_rotations_by_halves_are_fused(name: str) -> None:
    count, skipped = fused(name)
    assert count == 2
    assert not skipped


@pytest.mark.parametrize(("name", "has_norms"), [("qwen3", True), ("llama_gqa4", False)])
def test_norms_of_heads_are_taken_in(name: str, has_norms: bool) -> None:
    gm = deepcopy(transformed(name)[0])
    before = len(find(gm, aten.rsqrt))
    fuse(gm)
    appends = find(gm, torch.ops.ad_flashinfer.rope_append)
    assert all((g.op_args(node)["query_norm"] is not None) == has_norms for node in appends)
    assert before - len(find(gm, aten.rsqrt)) == 2 * len(appends) * has_norms


def test_layers_without_rotation_stay() -> None:
    """SmolLM3's last layer has none; the other is fused."""
    count, (skip,) = fused("smollm3")
    assert count == 1
    assert "not rotated" in skip.reason


def other_angles(gm: fx.GraphModule) -> None:
    """Let one half of the angles be another function, as in interleaved or multi-part rotations."""
    (cat,) = (n for n in find(gm, aten.cat) if n.args[0][0] is n.args[0][1])  # type: ignore[index]
    half = cat.args[0][0]  # type: ignore[index]
    with gm.graph.inserting_before(cat):
        doubled = gm.graph.call_function(aten.mul.Tensor, (half, 2.0))
    doubled.meta = dict(half.meta)  # type: ignore[union-attr]
    cat.update_arg(0, [half, doubled])
    gm.recompile()


def swapped_halves(gm: fx.GraphModule) -> None:
    """Rotate by cat(x2, -x1), the other way round."""
    for neg in find(gm, aten.neg):
        x = neg.args[0]
        for user in list(neg.users):
            user.update_arg(0, [x, user.args[0][1]])  # type: ignore[index]
    gm.graph.eliminate_dead_code()
    gm.recompile()


@pytest.mark.parametrize("change", [other_angles, swapped_halves])
def test_what_is_no_rotation_by_halves_stays(change: Callable[[fx.GraphModule], None]) -> None:
    count, skipped = fused("qwen3", change)
    assert count == 0
    assert len(skipped) == 2
