"""``ad_flashinfer.prepare_metadata``: what kernels need, derived once a step inside the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import reference
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching


def prepare_metadata(
    position_ids: Tensor,
    batch_info_host: Tensor,
    cu_seqlen: Tensor,
    input_pos: Tensor,
    cache_loc: Tensor,
    cu_num_pages: Tensor,
    max_blocks_per_seq: int,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Block table and slots of one step.

    On CUDA by one Triton kernel, without waiting for the device; elsewhere by the reference.

    Args:
        position_ids: [b, s]; only its number of elements, the padded token count T, is used.
        batch_info_host: int32, host, see ``sequence_info.BatchInfo``.
        cu_seqlen: int32 [max_batch_size + 1].
        input_pos: int32 [max_batch_size].
        cache_loc: int32 [*], page ids of all sequences, concatenated.
        cu_num_pages: int32 [max_batch_size + 1].
        max_blocks_per_seq: width of the block table.
        page_size: tokens of one page.

    Returns:
        block_table: int32 [max_batch_size, max_blocks_per_seq], page ids; 0 where there is none.
        slot_mapping: int64 [T], page * page_size + offset of each new token; 0, in the scratch
            page, for padding tokens.
    """
    counts = (position_ids.numel(), reference.num_sequences(batch_info_host))
    args = (*counts, cu_seqlen, input_pos, cache_loc, cu_num_pages, max_blocks_per_seq, page_size)
    if cache_loc.device.type != "cuda":
        return reference.prepare_metadata(*args)
    from ad_flashinfer_pass.kernels.cache import prepare_metadata as metadata  # needs triton

    inputs = {"cu_seqlen": cu_seqlen, "input_pos": input_pos, "cu_num_pages": cu_num_pages}
    with launching(cache_loc.device, **inputs):
        return metadata.prepare_metadata(*args)


define(
    prepare_metadata,
    fake=lambda position_ids, input_pos, cache_loc, max_blocks_per_seq, **_: (
        cache_loc.new_empty((input_pos.shape[0], max_blocks_per_seq)),
        cache_loc.new_empty((position_ids.numel(),), dtype=torch.int64),
    ),
)
