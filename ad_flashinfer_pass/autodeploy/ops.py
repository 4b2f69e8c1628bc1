"""The ops that AutoDeploy inserts: metadata, once a graph and pool, and append and attention, once a layer.

Their names end in those of AutoDeploy's own ``trtllm`` backend, because its piecewise graphs find dynamic
ops by substring (compile/piecewise_utils.py), and one that is not found is captured with the lengths of the
example. ``*_mha_with_cache`` gets an ``out`` buffer; ``*_prepare_metadata`` must return the same memory for
steps of every size, because a replayed segment passes on what it captured.
"""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.autodeploy.interface import attention
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels.attention import xqa
from ad_flashinfer_pass.ops import cached_attention, ragged

PREPARE = "auto_deploy::flashinfer_trtllm_attention_prepare_metadata"
ATTENTION = "auto_deploy::flashinfer_trtllm_attention_mha_with_cache"

_buffers: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
_copies: dict[int, Tensor] = {}
"""Of a step's block tables, by address: kernels with a plan know by a new address that it is out of date."""


class Counts:
    """What the host knows of a step, from AutoDeploy's ``BatchInfo``, int32 [12 or more]."""

    def __init__(self, batch_info_host: Tensor) -> None:
        if batch_info_host.device.type != "cpu":
            raise UnsupportedError(
                f"flashinfer_trtllm reads the counts of a step on the host, and batch_info_host is on "
                f"{batch_info_host.device}: unset AD_BATCH_INFO_DEVICE, or use another attn_backend."
            )
        info = batch_info_host.tolist()
        self.num_seqs, self.long_tokens = info[0] + info[2] + info[4], info[1] + info[3]
        self.num_tokens = self.long_tokens + info[5]
        self.table_shape = info[9], info[7]  # max_batch_size, max_blocks_per_seq
        drafts = getattr(attention.BatchInfo(batch_info_host), "get_max_draft_len", int)() if info[2] else 0
        self.max_extend_len = drafts + 1 if 1 <= drafts < xqa.MAX_EXTEND else 0

    def table(self, block_table: Tensor) -> Tensor:
        """``prepare_metadata``'s block_table in the shape that kernels take, contiguous."""
        return block_table[: prod(self.table_shape)].view(self.table_shape)


def prepare_metadata(
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Block table, and row and position of each token; see ``cache.prepare_ragged_metadata``.

    The past length is that of ``seq_len_with_cache``, never ``input_pos``: in the pool of a sliding window
    both pages and length are those of the window (transform/library/kvcache.py, "front-eviction").

    Returns:
        block_table, token_rows, token_positions: int32 [cache_loc.numel()] each, in one place for every step.
    """
    _copies.clear()
    counts, room = Counts(batch_info_host), cache_loc.numel()
    needed = max(prod(counts.table_shape), counts.num_tokens)
    if needed > room:
        raise UnsupportedError(f"flashinfer_trtllm needs a cache_loc of {needed} pages or more, got {room}.")
    if (key := (cache_loc.data_ptr(), room)) not in _buffers:
        a, b, c = (torch.zeros_like(cache_loc) for _ in range(3))
        _buffers[key] = (a, b, c)
    metadata = (cu_seqlen, seq_len_with_cache, cache_loc, cu_num_pages)
    ragged.prepare(counts.num_seqs, *metadata, counts.table(_buffers[key][0]), *_buffers[key][1:])
    return _buffers[key]


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
    out_scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Append K and V, rotated first if asked for, and attend over the pages as ``ops.cached_attention``.

    Inputs are as in AutoDeploy's SequenceInfo: at full capacity, with stale entries behind what
    ``batch_info_host`` counts; q, k and v have padding tokens last. With ``read_cache_only`` another layer
    writes the cache. ``rope_cos`` and ``rope_sin`` [b, s, rotary_dim] have each angle twice; with
    ``rope_positions``, ``rope_cos`` is a table [positions, rotary_dim] of cos and then sin.

    Returns:
        [b, s, num_heads, head_dim], zeros for padding tokens, in the dtype of q, or divided by ``out_scale``
        and saturated to float8_e4m3fn. With ``out`` that is written to it, and an empty tensor returned.
    """
    counts = Counts(batch_info_host)
    n, table = counts.num_tokens, counts.table(block_table)
    if counts.long_tokens:
        if block_table.data_ptr() not in _copies:
            _copies[block_table.data_ptr()] = table.clone()
        table = _copies[block_table.data_ptr()]
    query, key, value = (x.flatten(0, 1)[None, :n] for x in (q, k, v))
    if not read_cache_only:
        places = (kv_cache, table, token_rows[:n], token_positions[:n], counts.long_tokens)
        rope: Any = None
        if rope_positions is not None and rope_cos is not None:
            rope = (*rope_cos.chunk(2, -1), rope_positions.flatten()[:n])
        elif rope_sin is not None and rope_cos is not None:
            halves = (x.chunk(2, -1)[0].expand(*q.shape[:2], -1) for x in (rope_cos, rope_sin))
            rope = (*(x.flatten(0, 1)[:n] for x in halves), None)
        query = ragged.append(query, key, value, *places, (1.0, 1.0), rope, rope_interleaved)
    metadata = (batch_info_host[:6], cu_seqlen, seq_len_with_cache, table)
    window: Any = (sliding_window, logit_cap, None, sinks, None)
    kernels: Any = (prefill_kernel, decode_kernel, 1.0, 1.0, counts.max_extend_len)
    attended = cached_attention(query, kv_cache, *metadata, scale, v.shape[3], *window, *kernels)[0]
    if out is None and out_scale is None and n == q.shape[0] * q.shape[1]:
        return attended.view(*q.shape[:3], v.shape[3])
    dtype = q.dtype if out_scale is None else torch.float8_e4m3fn
    result = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype) if out is None else out
    ragged.store(attended, result, out_scale or 1.0)
    return result if out is None else out.new_empty(0)


# AutoDeploy finds the inputs by the names in the schema.
torch.library.define(PREPARE, torch.library.infer_schema(prepare_metadata, mutates_args=()))
torch.library.define(ATTENTION, torch.library.infer_schema(mha_with_cache, mutates_args=("kv_cache", "out")))
torch.library.impl(PREPARE, "default", prepare_metadata)
torch.library.impl(ATTENTION, "default", mha_with_cache)
torch.library.register_fake(PREPARE, lambda *args: tuple(torch.empty_like(args[3]) for _ in range(3)))


@torch.library.register_fake(ATTENTION)
def _(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    given = inspect.signature(mha_with_cache).bind(q, k, v, *args, **kwargs).arguments
    dtype = q.dtype if given.get("out_scale") is None else torch.float8_e4m3fn
    return q.new_empty((0,) if "out" in given else (*q.shape[:3], v.shape[3]), dtype=dtype)
