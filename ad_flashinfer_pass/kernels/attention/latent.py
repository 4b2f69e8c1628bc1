"""Attention over a latent (``cache_latent``) by Triton kernels of this package, on capability 9.x and above.

All query heads share one row a token, so that heads, and the new tokens of a chunk, are the rows of a matrix
product: decode, extends and prefill are one kernel, but for steps of many new tokens, which expand K and V of
each head (``latent_prefill``). It needs no plan and no FlashInfer: lengths and pages
are read on the device, so that a captured call stays valid when they change. The keys are split among enough
programs to keep the GPU busy; how many depends on the numbers of tokens and sequences of the launch alone,
and so does the order of the sums: equal inputs give equal bits.

Query and softmax weights are multiplied in the dtype of the query, or in float16 if the cache has 8 bits,
which it holds exactly; sums and softmax are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention import latent_prefill
from ad_flashinfer_pass.kernels.attention.absorbing import absorbing
from ad_flashinfer_pass.kernels.attention.capability import Capability, Site
from ad_flashinfer_pass.kernels.attention.latent_prefill import block_of
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

MAX_SPLITS = 128
_SUMS, _TILES = 2**23, 2**15
"""Floats that the parts of one launch may leave in the workspace, and tiles of one launch that has parts."""
_COLUMNS = 128
"""Of a result's row, that a program adds."""
SHARED_BYTES = {False: 99 * 2**10, True: 227 * 2**10}
"""That a program may have on capability 12.x, and on 9.x and 10.x, which are large."""
_EIGHT_BITS = frozenset({torch.float8_e4m3fn})
CAPABILITY = Capability(
    name="latent",
    workspace_bytes=4 * (_SUMS + _SUMS // 8 + 3 * _TILES) + latent_prefill.EXTRA_BYTES,  # during prefill
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 10, 12}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    kv_dtypes={"prefill": _EIGHT_BITS, "decode": _EIGHT_BITS},
    head_dims=frozenset(range(16, 641, 8)),
    alibi=False,
    run_on=frozenset({90}),
    is_latent=True,
)


class Config(NamedTuple):
    """How the kernel is launched."""

    rows: int
    """Query heads, of one token or several, of a program."""
    block: int
    """Tokens that a program reads at once."""
    warps: int
    stages: int


class _Workspace(NamedTuple):
    sums: Tensor
    stats: Tensor
    tiles: Tensor
    num_processors: int
    is_large: bool
    """As in ``SHARED_BYTES``."""


def _workspace(device: torch.device) -> _Workspace:
    """Of a device, for one stream at a time; it never grows."""
    processors, is_large = 8, True
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, is_large = properties.multi_processor_count, properties.major in (9, 10)
    return _Workspace(
        torch.empty(_SUMS, dtype=torch.float32, device=device),
        torch.empty(_SUMS // 8, dtype=torch.float32, device=device),
        torch.empty(3 * _TILES, dtype=torch.int32, device=device),
        processors,
        is_large,
    )


def default_config(rows: int, rank: int, rest: int, is_large: bool) -> Config:
    """The launch for so many rows that read the same keys, a latent, the rest of K, and a GPU."""
    few = [Config(16, 64 if rank <= 256 else 32, 4, 6), Config(16, 32, 4, 4), Config(16, 16, 4, 4)]
    some, many = Config(32, 32, 8, 4), Config(64, 64, 8, 2)
    configs = few if rows <= 16 else [many, some, *few] if is_large and rows > 32 else [some, *few]
    return next(each for each in configs if shared_bytes(each, rank, rest) <= SHARED_BYTES[is_large])


def shared_bytes(config: Config, rank: int, rest: int) -> int:
    """Shared memory of a program, at most: of queries, of a block of keys or two, and of softmax weights.

    As Triton 3.6 and 3.9 have it, for 16 bits.
    """
    blocks = 2 if config.rows >= 64 or config.stages > 4 else 1
    width = block_of(rank) + block_of(rest)
    return 2 * width * (config.rows + blocks * config.block) + 2 * config.rows * config.block + 2048


def default_splits(tiles: int, num_processors: int) -> int:
    """Programs that share the keys of a tile, for so many tiles."""
    return max(1, min(MAX_SPLITS, 2 * num_processors // tiles))


def _options(site: Site, batch: int, device: torch.device) -> list[int]:
    """Fewer and more splits than the default."""
    space = workspaces.get(_workspace, device)
    rank, rest = site.v_head_dim, site.head_dim - site.v_head_dim
    config = default_config(site.num_heads, rank, rest, space.is_large)
    splits = default_splits(batch * -(-site.num_heads // config.rows), space.num_processors)
    return sorted({max(1, splits // 2), min(MAX_SPLITS, 2 * splits)} - {splits})


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
    """See ``attention.provider``.

    Args:
        splits: programs that share the keys of a tile, at most; default: ``default_splits``.
        config: default: ``default_config``.
    """
    return _attend(query, kv_cache, None, seq_len_with_cache, block_table, spec, splits, config)


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    splits: int | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """See ``attention.provider``; the options are those of ``decode``, where nothing is expanded."""
    args = (query, kv_cache, cu_seqlen, seq_len_with_cache, block_table, spec)
    is_large = workspaces.get(_workspace, query.device).is_large
    if is_large and latent_prefill.covers(spec, len(query), kv_cache.shape[4]):
        return latent_prefill.prefill(*args)
    return absorbing(_attend, spec)(*args, splits, config)


def extend(*args: Tensor, max_len: int) -> Tensor:
    """``prefill`` of sequences that have at most ``max_len`` new tokens, of a query that has absorbed."""
    return _attend(*args)  # type: ignore[arg-type]


def _attend(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor | None,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    splits: int | None = None,
    config: Config | None = None,
) -> Tensor:
    import triton

    from ad_flashinfer_pass.kernels.attention import latent_kernel

    query = query.contiguous()
    (tokens, heads, width), seqs, rank = query.shape, len(seq_len_with_cache), spec.v_head_dim
    assert rank is not None
    assert (kv_cache.stride(4), block_table.stride(1), seq_len_with_cache.stride(0)) == (1, 1, 1)
    space = workspaces.get(_workspace, query.device)
    if config is None:
        rows = heads if cu_seqlen is None else 64
        config = default_config(rows, rank, width - rank, space.is_large)
    if cu_seqlen is None:
        tiles = seqs * triton.cdiv(heads, config.rows)
    else:  # as many as there can be, however the tokens are those of the sequences
        tiles = triton.cdiv(tokens * heads, config.rows) + seqs
    if splits is None:
        splits = default_splits(tiles, space.num_processors)
    while splits > 1 and (tiles > _TILES or tiles * splits * config.rows * max(rank, 16) > _SUMS):
        splits //= 2  # what the workspace holds
    is_split = splits > 1
    out = torch.empty((tokens, heads, rank), dtype=query.dtype, device=query.device)
    latent_kernel.attend[(tiles, splits)](
        query,
        kv_cache,
        cu_seqlen,
        seq_len_with_cache,
        block_table,
        spec.sinks,
        out,
        space.sums,
        space.stats,
        space.tiles if is_split else None,
        spec.scale * spec.k_scale,
        spec.v_scale,
        kv_cache.stride(0),
        kv_cache.stride(3),
        block_table.stride(0),
        seqs,
        splits,
        HEADS=heads,
        ROWS=config.rows,
        RANK=rank,
        RANK_BLOCK=block_of(rank),
        REST=width - rank,
        REST_BLOCK=block_of(width - rank),
        PAGE=kv_cache.shape[3],
        BLOCK=config.block,
        SEQS=0 if cu_seqlen is None else 1 << (seqs - 1).bit_length(),
        LEVELS=0 if cu_seqlen is None else (seqs - 1).bit_length(),
        WINDOW=spec.sliding_window,
        CHUNK=spec.chunk,
        CAP=spec.logit_cap,
        ONE_BYTE=kv_cache.dtype.itemsize == 1,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if is_split:
        latent_kernel.add_parts[(tiles, config.rows, triton.cdiv(rank, _COLUMNS))](
            spec.sinks,
            out,
            space.sums,
            space.stats,
            space.tiles,
            spec.v_scale,
            splits,
            HEADS=heads,
            ROWS=config.rows,
            RANK=rank,
            COLUMNS=_COLUMNS,
            PARTS=16,
        )
    return out


PROVIDER = Provider(
    capability=CAPABILITY,
    decode=decode,
    prefill=prefill,
    expands=True,
    extend=extend,
    options=_options,
    without_modules="Triton kernels, compiled in seconds by the first call",
)
