"""What a drafter guesses in the steps of an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.runtime.cached_model import CachedModel


class Watched:
    """Notes what a drafter guesses, and after which tokens.

    Args:
        model: whose drafter it is.
        monkeypatch: for the time of the test.
        known: whole texts, of which some tokens take the places of guesses once those are noted, so that
            from no guess to all are right.
    """

    def __init__(
        self, model: CachedModel, monkeypatch: pytest.MonkeyPatch, known: Sequence[list[int]] = ()
    ) -> None:
        self.known, self._rng = known, random.Random(0)
        drafter, self._info = model.drafter, model.sequence_info
        assert drafter is not None
        self._begin, self._propose, self._replay = drafter.begin, drafter.propose, model.sample_and_advance
        monkeypatch.setattr(drafter, "begin", self.begin)
        monkeypatch.setattr(drafter, "propose", self.propose)
        monkeypatch.setattr(model, "sample_and_advance", self.replay)
        self._by_slot: dict[int, Any] = {}
        self.found: list[tuple[Any, int, list[int]]] = []
        """The sequence, the place of its newest token, and the guesses that have a page."""

    def begin(self, sequences: Any) -> None:
        self._begin(sequences)
        self._by_slot = {sequence.slot: sequence for sequence in sequences}

    def propose(self, accepted: Tensor | None = None) -> None:
        self._propose(accepted)
        self._note()

    def replay(self, *, is_greedy: bool) -> bool:
        was_replayed = self._replay(is_greedy=is_greedy)
        if was_replayed and self._info.num_verified and self._info.device.type == "cuda":
            self._note()  # elsewhere a replay calls propose
        return was_replayed

    def _note(self) -> None:
        info = self._info
        for row, drafts in enumerate(info.drafts[: len(self._by_slot)].tolist()):
            sequence = self._by_slot[int(info.views["slot_idx"][row])]
            place = int(info.views["input_pos"][row])
            if 0 < place < info.max_seq_len - len(drafts):  # else it rests
                num_kept = int(info.views["max_cached"][row]) - place
                self.found.append((sequence, place, drafts[1 : max(num_kept, 1)]))
            for text in self.known:
                if text[: len(sequence.token_ids)] == sequence.token_ids:
                    right = text[place + 1 :][: self._rng.randrange(len(drafts))]
                    info.drafts[row, 1 : 1 + len(right)] = torch.tensor(right, dtype=torch.int64)
