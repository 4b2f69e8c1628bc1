"""``eliminate_noops``: what returns its input goes, what only looks like it stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.transforms.small_models import (
    Mix,
    SmallModel,
    assert_computes,
    aten,
    context,
    count,
    run,
    snapshot,
)

NOOPS: dict[str, tuple[Mix, object]] = {
    "cast_to_its_own_dtype": (lambda m, x, p: x.to(torch.float32), aten.to),
    "float": (lambda m, x, p: x.float(), aten.to),
    "type_as_itself": (lambda m, x, p: x.type_as(m.lm_head.weight), aten.type_as),
    "whole_slice": (lambda m, x, p: x[:, :, :], aten.slice),
    "slice_beyond_the_end": (lambda m, x, p: x[..., :10_000], aten.slice),
    "view_as_it_is": (lambda m, x, p: x.view(x.shape), aten.view),
    "reshape_as_it_is": (lambda m, x, p: x.reshape(x.shape[0], -1, x.shape[2]), aten.reshape),
    "expand_to_its_own_size": (lambda m, x, p: x.expand(-1, -1, -1), aten.expand),
    "dropout_in_eval": (lambda m, x, p: F.dropout(x, 0.5, training=False), aten.dropout),
    "dropout_of_nothing": (lambda m, x, p: F.dropout(x, 0.0, training=True), aten.dropout),
    "detach": (lambda m, x, p: x.detach(), aten.detach),
}
MEANINGFUL: dict[str, tuple[Mix, object]] = {
    "cast": (lambda m, x, p: x.to(torch.float64).to(torch.float32), aten.to),
    "copying_cast": (lambda m, x, p: x.to(torch.float32, copy=True), aten.to),
    "step_of_two": (lambda m, x, p: x[..., ::2].repeat(1, 1, 2), aten.slice),
    "part": (lambda m, x, p: F.pad(x[..., 1:], (0, 1)), aten.slice),
    "other_shape_of_the_same_size": (lambda m, x, p: x.transpose(1, 2).reshape(x.shape), aten.reshape),
    "clone": (lambda m, x, p: x.clone().mul_(2.0) + x, aten.clone),
}


def cleaned(mix: Mix) -> tuple[torch.fx.GraphModule, SmallModel, int]:
    model, ctx = SmallModel(mix=lambda m, x, p: mix(m, x * 2.0, p) + 1.0), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops")
    return gm, model, reports["eliminate_noops"].num_matches


@pytest.mark.parametrize("noop", NOOPS)
def test_noop_is_removed(noop: str) -> None:
    """The node goes, is counted, and the graph computes the same."""
    mix, target = NOOPS[noop]
    gm, model, num_matches = cleaned(mix)
    assert count(gm, target) == 0
    assert num_matches >= 1
    assert_computes(gm, model, tolerance=0)


@pytest.mark.parametrize("op", MEANINGFUL)
def test_what_changes_something_stays(op: str) -> None:
    """Copies, real casts, partial slices and shapes read in another order are not no-ops."""
    mix, target = MEANINGFUL[op]
    gm, model, _ = cleaned(mix)
    assert count(gm, target) >= 1
    assert_computes(gm, model, tolerance=0)


def test_graph_without_noops_is_unchanged() -> None:
    """Nothing matched: the same module with the same nodes, and zero in the report."""
    ctx = context()
    gm, _ = run(SmallModel(), ctx, "export_model", "eliminate_noops")
    before = snapshot(gm)
    again, reports = run(gm, ctx, "eliminate_noops")
    assert again is gm
    assert snapshot(gm) == before
    assert reports["eliminate_noops"].num_matches == 0


def test_chain_and_several_users() -> None:
    """A chain of no-ops goes whole, and all who read its end read its beginning."""

    def mix(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        y = x.float().detach().view(x.shape)
        return y.sin() + y.cos() + y

    gm, model, num_matches = cleaned(mix)
    assert num_matches >= 3
    assert count(gm, aten.to, aten.detach, aten.view) == 0
    assert_computes(gm, model, tolerance=0)


def test_export_assertions_are_dropped() -> None:
    """The assertions on dtype and device that export writes beside casts do not survive."""
    gm, _, _ = cleaned(lambda m, x, p: x.to(torch.float64).to(torch.float32))
    assert count(gm, aten._assert_tensor_metadata) == 0
