"""``match_attention``: which forms become the one op, with what attributes, and which are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass.errors import NoAttentionError, UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from tests.transforms.small_models import (
    ATTENTION,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SCALE,
    Attend,
    Layer,
    SmallModel,
    additive,
    assert_computes,
    aten,
    causal,
    context,
    count,
    eager,
    exported,
    find,
    repeat_kv,
    run,
    sdpa,
    snapshot,
    softmax_with_sinks,
)

CAP = 2.0
SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax, aten.scaled_dot_product_attention)


def sdpa_masked(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal(p), scale=SCALE, enable_gqa=True)


def sdpa_additive(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, additive(causal(p)), scale=SCALE, enable_gqa=True)


def sdpa_expanded(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), causal(p), scale=SCALE)


def sdpa_interleaved(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, causal(p), scale=SCALE)


def hide(logits: Tensor, p: Tensor) -> Tensor:
    return logits.masked_fill(~causal(p), float("-inf"))


def capped(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.transpose(2, 3) * SCALE / CAP) * CAP


def of_each_head(q: Tensor) -> Tensor:
    """[n, 1, 1], no constant."""
    return torch.linspace(0.5, 1.5, HEADS, dtype=q.dtype)[:, None, None]


FORMS: dict[str, Attend] = {
    "sdpa_masked": sdpa_masked,
    "sdpa_additive": sdpa_additive,
    "sdpa_expanded": sdpa_expanded,
    "sdpa_interleaved": sdpa_interleaved,
    "eager": eager(),
    "scaled_query": eager(scores=lambda q, k: (q * SCALE) @ k.transpose(2, 3)),
    "scaled_key": eager(scores=lambda q, k: q @ (k * SCALE).transpose(2, 3)),
    "scaled_both": eager(scores=lambda q, k: (q * SCALE**0.5) @ (k * SCALE**0.5).transpose(2, 3)),
    "divided": eager(scores=lambda q, k: q @ k.transpose(-1, -2) / (1 / SCALE)),
    "masked_fill": eager(mask=hide),
    "where": eager(mask=lambda x, p: torch.where(causal(p), x, torch.finfo(x.dtype).min)),
    "where_hidden": eager(mask=lambda x, p: torch.where(~causal(p), float("-inf"), x)),
    "mask_first": eager(mask=lambda x, p: additive(causal(p)) + x),
    "softmax_cast": eager(weights=lambda x, _: torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)),
    "float_scores": eager(scores=lambda q, k: q.float() @ k.float().transpose(2, 3) * SCALE),
    "dropout_in_eval": eager(weights=lambda x, _: F.dropout(torch.softmax(x, -1), 0.1, training=False)),
    "stable_softmax": eager(weights=lambda x, _: torch.softmax(x - x.amax(-1, keepdim=True), -1)),
    "scaled_after_the_mask": eager(
        scores=lambda q, k: q @ k.transpose(2, 3), mask=lambda x, p: (x + additive(causal(p)) / 1e3) * SCALE
    ),
    "two_masks": eager(mask=lambda x, p: hide(x + additive(causal(p)), p)),
    "scale_in_a_buffer": eager(scores=lambda q, k: q @ k.transpose(2, 3) * torch.full((), SCALE)),
    "temperature_of_each_head": eager(scores=lambda q, k: q @ k.transpose(2, 3) * SCALE * of_each_head(q)),
    "temperature_first": eager(scores=lambda q, k: of_each_head(q)[None] * (q @ k.transpose(2, 3)) * SCALE),
    "temperature_of_each_query": eager(
        scores=lambda q, k: SCALE * (q @ k.transpose(2, 3)) / q[..., :1].exp()
    ),
    "temperature_before_the_logit_cap": eager(
        scores=lambda q, k: torch.tanh(q @ k.transpose(2, 3) * SCALE * of_each_head(q) / CAP) * CAP
    ),
    "einsum": eager(
        scores=lambda q, k: torch.einsum("bnsd,bntd->bnst", q, k) * SCALE,
        product=lambda w, v: torch.einsum("bnst,bntd->bnsd", w, v),
    ),
    "heads_in_the_batch": eager(
        scores=lambda q, k: (
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(
                q.shape[0], -1, q.shape[2], k.shape[2]
            )
            * SCALE
        ),
        product=lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view(v.shape),
    ),
    "logit_cap": eager(scores=capped),
    "sinks": eager(weights=softmax_with_sinks),
    "cap_and_sinks": eager(scores=capped, weights=softmax_with_sinks),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_op(form: str) -> None:
    """One op is left, with K and V as projected, the scale of the form, and the same logits."""
    model, ctx = SmallModel(FORMS[form]), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_repeat_kv", "match_attention")
    (node,) = find(gm, ATTENTION)
    assert count(gm, *SOFTMAX) == 0
    args = g.op_args(node)
    assert g.shape(args["key"])[2:] == (KV_HEADS, HEAD_DIM)
    assert g.shape(args["value"])[2:] == (KV_HEADS, HEAD_DIM)
    assert args["scale"] == pytest.approx(SCALE, rel=1e-12)
    assert args["attn_mask"] is not None
    assert (args["logit_cap"] is not None) == ("cap" in form)
    assert (args["sinks"] is not None) == ("sinks" in form)
    assert_computes(gm, model)
    report = reports["match_attention"]
    assert (report.num_matches, report.skipped) == (1, [])


def test_is_causal_and_the_default_scale_are_read() -> None:
    """An op with is_causal and no scale has no mask and 1 / sqrt(head_dim)."""
    model = SmallModel(sdpa)
    gm = exported(model, "match_attention")
    args = g.op_args(find(gm, ATTENTION)[0])
    assert args["attn_mask"] is None
    assert args["is_causal"]
    assert args["scale"] == HEAD_DIM**-0.5
    assert_computes(gm, model)


def test_cap_and_sinks_are_read_as_they_are() -> None:
    """The cap is the constant of the form, and the sinks are the layer's parameter."""
    gm = exported(SmallModel(FORMS["cap_and_sinks"]), "match_repeat_kv", "match_attention")
    args = g.op_args(find(gm, ATTENTION)[0])
    assert args["logit_cap"] == pytest.approx(CAP)
    assert "sinks" in str(args["sinks"].target)


def test_half_precision_keeps_its_dtypes() -> None:
    """In bfloat16 with a float32 softmax, q, k and v enter the op as projected; its result is cast back."""
    form = eager(
        scores=lambda q, k: q.float() @ k.float().transpose(2, 3) * SCALE,
        weights=lambda x, layer: torch.softmax(x, -1),
        product=lambda w, v: (w @ v.float()).to(v.dtype),
    )
    model = SmallModel(form).bfloat16()
    gm = exported(model, "match_repeat_kv", "match_attention")
    (node,) = find(gm, ATTENTION)
    args = g.op_args(node)
    assert {g.value(args[name]).dtype for name in ("query", "key", "value")} == {torch.bfloat16}
    # The op rounds its result once; the model rounds the same float32 sum once too.
    assert_computes(gm, model, tolerance=2 * torch.finfo(torch.bfloat16).eps)


def test_a_chain_of_different_forms_is_matched_whole() -> None:
    """Each layer is matched by itself, in the order of the layers."""
    forms = [sdpa, FORMS["sdpa_expanded"], FORMS["sinks"], FORMS["logit_cap"]]
    model, ctx = SmallModel(*forms), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_repeat_kv", "match_attention")
    assert reports["match_attention"].num_matches == 4
    assert count(gm, *SOFTMAX) == 0
    places = [g.module_path(node) for node in find(gm, ATTENTION)]
    assert [path.removeprefix("model.") for path in places] == [f"layers.{i}" for i in range(4)]
    assert_computes(gm, model)


def test_result_k_and_v_may_have_other_users() -> None:
    """What else reads the result, K or V reads the same values after the rewrite."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        k_all, v_all = repeat_kv(k), repeat_kv(v)
        out = F.scaled_dot_product_attention(q, k_all, v_all, causal(p))
        return out * 2 + out.sin() + k_all + v_all.cos()

    model = SmallModel(attend)
    gm = exported(model, "match_repeat_kv", "match_attention")
    assert count(gm, ATTENTION) == 1
    assert_computes(gm, model)


def test_graph_without_attention_is_refused_and_unchanged() -> None:
    """Zero sites is an error that says what was looked for; the graph is left as it was."""
    gm = exported(SmallModel(mix=lambda model, x, p: torch.softmax(x, -1)))
    before = snapshot(gm)
    with pytest.raises(NoAttentionError) as raised:
        run(gm, context(), "match_attention")
    message = str(raised.value)
    assert message.startswith(f"no attention was found in a graph of {len(before)} nodes: looked for ")
    assert "scaled_dot_product_attention and for matmul -> softmax -> matmul" in message
    assert "passed over node softmax (" in message
    assert "a softmax, but not of each token's logits for the other tokens" in message
    assert snapshot(gm) == before


def test_other_softmaxes_are_passed_over_with_the_reason() -> None:
    """A router's softmax beside attention is skipped, reported with its line, and left alone."""

    def gate(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        return x * torch.softmax(x, -1)

    model, ctx = SmallModel(sdpa, mix=gate), context()
    gm, reports = run(model, ctx, "export_model", "eliminate_noops", "match_attention")
    (skip,) = reports["match_attention"].skipped
    assert skip.reason == "a softmax, but not of each token's logits for the other tokens"
    assert "small_models.py:" in skip.where
    assert count(gm, aten.softmax) == 1
    assert_computes(gm, model)


REFUSED: dict[str, tuple[Attend, str]] = {
    "cap_after_the_mask": (
        eager(mask=lambda x, p: torch.tanh((x + additive(causal(p))) / CAP) * CAP),
        "applies a mask before the logits are capped",
    ),
    "scaled_cap": (
        eager(scores=lambda q, k: capped(q, k) * 2.0),
        "caps the logits and scales them afterwards",
    ),
    "tanh_that_is_no_cap": (
        eager(scores=lambda q, k: torch.tanh(q @ k.transpose(2, 3)) * 3.0),
        "has a tanh in the logits that is not c * tanh(x / c)",
    ),
    "rounded_scores": (
        eager(scores=lambda q, k: torch.div(q @ k.transpose(2, 3), 2.0, rounding_mode="floor")),
        "applies aten.div.Tensor_mode to the logits",
    ),
    "scale_of_each_key": (
        eager(scores=lambda q, k: (q @ k.transpose(2, 3)) * k[..., 0][:, :, None]),
        "applies aten.mul.Tensor to the logits",
    ),
    "temperature_after_the_mask": (
        eager(mask=lambda x, p: (x + additive(causal(p))) * of_each_head(x)),
        "multiplies a mask by a tensor; multiply the logits before the mask is applied",
    ),
    "temperature_after_the_logit_cap": (
        eager(scores=lambda q, k: capped(q, k) * of_each_head(q)),
        "caps the logits and scales them afterwards",
    ),
    "sinks_with_a_temperature": (
        eager(weights=lambda x, layer: softmax_with_sinks_of(x, layer, factor=of_each_head(x))),
        "scales or caps its sinks together with the logits",
    ),
    "visible_keys_of_low_weight": (
        eager(mask=lambda x, p: x.masked_fill(~causal(p), -2e4) * 1e-3),
        "applies aten.masked_fill.Scalar to the logits",
    ),
    "shift_by_the_maximum_over_queries": (
        eager(weights=lambda x, _: torch.softmax(x - x.amax(2, keepdim=True), -1)),
        "has logits that node",
    ),
    "shift_by_another_maximum": (
        eager(weights=lambda x, _: torch.softmax(x - x.sin().amax(2, keepdim=True), -1)),
        "has logits that node",
    ),
    "probabilities_read_twice": (
        eager(product=lambda w, v: w @ v * w.sum(-1, keepdim=True)),
        "has probabilities that 2 nodes read, not V alone",
    ),
    "probabilities_changed": (
        eager(weights=lambda x, _: torch.softmax(x, -1) ** 2),
        "applies aten.pow.Tensor_Scalar to the probabilities",
    ),
    "dropout": (
        eager(weights=lambda x, _: F.dropout(torch.softmax(x, -1), 0.1, training=True)),
        "has dropout; export the model in eval mode",
    ),
    "sinks_scaled_with_the_logits": (
        eager(weights=lambda x, layer: softmax_with_sinks_of(x, layer, factor=2.0)),
        "scales or caps its sinks together with the logits",
    ),
    "first_column_cut_off": (
        eager(weights=lambda x, layer: softmax_with_sinks_of(x, layer, start=1)),
        "cuts off something other than the column of sinks",
    ),
    "two_columns_of_sinks": (
        eager(weights=lambda x, layer: softmax_with_sinks_of(x, layer, columns=2)),
        "concatenates something other than one column of sinks to the logits",
    ),
    "sinks_that_depend_on_the_token": (
        eager(weights=lambda x, _: torch.softmax(torch.cat([x, x[..., :1].cos()], -1), -1)[..., :-1]),
        "has sinks that are not one value a head",
    ),
}


def softmax_with_sinks_of(
    logits: Tensor, layer: Layer, factor: float | Tensor = 1.0, start: int = 0, columns: int = 1
) -> Tensor:
    """Sinks, but scaled together with the logits, cut off at the wrong end, or several."""
    sinks = layer.sinks.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], columns)
    weights = torch.softmax(torch.cat([logits, sinks], -1) * factor, -1)
    return weights[..., start : logits.shape[-1] + start] if start else weights[..., :-columns]


@pytest.mark.parametrize("form", REFUSED)
def test_eager_attention_that_does_more_than_the_op_is_refused(form: str) -> None:
    """What cannot be expressed stops the pass with node, line and what is done: nothing is dropped."""
    attend, reason = REFUSED[form]
    gm = exported(SmallModel(attend), "match_repeat_kv")
    with pytest.raises(UnsupportedError) as raised:
        run(gm, context(), "match_attention")
    message = str(raised.value)
    assert message.startswith("node ")
    assert f"this attention {reason}" in message
    assert "small_models.py:" in message
    assert "\n" not in message


class Raw(nn.Module):
    """Calls an attention on tensors of any shape, made from an embedding of the tokens."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.tokens = nn.Embedding(29, 8)
        self.attend = attend

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, 8]."""
        out: Tensor = self.attend(self.tokens(input_ids))
        return out


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        return F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.25)[:, 0]


class FewerQueries(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        more = torch.cat([x, x], 2)
        return F.scaled_dot_product_attention(x, more, more, is_causal=True)[:, 0]


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (Dropout(), "has dropout 0.25; export the model in eval mode."),
        (
            FewerQueries(),
            "aligned to the upper left, which no cached kernel does; the graph must hold no cache.",
        ),
    ],
    ids=["dropout", "fewer_queries_than_keys"],
)
def test_sdpa_that_cannot_be_taken_over_is_refused(attend: nn.Module, message: str) -> None:
    """An SDPA call that the op cannot express is an error that names node, line and reason."""
    gm = exported(Raw(attend))
    with pytest.raises(UnsupportedError) as raised:
        run(gm, context(), "match_attention")
    assert message in str(raised.value)
    assert "test_match_attention.py:" in str(raised.value)
    assert "\n" not in str(raised.value)
