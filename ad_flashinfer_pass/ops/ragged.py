"""What stands around ``cached_attention`` where a caller brings pages and lengths of its own.

Each by one Triton kernel on CUDA, and by the reference elsewhere. Not ops: whoever makes an op of them says
what it mutates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import reference


def prepare(num_seqs: int, *args: Tensor) -> None:
    """Block table, and row and position of each token; see ``cache.prepare_ragged_metadata``."""
    if args[0].device.type == "cpu":
        return reference.prepare_ragged_metadata(num_seqs, *args)
    from ad_flashinfer_pass.kernels.cache import prepare_ragged_metadata  # needs triton

    return prepare_ragged_metadata.prepare(num_seqs, *args)


def append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    token_rows: Tensor,
    token_positions: Tensor,
    clear_before: int,
    scales: tuple[float, float],
    rope: tuple[Tensor, Tensor, Tensor | None] | None,
    interleaved: bool,
) -> Tensor:
    """K and V to their pages; returns the query, rotated like K if ``rope`` is given.

    Args:
        query: [1, tokens, num_heads, head_dim]; for this and what follows see ``cache.rope_append``.
        clear_before: see there; on CUDA alone, whose kernels need it.
        scales: k_scale and v_scale.
        rope: cos and sin [rows, rotary_dim // 2], and the row of each token, or None if row i is token i's.
    """
    if kv_cache.device.type != "cpu":
        from ad_flashinfer_pass.kernels.cache import rope_append  # needs triton

        options: Any = {"block_table": block_table, "table_rows": token_rows, "clear_before": clear_before}
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
        if rope is None:
            rope_append.append(key, value, kv_cache, token_positions, **options)
            return query
        options["interleaved"] = interleaved
        return rope_append.rope_append(query, key, value, kv_cache, token_positions, *rope, **options)
    if rope is not None:
        cos, sin = rope[:2] if rope[2] is None else (x[rope[2]] for x in rope[:2])
        query, key = (reference.rotate(x, cos, sin, interleaved) for x in (query, key))
    page_size = kv_cache.shape[3]
    pages = block_table[token_rows.long(), torch.div(token_positions, page_size, rounding_mode="floor")]
    slots = pages.long() * page_size + token_positions % page_size
    reference.append(key, value, slots, kv_cache, *scales)
    return query


def store(attended: Tensor, out: Tensor, scale: float) -> None:
    """The result, quantized if ``out`` is; see ``attention.store_result``."""
    if out.device.type == "cpu":
        return reference.store_result(attended, out, scale)
    from ad_flashinfer_pass.kernels.attention import store_result  # needs triton

    return store_result.store_result(attended, out, scale)
