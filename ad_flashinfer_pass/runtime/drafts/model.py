"""Guesses what a smaller model of the same vocabulary takes for the most likely.

The model has pools of its own, with as many pages as those of the model whose tokens are guessed, and a
sequence has the same pages in both. Guesses are decode steps, one token of each sequence after the other,
and one step more than there are guesses, so that K and V of all that may be kept are there. What else
stands in a sequence, prompts and tokens of plain steps, is read before the next guess. What its pages hold
decides how good the guesses are, and never a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ad_flashinfer_pass.runtime.drafts.drafter import DraftedSequence, Drafter
from ad_flashinfer_pass.runtime.sampling import most_likely
from ad_flashinfer_pass.runtime.sequence_info import Kind, SequenceInfo, SequenceStep


class ModelDrafter(Drafter):
    """A second model.

    Args:
        info: whose steps verify drafts.
        own: of the same sizes, whose tensors are the inputs of ``module``.
        module: the transformed graph, which is captured with the end of the steps that verify.
        caches: its pools by name.
    """

    def __init__(
        self, info: SequenceInfo, own: SequenceInfo, module: nn.Module, caches: Mapping[str, Tensor]
    ) -> None:
        self._info, self._own = info, own
        self._module, self.caches = module, caches
        self._held: dict[int, tuple[DraftedSequence, int, list[int]]] = {}
        """By slot: the sequence, how many of its tokens were read, and the pages that it had."""

    def begin(self, sequences: Sequence[DraftedSequence]) -> None:
        """Read what was not read yet, but the newest token; see ``Drafter.begin``."""
        todo: list[tuple[DraftedSequence, int]] = []
        for sequence in sequences:
            todo.append((sequence, self._num_read(sequence)))
            self._held[sequence.slot] = (sequence, len(sequence.token_ids) - 1, list(sequence.pages))
        while todo := [(each, first) for each, first in todo if first < len(each.token_ids) - 1]:
            budget, steps, rest = self._own.max_num_tokens, list[SequenceStep](), []
            for sequence, first in todo:
                end = min(first + budget, len(sequence.token_ids) - 1)
                budget -= end - first
                rest.append((sequence, end))
                if end > first:
                    num_pages = -(-end // self._own.tokens_per_block)
                    tokens, pages = sequence.token_ids[first:end], sequence.pages[:num_pages]
                    steps.append(
                        SequenceStep(tokens, first, pages, gather=False, first_len=sequence.first_len)
                    )
            steps.sort(key=lambda step: Kind.of(step.input_pos, len(step.token_ids)))
            self._own.nest_sequences(steps)
            self._run()
            todo = rest

    def propose(self, accepted: Tensor | None = None) -> None:
        """See ``Drafter.propose``."""
        drafts, own = self._info.drafts, self._own
        own.follow(self._info)
        for place in range(1, drafts.shape[1] + 1):
            logits = self._run()
            if logits.is_cuda:
                own.sample_and_advance(logits, is_greedy=True)
            else:
                own.advance(most_likely(logits))
            if place < drafts.shape[1]:
                drafts[:, place] = own.tokens[: len(drafts)].clamp(min=0)

    def _num_read(self, sequence: DraftedSequence) -> int:
        """Leading tokens whose K and V are in the pages that it has now."""
        holder, num_read, pages = self._held.get(sequence.slot, (None, 0, []))
        if holder is not sequence:
            return 0
        kept = next(
            (i for i, (then, now) in enumerate(zip(pages, sequence.pages, strict=False)) if then != now), None
        )
        return num_read if kept is None else min(num_read, kept * self._own.tokens_per_block)

    def _run(self) -> Tensor:
        logits: Tensor = self._module(**self._own.named_args(), **self.caches)[0]
        return logits
