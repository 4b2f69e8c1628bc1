"""The result of an attention to the memory that a caller gave, as one Triton kernel.

Copy, quantization and the zeros of padding tokens, which are three kernels and more in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ad_flashinfer_pass.kernels.cache.append import _converted

_BLOCK = 1024


def store_result(attended: Tensor, out: Tensor, scale: float) -> None:
    """Write ``attended / scale`` and then zeros to ``out``.

    Args:
        attended: [n, num_heads, v_head_dim], contiguous.
        out: contiguous, of at least as many elements, in the dtype of attended or in float8_e4m3fn, to which
            numbers beyond its range are saturated.
        scale: multiplied as its reciprocal, in float32; see ``ops.append_kv``.
    """
    limit = torch.finfo(out.dtype).max if out.dtype.itemsize == 1 else None
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    _store[grid](attended, out, attended.numel(), out.numel(), 1.0 / scale, LIMIT=limit, BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["factor"])
def _store(attended, out, num_attended, num_out, factor, LIMIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(attended + at, mask=at < num_attended, other=0.0)
    tl.store(out + at, _converted(value, factor, out.dtype.element_ty, LIMIT), mask=at < num_out)
