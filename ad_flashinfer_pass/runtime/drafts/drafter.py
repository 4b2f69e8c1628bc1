"""``Drafter``: who guesses the tokens that a step verifies.

A step that verifies takes the newest token of each sequence, and guesses at those after it. The token of
each place is chosen from its own logits by the request's own numbers, as if there were no drafts, and the
guesses up to the first that is not what was chosen are kept. So the tokens are those of plain decoding,
sampled ones too, whatever is guessed. Rejection sampling accepts no more: a guess is a single token, and is
chosen with its own probability.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from torch import Tensor


class DraftedSequence(Protocol):
    """What a drafter reads of a sequence."""

    token_ids: list[int]
    """Prompt and generated tokens, all of them; more are appended."""
    slot: int
    """A number from 1 on that no other running sequence has."""
    pages: list[int]
    """Of all tokens but, perhaps, the newest."""
    first_len: int
    """See ``SequenceStep``."""


class Drafter(ABC):
    """Guesses tokens, for the steps of one ``SequenceInfo``."""

    caches: Mapping[str, Tensor] = MappingProxyType({})
    """Its own pools, by name as those of a ``CachedModel``."""

    @abstractmethod
    def begin(self, sequences: Sequence[DraftedSequence]) -> None:
        """Take in the tokens of the sequences, in their order, of a step whose metadata the host wrote."""

    @abstractmethod
    def propose(self, accepted: Tensor | None = None) -> None:
        """Write guesses into ``SequenceInfo.drafts`` of the step for which the metadata stand.

        Runs on the device alone, so that it can be captured.

        Args:
            accepted: int64 [rows, 1 + num_drafts], what the sequences got in the step before, the newest
                token included, and then negative numbers; None: the host wrote this step.
        """

    def read(self) -> None:  # noqa: B027 -- others need nothing of a step
        """Take in the step that was run, once its tokens have been chosen, if ``propose`` does not follow.

        Runs on the device alone, so that it can be captured.
        """
