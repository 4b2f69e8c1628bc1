"""A language model without weights, for tests of the runtime.

The logits after some tokens are drawn from a hash of all of them. ``ToyModel`` gets those tokens by
reading them back from the pages that it was given, so that a wrong page, position or order gives
wrong logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from ad_flashinfer_pass.metadata import SequenceInfo, SequenceStep

VOCAB_SIZE = 48
NAN_TOKEN = VOCAB_SIZE - 1
"""All logits after a sequence that holds this token are NaN."""


@lru_cache(maxsize=20_000)
def toy_logits(token_ids: tuple[int, ...]) -> Tensor:
    """float32 [VOCAB_SIZE]; NAN_TOKEN is never drawn."""
    digest = blake2b(repr(token_ids).encode(), digest_size=8).digest()
    normal = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCAB_SIZE)
    logits = torch.from_numpy(normal).float() * 3
    logits[NAN_TOKEN] = -torch.inf
    return logits * torch.nan if NAN_TOKEN in token_ids else logits


def greedy_alone(prompt: Sequence[int], num_tokens: int, eos: Sequence[int] = ()) -> list[int]:
    """The continuation of a prompt without pages, batch or engine."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens and (token_ids[-1] not in eos):
        token_ids.append(int(toy_logits(tuple(token_ids)).argmax()))
    return token_ids[len(prompt) :]


class ToyModel:
    """A ``StepModel``; ``fail_next`` is raised by the next step, after it has written its pages."""

    def __init__(
        self,
        *,
        num_pages: int = 100,
        tokens_per_page: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        max_seq_len: int = 200,
    ) -> None:
        self.device = torch.device("cpu")
        self.sequence_info = SequenceInfo(
            max_seq_len, max_batch_size, max_num_tokens, tokens_per_page, self.device
        )
        self.num_pages = num_pages
        self.vocab_size = VOCAB_SIZE
        self.eager_steps: dict[str, int] = {}
        self.fail_next: BaseException | None = None
        self.steps: list[list[SequenceStep]] = []
        self._cache: dict[tuple[int, int], int] = {}

    def step(self, sequences: Sequence[SequenceStep]) -> Tensor:
        """Write the new tokens into pages, and hash all tokens read back from them."""
        self.sequence_info.nest_sequences(sequences)  # raises on what no model accepts
        self.steps.append([s._replace(pages=list(s.pages)) for s in sequences])
        pages = [page for s in sequences for page in s.pages]
        assert len(set(pages)) == len(pages), f"a page belongs to two sequences: {pages}"
        assert 0 < min(pages) <= max(pages) < self.num_pages, f"a page is out of range: {pages}"
        for s in sequences:
            for position, token in enumerate(s.token_ids, s.input_pos):
                self._cache[self._slot(s, position)] = token
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        logits = [toy_logits(self._read(s)) for s in sequences if s.gather]
        return torch.stack(logits) if logits else torch.empty(0, VOCAB_SIZE)

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Forget the tokens in these pages."""
        cleared = set(pages)
        self._cache = {slot: t for slot, t in self._cache.items() if slot[0] not in cleared}

    @property
    def num_dirty_pages(self) -> int:
        """Pages that were written and not cleared."""
        return len({page for page, _ in self._cache})

    def _read(self, s: SequenceStep) -> tuple[int, ...]:
        end = s.input_pos + len(s.token_ids)
        return tuple(self._cache[self._slot(s, position)] for position in range(end))

    def _slot(self, s: SequenceStep, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.sequence_info.tokens_per_block)
        return s.pages[page], offset
