"""``match_repeat_kv``: the ways of repeating heads become one op, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.graph import edit as g
from tests.transforms.small_models import (
    ATTENTION,
    GROUP,
    HEADS,
    KV_HEADS,
    Attend,
    Layer,
    SmallModel,
    assert_computes,
    aten,
    context,
    count,
    exported,
    find,
    repeat_kv,
    run,
    sdpa,
    snapshot,
)

REPEAT = aten.repeat_interleave


def attention_with(repeat: object) -> Attend:
    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        k, v = repeat(k), repeat(v)  # type: ignore[operator]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def through_views(x: Tensor) -> Tensor:
    b, n, s, d = x.shape
    return x.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).contiguous().view(b, n * GROUP, s, d)


def by_flatten(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, GROUP, -1, -1).flatten(1, 2)


def tiled(x: Tensor) -> Tensor:
    """The heads one after the other, twice: not what grouped heads mean."""
    b, n, s, d = x.shape
    return x[:, None].expand(b, GROUP, n, s, d).reshape(b, n * GROUP, s, d)


@pytest.mark.parametrize("repeat", [repeat_kv, through_views, by_flatten], ids=lambda f: f.__name__)
def test_expanded_heads_become_one_op(repeat: object) -> None:
    """unsqueeze, expand and reshape become repeat_interleave, and attention takes K and V as projected."""
    model, ctx = SmallModel(attention_with(repeat)), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_repeat_kv")
    assert reports["match_repeat_kv"].num_matches == 2
    assert count(gm, REPEAT) == 2
    assert count(gm, aten.expand) == 0
    assert_computes(gm, model)
    gm, _ = run(gm, ctx, "match_attention")
    key = g.op_args(find(gm, ATTENTION)[0])["key"]
    assert KV_HEADS in g.shape(key)
    assert HEADS not in g.shape(key)
    assert_computes(gm, model)


def test_one_head_expanded_to_all_is_multi_query() -> None:
    """An expand of the one head of K and V is the same repeat, written without a reshape."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        k, v = (x[:, :1].expand(-1, HEADS, -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, ctx = SmallModel(attend), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_repeat_kv", "match_attention")
    assert reports["match_repeat_kv"].num_matches == 2
    assert 1 in g.shape(g.op_args(find(gm, ATTENTION)[0])["key"])
    assert_computes(gm, model)


def test_tiled_heads_are_not_a_repeat() -> None:
    """Heads in the order 0 1 0 1 stay here; match_attention puts the query's heads into that order."""
    model, ctx = SmallModel(attention_with(tiled)), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_repeat_kv")
    assert reports["match_repeat_kv"].num_matches == 0
    gm, _ = run(gm, ctx, "match_attention")
    assert KV_HEADS in g.shape(g.op_args(find(gm, ATTENTION)[0])["key"])
    assert_computes(gm, model)


def test_expanded_tokens_are_left_alone() -> None:
    """Only dimensions of a constant size can be heads; a broadcast over the batch is none."""

    def mix(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1))
        return x + heads.mean((0, 1), keepdim=True).expand(heads.shape).flatten(2)

    model, ctx = SmallModel(mix=mix), context()
    gm = exported(model, ctx=ctx)
    before = snapshot(gm)
    gm, reports = run(gm, ctx, "match_repeat_kv")
    assert (reports["match_repeat_kv"].num_matches, snapshot(gm)) == (0, before)
    assert_computes(gm, model)


def test_graph_without_repeats_is_unchanged() -> None:
    """Grouped attention as the op does it has nothing to match: same module, same nodes."""
    ctx = context()
    gm = exported(SmallModel(sdpa), ctx=ctx)
    before = snapshot(gm)
    same, reports = run(gm, ctx, "match_repeat_kv")
    assert same is gm
    assert snapshot(gm) == before
    assert reports["match_repeat_kv"].num_matches == 0


def test_repeated_heads_with_other_users_stay_for_them() -> None:
    """What else reads the repeated heads still gets all of them."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        k, v = repeat_kv(k), repeat_kv(v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out + k.sin() + torch.cos(v)

    model = SmallModel(attend, attend)
    gm = exported(model, "match_repeat_kv", "match_attention")
    assert count(gm, REPEAT) == 4
    assert KV_HEADS in g.shape(g.op_args(find(gm, ATTENTION)[1])["key"])
    assert_computes(gm, model)
