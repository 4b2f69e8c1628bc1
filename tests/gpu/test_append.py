"""Append where the interpreter cannot judge: rounding, and sizes of real models."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.attention import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tokens", [(1, 1), (32, 1), (1, 1000)], ids=str)
def test_append_rounds_to_nearest(
    tokens: tuple[int, int], dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Random numbers are converted as torch converts them, and no other byte of the pool changes."""
    key = torch.randn(*tokens, 8, 128, device="cuda").to(dtype)
    value = torch.randn(tokens[0], 8, tokens[1], 128, device="cuda").to(dtype).transpose(1, 2)
    ours = torch.randn(40, 2, 8, 32, 128, device="cuda").to(cache_dtype)
    theirs = ours.clone()
    slots = torch.randperm(39 * 32, device="cuda")[: tokens[0] * tokens[1]] + 32
    for scales in ((1.0, 1.0), (0.013, 1.7)) if cache_dtype.itemsize == 1 else ((1.0, 1.0),):
        ops.append_kv(key, value, slots, ours, *scales)
        reference.append(key, value, slots, theirs, *scales)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_append_saturates_in_8_bits(dtype: torch.dtype) -> None:
    """Numbers beyond the range of 8 bits, infinity too, become the largest; NaN is kept, to be seen."""
    values = torch.tensor([6e4, -6e4, 449.0, 465.0, 1.0, float("inf"), -float("inf"), float("nan")])
    key = values.to("cuda", dtype).view(1, 1, 1, 8)
    cache = torch.zeros(2, 2, 1, 16, 8, device="cuda").to(torch.float8_e4m3fn)
    ops.append_kv(key, key, torch.tensor([16], device="cuda"), cache, 1.0, 0.5)
    expected = [448.0, -448.0, 448.0, 448.0, 1.0, 448.0, -448.0]
    assert cache[1, 0, 0, 0, :7].tolist() == expected
    assert cache[1, 1, 0, 0, :7].tolist() == [*expected[:4], 2.0, *expected[5:]]
    assert cache[1, :, 0, 0, 7].isnan().all()
