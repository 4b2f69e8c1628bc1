"""Prefill by a Triton kernel of this package, on compute capability 8.9 and above.

Like ``split_decode`` it needs no plan and no FlashInfer, so that a CUDA graph holds it for any lengths, pages
and number of sequences. It serves what ``fmha_v2`` and ``fa3`` do not: above all caches of 8 bits, whose
numbers it takes to float16, which holds them exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.capability import Capability
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

CAPABILITY = Capability(
    name="tile_prefill",
    phases=frozenset({"prefill"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 10, 12}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    kv_dtypes={"prefill": frozenset({torch.float8_e4m3fn})},
    head_dims=frozenset(range(16, 257, 8)),
    run_on=frozenset({90}),
)


class Config(NamedTuple):
    """How the kernel is launched."""

    queries: int
    """Tokens of a program."""
    keys: int
    """That it reads at once."""
    warps: int
    stages: int
    """Of Triton's pipeline."""


def default_config(width: int) -> Config:
    """The launch for a cache whose larger head size is ``width``; not timed yet."""
    return Config(128, 64, 8, 3) if width <= 128 else Config(64, 32, 4, 3)


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    *,
    config: Config | None = None,
) -> Tensor:
    """See ``attention.provider``; rows of no sequence are left as they are.

    Args:
        config: default: ``default_config``.
    """
    import triton

    from ad_flashinfer_pass.kernels import overlap
    from ad_flashinfer_pass.kernels.attention.tile_prefill_kernel import tile_prefill

    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[2:4]
    v_head_dim, batch = spec.v_head_dim or head_dim, seq_len_with_cache.shape[0]
    if config is None:
        config = default_config(max(head_dim, v_head_dim))
    query = query if query.stride(2) == 1 else query.contiguous()
    assert (kv_cache.stride(4), block_table.stride(1), seq_len_with_cache.stride(0)) == (1, 1, 1)
    out = torch.empty((num_rows, num_heads, v_head_dim), dtype=query.dtype, device=query.device)
    # The last tile of each sequence may be short.
    tile_prefill[(num_heads, num_rows // config.queries + batch)](
        query,
        kv_cache,
        cu_seqlen,
        seq_len_with_cache,
        block_table,
        spec.sinks,
        spec.alibi_slopes,
        out,
        spec.scale * spec.k_scale,
        spec.v_scale,
        *query.stride()[:2],
        *kv_cache.stride()[:4],
        block_table.stride(0),
        batch,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        V_DIM=v_head_dim,
        V_BLOCK=max(16, triton.next_power_of_2(v_head_dim)),
        SEQUENCES=triton.next_power_of_2(batch),
        PAGE=page_size,
        QUERIES=config.queries,
        KEYS=config.keys,
        WINDOW=spec.sliding_window,
        CHUNK=spec.chunk,
        CAP=spec.logit_cap,
        ONE_BYTE=kv_cache.dtype.itemsize == 1,
        num_warps=config.warps,
        num_stages=config.stages,
        **overlap.options(query.device, num_rows),
    )
    return out


PROVIDER = Provider(
    capability=CAPABILITY,
    prefill=prefill,
    without_modules="a Triton kernel, compiled in seconds by the first call",
)
