"""Mixed batches with random pages, and what attention over them must give, from the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo, SequenceStep

# Stands in every slot that no sequence owns: a kernel that reads one gives a wrong number, not NaN,
# because a pool holds no NaN (its pages are zeroed when they change hands).
POISON = 1000.0
SPARE_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Features:
    """The scalars of an attention site, and whether it has sinks or ALiBi slopes."""

    scale: float = 0.3
    sliding_window: int | None = None
    logit_cap: float | None = None
    chunk: int | None = None
    has_sinks: bool = False
    has_alibi: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads, sizes and dtype of one attention."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    page_size: int = 5
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    layers_between_pages: int = 1
    """Above 1 the pool is a strided view: pages of that many layers alternate in memory."""
    is_latent: bool = False
    """V is the first part of K, and is not stored."""


EACH_FEATURE = [
    Features(),
    Features(sliding_window=1),
    Features(sliding_window=20),
    Features(logit_cap=2.0),
    Features(chunk=9),
    Features(has_sinks=True),
    Features(has_alibi=True),
    Features(sliding_window=20, logit_cap=2.0, has_sinks=True, has_alibi=True),
]


class PagedBatch:
    """One step of several sequences, with the past of each already in its pages.

    Args:
        lengths: (tokens in the cache, new tokens) of each sequence, ordered prefill, extend, decode.
        shape: of the tensors.
        seed: of the random values and of the order of the pages.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], shape: Shape, seed: int = 0) -> None:
        self.lengths, self.shape = list(lengths), shape
        generator = torch.Generator().manual_seed(seed)
        totals = [past + new for past, new in lengths]
        num_pages = [-(-total // shape.page_size) for total in totals]
        shuffled = (torch.randperm(sum(num_pages) + SPARE_PAGES, generator=generator) + 1).tolist()
        self.pages = [[shuffled.pop() for _ in range(n)] for n in num_pages]
        width = max(shape.head_dim, shape.v_head_dim)
        kv_dtype = shape.kv_dtype or shape.dtype
        self.memory = torch.full(
            (
                sum(num_pages) + SPARE_PAGES + 1,
                shape.layers_between_pages,
                1 if shape.is_latent else 2,
                shape.num_kv_heads,
                shape.page_size,
                width,
            ),
            min(POISON, torch.finfo(kv_dtype).max),
            dtype=kv_dtype,
        )
        self.kv_cache = self.memory[:, shape.layers_between_pages // 2]

        def random(tokens: int, heads: int, dim: int) -> Tensor:
            return torch.randn(tokens, heads, dim, generator=generator).to(shape.dtype)

        self.query = [random(new, shape.num_heads, shape.head_dim) for _, new in lengths]
        self.key = [random(total, shape.num_kv_heads, shape.head_dim) for total in totals]
        self.value = [
            key[..., : shape.v_head_dim]
            if shape.is_latent
            else random(len(key), shape.num_kv_heads, shape.v_head_dim)
            for key in self.key
        ]
        self.sinks = torch.randn(shape.num_heads, generator=generator)
        self.alibi_slopes = torch.rand(shape.num_heads, generator=generator)
        for index, (past, _) in enumerate(lengths):
            for position in range(past):
                self._write(index, position)
        info = SequenceInfo(
            max_seq_len=max(totals) + shape.page_size,
            max_batch_size=len(totals) + 1,
            max_num_tokens=sum(new for _, new in lengths),
            tokens_per_block=shape.page_size,
            device=torch.device("cpu"),
        )
        steps = [
            SequenceStep([0] * new, past, pages)
            for (past, new), pages in zip(lengths, self.pages, strict=True)
        ]
        info.nest_sequences(steps)
        self.args = info.named_args()
        self.max_blocks_per_seq = info.max_blocks_per_seq

    def round_as_cached(self) -> None:
        """Let K and V be what pages of another dtype hold of them, which is what counts."""
        if self.shape.kv_dtype is None:
            return
        rounded = [(self.shape.k_scale, self.key)]
        if not self.shape.is_latent:  # else V is a view of K
            rounded.append((self.shape.v_scale, self.value))
        for scale, tensors in rounded:
            for x in tensors:
                x.copy_((x / scale).to(self.shape.kv_dtype).to(x.dtype) * scale)

    def slot(self, index: int, position: int) -> tuple[int, int]:
        """(page, offset) of one token."""
        return self.pages[index][position // self.shape.page_size], position % self.shape.page_size

    def _write(self, index: int, position: int) -> None:
        page, offset = self.slot(index, position)
        limit = torch.finfo(self.kv_cache.dtype).max
        key = (self.key[index][position] / self.shape.k_scale).clamp(-limit, limit)
        value = (self.value[index][position] / self.shape.v_scale).clamp(-limit, limit)
        self.kv_cache[page, 0, :, offset, : self.shape.head_dim] = key
        if not self.shape.is_latent:
            self.kv_cache[page, 1, :, offset, : self.shape.v_head_dim] = value

    def prepare(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Block table and slots from the op, for as many tokens as ``position_ids`` has."""
        return ops.prepare_metadata(
            position_ids,
            self.args["batch_info_host"],
            self.args["cu_seqlen"],
            self.args["input_pos"],
            self.args["cache_loc"],
            self.args["cu_num_pages"],
            self.max_blocks_per_seq,
            self.shape.page_size,
        )

    def run(self, features: Features, max_extend_len: int = 0) -> list[Tensor]:
        """Append and attend with the ops; [new tokens, num_heads, v_head_dim] of each sequence."""
        args, shape = self.args, self.shape
        block_table, slot_mapping = self.prepare(args["position_ids"])
        new = [n for _, n in self.lengths]
        tokens = args["position_ids"].shape
        new_key, new_value = (
            torch.cat([x[-n:] for x, n in zip(tensors, new, strict=True)]).unflatten(0, tokens)
            for tensors in (self.key, self.value)
        )
        ops.append_kv(new_key, new_value, slot_mapping, self.kv_cache, shape.k_scale, shape.v_scale)
        out = ops.cached_attention(
            torch.cat(self.query).unflatten(0, tokens),
            self.kv_cache,
            args["batch_info_host"],
            args["cu_seqlen"],
            args["seq_len_with_cache"],
            block_table,
            features.scale,
            shape.v_head_dim,
            features.sliding_window,
            features.logit_cap,
            features.chunk,
            self.sinks if features.has_sinks else None,
            self.alibi_slopes if features.has_alibi else None,
            k_scale=shape.k_scale,
            v_scale=shape.v_scale,
            max_extend_len=max_extend_len,
        )
        assert out.shape == (*tokens, shape.num_heads, shape.v_head_dim)
        assert out.dtype == shape.dtype
        return list(out.flatten(0, 1).split(new))

    def expected(self, features: Features) -> list[Tensor]:
        """What ``run`` must give, in float64."""
        return [
            dense_attention(
                self.query[i],
                self.key[i],
                self.value[i],
                past,
                features,
                self.sinks if features.has_sinks else None,
                self.alibi_slopes if features.has_alibi else None,
            )
            for i, (past, _) in enumerate(self.lengths)
        ]


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: int,
    features: Features,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of one sequence in float64, each query at ``past`` plus its row.

    torch's own scaled_dot_product_attention where it can express the features, else the formula.

    Args:
        query: [new, num_heads, d].
        key: [past + new, num_kv_heads, d].
        value: [past + new, num_kv_heads, v_d].
        past: tokens before the first query.
        features: scale, window, cap and chunk.
        sinks: [num_heads] or None.
        alibi_slopes: [num_heads] or None.

    Returns:
        float64 [new, num_heads, v_d].
    """
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
    q_pos = past + torch.arange(q.shape[1])[:, None]
    k_pos = torch.arange(k.shape[1])
    visible = k_pos <= q_pos
    if features.sliding_window is not None:
        visible &= q_pos - k_pos < features.sliding_window
    if features.chunk is not None:
        visible &= q_pos // features.chunk == k_pos // features.chunk
    bias = torch.where(visible, 0.0, float("-inf")).double()[None]
    if alibi_slopes is not None:
        bias = bias + alibi_slopes.double()[:, None, None] * (k_pos - q_pos)
    if features.logit_cap is None and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=features.scale)
        return out.transpose(0, 1)
    logits = q @ k.transpose(1, 2) * features.scale
    if features.logit_cap is not None:
        logits = features.logit_cap * torch.tanh(logits / features.logit_cap)
    weights = torch.exp(logits + bias)
    denominator = weights.sum(-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks.double())[:, None, None]
    return (weights / denominator @ v).transpose(0, 1)
