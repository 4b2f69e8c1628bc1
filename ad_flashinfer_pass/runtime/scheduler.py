"""Which sequences run in a step, with how many tokens, on which pages.

Pure logic, no tensors. Sequences are served in the order in which they were added, and in the
reverse order they give way: the running ones are always older than the waiting ones, and when pages
run out the youngest running one loses its pages and waits again, in front of the others. So the
oldest always moves on, and in the end every sequence is the oldest.

Steps can be scheduled before the tokens of earlier ones are known: how many there are is enough, until a
sequence that has lost its pages is computed anew.

Steps that verify drafts give a sequence one token or several. While they are ahead, ``num_pending`` and
``num_cached`` are the most that there can be; ``settle`` makes them what there are.

Full pages get names, which say what stands in them and before them. A sequence takes over the pages of its
longest known prefix, and starts after it; nobody writes a page that has a name.
"""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
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
    salt: bytes = b""
    """It shares pages with sequences of the same salt."""
    takes_known: bool = True
    """Whether it starts after a prefix that is known; else each of its tokens is computed."""
    page_names: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as they were asked for."""
    num_named: int = 0
    """Leading pages whose names the pool was told."""
    num_computed: int = 0
    """Leading tokens whose K and V were cached before it lost its pages."""
    num_reused: int = 0
    """Tokens whose K and V it has from others, and never computed."""

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
        shares_pages: whether sequences that begin alike share pages, and pages are kept for those to come.
        num_drafts: tokens that a step may write beyond the newest one of a sequence, where it has pages for
            them: spare ones, for which no other sequence gives way.
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
        shares_pages: bool = False,
        num_drafts: int = 0,
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
        self._tokens_ahead = max(tokens_ahead, num_drafts)
        self._num_drafts = num_drafts
        self._refused: S | None = None
        """The first that waited when the last step was chosen, and found no room."""
        self._settled_epoch = -1
        self._shares_pages = shares_pages
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

    def remove(self, sequence: S, *, is_broken: bool = False) -> None:
        """Forget a sequence, running or waiting, and give up its pages.

        Args:
            sequence: its full pages are kept.
            is_broken: nobody is to use its pages any more.
        """
        if sequence.pages:
            self._running.remove(sequence)
            if is_broken:
                self._pool.forget(sequence.pages)
                sequence.num_cached = 0
            self._release_pages(sequence)
        else:
            self._waiting.remove(sequence)

    def restart(self, sequences: Iterable[S]) -> None:
        """Queue these sequences, in order of arrival, without pages, and nothing else.

        Whatever a step that was broken off left behind is forgotten; every page is free again, and is zeroed.
        """
        self._to_clear = list(range(1, self._pool.capacity + 1))
        self._pool.free_all()
        self._slots.free_all()
        self._running = []
        self._waiting = deque(sequences)
        self.epoch += 1
        for sequence in self._waiting:
            sequence.pages = []
            sequence.num_computed = max(sequence.num_computed, sequence.num_cached)
            sequence.slot = sequence.num_cached = sequence.num_pending = sequence.num_named = 0

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

    @property
    def has_no_room_for_more(self) -> bool:
        """Whether none of those that wait can run in the next step, as far as is known."""
        if not self._waiting or len(self._running) >= self._max_running:
            return True
        return self._waiting[0] is self._refused and self._settled_epoch == self.epoch

    @property
    def has_decodes_alone(self) -> bool:
        """Whether the next step is of one token of each running sequence, as far as is known."""
        is_decode = all(s.num_tokens - s.num_cached == 1 for s in self._running)
        return is_decode and bool(self._running) and self.has_no_room_for_more

    @property
    def is_settled(self) -> bool:
        """Whether the next step is of the running sequences, which need nothing that they can get."""
        return self.has_no_room_for_more and not any(map(self._needs_something, self._running))

    def _needs_something(self, sequence: S) -> bool:
        """Whether it is to be computed anew, or lacks a page for its newest token, or a spare one."""
        limit, num_tokens = self._recompute_at, sequence.num_tokens
        if limit is not None and sequence.first_len <= limit < num_tokens:
            return True
        if self._num_missing(sequence, num_tokens + self._num_drafts) <= 0:
            return False
        is_spare = self._num_missing(sequence, num_tokens + self._tokens_ahead) <= self._num_spare
        return is_spare or self._num_missing(sequence, num_tokens) > 0

    def max_cached(self, sequence: S) -> int:
        """Tokens of a running sequence that drafts may fill, at most, by its pages and by what ends it."""
        limit, most = (
            self._recompute_at,
            min(len(sequence.pages) * self._tokens_per_page, sequence.max_len - 1),
        )
        return most if limit is None or sequence.num_tokens > limit else min(most, limit)

    @staticmethod
    def settle(sequence: S, num_most: int, num_found: int) -> None:
        """A step that could give a running sequence ``num_most`` tokens gave it ``num_found``, now known."""
        sequence.num_pending -= num_most
        sequence.num_cached -= num_most - num_found

    def clear_released_pages(self) -> None:
        """Zero what was given up since the last call, all at once; ``schedule`` does it too."""
        if self._to_clear:
            self._clear_pages(self._to_clear)
            self._to_clear = []

    def name_pages(self, sequence: S) -> None:
        """Let others have the full pages of a sequence, whose content has been computed or is about to be.

        A step that was scheduled on a token that was sampled writes it only if it was none that stops: of the
        last known token this is not yet known.
        """
        if not self._shares_pages:
            return
        num_full = min(sequence.num_cached, len(sequence.token_ids) - 1) // self._tokens_per_page
        if num_full > sequence.num_named:
            names = self._names(sequence)
            for index in range(sequence.num_named, num_full):
                self._pool.name(sequence.pages[index], names[index])
            sequence.num_named = num_full

    def _names(self, sequence: S) -> list[bytes]:
        """Of its full pages, as far as its tokens are known: a hash of all tokens up to the page's end."""
        names, size = sequence.page_names, self._tokens_per_page
        num_new = len(sequence.token_ids) // size - len(names)
        if num_new > 0:
            first, width = len(names) * size, 8 * size
            tokens = array("q", sequence.token_ids[first : first + num_new * size]).tobytes()
            name = names[-1] if names else sequence.salt
            for start in range(0, num_new * width, width):
                name = sha256(name + tokens[start : start + width]).digest()
                names.append(name)
        return names

    def _num_shareable(self, sequence: S) -> int:
        """Leading pages that it can have from others, if they are known: its last token is computed."""
        if not (self._shares_pages and sequence.takes_known):
            return 0
        return min(sequence.num_tokens - 1, len(sequence.token_ids)) // self._tokens_per_page

    def _known_pages(self, sequence: S, start: int) -> list[int]:
        """Those that hold its tokens from its page ``start`` on, up to the first that is not known."""
        end, pages = self._num_shareable(sequence), []
        for name in self._names(sequence)[start:end] if start < end else ():
            page = self._pool.find(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def _start_after(self, sequence: S, num_pages: int) -> None:
        """The first pages of the sequence hold their tokens already."""
        num_cached = num_pages * self._tokens_per_page
        if num_cached > sequence.num_cached:
            seen = max(sequence.num_cached, sequence.num_computed)
            sequence.num_reused += max(num_cached - seen, 0)
            sequence.num_cached = num_cached

    def _take_known(self, sequence: S) -> None:
        """Put pages that others have filled since it got its own in their place."""
        start = sequence.num_cached // self._tokens_per_page
        known = self._known_pages(sequence, start)
        if not known:
            return
        end = start + len(known)
        own, sequence.pages[start:end] = sequence.pages[start:end], known
        for page in known:
            self._pool.share(page)
        self._to_clear += self._pool.free(own)
        self._start_after(sequence, end)
        self.epoch += 1

    def _chunks(self, budget: int, decodes: list[tuple[S, int]]) -> list[tuple[S, int]]:
        """The whole step: prompt chunks within the budget, oldest first, and the decodes."""
        if 4 * len(decodes) >= 3 * self._max_running:
            waiting = sum(seq.num_tokens - seq.num_cached for seq in self._running) - len(decodes)
            budget = min(budget, _CHUNK_BESIDE_DECODES if waiting <= _BACKLOG else budget)
        prefills: list[tuple[S, int]] = []
        extends: list[tuple[S, int]] = []
        in_this_step: set[bytes] = set()
        """Names of the pages that get full."""
        for sequence in self._running:
            if not sequence.can_run or sequence.num_tokens - sequence.num_cached == 1 or not budget:
                continue
            if self._shares_pages:
                self._take_known(sequence)
            num_left = sequence.num_tokens - sequence.num_cached
            num_new = min(num_left, self._max_chunk, budget)
            if self._shares_pages:
                first, end = (
                    n // self._tokens_per_page for n in (sequence.num_cached, sequence.num_cached + num_new)
                )
                names = self._names(sequence)
                if first < self._num_shareable(sequence) and names[first] in in_this_step:
                    continue  # an older one computes what it needs next
                in_this_step.update(names[first:end])
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
                if not self._num_available and not self._take_back_spare_pages():
                    self._preempt_youngest()
                    continue
                self._give(sequence, 1)
                has_grown = True
            index += 1
        if self._tokens_ahead and (has_grown or self._lack_pages_for_drafts()):
            self._give_spare_pages()

    def _lack_pages_for_drafts(self) -> bool:
        drafts = self._num_drafts
        return drafts > 0 and any(self._num_missing(s, s.num_tokens + drafts) > 0 for s in self._running)

    def _num_missing(self, sequence: S, num_tokens: int) -> int:
        """Pages that the sequence lacks for this many tokens; the last one it may have is never cached."""
        return self.num_pages_for(min(num_tokens, sequence.max_len - 1)) - len(sequence.pages)

    @property
    def _num_available(self) -> int:
        """Pages that ``_give`` can give."""
        return self._pool.num_free + self._pool.num_kept

    def _give(self, sequence: S, num_pages: int) -> None:
        self._to_clear += self._pool.drop_kept(num_pages)
        sequence.pages += self._pool.allocate(num_pages)
        self.epoch += 1

    def _give_spare_pages(self) -> None:
        """Pages for ``tokens_ahead`` more tokens of each, while there are spare ones."""
        for sequence in self._running:
            num_pages = self._num_missing(sequence, sequence.num_tokens + self._tokens_ahead)
            if 0 < num_pages <= self._num_spare:
                self._give(sequence, num_pages)

    @property
    def _num_spare(self) -> int:
        """Pages beyond those that stay for growth and for who waits first."""
        kept = len(self._running)
        if self._waiting:
            kept += self.num_pages_for(self._waiting[0].num_tokens)
        return self._num_available - kept

    def _take_back_spare_pages(self) -> bool:
        """Free the pages that hold no token, which are clean but for drafts; false if there are none."""
        num_before = self._pool.num_free
        for sequence in self._running:
            num_used = self.num_pages_for(sequence.num_tokens)
            freed = self._pool.free(sequence.pages[num_used:])
            self._to_clear += freed if self._num_drafts else []
            del sequence.pages[num_used:]
        has_freed = self._pool.num_free > num_before
        self.epoch += has_freed
        return has_freed

    def _admit(self) -> None:
        self._refused = None
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if sequence.num_pending:
                return
            known = self._known_pages(sequence, 0)
            num_pages = self.num_pages_for(sequence.num_tokens) - len(known)
            # One page of growth for each that runs, or their next page edges would preempt it.
            needed = num_pages + len(self._running) + sum(map(self._pool.is_kept, known))
            if needed > self._num_available and self._tokens_ahead:
                self._take_back_spare_pages()
            if needed > self._num_available:
                self._refused, self._settled_epoch = sequence, self.epoch
                return
            for page in known:
                self._pool.share(page)
            sequence.pages += known
            self._give(sequence, num_pages)
            self._start_after(sequence, len(known))
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
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release_pages(self, sequence: S) -> None:
        self.name_pages(sequence)
        self._to_clear += self._pool.free(sequence.pages)
        self._slots.free([sequence.slot])
        sequence.num_computed = max(sequence.num_computed, sequence.num_cached)
        sequence.pages, sequence.slot, sequence.num_cached, sequence.num_named = [], 0, 0, 0
        self.epoch += 1
