"""``ad_flashinfer.rope_append``: rotate Q and K, and write K and V to the pages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import reference
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding by halves (GPT-NeoX) of Q and K, then ``append_kv`` of K and V.

    On CUDA by one Triton kernel, elsewhere by the reference; both rotate in float32 and round once.

    Args:
        query: [b, s, num_heads, head_dim], any strides.
        key: [b, s, num_kv_heads, head_dim], any strides.
        value: [b, s, num_kv_heads, v_head_dim], any strides.
        cos: [1 or b, s, rotary_dim]; the second half repeats the first and is not read. Elements of a head
            from rotary_dim on are not rotated.
        sin: likewise.
        slot_mapping: int64 [b * s], page * page_size + offset. Slot 0 is scratch.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, max(head_dim, v_head_dim)], written at the slots.
        k_scale: what an element of K in the cache stands for.
        v_scale: likewise for V.
        query_norm: [head_dim]; each head of Q is first divided by sqrt(mean(q^2) + eps), and multiplied by
            this.
        key_norm: likewise for K; both or neither.
        eps: of the norms.

    Returns:
        The rotated query [b, s, num_heads, head_dim], contiguous.
    """
    half = cos.shape[-1] // 2
    cos, sin = (x.expand(*query.shape[:2], -1)[..., :half] for x in (cos, sin))
    if kv_cache.device.type == "cuda":
        from ad_flashinfer_pass.kernels.cache import rope_append as kernel  # needs triton

        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        inputs = {"query": query, "key": key, "value": value, "slot_mapping": slot_mapping, "cos": cos}
        with launching(kv_cache.device, **inputs):
            norms = None if query_norm is None or key_norm is None else (query_norm, key_norm, eps)
            return kernel.rope_append(
                query,
                key,
                value,
                kv_cache,
                slot_mapping,
                cos,
                sin,
                k_scale=k_scale,
                v_scale=v_scale,
                norms=norms,
            )
    dtype = query.dtype
    if query_norm is not None and key_norm is not None:  # rounded after the rotation
        query, key = (
            F.rms_norm(x.float(), weight.shape, weight.float(), eps)
            for x, weight in ((query, query_norm), (key, key_norm))
        )
    key = reference.rotate(key, cos, sin, interleaved=False)
    reference.append(key, value, slot_mapping, kv_cache, k_scale, v_scale)
    return reference.rotate(query, cos, sin, interleaved=False).to(dtype).contiguous()


define(rope_append, fake=lambda query, **_: query.new_empty(query.shape), mutates=("kv_cache",))
