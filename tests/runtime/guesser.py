"""A drafter that is right as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Callable

from torch import Tensor

from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo
from tests.runtime.toy_model import NAN_TOKEN, greedy_alone


def of_toy_model(tokens: list[int]) -> int | None:
    """Its most likely token after these."""
    return None if NAN_TOKEN in tokens else greedy_alone(tokens, 1)[0]


class Guesser(NgramDrafter):
    """Knows what comes next, and says it or something else.

    Args:
        info: whose steps verify drafts.
        share_right: how many of the guesses are what is known, in the mean.
        known: the next token; None if it is not known.
        vocab_size: guesses lie below it.
    """

    def __init__(
        self,
        info: SequenceInfo,
        share_right: float,
        known: Callable[[list[int]], int | None] = of_toy_model,
        vocab_size: int = NAN_TOKEN + 1,
    ) -> None:
        super().__init__(info)
        self._share, self._known, self._vocab_size = share_right, known, vocab_size
        self._rng = random.Random(0)

    def propose(self, accepted: Tensor | None = None) -> None:
        """After the tokens that the n-gram drafter keeps, which are all of the sequence."""
        super().propose(accepted)
        drafts, views = self._info.drafts, self._info.views
        for row in range(len(drafts if accepted is None else accepted)):
            slot, position = int(views["slot_idx"][row]), int(views["input_pos"][row])
            if not slot or not position:
                continue
            tokens = self._tokens[slot, : position + 1].tolist()
            for place in range(1, drafts.shape[1]):
                guess = self._known(tokens) if self._rng.random() < self._share else None
                tokens.append(self._rng.randrange(self._vocab_size) if guess is None else guess)
                drafts[row, place] = tokens[-1]
