"""Prefill over a latent with K and V of each head expanded: fewer operations than over the latent itself.

A logit over [c, r] with W_UK absorbed takes rank + rest products, and its value rank more; over K and V it is
n + rest and size: of DeepSeek-V3 1,088 against 320. To expand a key takes as much as to absorb W_UK and W_UV
for a query. So the new tokens are always expanded: where they have no past, nothing is to be absorbed. The
past of a sequence is expanded where it has enough new tokens to pay for it, as far as there is memory; the
rest of it is attended absorbed.

This is right for any batch. A softmax over keys A and B is the mean of those over A and over B, weighted by
their sums of exponentials, so that each key may be on either side. Both sides read the pages, which hold the
new tokens already: a token's row is the same wherever a prompt was cut, in 8 bits, too. Which side a key is
on is decided on the device, by lengths alone: nothing is read on the host, so that a captured call stays
valid, and equal inputs give equal bits. Sequences without tokens have no share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec


class Config(NamedTuple):
    """How the kernels are launched."""

    queries: int
    """Tokens of a program of ``attend``."""
    keys: int
    """That it reads at once."""
    warps: int
    stages: int


def default_config(key_size: int, value_size: int) -> Config:
    """The launch for heads of K and V of those sizes."""
    return Config(128, 64 if max(key_size, value_size) <= 128 else 32, 8, 3)


def default_least(heads: int) -> int:
    """New tokens of a sequence whose past is expanded: few rows do not fill the GPU with K and V expanded."""
    return max(128, 4096 // heads)


def covers(spec: AttentionSpec, num_tokens: int, width: int) -> bool:
    """Whether it computes a site with rows of that width, and is worth it for so many tokens."""
    items = (spec.sliding_window, spec.logit_cap, spec.chunk, spec.sinks, spec.alibi_slopes)
    if spec.key_up is None or spec.value_up is None or any(item is not None for item in items):
        return False
    (_, nope, rank), size = spec.key_up.shape, spec.value_up.shape[1]
    fits = max(nope, size) <= 256 and block_of(rank) + block_of(width - rank) <= 576  # of shared memory
    return fits and num_tokens >= FEWEST


def block_of(size: int) -> int:
    """Elements of a tile, a power of two, as products take them."""
    return max(16, 1 << (size - 1).bit_length()) if size else 16


FEWEST = 128
"""Tokens of a step, below which all of it is absorbed."""
PAST_QUERIES = 64
"""Tokens of a program of ``attend_past``, as many as a product has rows."""
EXTRA_BYTES = 2**29
"""Of K and V of keys of the past."""


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    *,
    config: Config | None = None,
    extra: int | None = None,
    least: int | None = None,
    num_programs: int | None = None,
) -> Tensor:
    """See ``attention.provider``; the query has absorbed nothing. Rows of no sequence are left as they are.

    Args:
        config: default: ``default_config``.
        extra: keys of the past that are expanded, at most; default: of ``EXTRA_BYTES``.
        least: new tokens of a sequence whose past is expanded; default: ``default_least``.
        num_programs: of ``attend_past``, and half of those of ``expand``; default: as many as processors.
    """
    import triton

    from ad_flashinfer_pass.kernels.attention import latent_prefill_kernel as kernel

    key_up, value_up = spec.key_up, spec.value_up
    assert key_up is not None
    assert value_up is not None
    (tokens, heads, _), seqs, device = query.shape, len(seq_len_with_cache), query.device
    nope, size, rank, width = key_up.shape[1], value_up.shape[1], key_up.shape[2], kv_cache.shape[4]
    query = query if query.stride(2) == 1 else query.contiguous()
    assert (kv_cache.stride(4), block_table.stride(1), seq_len_with_cache.stride(0)) == (1, 1, 1)
    if extra is None:
        extra = EXTRA_BYTES // (heads * (nope + size) * query.itemsize)
        extra = min(extra, block_table.numel() * kv_cache.shape[3])
    if config is None:
        config = default_config(nope, size)
    if num_programs is None:
        num_programs = torch.cuda.get_device_properties(device).multi_processor_count if query.is_cuda else 3
    room = tokens + extra + kernel.PAD
    shares = {
        "SEQUENCES": triton.next_power_of_2(seqs),
        "LEAST": default_least(heads) if least is None else least,
    }
    sizes = {"WIDTH": width, "RANK": rank}
    pages = (kv_cache.stride(0), kv_cache.stride(3), block_table.stride(0))
    blocks = {
        "NOPE_BLOCK": block_of(nope),
        "SIZE_BLOCK": block_of(size),
        "REST_BLOCK": block_of(width - rank),
    }
    rows = query.new_empty(room, width)
    kernel.gather[(triton.cdiv(room, 32),)](
        kv_cache,
        cu_seqlen,
        seq_len_with_cache,
        block_table,
        rows,
        *pages,
        seqs,
        extra,
        **shares,
        WIDTH=width,
        PAGE=kv_cache.shape[3],
        ROWS=32,
        COLUMNS=128,
        num_warps=4,
    )
    keys, values = (query.new_empty(heads, room, up.shape[1]) for up in (key_up, value_up))
    for up, out, block in (
        (key_up, keys, blocks["NOPE_BLOCK"]),
        (value_up, values, blocks["SIZE_BLOCK"]),
    ):
        kernel.expand[(2 * num_programs,)](
            rows,
            up,
            cu_seqlen,
            seq_len_with_cache,
            out,
            *up.stride(),
            seqs,
            extra,
            room,
            **shares,
            **sizes,
            HEADS=heads,
            SIZE=up.shape[1],
            SIZE_BLOCK=block,
            ROWS=128,
            DEPTH=64,
            num_warps=8,
            num_stages=3,
        )
    out = query.new_empty(tokens, heads, size)
    stats = query.new_empty(tokens, heads, dtype=torch.float32)
    tile = {"QUERIES": PAST_QUERIES, "KEYS": 64}
    factors = (spec.scale * spec.k_scale, spec.v_scale)
    kernel.attend[(heads, tokens // config.queries + seqs)](
        query,
        keys,
        rows,
        values,
        cu_seqlen,
        seq_len_with_cache,
        out,
        stats,
        *factors,
        *query.stride()[:2],
        seqs,
        extra,
        room,
        **shares,
        **sizes,
        **blocks,
        NOPE=nope,
        SIZE=size,
        QUERIES=config.queries,
        KEYS=config.keys,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    of_parts = (
        stats.new_empty(num_programs, PAST_QUERIES, size),
        stats.new_empty(num_programs, PAST_QUERIES),
    )
    kernel.attend_past[(num_programs,)](
        query,
        kv_cache,
        key_up,
        value_up,
        cu_seqlen,
        seq_len_with_cache,
        block_table,
        out,
        stats,
        query.new_empty(num_programs, PAST_QUERIES, rank),
        *of_parts,
        *factors,
        *query.stride()[:2],
        *pages,
        *key_up.stride(),
        *value_up.stride(),
        seqs,
        extra,
        **shares,
        **sizes,
        **blocks,
        HEADS=heads,
        RANK_BLOCK=block_of(rank),
        NOPE=nope,
        SIZE=size,
        PAGE=kv_cache.shape[3],
        **tile,
        DEPTH=64,
        num_warps=8,
        num_stages=2,
    )
    kernel.add_parts[(num_programs, PAST_QUERIES // 16)](
        cu_seqlen,
        seq_len_with_cache,
        out,
        stats,
        *of_parts,
        seqs,
        extra,
        num_programs,
        **shares,
        **tile,
        HEADS=heads,
        SIZE=size,
        SIZE_BLOCK=blocks["SIZE_BLOCK"],
        ROWS=16,
        num_warps=4,
    )
    return out
