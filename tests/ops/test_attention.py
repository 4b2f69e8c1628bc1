"""``ad_flashinfer.attention``, the source op, against torch's attention and the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass import ops
from tests.kernels.attention.test_reference import FEATURES
from tests.kernels.paged_batch import Features, dense_attention

B, S, D = 2, 9, 8


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def qkv(kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return random(B, S, 4, D), random(B, S, kv_heads, D, seed=1), random(B, S, kv_heads, D, seed=2)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """torch's attention in the layout bsnd, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_causal_equals_torch(kv_heads: int) -> None:
    """With is_causal and the default scale it is torch's own causal attention; heads group in order."""
    q, k, v = qkv(kv_heads)
    torch.testing.assert_close(
        ops.attention(q, k, v, None, True).double(), sdpa(q, k, v, is_causal=True), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "additive"])
@pytest.mark.parametrize("heads", [1, 4], ids=["one_for_all_heads", "one_a_head"])
def test_masks_equal_torch(dtype: torch.dtype, heads: int) -> None:
    """Boolean masks hide where they are False, additive ones are added, whatever dimension they broadcast."""
    q, k, v = qkv()
    mask = random(B, heads, S, S, seed=3)
    if dtype == torch.bool:
        mask = (mask > 0) | torch.eye(S, dtype=torch.bool)
    wanted = sdpa(q, k, v, mask if dtype == torch.bool else mask.double(), scale=0.7)
    torch.testing.assert_close(ops.attention(q, k, v, mask, scale=0.7).double(), wanted, atol=1e-5, rtol=1e-5)


def test_no_mask_sees_everything() -> None:
    """Without a mask and without is_causal every query sees every key, of which there may be more."""
    q, _, _ = qkv()
    k, v = random(B, 13, 2, D, seed=4), random(B, 13, 2, D, seed=5)
    torch.testing.assert_close(ops.attention(q, k, v).double(), sdpa(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", FEATURES)
def test_features_equal_the_formula(features: str) -> None:
    """Window, chunk, cap, sinks and slopes mean the same here as in the cached op."""
    q, k, v = qkv()
    spec = FEATURES[features]
    sinks = random(4, seed=6) if spec.has_sinks else None
    slopes = random(4, seed=7).abs() if spec.has_alibi else None
    found = ops.attention(
        q, k, v, None, True, spec.scale, sinks, spec.sliding_window, spec.logit_cap, spec.chunk, slopes
    )
    wanted = torch.stack([dense_attention(q[b], k[b], v[b], 0, spec, sinks, slopes) for b in range(B)])
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


def test_cap_is_applied_before_the_mask() -> None:
    """A hidden key stays hidden under a cap: the cap is not applied to the mask's values."""
    q, k, v = qkv()
    mask = torch.where(torch.ones(S, S, dtype=torch.bool).tril(), 0.0, float("-inf"))
    found = ops.attention(q, k, v, mask, scale=1.0, logit_cap=1.5)
    spec = Features(scale=1.0, logit_cap=1.5)
    wanted = torch.stack([dense_attention(q[b], k[b], v[b], 0, spec) for b in range(B)])
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_result_has_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    """16-bit inputs give a 16-bit result, rounded once from a float32 softmax."""
    q, k, v = (x.to(dtype) for x in qkv())
    found = ops.attention(q, k, v, None, True)
    assert found.dtype == dtype
    wanted = sdpa(q, k, v, is_causal=True)
    # One rounding of the result: half a unit in the last place, on top of float32 noise.
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=torch.finfo(dtype).eps / 2 + 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "is_causal needs as many keys as queries, got 13 and 9"),
        ({"sliding_window": 3}, "sliding_window and chunk narrow a causal mask: set is_causal"),
        ({"chunk": 3}, "sliding_window and chunk narrow a causal mask: set is_causal"),
    ],
    ids=["causal_with_more_keys", "window_without_causal", "chunk_without_causal"],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    """An argument that could only be ignored is an error."""
    q, _, _ = qkv()
    k = random(B, 13, 2, D)
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, k, **options)
