"""``ad_flashinfer.cached_attention``: attend over the pages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.absorbing import absorbing
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching

_HERE = nullcontext()
"""Of a CPU, where there is no device to be made the current one."""


def cached_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    scale: float,
    v_head_dim: int,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    prefill_kernel: str = "reference",
    decode_kernel: str = "reference",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    max_extend_len: int = 0,
    verify_kernel: str = "",
    key_up: Tensor | None = None,
    value_up: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new tokens over their sequence's pages, which already hold them.

    The tokens are those of prefill and extend sequences, then one of each decode sequence.

    Args:
        query: [b, s, num_heads, head_dim] with b * s tokens, padding last.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, max(head_dim, v_head_dim)], or [num_pages, 1, ...]
            of a latent: V is the first v_head_dim elements of K; read only.
        batch_info_host: int32, host, see ``sequence_info.BatchInfo``.
        cu_seqlen: int32 [max_batch_size + 1], exclusive prefix sum of new tokens.
        seq_len_with_cache: int32 [max_batch_size], cached and new tokens.
        block_table: int32 [max_batch_size, max_blocks_per_seq].
        scale: factor of the logits.
        v_head_dim: head size of V and of the result.
        sliding_window: W tokens are visible, the current one included.
        logit_cap: with c, logits become c * tanh(logits / c).
        chunk: only keys of the query's own chunk of C positions are visible.
        sinks: [num_heads], one more logit in each softmax, whose value is zero.
        alibi_slopes: float32 [num_heads], slope * (key position - query position) is added.
        prefill_kernel: name of the provider for prefill and extend sequences.
        decode_kernel: likewise for decode sequences, and others by batch size: a ``KernelPlan``.
        k_scale: what an element of K in the cache is multiplied by; see ``ops.append_kv``.
        v_scale: likewise for V.
        max_extend_len: if not 0, no extend sequence has more tokens than that, as drafts to be verified, and
            they are for ``extend`` of decode_kernel if it has that, as `xqa` does; else they are prefilled.
        verify_kernel: if given, all extend sequences have max_extend_len tokens, which are for ``verify`` of
            the provider of that name, or of others by the number of sequences: a ``KernelPlan``.
        key_up: [num_heads, n, v_head_dim], any strides: the pages hold a latent, as ``ops.attention`` says.
        value_up: [num_heads, size, v_head_dim], likewise.

    Returns:
        [b, s, num_heads, v_head_dim], or size with value_up, in the dtype of query; zeros for padding tokens.
    """
    spec = AttentionSpec(
        scale,
        sliding_window,
        logit_cap,
        chunk,
        k_scale,
        v_scale,
        v_head_dim,
        sinks,
        alibi_slopes,
        key_up,
        value_up,
    )
    device: AbstractContextManager[object] = _HERE
    if query.device.type == "cuda":
        inputs = {"kv_cache": kv_cache, "seq_len_with_cache": seq_len_with_cache, "block_table": block_table}
        device = launching(query.device, cu_seqlen=cu_seqlen, **inputs)
    num_prefill, prefill_tokens, num_extend, extend_tokens, num_decode = batch_info_host.tolist()[:5]
    num_long, long_tokens = num_prefill + num_extend, prefill_tokens + extend_tokens
    tokens = query.flatten(0, 1)
    parts = []
    extend = None
    if num_extend and max_extend_len:
        extend = select.extender(decode_kernel, verify_kernel, num_extend)
    if extend is None:
        num_prefill, prefill_tokens = num_long, long_tokens
    with device:
        if num_prefill:
            provider = select.PROVIDERS[prefill_kernel]
            prefill = provider.prefill if provider.expands else absorbing(provider.prefill, spec)
            lens, pages = seq_len_with_cache[:num_prefill], block_table[:num_prefill]
            bounds = cu_seqlen[: num_prefill + 1]
            parts.append(prefill(tokens[:prefill_tokens], kv_cache, bounds, lens, pages, spec))
        if extend is not None:
            rows, bounds = slice(num_prefill, num_long), cu_seqlen[num_prefill : num_long + 1]
            bounds = bounds - prefill_tokens if prefill_tokens else bounds
            drafts = tokens[prefill_tokens:long_tokens]
            lens, pages = seq_len_with_cache[rows], block_table[rows]
            attend = absorbing(extend, spec)
            parts.append(attend(drafts, kv_cache, bounds, lens, pages, spec, max_len=max_extend_len))
        if num_decode:
            rows = slice(num_long, num_long + num_decode)
            one_each = tokens[long_tokens : long_tokens + num_decode]
            lens, pages = seq_len_with_cache[rows], block_table[rows]
            name, options = KernelPlan.parse(decode_kernel).at(num_decode)
            decode = absorbing(select.PROVIDERS[name].decode, spec)
            parts.append(decode(one_each, kv_cache, lens, pages, spec, *options))
        padding = tokens.shape[0] - long_tokens - num_decode
        if padding:
            size = v_head_dim if value_up is None else value_up.shape[1]
            parts.append(tokens.new_zeros(padding, query.shape[2], size))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.contiguous().view(*query.shape[:-1], out.shape[-1])


def _fake(query: Tensor, v_head_dim: int, value_up: Tensor | None, **_: object) -> Tensor:
    size = v_head_dim if value_up is None else value_up.shape[1]
    return query.new_empty((*query.shape[:-1], size))


define(cached_attention, fake=_fake)
