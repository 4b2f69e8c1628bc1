"""Random paged batches on the GPU, and attention over them in float64 with a bound on a kernel's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.reference import visibility_bias
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo, SequenceStep

DEVICE = torch.device("cuda")
SPARE_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention."""

    group: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    """Of the cache, if not that of the query."""
    k_scale: float = 1.0
    v_scale: float = 1.0
    sliding_window: int | None = None
    logit_cap: float | None = None
    has_sinks: bool = False

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.group * self.num_kv_heads

    @property
    def spec(self) -> AttentionSpec:
        """A scale that is not the default, and the rest."""
        scale = 1.5 * self.head_dim**-0.5
        return AttentionSpec(scale, self.sliding_window, self.logit_cap, None, self.k_scale, self.v_scale)

    def __str__(self) -> str:
        options = f"-{str(self.kv_dtype)[6:]}-{self.k_scale}-{self.v_scale}" if self.kv_dtype else ""
        options += f"-w{self.sliding_window}" if self.sliding_window else ""
        options += f"-c{self.logit_cap}" if self.logit_cap else ""
        options += "-sinks" * self.has_sinks
        return f"p{self.page_size}-g{self.group}-d{self.head_dim}-{str(self.dtype)[6:]}{options}"


def site_of(shape: Shape) -> Site:
    """The site that asks for a shape."""
    return Site(
        dtype=shape.dtype,
        kv_dtype=shape.kv_dtype or shape.dtype,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        page_size=shape.page_size,
        scale=shape.spec.scale,
        sliding_window=shape.sliding_window,
        logit_cap=shape.logit_cap,
        has_sinks=shape.has_sinks,
    )


class PagedBatch:
    """Sequences in random pages of a pool in which every other byte is random too.

    Args:
        lengths: (tokens in the cache, new tokens) of each sequence, ordered prefill, extend, decode.
        shape: of the attention.
        seed: of everything random.
    """

    def __init__(self, lengths: Sequence[tuple[int, int]], shape: Shape, seed: int = 0) -> None:
        self.lengths, self.shape = list(lengths), shape
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        num_pages = [-(-(past + new) // shape.page_size) for past, new in lengths]
        total = sum(num_pages) + SPARE_PAGES + 1
        order = (torch.randperm(total - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in num_pages]
        kv_cache = self.random(total, 2, shape.num_kv_heads, shape.page_size, shape.head_dim)
        scales = torch.tensor([shape.k_scale, shape.v_scale], device=DEVICE).view(2, 1, 1, 1)
        self.kv_cache = kv_cache if shape.kv_dtype is None else (kv_cache / scales).to(shape.kv_dtype)
        self.query = self.random(sum(new for _, new in lengths), shape.num_heads, shape.head_dim)
        self.sinks = self.random(shape.num_heads).float() if shape.has_sinks else None
        self.info = SequenceInfo(
            max_seq_len=max(past + new for past, new in lengths) + shape.page_size,
            max_batch_size=len(lengths) + 1,
            max_num_tokens=max(64, sum(new for _, new in lengths)),
            tokens_per_block=shape.page_size,
            device=DEVICE,
        )
        self.info.nest_sequences(
            [
                SequenceStep([0] * new, past, pages)
                for (past, new), pages in zip(lengths, self.pages, strict=True)
            ]
        )
        self.args = self.info.named_args()
        self.block_table, _ = ops.prepare_metadata(
            self.args["position_ids"],
            self.args["batch_info_host"],
            self.args["cu_seqlen"],
            self.args["input_pos"],
            self.args["cache_loc"],
            self.args["cu_num_pages"],
            self.info.max_blocks_per_seq,
            shape.page_size,
        )

    @property
    def spec(self) -> AttentionSpec:
        """What is computed, with the sinks."""
        return self.shape.spec._replace(sinks=self.sinks)

    def random(self, *sizes: int) -> Tensor:
        """Standard normal numbers in the dtype of the attention."""
        return torch.randn(sizes, generator=self.generator, device=DEVICE).to(self.shape.dtype)

    def expected(self, math_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The result in float64 and the bound of its error, both [new tokens, num_heads, head_dim].

        Args:
            math_dtype: to which the kernel rounds query and softmax weights, if not that of the query.
        """
        outputs, bounds, start = [], [], 0
        for (past, new), pages in zip(self.lengths, self.pages, strict=True):
            kv = self.kv_cache[torch.tensor(pages, device=DEVICE)].double().transpose(2, 3)
            k = kv[:, 0].flatten(0, 1)[: past + new] * self.shape.k_scale
            v = kv[:, 1].flatten(0, 1)[: past + new] * self.shape.v_scale
            q = self.query[start : start + new].to(math_dtype or self.shape.dtype).double()
            out, spread = attend(q, k, v, past, self.shape.spec, self.sinks)
            limit = bound(out, spread, past + new, self.shape.dtype)
            if math_dtype is not None:
                limit += bound_of_8_bits(q, k, v, spread, self.shape.spec)
            outputs.append(out)
            bounds.append(limit)
            start += new
        return torch.cat(outputs), torch.cat(bounds)


def attend(
    query: Tensor, key: Tensor, value: Tensor, past: int, spec: AttentionSpec, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, and the same over the absolute values of V; all in float64."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    positions = past + torch.arange(query.shape[0], device=query.device)[None]
    logits = q @ k.transpose(1, 2) * spec.scale
    if spec.logit_cap is not None:
        logits = torch.tanh(logits / spec.logit_cap) * spec.logit_cap
    logits = logits + visibility_bias(positions, key.shape[0], spec)[0].double()
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, query.shape[0], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[0]]
    return (weights @ v).transpose(0, 1), (weights @ v.abs()).transpose(0, 1)


def bound(out: Tensor, spread: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """How far a kernel may be off, element by element.

    With u the rounding unit of the dtype: u |out| for the result; u spread for each of the three places where
    weights or partial sums are held in that dtype; and float32 sums over the keys.
    """
    unit = torch.finfo(dtype).eps / 2
    return unit * out.abs() + (3 * unit + length * torch.finfo(torch.float32).eps) * spread + 1e-6


def bound_of_8_bits(query: Tensor, key: Tensor, value: Tensor, spread: Tensor, spec: AttentionSpec) -> Tensor:
    """What multiplying in float8_e4m3fn adds, for a query that is already rounded to it.

    u8 spread for softmax weights held in 8 bits; those below its range, scaled so that the largest is 448,
    are off by half its smallest number; and both products are summed with 13 bits after the point.
    """
    fp8 = torch.finfo(torch.float8_e4m3fn)
    group = query.shape[1] // key.shape[1]
    k = key.abs().amax(0).repeat_interleave(group, 0)  # at least as large as each key
    logit = (query.abs() * k).sum(-1, keepdim=True) * spec.scale
    lost = value.abs().sum(0).repeat_interleave(group, 0) * (fp8.smallest_normal / 8 / 2 / fp8.max)
    return (fp8.eps / 2 + 2**-13 * (2 * logit + 1)) * spread + lost
