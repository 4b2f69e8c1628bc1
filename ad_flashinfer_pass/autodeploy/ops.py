"""The ops that AutoDeploy inserts: a metadata op, once a graph and pool, and a cached attention a layer.

Their names end in those of AutoDeploy's own ``trtllm`` backend, because its piecewise graphs find dynamic
ops by substring (compile/piecewise_utils.py), and a dynamic op that is not found is captured with the lengths
of the example. ``*_mha_with_cache`` gets an ``out`` buffer; ``*_prepare_metadata`` must return the
same memory at every call.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import reference
from ad_flashinfer_pass.ops import cached_attention

PREPARE = "auto_deploy::flashinfer_trtllm_attention_prepare_metadata"
ATTENTION = "auto_deploy::flashinfer_trtllm_attention_mha_with_cache"
HOST_PLANNED = frozenset({"fa2", "fa3"})
"""Providers that plan on the host: for prefill, which AutoDeploy runs eagerly, and not for decode."""
DEFERRED_ROPE = "auto_deploy::flashinfer_trtllm_deferred_rope"

_METADATA = "Tensor cu_seqlen, Tensor seq_len_with_cache, Tensor cache_loc, Tensor cu_num_pages"
_ROPE = (
    "Tensor? rope_cos=None, Tensor? rope_sin=None, Tensor? rope_positions=None, bool rope_interleaved=False"
)

# AutoDeploy finds the inputs by the names in the schema; where there are no ``_host`` names yet,
# ``batch_info`` is the host's (01d93fe: ``_host_return_args``).
torch.library.define(
    PREPARE, f"(Tensor position_ids, Tensor batch_info_host, {_METADATA}) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    f"{PREPARE}.batch_info",
    f"(Tensor position_ids, Tensor batch_info, {_METADATA}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor batch_info_host, Tensor cu_seqlen, Tensor seq_len_with_cache, "
    "Tensor block_table, Tensor token_rows, Tensor token_positions, Tensor(a!) kv_cache, float scale, "
    "int? sliding_window=None, float? logit_cap=None, Tensor? sinks=None, bool read_cache_only=False, "
    f'str prefill_kernel="reference", str decode_kernel="reference", {_ROPE}, Tensor(b!)? out=None) '
    "-> Tensor",
)
torch.library.define(DEFERRED_ROPE, f"(Tensor x, {_ROPE}) -> Tensor")

_buffers: dict[tuple[Any, ...], Tensor] = {}
_step = 0
_step_tables: dict[int, tuple[int, Tensor]] = {}


def counts(batch_info_host: Tensor) -> list[int]:
    """Sequences and tokens of prefill, extend and decode.

    Args:
        batch_info_host: ``[num_prefill, num_prefill_tokens, num_decode]``, or the 12 and more integers of
            ``BatchInfo``, which begin with what is returned.
    """
    info = batch_info_host.tolist()
    return [info[0], info[1], 0, 0, info[2], info[2]] if len(info) == 3 else info[:6]


def _buffer(name: str, key: tuple[Any, ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same memory for the same arguments, in every call."""
    key = (name, shape, device, *key)
    if key not in _buffers:
        _buffers[key] = torch.empty(shape, dtype=torch.int32, device=device)
    return _buffers[key]


def _table_width(batch_info_host: Tensor, seq_len_with_cache: Tensor, cache_loc: Tensor) -> int:
    """Blocks of the longest sequence, or an upper bound, which a graph may bake in."""
    if batch_info_host.numel() > 7:
        return max(1, batch_info_host.tolist()[7])
    return max(1, cache_loc.numel() // seq_len_with_cache.numel())


def prepare_metadata(
    position_ids: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block table, and row and position of each token; see ``kernels.ragged_metadata``.

    The past length is taken from ``seq_len_with_cache``, never from ``input_pos``: in the pool of a sliding
    window both pages and length are those of the window (transform/library/kvcache.py, "front-eviction").

    Returns:
        block_table int32 [max_batch_size, max_blocks_per_seq], token_rows and token_positions int32
        [position_ids.numel()]; in memory that belongs to ``cache_loc`` and to the number of tokens.
    """
    global _step
    _step += 1
    num_prefill, _, num_extend, _, num_decode, _ = counts(batch_info_host)
    num_tokens, num_seqs = position_ids.numel(), num_prefill + num_extend + num_decode
    key, device = (cache_loc.data_ptr(),), cache_loc.device
    width = _table_width(batch_info_host, seq_len_with_cache, cache_loc)
    block_table = _buffer("block_table", key, (seq_len_with_cache.numel(), width), device)
    capacity = (1 << (num_tokens - 1).bit_length(),)  # so that the buffers of all sizes together stay small
    rows, positions = (_buffer(name, key, capacity, device)[:num_tokens] for name in ("rows", "positions"))
    args = (cu_seqlen, seq_len_with_cache, cache_loc, cu_num_pages, block_table, rows, positions)
    if device.type == "cpu":
        reference.prepare_ragged_metadata(num_tokens, num_seqs, *args)
    else:
        from ad_flashinfer_pass.kernels import ragged_metadata  # needs triton

        ragged_metadata.prepare(num_tokens, num_seqs, *args)
    return block_table, rows, positions


def mha_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    token_rows: Tensor,
    token_positions: Tensor,
    kv_cache: Tensor,
    scale: float,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    sinks: Tensor | None = None,
    read_cache_only: bool = False,
    prefill_kernel: str = "reference",
    decode_kernel: str = "reference",
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    rope_positions: Tensor | None = None,
    rope_interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Append K and V, rotated first if asked for, and attend over the pages.

    Tensors are as in AutoDeploy's SequenceInfo: at full capacity, with stale entries behind what
    ``batch_info_host`` counts; q, k and v have padding tokens last.

    Args:
        q: [b, s, num_heads, head_dim].
        k: [b, s, num_kv_heads, head_dim].
        v: [b, s, num_kv_heads, head_dim].
        batch_info_host: see ``counts``.
        cu_seqlen: int32 [max_batch_size + 1].
        seq_len_with_cache: int32 [max_batch_size].
        block_table: this and the next two from ``prepare_metadata``.
        token_rows: see there.
        token_positions: see there.
        kv_cache: [num_pages, 2, num_kv_heads, page_size, head_dim], possibly a strided view of a larger pool.
        scale: factor of the logits.
        sliding_window: tokens that are visible, the current one included.
        logit_cap: see ``ops.cached_attention``.
        sinks: [num_heads].
        read_cache_only: another layer writes this cache.
        prefill_kernel: provider, see ``kernels.select``.
        decode_kernel: likewise.
        rope_cos: cos of each pair, by token [b, s, >= rotary_dim // 2] or, with ``rope_sin`` None, a table
            [max positions, rotary_dim] of cos and then sin, by ``rope_positions``. None: no rotation.
        rope_sin: like ``rope_cos``, by token.
        rope_positions: int [b, s], row of the table.
        rope_interleaved: pairs are neighbours.
        out: [b, s, num_heads, head_dim], for the result.

    Returns:
        [b, s, num_heads, head_dim]; with ``out`` an empty tensor. Zeros for padding tokens.
    """
    info = counts(batch_info_host)
    num_long, num_tokens = info[1] + info[3], info[1] + info[3] + info[5]
    query, key, value = (x.flatten(0, 1)[None, :num_tokens] for x in (q, k, v))
    place = (kv_cache, block_table, token_rows[:num_tokens], token_positions[:num_tokens], num_long)
    if rope_cos is not None:
        rope = (*_angles(rope_cos, rope_sin, rope_positions, num_tokens, q.shape[3]), rope_interleaved)
        query = _append(query, key, value, place, rope)
    elif not read_cache_only:
        _append(query, key, value, place, None)
    if num_long:
        _check_capture(q, prefill_kernel)
        block_table = _table_of_step(block_table, seq_len_with_cache, kv_cache.shape[3])
    attended = cached_attention(
        query,
        kv_cache,
        torch.tensor(info, dtype=torch.int32),
        cu_seqlen,
        seq_len_with_cache,
        block_table,
        scale,
        v.shape[3],
        sliding_window=sliding_window,
        logit_cap=logit_cap,
        sinks=sinks,
        prefill_kernel=prefill_kernel,
        decode_kernel=decode_kernel,
    )[0]
    if out is None and num_tokens == q.shape[0] * q.shape[1]:
        return attended.view(*q.shape[:3], v.shape[3])
    result = q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out
    rows = result.view(-1, *attended.shape[1:])
    rows[:num_tokens].copy_(attended)
    rows[num_tokens:].zero_()
    return result if out is None else out.new_empty(0)


def _check_capture(q: Tensor, kernel: str) -> None:
    """Speculative decoding captures steps of extends alone, which run on the kernel of prefill."""
    if kernel in HOST_PLANNED and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"a step of drafts is being captured, and the kernel of its attention, {kernel}, needs a plan "
            "that nothing would renew: use kv_cache_config.dtype: auto, or compile_backend: torch-simple."
        )


def _table_of_step(block_table: Tensor, seq_len_with_cache: Tensor, page_size: int) -> Tensor:
    """The table for prefill: made once a step, and another tensor in every step.

    The first, because kernels read ahead: behind the page of the last token stands that page again. The
    second, because kernels with a plan know by it that the plan is out of date.
    """
    made, table = _step_tables.get(block_table.data_ptr(), (0, block_table))
    if made != _step:
        width = block_table.shape[1]
        last = torch.div(seq_len_with_cache - 1, page_size, rounding_mode="floor").clamp_(0, width - 1)
        columns = torch.arange(width, device=last.device).minimum(last[:, None])
        table = block_table[: last.shape[0]].gather(1, columns)
        _step_tables[block_table.data_ptr()] = (_step, table)
    return table


def _angles(
    cos: Tensor, sin: Tensor | None, positions: Tensor | None, num_tokens: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos, sin and positions as ``kernels.rope_append`` takes them."""
    if sin is None:
        assert positions is not None, "a table of angles is read by position"
        half = cos.shape[1] // 2
        return cos[:, :half], cos[:, half:], positions.flatten()[:num_tokens]
    cos, sin = (x.flatten(0, -2)[:num_tokens, : head_dim // 2] for x in (cos, sin))
    return cos, sin, None


def _append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: tuple[Tensor, Tensor, Tensor, Tensor, int],
    rope: tuple[Tensor, Tensor, Tensor | None, bool] | None,
) -> Tensor:
    """K and V to their pages; returns Q, rotated like K if ``rope`` is given.

    ``place``: cache, block table, row and position of each token, number of tokens that are no decodes.
    """
    kv_cache, block_table, rows, positions, num_long = place
    if kv_cache.device.type != "cpu":
        from ad_flashinfer_pass.kernels import rope_append  # needs triton

        options: Any = {"block_table": block_table, "table_rows": rows, "clear_before": num_long}
        if rope is None:
            rope_append.append(key, value, kv_cache, positions, **options)
            return query
        angles: Any = rope[:3]
        return rope_append.rope_append(
            query, key, value, kv_cache, positions, *angles, interleaved=rope[3], **options
        )
    if rope is not None:
        cos, sin, at, interleaved = rope
        cos, sin = (cos, sin) if at is None else (cos[at], sin[at])
        query, key = (reference.rotate(x, cos, sin, interleaved) for x in (query, key))
    page_size = kv_cache.shape[3]
    pages = block_table[rows.long(), torch.div(positions, page_size, rounding_mode="floor").long()]
    reference.append(key, value, pages.long() * page_size + positions % page_size, kv_cache)
    return query


def deferred_rope(x: Tensor, *rope: Any, **options: Any) -> Tensor:
    """Stands before Q and K of an attention whose rotation ``flashinfer_trtllm`` will do; never runs."""
    raise RuntimeError(
        "The rotary embedding of this attention was left to the backend flashinfer_trtllm, and another one "
        "was inserted. Set attn_backend: flashinfer_trtllm, or disable the transform "
        "fuse_rope_into_flashinfer_trtllm."
    )


for _overload in (PREPARE, f"{PREPARE}.batch_info"):
    torch.library.impl(_overload, "default", prepare_metadata)
torch.library.impl(ATTENTION, "default", mha_with_cache)
torch.library.impl(DEFERRED_ROPE, "default", deferred_rope)


def _fake_prepare(
    position_ids: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    # The width is the host's to know; whoever reads it has the real table.
    width = max(1, cache_loc.numel() // seq_len_with_cache.numel())
    tokens = cache_loc.new_empty(position_ids.numel())
    return cache_loc.new_empty(seq_len_with_cache.numel(), width), tokens, torch.empty_like(tokens)


for _overload in (PREPARE, f"{PREPARE}.batch_info"):
    torch.library.register_fake(_overload)(_fake_prepare)


@torch.library.register_fake(ATTENTION)
def _(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    out = inspect.signature(mha_with_cache).bind(q, k, v, *args, **kwargs).arguments.get("out")
    return q.new_empty(*q.shape[:3], v.shape[3]) if out is None else out.new_empty(0)


@torch.library.register_fake(DEFERRED_ROPE)
def _(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)
