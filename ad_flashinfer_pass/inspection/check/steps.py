"""The steps that a check runs: every kind of them, on a few sequences whose pages lie among each other's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.runtime.sequence_info import Bucket, SequenceStep

Phase = Literal["prefill", "mixed", "decode", "padded", "captured", "dense"]

BATCH = 4
"""Rows to which decode steps are padded; one more than there are sequences."""
SHORTEST = 32
"""Tokens that a sequence must be able to have."""
BUDGET = 512
"""Tokens of a step."""
_CHUNK = 300


@dataclass
class Step:
    """One call of the cached graph."""

    phase: Phase
    sequences: list[SequenceStep]
    owners: list[int]
    """Which sequence each of them is."""
    bucket: Bucket | None = None

    def rows(self) -> list[int]:
        """Where the tokens of the sequences stand among all, padding included."""
        lens = [len(sequence.token_ids) for sequence in self.sequences]
        if self.bucket is None or not self.bucket.num_tokens:
            return list(range(sum(lens)))
        long = sum(n for n in lens if n > 1)
        decodes = sum(n == 1 for n in lens)
        return [*range(long), *range(self.bucket.num_tokens, self.bucket.num_tokens + decodes)]


def lengths(sites: Iterable[Site], max_seq_len: int) -> list[int]:
    """One sequence that leaves each window and chunk that max_seq_len lets it leave, and two short ones."""
    spans = [span for site in sites for span in (site.sliding_window, site.chunk) if span is not None]
    longest = max([64, *(span + 24 for span in spans if span < max_seq_len)])
    return [min(max_seq_len, longest), min(max_seq_len, 41), 28]


def random_tokens(lengths: Sequence[int], vocab_size: int, device: torch.device) -> list[Tensor]:
    """Token ids, int64 [1, n] for each length, the same in each run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, n), generator=generator).to(device) for n in lengths]


def num_pages(lengths: Sequence[int], page_size: int) -> int:
    """Pages of each pool that the steps need, page 0 included."""
    return 1 + len(lengths) * -(-max(lengths) // page_size)


def steps(tokens: Sequence[Tensor], page_size: int) -> list[Step]:
    """Every kind of step; the pages of the sequences alternate, and page 1 is one of them."""
    lists = [ids[0].tolist() for ids in tokens]
    a, b, c = (len(ids) for ids in lists)
    done = [0, 0, 0]
    # The pages of a sequence are every third one, backwards: page 1 is where the last tokens of one are.
    pages = [
        [1 + 3 * block + first for block in reversed(range(-(-len(ids) // page_size)))]
        for first, ids in zip((1, 2, 0), lists, strict=True)
    ]

    def to(owner: int, end: int) -> tuple[int, SequenceStep]:
        start, done[owner] = done[owner], end
        own = pages[owner][: -(-end // page_size)]
        return owner, SequenceStep(lists[owner][start:end], start, own, slot=owner + 1)

    def step(phase: Phase, *parts: tuple[int, SequenceStep], bucket: Bucket | None = None) -> Step:
        kind = [2 if len(s.token_ids) == 1 else int(s.input_pos > 0) for _, s in parts]
        ordered = [part for _, part in sorted(zip(kind, parts, strict=True), key=lambda each: each[0])]
        return Step(phase, [s for _, s in ordered], [owner for owner, _ in ordered], bucket)

    found = [
        step("prefill", to(0, min(a // 2, _CHUNK)), to(1, b // 3)),
        step("mixed", to(2, c // 2), to(0, done[0] + 5), to(1, b // 3 + 1)),
        step("mixed", to(0, min(a - 7, done[0] + _CHUNK)), to(1, b - 7), to(2, c - 7)),
    ]
    while done[0] < a - 7:
        found.append(step("mixed", to(0, min(a - 7, done[0] + _CHUNK))))
    for back in (6, 5):
        found.append(step("decode", to(0, a - back), to(1, b - back), to(2, c - back)))
    for back in (4, 3):
        bucket = Bucket(0, BATCH)
        found.append(step("padded", to(0, a - back), to(1, b - back), to(2, c - back), bucket=bucket))
    bucket = Bucket(8, BATCH, BATCH)
    found.append(step("padded", to(2, c), to(0, a - 2), to(1, b - 2), bucket=bucket))
    found.append(step("decode", to(0, a - 1), to(1, b - 1)))
    found.append(step("decode", to(0, a), to(1, b)))
    return found
