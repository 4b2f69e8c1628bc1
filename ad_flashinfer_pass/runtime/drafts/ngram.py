"""Guesses what followed the last tokens where they stood before in the same request.

Of all places that one counts whose last tokens agree longest, up to four of them and at least two, and of
equals the newest. Where what followed is shorter than the drafts it is repeated, as in a text that goes in
circles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ad_flashinfer_pass.runtime.drafts.drafter import DraftedSequence, Drafter
from ad_flashinfer_pass.runtime.sampling import on_device
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo

MOST, LEAST = 4, 2
"""Tokens that agree, of those that count."""


class NgramDrafter(Drafter):
    """Keeps the tokens of all running sequences on the device.

    Args:
        info: whose steps verify drafts.
    """

    def __init__(self, info: SequenceInfo) -> None:
        self._info = info
        self._tokens = torch.zeros(info.num_slots, info.max_seq_len, dtype=torch.int32, device=info.device)
        """By slot and position; slot 0 is scratch."""
        self._held: dict[int, tuple[DraftedSequence, int]] = {}
        """By slot: the sequence, and how many of its tokens came from the host."""

    def begin(self, sequences: Sequence[DraftedSequence]) -> None:
        """Copy what the host knows and has not copied yet; see ``Drafter.begin``."""
        places, tokens = [], []
        for sequence in sequences:
            holder, first = self._held.get(sequence.slot, (None, 0))
            first = first if holder is sequence else 0
            length = len(sequence.token_ids)
            start = sequence.slot * self._info.max_seq_len
            places.append(np.arange(start + first, start + length))
            tokens.append(np.array(sequence.token_ids[first:], dtype=np.int32))
            self._held[sequence.slot] = (sequence, length)
        index, values = (
            on_device(torch.from_numpy(np.concatenate(each)), self._tokens.device)
            for each in (places, tokens)
        )
        self._tokens.view(-1)[index] = values

    def propose(self, accepted: Tensor | None = None) -> None:
        """See ``Drafter.propose``."""
        drafts, views = self._info.drafts, self._info.views
        if drafts.is_cuda:
            from ad_flashinfer_pass.kernels.drafts import match  # needs triton

            where = (views["slot_idx"], views["input_pos"])
            match(self._tokens, drafts, accepted, *where, most=MOST, least=LEAST)
            return
        positions = views["input_pos"].tolist()
        num_rows = len(drafts if accepted is None else accepted)
        for row, slot in enumerate(views["slot_idx"][:num_rows].tolist()):
            tokens, position = self._tokens[slot], positions[row]
            if accepted is not None:
                got = accepted[row][accepted[row] >= 0]
                if len(got) > position:  # it rests
                    continue
                tokens[position + 1 - len(got) : position + 1] = got
            drafts[row, 1:] = guess(tokens[: position + 1], drafts.shape[1] - 1)


def guess(tokens: Tensor, count: int) -> Tensor:
    """``count`` tokens that may follow these, [n]; the last one if nothing stood before.

    The reference of ``kernels.drafts.match``.
    """
    last = len(tokens) - 1
    agrees = torch.ones(last, dtype=torch.bool)
    length = torch.zeros(last, dtype=torch.int64)
    for back in range(min(MOST, last)):
        agrees[back:] &= tokens[: last - back] == tokens[last - back]
        agrees[:back] = False
        length += agrees
    best = int((length * (last + 1) + torch.arange(last)).argmax()) if last else 0
    if not last or length[best] < LEAST:
        return tokens[last].expand(count)  # a token that the model has seen; 0 may be one that it cannot read
    return tokens[best + 1 + torch.arange(count) % (last - best)]
