"""Which sequences a session has, how long they are, and on which pages their K and V lie. No tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from ad_flashinfer_pass.errors import CapacityError, SessionError
from ad_flashinfer_pass.runtime.page_pool import PagePool
from ad_flashinfer_pass.runtime.sequence_info import Kind, SequenceInfo, SequenceStep

Schedule = Sequence[tuple[int | None, Sequence[int]]]
"""(sequence, its new tokens); None begins one."""
Entries = list[tuple[int | None, list[int]]]
"""A schedule that was checked."""
Copies = list[tuple[int, int]]
"""Pages that are to be copied, and where to."""


@dataclass
class _State:
    length: int
    """Tokens that are in the cache."""
    pages: list[int]


class Sequences:
    """The sequences and their pages.

    Args:
        info: the limits.
        pool: the pages.
    """

    def __init__(self, info: SequenceInfo, pool: PagePool) -> None:
        self._info = info
        self._pool = pool
        self._states: dict[int, _State] = {}
        self._next_id = 0

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens in the cache, by sequence, in the order in which they began."""
        return {sequence: state.length for sequence, state in self._states.items()}

    def checked(self, schedule: Schedule, *, sort: bool) -> Entries:
        """A schedule that the next step can run.

        Args:
            schedule: of the step.
            sort: it may be in any order.

        Raises:
            SessionError: it is empty or out of order, a sequence is unknown or given twice, or has no tokens,
                or tokens are no integers.
            CapacityError: the session is too small.
        """
        try:
            pairs = [(sequence, tokens) for sequence, tokens in schedule]
        except (TypeError, ValueError) as err:
            raise SessionError(f"a schedule must be a list of (sequence, tokens), got {schedule!r}.") from err
        entries = [(sequence, _integers(tokens)) for sequence, tokens in pairs]
        named = [sequence for sequence, _ in entries if sequence is not None]
        if not entries or not all(tokens for _, tokens in entries) or len(set(named)) < len(named):
            raise SessionError("a step takes one sequence or more, each once and with one token or more.")
        self._check_size(entries)
        pasts = [0 if sequence is None else self.known(sequence).length for sequence, _ in entries]
        kinds = [Kind.of(past, len(tokens)) for past, (_, tokens) in zip(pasts, entries, strict=True)]
        if not sort and kinds != sorted(kinds):
            given = ", ".join(kind.name.lower() for kind in kinds)
            raise SessionError(f"a step must be ordered prefill, extend, decode, got {given}.")
        needed = 0
        for past, (_, tokens) in zip(pasts, entries, strict=True):
            if past + len(tokens) > self._info.max_seq_len:
                raise CapacityError(
                    f"a sequence of {past} and {len(tokens)} more tokens is longer than the session's "
                    f"max_seq_len={self._info.max_seq_len}. Make the session larger."
                )
            needed += self._num_pages(past + len(tokens)) - self._num_pages(past)
        if needed > self._pool.num_free:
            raise CapacityError(
                f"the step needs {needed} more pages of {self._info.tokens_per_block} tokens, but "
                f"{self._pool.num_free} are free. Free sequences, or raise kv_cache_config.max_tokens of "
                "the session."
            )
        return entries

    def plan(self, entries: Entries) -> tuple[list[int], list[SequenceStep], list[int]]:
        """Ids and steps of the sequences of a step, in order, and the pages that they get for it.

        The sequences are as before until ``commit``; without it, the pages have to be given back.
        """
        ids, steps, new_pages = [], [], []
        for sequence, tokens in entries:
            if sequence is None:
                sequence, self._next_id = self._next_id, self._next_id + 1
            state = self._states.get(sequence, _State(0, []))
            count = self._num_pages(state.length + len(tokens)) - len(state.pages)
            pages = self._pool.allocate(count)
            new_pages += pages
            ids.append(sequence)
            steps.append(SequenceStep(tokens, state.length, [*state.pages, *pages]))
        return ids, steps, new_pages

    def commit(self, sequence: int, step: SequenceStep) -> int:
        """The tokens of a step are in the cache; gives the new length."""
        length = step.input_pos + len(step.token_ids)
        self._states[sequence] = _State(length, list(step.pages))
        return length

    def fork(self, sequence: int) -> tuple[int, Copies]:
        """Begin a sequence with the tokens of another one: its number, and what is to be copied.

        Full pages are those of both, since nobody writes them any more.

        Raises:
            SessionError: the sequence is unknown.
            CapacityError: no page is free.
        """
        state = self.known(sequence)
        num_full = state.length // self._info.tokens_per_block
        shared, rest = state.pages[:num_full], state.pages[num_full:]
        own = self._pool.allocate(len(rest))
        for page in shared:
            self._pool.share(page)
        number, self._next_id = self._next_id, self._next_id + 1
        self._states[number] = _State(state.length, shared + own)
        return number, list(zip(rest, own, strict=True))

    def own(self, sequence: int, length: int) -> Copies:
        """Let a sequence write after its first ``length`` tokens: what is to be copied.

        Raises:
            SessionError: the sequence is unknown.
            CapacityError: no page is free.
        """
        pages = self.known(sequence).pages
        index, is_full = length // self._info.tokens_per_block, length % self._info.tokens_per_block == 0
        if is_full or not self._pool.is_shared(page := pages[index]):
            return []
        (pages[index],) = self._pool.allocate(1)
        self._pool.free([page])
        return [(page, pages[index])]

    def cut(self, sequence: int, length: int) -> list[int]:
        """Forget all tokens but the first ``length``, and the sequence if that is 0; gives their pages.

        Raises:
            SessionError: the sequence is unknown.
        """
        state = self.known(sequence)
        keep = self._num_pages(length)
        pages = state.pages[keep:]
        state.length, state.pages = length, state.pages[:keep]
        if length == 0:
            del self._states[sequence]
        return pages

    def known(self, sequence: int) -> _State:
        """Length and pages.

        Raises:
            SessionError: there is no such sequence.
        """
        if sequence not in self._states:
            known = ", ".join(map(str, self._states)) or "none"
            raise SessionError(f"there is no sequence {sequence} in the session; known: {known}.")
        return self._states[sequence]

    def _check_size(self, entries: Entries) -> None:
        info, total = self._info, sum(len(tokens) for _, tokens in entries)
        if len(entries) > info.max_batch_size or total > info.max_num_tokens:
            raise CapacityError(
                f"the session takes max_batch_size={info.max_batch_size} sequences and "
                f"max_num_tokens={info.max_num_tokens} tokens a step, got {len(entries)} and {total}. Make "
                "it larger, or run long prompts in several steps."
            )

    def _num_pages(self, length: int) -> int:
        return -(-length // self._info.tokens_per_block)


def _integers(tokens: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as err:
        raise SessionError(f"tokens must be integers, got {tokens!r}.") from err
