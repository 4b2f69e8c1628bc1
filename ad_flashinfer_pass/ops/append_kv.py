"""``ad_flashinfer.append_kv``: write this step's K and V to the pages."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.kernels.attention import reference
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def append_kv(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write K and V of the new tokens to their slots, divided by their scales, in the dtype of the cache.

    On CUDA by one Triton kernel, elsewhere by the reference. An element is multiplied, in float32, by the
    reciprocal of its scale, which is rounded to float32, and the product is rounded to the nearest number of
    the cache's dtype, of two as near to the even one. A number beyond the range of an 8-bit float becomes the
    largest that it has, of the same sign; NaN stays NaN.

    Args:
        key: [b, s, num_kv_heads, head_dim], any strides.
        value: [b, s, num_kv_heads, v_head_dim].
        slot_mapping: int64 [b * s], page * page_size + offset. Slot 0 is scratch.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, max(head_dim, v_head_dim)], K at [:, 0],
            V at [:, 1]; or [num_pages, 1, ...] with K alone, whose first part V is. Written in place at the
            slots and nowhere else.
        k_scale: what an element of K in the cache stands for; other than 1.0 only in caches of 8 bits.
        v_scale: likewise for V.
    """
    if kv_cache.device.type == "cuda":
        from ad_flashinfer_pass.kernels.cache import append  # needs triton

        with launching(kv_cache.device, key=key, value=value, slot_mapping=slot_mapping):
            append.append(key, value, slot_mapping, kv_cache, k_scale, v_scale)
    else:
        reference.append(key, value, slot_mapping, kv_cache, k_scale, v_scale)


define(append_kv, fake=lambda **_: None, mutates=("kv_cache",))
