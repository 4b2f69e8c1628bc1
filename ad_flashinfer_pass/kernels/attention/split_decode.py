"""Decode, and verification of drafts, by a Triton kernel of this package, on capability 8.9 and above.

It needs no plan and no FlashInfer: lengths and pages are read on the device, so that a captured call stays
valid when they change. Where ``xqa`` gives a sequence's KV head to few thread blocks, this kernel splits the
keys among enough of them to keep the memory busy. The number of splits depends on batch size, KV heads and
device alone, and so does the order of the sums: equal inputs give equal bits.

Query and softmax weights are multiplied in the dtype of the query, or in float16 if the cache has 8 bits,
which it holds exactly; sums and softmax are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Capability, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

MAX_SPLITS = 32
_SUMS, _PAIRS = 2**22, 2**13
"""Floats that the parts of one launch may leave in the workspace; KV heads times sequences."""
CAPABILITY = Capability(
    name="split_decode",
    workspace_bytes=4 * (_SUMS + _SUMS // 8 + _PAIRS),
    phases=frozenset({"decode"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 10, 12}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    kv_dtypes={"decode": frozenset({torch.float8_e4m3fn})},
    head_dims=frozenset(range(16, 257, 8)),
    max_group=64,
    run_on=frozenset({90}),
)


class Config(NamedTuple):
    """How the kernel is launched."""

    block: int
    """Tokens that a program reads at once."""
    warps: int
    stages: int
    """Of Triton's pipeline. Half of them hold K and V in flight, the others the page numbers before them."""


class _Workspace(NamedTuple):
    sums: Tensor
    stats: Tensor
    arrivals: Tensor
    """Zero before and after each launch."""
    num_processors: int


def _workspace(device: torch.device) -> _Workspace:
    """Of a device, for one stream at a time; it never grows."""
    processors = 8
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _Workspace(
        torch.empty(_SUMS, dtype=torch.float32, device=device),
        torch.empty(_SUMS // 8, dtype=torch.float32, device=device),
        torch.zeros(_PAIRS, dtype=torch.int32, device=device),
        processors,
    )


def default_config(width: int, rows: int = 16) -> Config:
    """The launch for a cache whose larger head size is ``width``, and so many query heads a program.

    Of 22 that were timed on an H200 for head size 128, pages of 32 tokens, batches of 1 to 128 and contexts
    of 1,055 and 8,192, never more than 4 % behind the best for bfloat16, and 12 % for fp8.
    """
    tokens = 32 * 128 // (1 << (width - 1).bit_length())
    warps = 2 if rows <= 16 else 4 if rows * width <= 64 * 128 else 8
    return Config(max(16, min(64, tokens)), warps, 8 if rows <= 64 else 4)


def default_splits(pairs: int, num_processors: int) -> int:
    """Programs that share the keys of a sequence and KV head, for that many of these pairs."""
    return max(1, min(MAX_SPLITS, 2 * num_processors // pairs))


def _options(site: Site, batch: int, device: torch.device) -> list[int]:
    """Fewer and more splits than the default."""
    pairs = batch * site.num_kv_heads
    splits = default_splits(pairs, workspaces.get(_workspace, device).num_processors)
    return sorted({max(1, splits // 2), min(MAX_SPLITS, 2 * splits)} - {splits})


def _verify_options(site: Site, batch: int, device: torch.device) -> list[int]:
    """Fewer splits than the default: of each, all queries of a sequence are added up by one program."""
    splits = default_splits(batch * site.num_kv_heads, workspaces.get(_workspace, device).num_processors)
    return sorted({max(1, splits // 2), max(1, splits // 4)} - {splits})


def decode(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    splits: int | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """See ``attention.provider``; a row of length 0 is zero.

    Args:
        splits: programs that share the keys of a sequence and KV head, at most; default: ``default_splits``.
        config: default: ``default_config``.
    """
    return _attend(query, kv_cache, seq_len_with_cache, block_table, spec, 1, splits, config)


def verify(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    splits: int | None = None,
    *,
    max_len: int,
    config: Config | None = None,
) -> Tensor:
    """``max_len`` new tokens of each sequence; see ``attention.provider``, and ``decode``."""
    return _attend(query, kv_cache, seq_len_with_cache, block_table, spec, max_len, splits, config)


def _attend(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    queries: int,
    splits: int | None,
    config: Config | None,
) -> Tensor:
    import triton

    from ad_flashinfer_pass.kernels import overlap
    from ad_flashinfer_pass.kernels.attention.split_decode_kernel import split_decode

    num_tokens, num_heads, head_dim = query.shape
    batch = seq_len_with_cache.shape[0]
    assert num_tokens == batch * queries, f"{num_tokens} tokens are not {queries} of {batch} sequences each"
    num_kv_heads, page_size = kv_cache.shape[2:4]
    v_head_dim = spec.v_head_dim or head_dim
    group, pairs = num_heads // num_kv_heads, batch * num_kv_heads
    space = workspaces.get(_workspace, query.device)
    rows = max(16, triton.next_power_of_2(queries * group))
    if config is None:
        config = default_config(max(head_dim, v_head_dim), rows)
    if splits is None:
        splits = default_splits(pairs, space.num_processors)
    while splits > 1 and (pairs > _PAIRS or pairs * splits * queries * group * max(v_head_dim, 16) > _SUMS):
        splits //= 2  # what the workspace holds
    query = query if query.stride(2) == 1 else query.contiguous()
    assert (kv_cache.stride(4), block_table.stride(1), seq_len_with_cache.stride(0)) == (1, 1, 1)
    out = torch.empty((num_tokens, num_heads, v_head_dim), dtype=query.dtype, device=query.device)
    split_decode[(num_kv_heads, splits, batch)](
        query,
        kv_cache,
        seq_len_with_cache,
        block_table,
        spec.sinks,
        spec.alibi_slopes,
        out,
        space.sums,
        space.stats,
        space.arrivals,
        spec.scale * spec.k_scale,
        spec.v_scale,
        *query.stride()[:2],
        *kv_cache.stride()[:4],
        block_table.stride(0),
        splits,
        QUERIES=queries,
        GROUP=group,
        GROUP_ROWS=rows,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        V_DIM=v_head_dim,
        V_BLOCK=max(16, triton.next_power_of_2(v_head_dim)),
        PAGE=page_size,
        BLOCK=config.block,
        WINDOW=spec.sliding_window,
        CHUNK=spec.chunk,
        CAP=spec.logit_cap,
        ONE_BYTE=kv_cache.dtype.itemsize == 1,
        num_warps=config.warps,
        num_stages=config.stages,
        # Set up while SMs are still taken, its programs would crowd on those that are not.
        **overlap.options(query.device, num_tokens, is_early=False),
    )
    return out


PROVIDER = Provider(
    capability=CAPABILITY,
    decode=decode,
    verify=verify,
    options=_options,
    verify_options=_verify_options,
    without_modules="a Triton kernel, compiled in seconds by the first call",
)
