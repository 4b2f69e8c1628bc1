"""Which sequences run in a step, with how many tokens, on which pages.

Pure logic, no tensors. Sequences are served in the order in which they were added, and in the
reverse order they give way: the running ones are always older than the waiting ones, and when pages
run out the youngest running one loses its pages and waits again, in front of the others. So the
oldest always moves on, and in the end every sequence is the oldest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ad_flashinfer_pass.runtime.page_pool import PagePool


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One sequence as the scheduler sees it."""

    request_id: int
    """Ascending in the order of arrival."""
    token_ids: list[int]
    """Prompt and generated tokens; the engine appends to it."""
    num_cached: int = 0
    """Leading tokens whose K and V are in the pages; the engine advances it after a step."""
    pages: list[int] = field(default_factory=list)
    """Pages of positions 0 .. len(token_ids) - 1 while running, empty while waiting."""


S = TypeVar("S", bound=SequenceState)


class Scheduler(Generic[S]):
    """Continuous batching with chunked prefill under a token budget, and preemption by recompute.

    Args:
        pool: where pages come from.
        tokens_per_page: tokens of one page.
        max_batch_size: sequences of one step, at most.
        max_num_tokens: tokens of one step, at most.
        clear_pages: zeroes the content of pages, called before they go back to the pool: a NaN left
            in one would reach the sequence that owns it next.
        prefill_chunk_tokens: tokens of one sequence in one step, at most; default: the budget alone
            decides.
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
    ) -> None:
        self._pool = pool
        self._tokens_per_page = tokens_per_page
        # With one token of budget for each running sequence, nothing that runs can starve.
        self._max_running = min(max_batch_size, max_num_tokens)
        self._max_num_tokens = max_num_tokens
        self._clear_pages = clear_pages
        self._max_chunk = prefill_chunk_tokens or max_num_tokens
        self._running: list[S] = []
        self._waiting: deque[S] = deque()
        self.num_preemptions = 0

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
        self._pool.free_all()
        self._running = []
        self._waiting = deque(sequences)
        for sequence in self._waiting:
            sequence.pages = []
            sequence.num_cached = 0

    def schedule(self) -> list[tuple[S, int]]:
        """Choose the next step.

        Returns:
            Sequences with their new tokens, ordered prefill (many tokens, no past), extend (many,
            with a past), decode (one token). Their pages cover ``token_ids``. Empty if nothing is
            queued.
        """
        self._grow()
        self._admit()
        decodes = [(s, 1) for s in self._running if len(s.token_ids) - s.num_cached == 1]
        if len(decodes) == len(self._running):
            return decodes
        return self._chunks(self._max_num_tokens - len(decodes), decodes)

    def _chunks(self, budget: int, decodes: list[tuple[S, int]]) -> list[tuple[S, int]]:
        """The whole step: prompt chunks within the budget, oldest first, and the decodes."""
        prefills: list[tuple[S, int]] = []
        extends: list[tuple[S, int]] = []
        for sequence in self._running:
            num_left = len(sequence.token_ids) - sequence.num_cached
            num_new = min(num_left, self._max_chunk, budget)
            if num_left == 1 or num_new == 0:
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
        while index < len(self._running):
            sequence = self._running[index]
            if len(sequence.token_ids) > len(sequence.pages) * self._tokens_per_page:
                if not self._pool.num_free:
                    self._preempt_youngest()
                    continue
                sequence.pages += self._pool.allocate(1)
            index += 1

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            num_pages = self.num_pages_for(len(sequence.token_ids))
            # One page of growth for each that runs, or their next page edges would preempt it.
            if num_pages + len(self._running) > self._pool.num_free:
                return
            sequence.pages = self._pool.allocate(num_pages)
            self._running.append(self._waiting.popleft())

    def _preempt_youngest(self) -> None:
        sequence = self._running.pop()
        self._release_pages(sequence)
        sequence.num_cached = 0
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release_pages(self, sequence: S) -> None:
        self._clear_pages(sequence.pages)
        self._pool.free(sequence.pages)
        sequence.pages = []
