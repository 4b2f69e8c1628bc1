"""Attention as people write it by hand, in graphs from export, after decompositions and from make_fx.

Each model has a layer for each of a few forms. It is served from pages, in every kind of step, and must give
the logits of the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ad_flashinfer_pass.errors import MaskError, PackingError, UnsupportedError
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import (
    GROUP,
    HEADS,
    KV_HEADS,
    SCALE,
    VOCAB,
    Attend,
    Layer,
    SmallModel,
    additive,
    causal,
    eager,
    repeat_kv,
    sdpa,
    softmax_with_sinks,
    tokens,
)

WINDOW, CAP = 4, 2.0


def form(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """An attention that needs nothing of its layer."""
    return lambda layer, q, k, v, p: function(q, k, v, p)


def hidden(logits: Tensor, visible: Tensor) -> Tensor:
    return logits.masked_fill(~visible, float("-inf"))


def merged(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [b * n, s, d]."""
    return x.reshape(-1, *x.shape[2:])


def seq_first_einsum(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), repeat_kv(k).transpose(1, 2), repeat_kv(v).transpose(1, 2)
    weights = hidden(torch.einsum("bihd,bjhd->bhij", q, k) * SCALE, causal(p)).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q = q.unflatten(1, (KV_HEADS, GROUP))
    weights = hidden(torch.einsum("bhgid,bhjd->bhgij", q, k) * SCALE, causal(p)[:, :, None]).softmax(-1)
    return torch.einsum("bhgij,bhjd->bhgid", weights, v).flatten(1, 2)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q = q.unflatten(1, (KV_HEADS, GROUP))
    weights = hidden(q @ k[:, :, None].mT * SCALE, causal(p)[:, :, None]).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


def group_outside(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Query head i reads KV head i % KV_HEADS."""
    q = q.unflatten(1, (GROUP, KV_HEADS))
    weights = hidden(q @ k[:, None].mT * SCALE, causal(p)[:, :, None]).softmax(-1)
    return (weights @ v[:, None]).flatten(1, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    k, v = k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def bmm(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    b, n, s, _ = q.shape
    logits = torch.bmm(merged(q), merged(repeat_kv(k)).mT).view(b, n, s, s) * SCALE
    weights = (logits + additive(causal(p))).softmax(-1)
    return torch.bmm(weights.view(b * n, s, s), merged(repeat_kv(v))).view(q.shape)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    b, n, s, _ = q.shape
    bias = additive(causal(p)).expand(b, n, s, s).reshape(b * n, s, s)
    logits = torch.baddbmm(bias, merged(q), merged(repeat_kv(k)).mT, alpha=SCALE)
    return torch.bmm(logits.softmax(-1), merged(repeat_kv(v))).view(q.shape)


def float_softmax(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p), q.dtype)
    return torch.softmax(logits, -1, dtype=torch.float32).to(q.dtype) @ repeat_kv(v)


def transposed(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """softmax((K Q^T)^T) V, written with the keys first and softmax over them."""
    logits = hidden(repeat_kv(k) @ q.mT * SCALE, causal(p).mT)
    return (repeat_kv(v).mT @ logits.softmax(-2)).mT


def heads_last(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Logits [b, s, t, n], with the softmax in the middle."""
    logits = (q @ repeat_kv(k).mT * SCALE + additive(causal(p))).permute(0, 2, 3, 1)
    return logits.softmax(2).permute(0, 3, 1, 2) @ repeat_kv(v)


def exponentials(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p))
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ repeat_kv(v)


def log_softmax(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p))
    return torch.log_softmax(logits, -1).exp() @ repeat_kv(v)


def multiplied_by_the_mask(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    mask = causal(p).float()
    return ((q @ repeat_kv(k).mT * SCALE) * mask - 1e4 * (1 - mask)).softmax(-1) @ repeat_kv(v)


def floored(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p))
    return torch.max(logits, torch.tensor(torch.finfo(logits.dtype).min)).softmax(-1) @ repeat_kv(v)


def sdpa_triangle(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)


def sdpa_window(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, additive(causal(p, WINDOW)), scale=SCALE, enable_gqa=True)


def sdpa_repeated(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    k, v = k.repeat_interleave(GROUP, 1), v.repeat_interleave(GROUP, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_expanded(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), causal(p), scale=SCALE)


def sdpa_of_merged_heads(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = merged(q), merged(repeat_kv(k)), merged(repeat_kv(v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).view(-1, HEADS, *q.shape[1:])


def one_head(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """All of the query's heads read the first one of K and V, by broadcasting."""
    weights = (q @ k[:, :1].mT * SCALE + additive(causal(p))).softmax(-1)
    return weights @ v[:, :1]


def one_head_expanded(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    k, v = (x[:, :1].expand(-1, HEADS, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def v_repeated_after_a_change(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """K has fewer heads than V, which share a cache."""
    weights = (q @ repeat_kv(k).mT * SCALE + additive(causal(p))).softmax(-1)
    return weights @ (repeat_kv(v) * torch.arange(1, HEADS + 1)[:, None, None])


def one_head_of_v(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """All heads of K read the first one of V."""
    weights = (q @ repeat_kv(k).mT * SCALE + additive(causal(p))).softmax(-1)
    return weights @ v[:, :1]


def cap_and_sinks(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = torch.tanh(q @ repeat_kv(k).mT * SCALE / CAP) * CAP + additive(causal(p, WINDOW))
    return softmax_with_sinks(logits, layer) @ repeat_kv(v)


def sinks_by_scaling(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p))
    share = torch.sigmoid(torch.logsumexp(logits, -1) - layer.sinks.view(1, -1, 1))
    return (logits.softmax(-1) @ repeat_kv(v)) * share[..., None]


def flex(mask: Callable[..., Tensor], score: Callable[..., Tensor] | None = None) -> Attend:
    """flex_attention with these functions."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        blocks = create_block_mask(mask, None, None, q.shape[2], q.shape[2], device="cpu")
        out = flex_attention(q, k, v, score_mod=score, block_mask=blocks, scale=SCALE, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    return attend


def flex_causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def flex_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < WINDOW)


def flex_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def flex_alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + (k - q) * torch.exp2(-(h + 1.0))


FORMS: dict[str, Attend] = {
    "sdpa": sdpa,
    "seq_first_einsum": form(seq_first_einsum),
    "grouped_einsum": form(grouped_einsum),
    "grouped_matmul": form(grouped_matmul),
    "group_outside": form(group_outside),
    "tiled": form(tiled),
    "bmm": form(bmm),
    "baddbmm": form(baddbmm),
    "float_softmax": form(float_softmax),
    "transposed": form(transposed),
    "heads_last": form(heads_last),
    "exponentials": form(exponentials),
    "log_softmax": form(log_softmax),
    "multiplied_by_the_mask": form(multiplied_by_the_mask),
    "floored": form(floored),
    "sdpa_triangle": form(sdpa_triangle),
    "sdpa_window": form(sdpa_window),
    "sdpa_repeated": form(sdpa_repeated),
    "sdpa_expanded": form(sdpa_expanded),
    "sdpa_of_merged_heads": form(sdpa_of_merged_heads),
    "one_head": form(one_head),
    "one_head_expanded": form(one_head_expanded),
    "v_repeated_after_a_change": form(v_repeated_after_a_change),
    "one_head_of_v": form(one_head_of_v),
    "cap_and_sinks": cap_and_sinks,
    "sinks_by_scaling": sinks_by_scaling,
    "scaled_query": eager(scores=lambda q, k: (q * SCALE) @ k.mT),
    "divided": eager(scores=lambda q, k: q @ k.mT / (1 / SCALE)),
    "masked_fill": eager(mask=lambda x, p: hidden(x, causal(p))),
    "where": eager(mask=lambda x, p: torch.where(causal(p), x, torch.finfo(x.dtype).min)),
    "flex_causal": flex(flex_causal),
    "flex_window_and_cap": flex(flex_window, flex_cap),
    "flex_alibi": flex(flex_causal, flex_alibi),
    "learned_temperature": lambda layer, q, k, v, p: (
        hidden(q @ repeat_kv(k).mT * layer.sinks.exp()[:, None, None] * SCALE, causal(p)).softmax(-1)
        @ repeat_kv(v)
    ),
    "learned_scale": lambda layer, q, k, v, p: (
        hidden(q @ repeat_kv(k).mT * layer.sinks.exp()[0], causal(p)).softmax(-1) @ repeat_kv(v)
    ),
}


def traced(model: nn.Module, way: str) -> nn.Module:
    """The graph of a model, made in this way; the module itself for ``export``, which the pass does."""
    ids, positions = tokens(2, 13)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    if way == "export":
        return model
    if way == "make_fx":

        def call(input_ids: Tensor, position_ids: Tensor) -> Any:
            return model(input_ids, position_ids)

        return make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(ids, positions)
    program = torch.export.export(model, (ids, positions), dynamic_shapes=(dynamic,) * 2, strict=False)
    return program.run_decompositions().module()


WAYS = ("export", "decomposed", "make_fx")
LAYERS = [tuple(FORMS)[start : start + 4] for start in range(0, len(FORMS), 4)]
# The decompositions of export are slow to run, and few of them are not also make_fx's.
CASES = [(names, way) for names in LAYERS for way in WAYS if way != "decomposed"]
CASES += [(names, "decomposed") for names in LAYERS if {"sdpa", "baddbmm", "sinks_by_scaling"} & {*names}]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("names", "way"), CASES, ids=["+".join((*names, way)) for names, way in CASES])
def test_every_form_is_served_in_every_kind_of_graph(names: tuple[str, ...], way: str) -> None:
    """Four layers of different forms give the module's own logits from pages."""
    model = SmallModel(*(FORMS[name] for name in names)).eval()

    assert_serves_like(cached(traced(model, way)), model)


class MultiheadAttention(nn.Module):
    """Two layers of torch.nn.MultiheadAttention, as its options allow it to be called."""

    def __init__(self, batch_first: bool, need_weights: bool, is_bool: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first, self.need_weights, self.is_bool = batch_first, need_weights, is_bool
        self.tokens, self.positions = nn.Embedding(VOCAB, 32), nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=batch_first) for _ in range(2))
        self.head = nn.Linear(32, VOCAB)
        for layer in self.layers:
            layer.in_proj_weight.data.mul_(3.0)  # type: ignore[operator]
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, VOCAB]."""
        x = self.tokens(input_ids) + self.positions(position_ids)
        size = input_ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size)
        mask = mask.isinf() if self.is_bool else mask
        for layer in self.layers:
            y = x if self.batch_first else x.transpose(0, 1)
            y, _ = layer(y, y, y, attn_mask=mask, need_weights=self.need_weights)
            x = x + (y if self.batch_first else y.transpose(0, 1))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [(True, False, True), (False, True, False)], ids=["batch_first", "seq_first_with_weights"]
)
def test_multihead_attention_is_served(options: tuple[bool, bool, bool], way: str) -> None:
    """Batch or sequence first, with and without weights, with a boolean or an additive mask."""
    model = MultiheadAttention(*options).eval()

    assert_serves_like(cached(traced(model, way)), model)


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder with a causal mask: MultiheadAttention's fast path, which is no matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(VOCAB, 32), nn.Embedding(64, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, VOCAB)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, VOCAB]."""
        x = self.tokens(input_ids) + self.positions(position_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        logits: Tensor = self.head(self.encoder(x, mask=mask, is_causal=True))
        return logits


def test_transformer_encoder_with_a_causal_mask_is_served() -> None:
    """The stock module, in eval mode."""
    model = Encoder().eval()

    assert_serves_like(cached(model), model)


def flex_of_noise(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + torch.cumsum(score[None], 0)[0]


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | (k < 3)


def every(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= 0


def attend_with_weights(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    logits = q @ repeat_kv(k).mT * SCALE + additive(causal(p))
    return logits.softmax(-1) @ repeat_kv(v) + logits.amax(-1, keepdim=True).clamp(min=0)


def normalised_late(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """The sum divides the result, not the weights, so that there is no softmax to find."""
    weights = torch.exp(q @ repeat_kv(k).mT * SCALE + additive(causal(p)))
    return (weights @ repeat_kv(v)) / weights.sum(-1, keepdim=True)


REFUSED: dict[str, tuple[tuple[Attend, ...], type[Exception], str]] = {
    "flex_score_mod": ((flex(flex_causal, flex_of_noise),), UnsupportedError, "score_mod with aten"),
    "flex_prefix": ((flex(prefix),), MaskError, "at query 0 and key 1 the key is visible"),
    "flex_all": ((flex(every),), MaskError, "the key is visible"),
    "logits_read_twice": ((attend_with_weights,), UnsupportedError, "has logits that .*amax.* reads too"),
    "one_layer_without_softmax": ((sdpa, normalised_late), PackingError, "over pairs of tokens"),
}


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused(name: str) -> None:
    """Never a wrong token: what is not read is refused, also where another layer is."""
    forms, error, said = REFUSED[name]

    with pytest.raises(error, match=said):
        cached(SmallModel(*forms).eval())
