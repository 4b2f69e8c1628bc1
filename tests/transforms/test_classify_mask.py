"""``classify_mask``: masks become attributes that compute the same, or stop the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.graph import edit as g
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import (
    ATTENTION,
    HEADS,
    SCALE,
    Attend,
    Layer,
    SmallModel,
    additive,
    assert_computes,
    causal,
    context,
    exported,
    find,
    run,
    sdpa,
    softmax_with_sinks,
)

SLOPES = torch.tensor([0.5, 0.25, 0.3, 0.01])


def masked(mask: Callable[[Tensor], Tensor]) -> Attend:
    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(p), scale=SCALE, enable_gqa=True)

    return attend


def chunked(p: Tensor) -> Tensor:
    return causal(p) & (p[:, None, :, None] // 4 == p[:, None, None, :] // 4)


def alibi(p: Tensor) -> Tensor:
    k = torch.arange(p.shape[1])
    return SLOPES[:, None, None] * (k - k[:, None]) + additive(causal(p))


def one_slope(p: Tensor) -> Tensor:
    k = torch.arange(p.shape[1])
    return 0.5 * k + additive(causal(p))


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "causal": (causal, {}),
    "window": (lambda p: additive(causal(p, 3)), {"sliding_window": 3}),
    "chunk": (chunked, {"chunk": 4}),
    "alibi": (alibi, {"alibi_slopes": SLOPES}),
    "one_slope": (one_slope, {"alibi_slopes": torch.full((HEADS,), 0.5)}),
}
STEPS = ("match_repeat_kv", "match_attention", "classify_mask")


@pytest.mark.parametrize("name", MASKS)
def test_mask_becomes_attributes_that_compute_the_same(name: str) -> None:
    """The op's attributes stand for the mask, whose nodes are gone, and the logits are those of the model."""
    mask, wanted = MASKS[name]
    model = SmallModel(masked(mask))

    gm = exported(model, *STEPS)

    (site,) = find(gm, ATTENTION)
    args = g.op_args(site)
    assert args["attn_mask"] is None
    assert args["is_causal"]
    found = {
        item: args[item] for item in ("sliding_window", "chunk", "alibi_slopes") if args[item] is not None
    }
    if "alibi_slopes" in found:
        found["alibi_slopes"] = gm.get_buffer(found["alibi_slopes"].target)
        assert torch.equal(found.pop("alibi_slopes"), wanted["alibi_slopes"])
    assert found == {item: value for item, value in wanted.items() if item != "alibi_slopes"}
    assert_computes(gm, model)


@pytest.mark.parametrize("name", ["alibi", "chunk"])
def test_class_serves_like_the_mask(name: str) -> None:
    """Through the pages and kernels, a class means what the mask meant."""
    model = SmallModel(masked(MASKS[name][0]))

    assert_serves_like(cached(model), model)


def test_equal_masks_are_proved_once_and_share_slopes() -> None:
    """Layers that build the same mask again share one proof and one buffer."""
    model, ctx = SmallModel(masked(alibi), masked(alibi), masked(causal)), context()

    gm, reports = run(model, ctx, "export_model", "eliminate_noops", *STEPS)

    report = reports["classify_mask"]
    assert report.num_matches == 3
    assert len(report.notes) == 2
    assert [name for name, _ in gm.named_buffers() if "alibi" in name] == ["alibi_slopes_0"]
    assert_computes(gm, model)


def test_mask_that_is_causal_already_is_left_alone() -> None:
    """A site without a mask needs no proof."""
    _, reports = run(SmallModel(sdpa), context(), "export_model", "eliminate_noops", *STEPS)

    assert reports["classify_mask"].num_matches == 0


def test_attention_without_a_mask_is_refused() -> None:
    """Attention in which tokens see later ones has no cache."""
    model = SmallModel(
        lambda layer, q, k, v, p: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=SCALE)
    )

    with pytest.raises(MaskError, match="has no mask, so each token sees later ones"):
        exported(model, *STEPS)


def test_unknown_mask_is_refused_with_its_place() -> None:
    """The refusal names the node, the line of the user's code and the first place that differs."""
    model = SmallModel(masked(lambda p: causal(p) | (p[:, None, None, :] < 3)))

    with pytest.raises(MaskError, match=r"node \w+ \(.*\.py:\d+\).*at query 0 and key 1 the key is visible"):
        exported(model, *STEPS)


def test_row_offset_beside_sinks_is_refused() -> None:
    """A number added to whole rows is nothing to softmax, but would change the share of the sinks."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        logits = q @ k.transpose(2, 3) * SCALE + torch.where(causal(p), 2.5, torch.finfo(torch.float32).min)
        return softmax_with_sinks(logits, layer) @ v

    with pytest.raises(MaskError, match="changes the share of the attention sinks"):
        exported(SmallModel(attend), *STEPS)


def test_slopes_of_a_wrong_number_of_heads_are_refused() -> None:
    """An ALiBi bias must be one slope a query head."""
    gm = exported(SmallModel(masked(alibi)), *STEPS[:2])
    (site,) = find(gm, ATTENTION)
    query = g.op_args(site)["query"]
    fake = g.value(query)
    query.meta["val"] = fake[:, :, :3]

    with pytest.raises(MaskError, match="one slope for each of the 3 query heads, got 4"):
        run(gm, context(), "classify_mask")
