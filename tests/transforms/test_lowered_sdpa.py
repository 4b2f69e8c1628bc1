"""scaled_dot_product_attention as AOT leaves it in a graph: the op of the device's backend, with its mask.

The ops of CUDA are traced with fake tensors, so their graphs are made without a GPU; they are served on the
CPU, and give the logits of the module that calls scaled_dot_product_attention itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ad_flashinfer_pass.errors import UnsupportedError
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import SCALE, Attend, Layer, SmallModel, causal, repeat_kv, tokens

aten = torch.ops.aten
WINDOW = 4


def traced(model: nn.Module) -> fx.GraphModule:
    """As a compiler under aot_autograd gets it, with parameters as attributes."""

    def call(input_ids: Tensor, position_ids: Tensor) -> Any:
        return model(input_ids, position_ids)

    return make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tokens(2, 13))


def bias_of(visible: Tensor) -> Tensor:
    """A boolean mask as torch's CUDA path makes it additive."""
    return torch.where(visible.logical_not(), float("-inf"), torch.scalar_tensor(0.0))


def aligned(bias: Tensor, q: Tensor) -> Tensor:
    """As torch brings the mask of the efficient kernel to strides of 16 elements, and to all heads."""
    size = bias.shape[-1]
    padded = F.pad(bias, (0, 16 - size % 16))[..., :size]
    return padded.expand(*q.shape[:3], size)


def of_class(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True, scale=SCALE)


def with_window(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    mask = causal(positions, WINDOW)
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask, scale=SCALE)


def flash(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    k, v = repeat_kv(k), repeat_kv(v)
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=SCALE)[0]


def flash_grouped(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=SCALE)[0]


def flash_padded(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """A head size that is no multiple of 8 is padded to one."""
    q, k, v = (F.pad(x, (0, 8)) for x in (q, repeat_kv(k), repeat_kv(v)))
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=SCALE)[0]
    return out[..., :-8]


def efficient(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    k, v = repeat_kv(k), repeat_kv(v)
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, True, scale=SCALE)[0]


def efficient_window(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    bias = aligned(bias_of(causal(positions, WINDOW)), q)
    k, v = repeat_kv(k), repeat_kv(v)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=SCALE)[0]


def cudnn(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    k, v = repeat_kv(k), repeat_kv(v)
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=SCALE)[0]


def cudnn_window(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    bias = bias_of(causal(positions, WINDOW)).expand(-1, q.shape[1], -1, -1)
    return aten._scaled_dot_product_cudnn_attention(q, repeat_kv(k), repeat_kv(v), bias, False, scale=SCALE)[
        0
    ]


def math(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    k, v = repeat_kv(k), repeat_kv(v)
    return aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, True, scale=SCALE)[0]


def overrideable(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    bias = bias_of(causal(positions, WINDOW)).expand(-1, q.shape[1], -1, -1)
    op = aten._scaled_dot_product_fused_attention_overrideable
    return op(q, repeat_kv(k), repeat_kv(v), bias, scale=SCALE)[0]


@pytest.mark.parametrize(
    ("lowered", "source"),
    [
        pytest.param(of_class, of_class, id="cpu"),
        pytest.param(with_window, with_window, id="cpu_window"),
        (flash, of_class),
        (flash_grouped, of_class),
        (flash_padded, of_class),
        (efficient, of_class),
        (efficient_window, with_window),
        (cudnn, of_class),
        (cudnn_window, with_window),
        (math, of_class),
        (overrideable, with_window),
    ],
)
def test_each_lowering_of_sdpa_is_served(lowered: Attend, source: Attend) -> None:
    """Two layers of it from pages, in every kind of step."""
    graph = traced(SmallModel(lowered, lowered).eval())
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" not in targets
    assert_serves_like(cached(graph), SmallModel(source, source).eval())


def with_sum(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, repeat_kv(k), repeat_kv(v), None, True, 0.0, True
    )
    return out + lse[:, :, : q.shape[2], None]


def with_dropout(layer: Layer, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.1, True)[0]


@pytest.mark.parametrize(
    ("attend", "match"),
    [
        (with_sum, "returns more than its result to the rest of the graph"),
        (with_dropout, r"has dropout 0\.1; export the model in eval mode"),
    ],
)
def test_what_a_lowering_does_beside_attention_is_refused(attend: Attend, match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        cached(traced(SmallModel(attend).eval()))
