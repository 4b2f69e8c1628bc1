"""Which sequences run in a step, with how many tokens, on which pages.

Pure logic, no tensors. Sequences are served in the order in which they were added, and in the
reverse order they give way: the running ones are always older than the waiting ones, and when pages
run out the youngest running one loses its pages and waits again, in front of the others. So the
oldest always moves on, and in the end every sequence is the oldest.

Steps can be scheduled before the tokens of earlier ones are known: how many there are is enough, until a
sequence that has lost its pages is computed anew.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ad_flashinfer_pass.runtime.page_pool import PagePool

_CHUNK_BESIDE_DECODES, _BACKLOG = 512, 4096
"""Tokens of prompts in a step that decodes most of a full batch, while no more than the other wait. Linears
of so many are bound by arithmetic, so that the decodes cost little beside them; the rest of the prompts takes
those of the next step along. More that wait are a burst, which is read at full speed."""


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One sequence as the scheduler sees it."""

    request_id: int
    """Ascending in the order of arrival."""
    token_ids: list[int]
    """Prompt and generated tokens, as far as they are known; the engine appends to it."""
    num_pending: int = 0
    """Tokens that were sampled after those and are not known yet."""
    num_cached: int = 0
    """Leading tokens whose K and V are in the pages once all steps so far have run."""
    max_len: int = sys.maxsize
    """Tokens at which the sequence ends: with so many it is in no further step."""
    first_len: int = 0
    """See ``sequence_info.SequenceStep``."""
    pages: list[int] = field(default_factory=list)
    """Pages of positions 0 .. num_tokens - 1 at least while running, empty while waiting."""
    slot: int = 0
    """Where its state is while running, 0 while waiting."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, known or not."""
        return len(self.token_ids) + self.num_pending

    @property
    def is_complete(self) -> bool:
        """Whether it waits only for its tokens to become known."""
        return self.num_tokens >= self.max_len

    @property
    def can_run(self) -> bool:
        """Whether it can be in a step now; what is computed anew needs all its tokens."""
        return not self.is_complete and not (self.num_pending and self.num_cached < len(self.token_ids))


S = TypeVar("S", bound=SequenceState)


class Scheduler(Generic[S]):
    """Continuous batching with chunked prefill under a token budget, and preemption by recompute.

    Args:
        pool: where pages come from.
        tokens_per_page: tokens of one page.
        max_batch_size: sequences of one step, at most.
        max_num_tokens: tokens of one step, at most.
        clear_pages: zeroes the content of pages that were given up, called before a step can use them: a NaN
            left in one would reach the sequence that owns it next.
        prefill_chunk_tokens: tokens of one sequence in one step, at most; default: the budget alone
            decides.
        recompute_at: a sequence that grows beyond so many tokens is computed anew, once, in its pages.
        tokens_ahead: when a sequence needs a page, give all that run pages for so many tokens more, if
            there are plenty: as long as ``epoch`` stands still a step needs no new pages.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        tokens_per_page: int,
        max_batch_size: int,
        max_num_tokens: int,
        clear_pages: Callable[[Sequence[int]], None],
        prefill_chunk_tokens: int | None = None,
        recompute_at: int | None = None,
        tokens_ahead: int = 0,
    ) -> None:
        self._pool = pool
        self._tokens_per_page = tokens_per_page
        # With one token of budget for each running sequence, nothing that runs can starve.
        self._max_running = min(max_batch_size, max_num_tokens)
        self._slots = PagePool(self._max_running + 1)
        self._max_num_tokens = max_num_tokens
        self._clear_pages = clear_pages
        self._max_chunk = prefill_chunk_tokens or max_num_tokens
        self._recompute_at = recompute_at
        self._tokens_ahead = tokens_ahead
        self._to_clear: list[int] = []
        self._running: list[S] = []
        self._waiting: deque[S] = deque()
        self.num_preemptions = 0
        self.epoch = 0
        """Goes up whenever the pages of a running sequence change."""

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none: new or preempted."""
        return len(self._waiting)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens of one sequence."""
        return -(-num_tokens // self._tokens_per_page)

    def add(self, sequence: S) -> None:
        """Queue a sequence, which alone must fit the pool at any length that it will reach."""
        self._waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a sequence, running or waiting, and free its pages."""
        if sequence.pages:
            self._running.remove(sequence)
            self._release_pages(sequence)
        else:
            self._waiting.remove(sequence)

    def restart(self, sequences: Iterable[S]) -> None:
        """Queue these sequences, in order of arrival, without pages, and nothing else.

        Whatever a step that was broken off left behind is forgotten; every page is free again.
        """
        for sequence in self._running:
            self._to_clear += sequence.pages
        self._pool.free_all()
        self._slots.free_all()
        self._running = []
        self._waiting = deque(sequences)
        self.epoch += 1
        for sequence in self._waiting:
            sequence.pages = []
            sequence.slot = sequence.num_cached = sequence.num_pending = 0

    def schedule(self) -> list[tuple[S, int]]:
        """Choose the next step.

        Returns:
            Sequences with their new tokens, ordered prefill (many tokens, no past), extend (many,
            with a past), decode (one token). Their pages cover their tokens. Empty if nothing is
            queued, or all that is waits for tokens to become known.
        """
        self._grow()
        self._admit()
        self._recompute()
        self.clear_released_pages()
        active = [s for s in self._running if s.can_run]
        decodes = [(s, 1) for s in active if s.num_tokens - s.num_cached == 1]
        if len(decodes) == len(active):
            return decodes
        return self._chunks(self._max_num_tokens - len(decodes), decodes)

    def clear_released_pages(self) -> None:
        """Zero what was given up since the last call, all at once; ``schedule`` does it too."""
        if self._to_clear:
            pages, self._to_clear = self._to_clear, []
            self._clear_pages(pages)

    def _chunks(self, budget: int, decodes: list[tuple[S, int]]) -> list[tuple[S, int]]:
        """The whole step: prompt chunks within the budget, oldest first, and the decodes."""
        if 4 * len(decodes) >= 3 * self._max_running:
            waiting = sum(seq.num_tokens - seq.num_cached for seq in self._running) - len(decodes)
            budget = min(budget, _CHUNK_BESIDE_DECODES if waiting <= _BACKLOG else budget)
        prefills: list[tuple[S, int]] = []
        extends: list[tuple[S, int]] = []
        for sequence in self._running:
            num_left = sequence.num_tokens - sequence.num_cached
            num_new = min(num_left, self._max_chunk, budget)
            if not sequence.can_run or num_left == 1 or num_new == 0:
                continue
            budget -= num_new
            if num_new == 1:
                decodes.append((sequence, 1))
            elif sequence.num_cached:
                extends.append((sequence, num_new))
            else:
                prefills.append((sequence, num_new))
        return prefills + extends + decodes

    def _grow(self) -> None:
        """Give each running sequence the page for its newest token, the oldest first."""
        index = 0
        has_grown = False
        while index < len(self._running):
            sequence = self._running[index]
            if self._num_missing(sequence, sequence.num_tokens) > 0:
                if not self._pool.num_free and not self._take_back_spare_pages():
                    self._preempt_youngest()
                    continue
                self._give(sequence, 1)
                has_grown = True
            index += 1
        if has_grown and self._tokens_ahead:
            self._give_spare_pages()

    def _num_missing(self, sequence: S, num_tokens: int) -> int:
        """Pages that the sequence lacks for this many tokens; the last one it may have is never cached."""
        return self.num_pages_for(min(num_tokens, sequence.max_len - 1)) - len(sequence.pages)

    def _give(self, sequence: S, num_pages: int) -> None:
        sequence.pages += self._pool.allocate(num_pages)
        self.epoch += 1

    def _give_spare_pages(self) -> None:
        """Pages for ``tokens_ahead`` more tokens, while some stay free for growth and for who waits first."""
        kept = len(self._running)
        if self._waiting:
            kept += self.num_pages_for(self._waiting[0].num_tokens)
        for sequence in self._running:
            num_pages = self._num_missing(sequence, sequence.num_tokens + self._tokens_ahead)
            if 0 < num_pages <= self._pool.num_free - kept:
                self._give(sequence, num_pages)

    def _take_back_spare_pages(self) -> bool:
        """Free the pages that no step so far has used, which are clean; false if there are none."""
        num_before = self._pool.num_free
        for sequence in self._running:
            num_used = self.num_pages_for(sequence.num_tokens)
            self._pool.free(sequence.pages[num_used:])
            del sequence.pages[num_used:]
        self.epoch += 1
        return self._pool.num_free > num_before

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if sequence.num_pending:
                return
            num_pages = self.num_pages_for(sequence.num_tokens)
            # One page of growth for each that runs, or their next page edges would preempt it.
            needed = num_pages + len(self._running)
            if needed > self._pool.num_free and self._tokens_ahead:
                self._take_back_spare_pages()
            if needed > self._pool.num_free:
                return
            self._give(sequence, num_pages)
            (sequence.slot,) = self._slots.allocate(1)
            self._running.append(self._waiting.popleft())

    def _recompute(self) -> None:
        limit = self._recompute_at
        if limit is None:
            return
        for sequence in self._running:
            if sequence.first_len <= limit < sequence.num_tokens:
                sequence.first_len, sequence.num_cached = limit + 1, 0
                self.epoch += 1

    def _preempt_youngest(self) -> None:
        sequence = self._running.pop()
        self._release_pages(sequence)
        sequence.num_cached = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release_pages(self, sequence: S) -> None:
        self._to_clear += sequence.pages
        self._pool.free(sequence.pages)
        self._slots.free([sequence.slot])
        sequence.pages, sequence.slot = [], 0
        self.epoch += 1
