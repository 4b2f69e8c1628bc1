"""A graph of two attention layers, and random steps over its pages, for tests of capture on any device."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.runtime.sequence_info import METADATA_ARGS, SequenceInfo, SequenceStep

NUM_TOKEN_IDS = 97


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and its pages."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 32
    num_pages: int = 80
    max_seq_len: int = 512
    max_batch_size: int = 8
    max_num_tokens: int = 256


class TwoLayers(nn.Module):
    """Metadata, then append and attend twice; the tokens of the step choose q, k and v from a table."""

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        dtype: torch.dtype,
        *,
        window: int | None = None,
        logit_cap: float | None = None,
        kv_dtype: torch.dtype | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
        prefill_kernel: str = "reference",
        decode_kernel: str = "reference",
        num_drafts: int = 0,
        verify_kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.sizes, self.window, self.logit_cap = sizes, window, logit_cap
        self.kv_dtype, self.scales = kv_dtype or dtype, scales
        self.prefill_kernel, self.decode_kernel = prefill_kernel, decode_kernel
        self.num_drafts, self.verify_kernel = num_drafts, verify_kernel
        width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        self.table = nn.Buffer(torch.randn(2, NUM_TOKEN_IDS, width, device=device).to(dtype))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_gather_indices: Tensor, **inputs: Tensor
    ) -> Tensor:
        """[1, rows, features] of the gathered tokens."""
        s = self.sizes
        metadata = [inputs[name] for name in METADATA_ARGS]
        info, cu_seqlen, input_pos, seq_len, cache_loc, cu_num_pages = metadata
        width = -(-(s.max_seq_len + self.num_drafts) // s.page_size)
        table, slots = ops.prepare_metadata(
            position_ids, info, cu_seqlen, input_pos, cache_loc, cu_num_pages, width, s.page_size
        )
        outs = []
        for layer in range(2):
            qkv = self.table[layer][input_ids].unflatten(-1, (-1, s.head_dim))
            q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), dim=2)
            cache = inputs[f"kv_cache_{layer}"]
            ops.append_kv(k, v, slots, cache, *self.scales)
            outs.append(
                ops.cached_attention(
                    q,
                    cache,
                    info,
                    cu_seqlen,
                    seq_len,
                    table,
                    s.head_dim**-0.5,
                    s.head_dim,
                    sliding_window=self.window,
                    logit_cap=self.logit_cap,
                    prefill_kernel=self.prefill_kernel,
                    decode_kernel=self.decode_kernel,
                    k_scale=self.scales[0],
                    v_scale=self.scales[1],
                    max_extend_len=1 + self.num_drafts if self.num_drafts else 0,
                    verify_kernel=self.verify_kernel if self.num_drafts else "",
                )
            )
        return torch.stack(outs, -1).flatten(0, 1).flatten(1)[token_gather_indices][None]

    def caches(self) -> dict[str, Tensor]:
        """Pools of random numbers, with a clean scratch page."""
        s = self.sizes
        shape = (s.num_pages, 2, s.kv_heads, s.page_size, s.head_dim)
        pools = {f"kv_cache_{i}": torch.randn(shape, device=self.table.device) for i in range(2)}
        for pool in pools.values():
            pool[0] = 0
        return {name: pool.to(self.kv_dtype) for name, pool in pools.items()}

    def info(self) -> SequenceInfo:
        """Metadata for these sizes."""
        s = self.sizes
        sizes = (s.max_seq_len, s.max_batch_size, s.max_num_tokens, s.page_size)
        return SequenceInfo(*sizes, self.table.device, self.num_drafts)


def random_step(rng: random.Random, sizes: Sizes, *, with_prefill: bool) -> list[SequenceStep]:
    """Sequences of random number, lengths and pages, in order, that a step may hold."""
    pages = rng.sample(range(1, sizes.num_pages), sizes.num_pages - 1)
    count = rng.randint(1, sizes.max_batch_size)
    num_long = rng.randint(1, count) if with_prefill else 0
    budget = sizes.max_num_tokens - count
    steps = []
    for index in range(count):
        past = rng.choice([0, sizes.page_size - 1, sizes.page_size, rng.randrange(sizes.max_seq_len - 1)])
        new = 1
        if index < num_long and budget > 0:
            past *= rng.randrange(2)
            new = 2 + rng.randrange(max(1, min(budget, sizes.max_seq_len - past - 1)))
        if past + new > sizes.max_seq_len or -(-(past + new) // sizes.page_size) > len(pages):
            past, new = 0, min(new, 2)
        num_pages = -(-(past + new) // sizes.page_size)
        if num_pages > len(pages):
            break
        budget -= new - 1
        ids = [rng.randrange(NUM_TOKEN_IDS) for _ in range(new)]
        own = [pages.pop() for _ in range(num_pages)]
        steps.append(SequenceStep(ids, past, own, gather=new == 1 or rng.random() < 0.7))
    return sorted(steps, key=lambda s: 2 if len(s.token_ids) == 1 else int(s.input_pos > 0))


def changed_slots(before: Tensor, after: Tensor, steps: list[SequenceStep]) -> Tensor:
    """bool [pages, page_size]: slots whose bytes changed although no sequence of the step owns them."""
    changed = (after.view(torch.uint8) != before.view(torch.uint8)).any(-1).any(1).any(1)
    page_size = before.shape[3]
    for s in steps:
        for position in range(s.input_pos, s.input_pos + len(s.token_ids)):
            changed[s.pages[position // page_size], position % page_size] = False
    changed[0] = False
    return changed
