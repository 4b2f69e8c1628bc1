"""The reference provider: paged attention in plain torch, on any device.

The default on a CPU and the oracle of every test. Logits and softmax are float32. The decode path is
vectorised over the batch; prefill and extend sequences are taken one after the other, neighbours of equal
lengths together, without padding.
"""

from __future__ import annotations

import operator
from functools import cache
from itertools import count, groupby, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.capability import Capability
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

CAPABILITY = Capability(
    name="reference", host_phases=frozenset({"prefill"}), is_latent=None, run_on=frozenset({90})
)


def num_sequences(batch_info_host: Tensor) -> int:
    """Sequences of this step, from ``batch_info_host``."""
    info = batch_info_host.tolist()
    return info[0] + info[2] + info[4]


def prepare_metadata(
    num_tokens: int,
    num_seqs: int,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
    max_blocks_per_seq: int,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """See ``ops.prepare_metadata``."""
    device = cache_loc.device
    starts, ends = cu_num_pages[:num_seqs, None], cu_num_pages[1 : num_seqs + 1, None]
    columns = starts + torch.arange(max_blocks_per_seq, dtype=torch.int32, device=device)
    pages = cache_loc[columns.clamp(max=cache_loc.shape[0] - 1)] * (columns < ends)
    block_table = cache_loc.new_zeros((input_pos.shape[0], max_blocks_per_seq))
    block_table[:num_seqs] = pages

    if num_tokens == num_seqs and bool((cu_seqlen[1 : num_seqs + 1] > cu_seqlen[:num_seqs]).all()):
        # One token each, the decode step.
        position = input_pos[:num_seqs].long()
        page = pages.gather(1, (position // page_size)[:, None])[:, 0]
        return block_table, page * page_size + position % page_size

    tokens = torch.arange(num_tokens, dtype=cu_seqlen.dtype, device=device)
    seq = torch.searchsorted(cu_seqlen[1 : num_seqs + 1].contiguous(), tokens, right=True)
    is_real = seq < num_seqs
    seq = seq.clamp_(max=num_seqs - 1)
    position = (input_pos[seq] + tokens - cu_seqlen[seq]).clamp_(0, max_blocks_per_seq * page_size - 1)
    page = block_table[seq, position // page_size].long()
    return block_table, (page * page_size + position % page_size) * is_real


def prepare_ragged_metadata(
    num_seqs: int,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
    block_table: Tensor,
    token_rows: Tensor,
    token_positions: Tensor,
) -> None:
    """See ``cache.prepare_ragged_metadata``."""
    starts, ends = cu_num_pages[:num_seqs, None], cu_num_pages[1 : num_seqs + 1, None]
    columns = starts + torch.arange(block_table.shape[1], device=starts.device)
    block_table.zero_()
    block_table[:num_seqs] = cache_loc[columns.minimum(ends - 1).clamp_(min=0)] * (starts < ends)
    new = cu_seqlen[1 : num_seqs + 1] - cu_seqlen[:num_seqs]
    rows = torch.arange(num_seqs, device=new.device).repeat_interleave(new)
    tokens = torch.arange(rows.shape[0], device=new.device)
    token_rows[: rows.shape[0]] = rows
    past = seq_len_with_cache[:num_seqs] - cu_seqlen[1 : num_seqs + 1]
    token_positions[: rows.shape[0]] = past[rows] + tokens


def append(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See ``ops.append_kv``."""
    planes, _, page_size, head_dim = kv_cache.shape[1:]
    key, value = _quantized(key, k_scale, kv_cache.dtype), _quantized(value, v_scale, kv_cache.dtype)
    if slot_mapping.shape[0] == 1 and kv_cache.device.type == "cpu":  # in half of the calls of torch
        number, position = divmod(int(slot_mapping), page_size)
        for place, new in zip(kv_cache[number].unbind(), (key, value), strict=False):
            place[:, position, : new.shape[-1]] = new[0, 0]
        return
    page = torch.div(slot_mapping, page_size, rounding_mode="floor")
    offset = slot_mapping - page * page_size
    if planes == 2 and key.shape[-1] == value.shape[-1] == head_dim:
        new = torch.stack((key.flatten(0, 1), value.flatten(0, 1)), 1)
        kv_cache.permute(0, 3, 1, 2, 4)[page, offset] = new
        return
    for index, new in enumerate((key, value)[:planes]):
        part = kv_cache[:, index, :, :, : new.shape[-1]]
        part.permute(0, 2, 1, 3)[page, offset] = new.flatten(0, 1)


def _quantized(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x / scale in a dtype; 8-bit floats saturate, and keep NaN."""
    if scale != 1.0:
        x = x.float() * (1.0 / scale)
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x if x.dtype == dtype else x.to(dtype)


def store_result(attended: Tensor, out: Tensor, scale: float) -> None:
    """See ``attention.store_result``."""
    rows = out.view(-1, *attended.shape[1:])
    rows[: attended.shape[0]] = _quantized(attended, scale, out.dtype)
    rows[attended.shape[0] :] = 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotary embedding of ``cache.rope_append``, in float32 and rounded once.

    Args:
        x: [..., heads, head_dim].
        cos: [..., rotary_dim // 2], of the angle of each pair.
        sin: like cos.
        interleaved: pairs are elements 2 i and 2 i + 1; else i and i + rotary_dim // 2.
    """
    half = cos.shape[-1]
    pairs = x[..., : 2 * half].float().unflatten(-1, (half, 2) if interleaved else (2, half))
    a, b = pairs.unbind(-1 if interleaved else -2)
    c, s = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    rotated = torch.stack((a * c - b * s, b * c + a * s), -1 if interleaved else -2).flatten(-2)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), -1)


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``; lengths are read on the host."""
    bounds, totals = cu_seqlen.tolist(), seq_len_with_cache.tolist()
    outputs, end = [], 0
    news = map(operator.sub, bounds[1:], bounds)
    # The explicit attention would hold the logits of all of them at once.
    apart = repeat(0) if _is_plain(spec) else count()
    for (new, total, _), alike in groupby(zip(news, totals, apart, strict=False)):
        start, end = end, end + len(list(alike))
        if total == 0:  # rows of a captured step that no sequence uses
            continue
        q = query[bounds[start] : bounds[end]].unflatten(0, (end - start, new))
        k, v = _gather_pages(kv_cache, block_table[start:end], total, q, spec)
        outputs.append(_attend(q, k, v, total, spec).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def extend(*args: Any, max_len: int) -> Tensor:
    """``prefill`` of sequences that have at most ``max_len`` new tokens."""
    return prefill(*args)


def decode(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``; all sequences at once."""
    # On a GPU reading the lengths would wait for the device: take the whole table.
    on_cpu = query.device.type == "cpu"
    lengths = seq_len_with_cache.tolist() if on_cpu else [block_table.shape[1] * kv_cache.shape[3]]
    longest = max(lengths)
    k, v = _gather_pages(kv_cache, block_table, longest, query, spec)
    if not _is_plain(spec):
        last = (seq_len_with_cache - 1)[:, None]
        bias = visibility_bias(last, longest, spec)
        return _attend_dense(query[:, None], k, v, bias, spec, last)[:, 0]
    within = spec.chunk is None and (spec.sliding_window is None or longest <= spec.sliding_window)
    sees_all = on_cpu and min(lengths) == longest and within
    mask = None if sees_all else ~_hidden((seq_len_with_cache - 1)[:, None], longest, spec)
    query = query.unsqueeze(2)
    return F.scaled_dot_product_attention(query, k, v, mask, scale=spec.scale, enable_gqa=True).squeeze(2)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """See ``ops.attention``."""
    positions = torch.arange(query.shape[1], device=query.device)[None]
    bias = query.new_zeros((), dtype=torch.float32)
    if is_causal:
        bias = visibility_bias(positions, key.shape[1], spec)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(
                ~attn_mask, float("-inf")
            )
        bias = bias + attn_mask
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    out = _attend_dense(query, k, v, bias, spec, positions)
    return out.contiguous()


def visibility_bias(q_positions: Tensor, num_keys: int, spec: AttentionSpec) -> Tensor:
    """0 where a query may see a key, -inf elsewhere.

    Args:
        q_positions: int [b, n], position of each query in its sequence.
        num_keys: keys are at positions 0 .. num_keys - 1.
        spec: its sliding_window and chunk are applied on top of causality.

    Returns:
        float32 [b, 1, n, num_keys].
    """
    hidden = _hidden(q_positions, num_keys, spec)
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _hidden(q_positions: Tensor, num_keys: int, spec: AttentionSpec) -> Tensor:
    """bool [b, 1, n, num_keys]: where ``visibility_bias`` is -inf."""
    q = q_positions[:, None, :, None]
    k = torch.arange(num_keys, device=q.device, dtype=q.dtype)
    hidden = k > q
    if spec.sliding_window is not None:
        hidden |= k <= q - spec.sliding_window
    if spec.chunk is not None:
        hidden |= k < torch.div(q, spec.chunk, rounding_mode="floor") * spec.chunk
    return hidden


def _gather_pages(
    kv_cache: Tensor, block_table: Tensor, num_keys: int, query: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """K [b, num_kv_heads, num_keys, head_dim] and V, copied from the pages in one gather."""
    _, planes, num_heads, page_size, width = kv_cache.shape
    num_blocks = -(-num_keys // page_size)
    pages = block_table[:, :num_blocks]
    if kv_cache.is_contiguous():
        # Rows of one (page, K or V, head): a gather of rows is a plain copy of page_size * width.
        heads = _head_rows(planes, num_heads, pages.device)
        rows = torch.add(heads, pages[None, :, None], alpha=planes * num_heads).view(-1)
        gathered = kv_cache.view(-1, page_size * width).index_select(0, rows)
    else:
        gathered = kv_cache[pages].permute(2, 0, 3, 1, 4, 5)
    gathered = gathered.reshape(planes, pages.shape[0], num_heads, num_blocks * page_size, width)
    k, v = gathered[0], gathered[-1]
    head_dim = query.shape[-1]
    k, v = k[:, :, :num_keys, :head_dim], v[:, :, :num_keys, : spec.v_head_dim or head_dim]
    return _dequantized(k, spec.k_scale, query.dtype), _dequantized(v, spec.v_scale, query.dtype)


def _dequantized(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    x = x if scale == 1.0 else x.float() * scale
    return x if x.dtype == dtype else x.to(dtype)


@cache
def _head_rows(planes: int, num_heads: int, device: torch.device) -> Tensor:
    """int32 [planes, 1, num_heads, 1]: the rows of K and V of each head within a page."""
    rows = torch.arange(planes * num_heads, dtype=torch.int32, device=device)
    return rows.view(planes, 1, num_heads, 1)


def _is_plain(spec: AttentionSpec) -> bool:
    """Whether torch's own attention computes it."""
    return spec.logit_cap is None and spec.sinks is None and spec.alibi_slopes is None


def _attend(q: Tensor, k: Tensor, v: Tensor, total: int, spec: AttentionSpec) -> Tensor:
    """The last q.shape[1] tokens of sequences of ``total`` tokens."""
    n = q.shape[1]
    if _is_plain(spec) and n == total and spec.sliding_window is None and spec.chunk is None:
        return _sdpa(q, k, v, None, spec.scale, is_causal=True)
    positions = torch.arange(total - n, total, device=q.device)[None]
    bias = visibility_bias(positions, total, spec)
    if _is_plain(spec):
        return _sdpa(q, k, v, bias.to(q.dtype), spec.scale)
    return _attend_dense(q, k, v, bias, spec, positions)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    spec: AttentionSpec,
    q_positions: Tensor,
) -> Tensor:
    """Explicit attention.

    query [b, n, num_heads, d]; key, value [b, num_kv_heads, t, d]; bias float32, broadcastable to
    [b, num_heads, n, t]; q_positions [1 or b, n]. Returns [b, n, num_heads, v_head_dim].
    """
    b, n, num_heads, _ = query.shape
    num_kv_heads, t = key.shape[1:3]
    # The group's heads become rows of one matrix, so that K and V are never repeated.
    q = query.transpose(1, 2).reshape(b, num_kv_heads, -1, query.shape[-1])
    logits = torch.matmul(q.float(), key.float().transpose(2, 3)).view(b, num_heads, n, t)
    logits = logits.mul_(spec.scale)
    if spec.logit_cap is not None:
        logits = torch.tanh(logits / spec.logit_cap) * spec.logit_cap
    if spec.alibi_slopes is not None:
        distance = torch.arange(t, device=query.device) - q_positions[:, :, None]
        logits = logits + spec.alibi_slopes.float()[:, None, None] * distance[:, None]
    logits = logits + bias
    if spec.sinks is not None:
        logits = torch.cat((logits, spec.sinks.float().view(1, -1, 1, 1).expand(b, -1, n, 1)), -1)
    weights = torch.softmax(logits, -1)[..., :t]
    weights = weights.reshape(b, num_kv_heads, -1, t)
    out = torch.matmul(weights, value.float()).view(b, num_heads, n, -1)
    return out.transpose(1, 2).to(query.dtype)


PROVIDER = Provider(
    capability=CAPABILITY,
    prefill=prefill,
    decode=decode,
    extend=extend,
    verify=extend,
    is_timed=False,
    without_modules="plain torch, nothing to compile, and slow on a GPU",
)
