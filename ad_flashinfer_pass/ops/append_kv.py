"""``ad_flashinfer.append_kv``: write this step's K and V to the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import reference

_NAME = "ad_flashinfer::append_kv"

torch.library.define(
    _NAME,
    "(Tensor key, Tensor value, Tensor slot_mapping, Tensor(a!) kv_cache) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def append_kv(key: Tensor, value: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    """Write K and V of the new tokens to their slots, converted to the dtype of the cache.

    On CUDA by one Triton kernel, elsewhere by the reference.

    Args:
        key: [b, s, num_kv_heads, head_dim], any strides.
        value: [b, s, num_kv_heads, v_head_dim].
        slot_mapping: int64 [b * s], page * page_size + offset. Slot 0 is scratch.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, max(head_dim, v_head_dim)], K at [:, 0],
            V at [:, 1]. Written in place at the slots and nowhere else.
    """
    if kv_cache.device.type == "cuda":
        from ad_flashinfer_pass.kernels import append  # needs triton

        append.append(key, value, slot_mapping, kv_cache)
    else:
        reference.append(key, value, slot_mapping, kv_cache)


torch.library.impl(_NAME, "default", append_kv)


@torch.library.register_fake(_NAME)
def _(key: Tensor, value: Tensor, slot_mapping: Tensor, kv_cache: Tensor) -> None:
    return None
