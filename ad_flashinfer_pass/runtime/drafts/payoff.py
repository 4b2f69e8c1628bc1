"""Whether drafts pay: a step that verifies costs more than one that decodes, and may give no more tokens.

Nobody knows but by trying. As long as steps give enough tokens, the next one verifies, too. Where the last
few did not, plain steps follow, so many that what the tries cost is ``_SHARE`` of the time, and twice and
four times as many where the next tries fail, too.
"""

from __future__ import annotations

from collections.abc import Mapping

_TRIES = 4
_SHARE = 0.01
_SHORTEST = 16
_MOST_DOUBLINGS = 2
_MEMORY = 0.8
"""How much of the mean is that of the steps before the last one."""


class Payoff:
    """Decides before each step.

    Args:
        cost: of a step that verifies, in steps that decode, by the number of sequences.
    """

    def __init__(self, cost: Mapping[int, float]) -> None:
        self._cost = cost
        self._mean = 0.0
        """Tokens of a sequence in a step, of the steps since the last pause, the newest ones most."""
        self._num_tries = 0
        self._pause = 0
        """Plain steps that are left of the present pause."""
        self._num_failures = 0

    @property
    def is_on(self) -> bool:
        """Whether the next step should verify."""
        return self._pause == 0

    def note_plain(self) -> None:
        """A step was enqueued that verifies nothing, though it might have."""
        self._pause = max(self._pause - 1, 0)

    def note(self, num_tokens: int, num_sequences: int) -> None:
        """A step verified, and gave so many tokens in all."""
        if not self.is_on:  # it was enqueued before the pause
            return
        mean = num_tokens / num_sequences
        memory = _MEMORY if self._num_tries >= _TRIES else self._num_tries / (self._num_tries + 1)
        self._mean = memory * self._mean + (1 - memory) * mean
        self._num_tries += 1
        if self._num_tries < _TRIES:
            return
        cost = self.cost_of(num_sequences)
        if self._mean > cost:
            self._num_failures = 0
            return
        shortest = max(_SHORTEST, round(_TRIES * (cost - 1) / _SHARE))
        self._pause, self._num_tries = shortest << min(self._num_failures, _MOST_DOUBLINGS), 0
        self._num_failures += 1

    def cost_of(self, num_sequences: int) -> float:
        """Of the smallest size measured that holds so many sequences, or the largest."""
        fitting = [size for size in self._cost if size >= num_sequences]
        return self._cost[min(fitting) if fitting else max(self._cost)]
