"""The shapes of FlashInfer's own tests, with our bound on every element in place of 98 % of them within 0.01.

Source: FlashInfer 0.6.18, tests/attention/test_xqa.py, test_xqa_batch_decode.py,
test_trtllm_gen_attention_decode_xqa.py and test_fmha_v2_prefill.py; what this package does not ask of the
kernels (8-bit results, NVFP4, other layouts, heads of 512) is left out.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.kernels.attention import fmha_v2, xqa
from tests.gpu.paged import PagedBatch, Shape
from tests.gpu.test_conformance import assert_decodes, assert_within_bound, prefilled, skip_unless_it_runs

FP8 = torch.float8_e4m3fn
# test_xqa: batch, length, KV heads, page, head size, group; a window of 256 and sinks or not.
XQA = [
    (Shape(num_kv_heads=heads, page_size=page, head_dim=dim, group=group), batch, length)
    for heads, (page, dim, group), (batch, length) in product(
        (2, 4),
        ((16, 32, 8), (64, 32, 16), (64, 128, 8), (32, 128, 16)),
        ((1, 2), (4, 15), (1, 256), (4, 512), (1, 514)),
    )
]
# The decode tests: batch, page, KV heads, group, head size; lengths up to 110, and a window of 128 or not.
DECODE = [
    (4, 16, 2, 1, 128),
    (4, 32, 2, 5, 128),
    (128, 64, 2, 6, 128),
    (256, 64, 4, 8, 128),
    (4, 32, 2, 16, 128),
    (128, 64, 2, 5, 128),
    (4, 16, 2, 1, 256),
    (4, 32, 2, 5, 256),
    (256, 64, 4, 8, 256),
]
CACHES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"kv_dtype": FP8},
    "fp8_half": {"kv_dtype": FP8, "k_scale": 0.5, "v_scale": 0.5},
}


@pytest.mark.parametrize("options", [{}, {"sliding_window": 256}, {"has_sinks": True}], ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("shape", "batch", "length"), XQA, ids=str)
def test_xqa(shape: Shape, batch: int, length: int, cache: str, options: dict[str, Any]) -> None:
    """Equal lengths in random pages."""
    shape = replace(shape, **CACHES[cache], **options)
    skip_unless_it_runs(xqa, shape, "decode")
    assert_decodes(PagedBatch([(length - 1, 1)] * batch, shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 128}, {"has_sinks": True}], ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(
    case: tuple[int, int, int, int, int], cache: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Random lengths, one of them the longest."""
    batch, page, heads, group, dim = case
    shape = Shape(group=group, num_kv_heads=heads, head_dim=dim, page_size=page, dtype=dtype)
    shape = replace(shape, **CACHES[cache], **options)
    skip_unless_it_runs(xqa, shape, "decode")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 111, (batch,), generator=generator).tolist()
    assert_decodes(PagedBatch([(length - 1, 1) for length in [110, *lengths[1:]]], shape))


@pytest.mark.parametrize("window", [None, 128, 513], ids="window_{}".format)
@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.parametrize("batch", [1, 16])
def test_fmha_v2_prefill(batch: int, heads: int, dim: int, page: int, window: int | None) -> None:
    """Prompts of up to 1024 tokens, one of them the longest."""
    shape = Shape(group=heads // 4, num_kv_heads=4, head_dim=dim, page_size=page, sliding_window=window)
    skip_unless_it_runs(fmha_v2, shape, "prefill")
    generator = torch.Generator().manual_seed(0)
    lengths = [1024, *torch.randint(2, 1025, (batch - 1,), generator=generator).tolist()]
    tokens = PagedBatch([(0, length) for length in lengths], shape)
    assert_within_bound(tokens, prefilled(fmha_v2, tokens))
