"""Enqueues steps on the device and hands out their tokens later.

A step is the graph, the choice of tokens, and, when steps run ahead of the host, ``SequenceInfo.advance``:
where all sequences decode, the next step of the same sequences then needs nothing from the host. Nothing
waits for the device but ``PendingTokens.read``. Steps that verify drafts are the same with ``accept``, and
guesses for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.drafts.drafter import DraftedSequence
from ad_flashinfer_pass.runtime.sampling import (
    Logprobs,
    SampledSequence,
    Sampler,
    TokenLogprobs,
    as_int64,
    on_device,
)
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceStep

_MAX_TOP_K = 2**31 - 1


FindBits = Callable[[], Tensor | None]


class _Row(SampledSequence, DraftedSequence, Protocol):
    """A sequence whose drafts are verified."""


class Wanted(NamedTuple):
    """Which log-probabilities of a step are read."""

    rows: list[int]
    """Rows of logits whose token's is wanted."""
    num_top: int = 0
    """How many of the most likely tokens beside it."""
    prompt: Sequence[int] = ()
    """Tokens of prompts whose logits follow those of all rows."""


class _At:
    """A sequence as it is once some more tokens of it are known, of which none has to be read."""

    def __init__(self, row: SampledSequence, shift: int) -> None:
        self.params, self.seed, self.token_ids = row.params, row.seed, row.token_ids
        self.num_prompt_tokens, self.stop_token_ids = row.num_prompt_tokens, row.stop_token_ids
        self.num_generated, self.num_tokens = row.num_generated + shift, row.num_tokens + shift


class PendingTokens:
    """The tokens of a step that may still run.

    Args:
        tokens: int64 [n] on the device, read before anything that is enqueued later can change them.
        logprobs: of some of them, and of tokens of prompts; None if nobody asked.
    """

    def __init__(self, tokens: Tensor, logprobs: Logprobs | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        self._logprobs = logprobs
        if tokens.device.type == "cuda":
            self._tokens = _to_pinned(tokens)
            if logprobs is not None:
                logprobs.tensors = [_to_pinned(tensor) for tensor in logprobs.tensors]
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tokens.device))
        else:
            self._tokens = tokens.clone()

    def read(self) -> list[int]:
        """Wait for the step and give its tokens; see ``Sampler.sample`` and ``sequence_info.IDLE``."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()

    def logprobs(self) -> list[TokenLogprobs]:
        """After ``read``: what was wanted, of rows first, then of prompts."""
        return [] if self._logprobs is None else self._logprobs.read()


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    return pinned


class StepRunner:
    """Runs steps one after the other.

    Args:
        model: what computes logits.
        runs_ahead: whether a step may be enqueued before the tokens of the last one are known.
    """

    def __init__(self, model: CachedModel, *, runs_ahead: bool) -> None:
        self._model = model
        self._runs_ahead = runs_ahead
        self._on_cuda = model.device.type == "cuda"
        self._is_plain = not (runs_ahead or self._on_cuda or model.drafter is not None)
        """Whether the host writes the metadata of every step, and nobody else reads them."""
        self._sampler = Sampler()
        self._wanted: Wanted | None = None
        self._is_greedy = self._is_penalised = False
        """Of the rows of the last ``run``: whether all are, and whether any is."""
        self._width = 1
        """Tokens that a row of the last ``run`` may get."""
        self._verified: list[_At] = []
        """If they are more than one, and not chosen by kernels: each row as often."""

    def run(
        self,
        steps: Sequence[SequenceStep],
        rows: Sequence[SampledSequence],
        wanted: Wanted | None = None,
        find_bits: FindBits | None = None,
    ) -> PendingTokens:
        """Enqueue a step.

        Args:
            steps: ordered prefill, extend, decode; see ``SequenceStep``.
            rows: those with gather, in their order, as a list that is not changed afterwards.
            wanted: which log-probabilities are read, also by ``run_again``; None for none.
            find_bits: called when the model has been enqueued, gives the tokens that may be chosen; see
                ``Sampler.sample``.
        """
        self._width = 1
        self._model.nest(steps, [] if self._is_plain else [_row_params(row) for row in rows])
        self._wanted = wanted
        self._is_greedy = all(row.params.is_greedy for row in rows)
        self._is_penalised = any(row.params.is_penalised for row in rows)
        return self.run_again(rows, find_bits)

    def verify(
        self, steps: Sequence[SequenceStep], rows: Sequence[_Row], wanted: Wanted | None = None
    ) -> PendingTokens:
        """Enqueue a step that verifies drafts; its tokens are 1 + ``num_drafts`` a row, see ``accept``.

        Args:
            steps: see ``SequenceInfo.nest_sequences``; the tokens of all sequences are known.
            rows: as for ``run``, none of them penalised.
            wanted: as for ``run``, of rows as many for each sequence.
        """
        drafter = self._model.drafter
        assert drafter is not None
        self._model.nest(steps, [_row_params(row) for row in rows], verifies=True)
        self._wanted, self._is_penalised = wanted, False
        self._is_greedy = all(row.params.is_greedy for row in rows)
        self._width = 1 + self._model.sequence_info.num_drafts
        if not self._on_cuda:
            self._verified = [_At(row, shift) for row in rows for shift in range(self._width)]
        with torch.inference_mode():
            drafter.begin(rows)
            drafter.propose()
        return self.run_again(rows)

    def run_again(self, rows: Sequence[SampledSequence], find_bits: FindBits | None = None) -> PendingTokens:
        """Enqueue the step for which the metadata stand, which is the next one if all of ``rows`` decode."""
        # What the host has a say in is known to this rank alone.
        is_alone = self._is_penalised or find_bits is not None or not self._on_cuda
        followed = self._model.leading(
            len(rows) if self._runs_ahead else 0, None if is_alone else self._is_greedy
        )
        with torch.inference_mode(), followed:
            all_logits = self._model.forward()
            if self._width > 1:
                return self._accepted(all_logits, len(rows) * self._width)
            bits = None if find_bits is None else find_bits()
            tokens = self._choose(all_logits[: len(rows)], rows, bits)
            if self._wanted is None:
                return PendingTokens(tokens)
            return PendingTokens(tokens, self._logprobs(all_logits, tokens, self._wanted))

    def _accepted(self, all_logits: Tensor, num_rows: int) -> PendingTokens:
        """What ``verify`` gives; of that many rows of logits."""
        info = self._model.sequence_info
        logits = all_logits[:num_rows]
        by_replay = self._model.sample_and_advance(is_greedy=self._is_greedy)
        if not by_replay and self._on_cuda:
            info.sample_and_accept(logits, is_greedy=self._is_greedy)
        elif not by_replay:
            num_generated = info.views["num_generated"][:num_rows]
            info.accept(self._sampler.sample(logits, self._verified, num_generated=num_generated))
        tokens = info.tokens[:num_rows]
        wanted = self._wanted
        pending = PendingTokens(tokens, None if wanted is None else self._logprobs(logits, tokens, wanted))
        drafter = self._model.drafter
        if not by_replay and drafter is not None:
            if self._runs_ahead:
                drafter.propose(tokens.view(-1, self._width))
            else:
                drafter.read()
        return pending

    def _choose(self, logits: Tensor, rows: Sequence[SampledSequence], bits: Tensor | None) -> Tensor:
        info, drafter = self._model.sequence_info, self._model.drafter
        if rows and self._is_plain:
            return self._sampler.sample(logits, rows, bits)
        if rows and not self._is_penalised and self._model.sample_and_advance(is_greedy=self._is_greedy):
            return info.tokens[: len(rows)]
        if rows and self._on_cuda:
            self._sample_on_cuda(logits, rows, bits)
        elif rows:
            info.advance(self._sampler.sample(logits, rows, bits))
        if drafter is not None:
            drafter.read()
        return info.tokens[: len(rows)]

    def _logprobs(self, logits: Tensor, tokens: Tensor, wanted: Wanted) -> Logprobs:
        num_rows = len(tokens)
        places = [*wanted.rows, *range(num_rows, num_rows + len(wanted.prompt))]
        index = on_device(torch.tensor(places), logits.device)
        of_prompts = on_device(torch.tensor(wanted.prompt, dtype=torch.int64), logits.device)
        return Logprobs(logits[index], torch.cat([tokens, of_prompts])[index], wanted.num_top)

    def _sample_on_cuda(self, logits: Tensor, rows: Sequence[SampledSequence], bits: Tensor | None) -> None:
        info = self._model.sequence_info
        if self._is_penalised:
            is_greedy = all(row.params.temperature == 0 for row in rows)
            info.sample_and_advance(self._sampler.penalise(logits, rows, bits), is_greedy=is_greedy)
            self._sampler.note(info.tokens[: len(rows)])
        else:
            info.sample_and_advance(logits, is_greedy=self._is_greedy)


def _row_params(row: SampledSequence) -> RowParams:
    params = row.params
    return RowParams(
        stop_token_ids=sorted(row.stop_token_ids),
        temperature=params.temperature,
        top_k=min(params.top_k, _MAX_TOP_K),
        tail_mass=1 - params.top_p if params.top_p < 1 else -1.0,
        min_p=params.min_p,
        seed=as_int64(row.seed),
        num_generated=row.num_generated,
    )
