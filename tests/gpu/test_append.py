"""Append where the interpreter cannot judge: rounding, and sizes of real models."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels import reference

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
    ops.append_kv(key, value, slots, ours)
    reference.append(key, value, slots, theirs)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
