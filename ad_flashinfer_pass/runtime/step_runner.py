"""Enqueues steps on the device and hands out their tokens later.

A step is the graph, the choice of tokens, and, when steps run ahead of the host, ``SequenceInfo.advance``:
where all sequences decode, the next step of the same sequences then needs nothing from the host. Nothing
waits for the device but ``PendingTokens.read``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ad_flashinfer_pass.metadata import SequenceStep
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sampling import SampledSequence, Sampler


class RunnerRow(SampledSequence, Protocol):
    """What the runner reads of a sequence that gets a token."""

    stop_token_ids: frozenset[int]


class PendingTokens:
    """The tokens of a step that may still run.

    Args:
        tokens: int64 [n] on the device, read before anything that is enqueued later can change them.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.device.type == "cuda":
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._tokens = tokens.clone()

    def read(self) -> list[int]:
        """Wait for the step and give its tokens; see ``Sampler.sample`` and ``metadata.IDLE``."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class StepRunner:
    """Runs steps one after the other.

    Args:
        model: what computes logits.
        runs_ahead: whether a step may be enqueued before the tokens of the last one are known.
    """

    def __init__(self, model: CachedModel, *, runs_ahead: bool) -> None:
        self._model = model
        self._runs_ahead = runs_ahead
        self._sampler = Sampler()

    def run(self, steps: Sequence[SequenceStep], rows: Sequence[RunnerRow]) -> PendingTokens:
        """Enqueue a step.

        Args:
            steps: ordered prefill, extend, decode; see ``SequenceStep``.
            rows: those with gather, in their order, as a list that is not changed afterwards.
        """
        stops = [sorted(row.stop_token_ids) for row in rows] if self._runs_ahead else ()
        self._model.nest(steps, stops)
        return self.run_again(rows)

    def run_again(self, rows: Sequence[RunnerRow]) -> PendingTokens:
        """Enqueue the step for which the metadata stand, which is the next one if all of ``rows`` decode."""
        with torch.inference_mode():
            logits = self._model.forward()
            if not rows:
                return PendingTokens(torch.empty(0, dtype=torch.int64))
            if not self._runs_ahead:
                return PendingTokens(self._sampler.sample(logits[: len(rows)], rows))
            info = self._model.sequence_info
            is_greedy = all(row.params.is_greedy for row in rows)
            if not (is_greedy and self._model.advance_greedily()):
                info.advance(self._sampler.sample(logits[: len(rows)], rows))
            return PendingTokens(info.tokens[: len(rows)])
