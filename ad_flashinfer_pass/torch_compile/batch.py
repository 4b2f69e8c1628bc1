"""``Batch``: one step of a session, in which its compiled models may be called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import SessionError
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import Kind, SequenceInfo, SequenceStep
from ad_flashinfer_pass.torch_compile.sequences import Entries, Sequences


class Session(Protocol):
    """What a batch needs of its session."""

    sequence_info: SequenceInfo
    sequences: Sequences
    open_batch: Batch | None
    last_decoder: CachedModel | None

    def refuse_if_open(self) -> None:
        """Refuse what cannot be done within a batch."""

    def release(self, pages: list[int]) -> None:
        """Give pages back, zeroed."""

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the last tokens of a sequence."""


class Batch:
    """One step of a session: a context in which its compiled models may be called.

    Gradients are off within it.
    """

    def __init__(
        self,
        session: Session,
        entries: Entries,
        *,
        sort: bool = False,
        sampled: Tensor | None = None,
    ) -> None:
        self._session = session
        self.entries = entries
        self._sort = sort
        self._sampled = sampled
        self._nested_by: Callable[[Sequence[SequenceStep]], None] | None = None
        self._stack = contextlib.ExitStack()
        self._new_pages: list[int] = []
        self._inputs: dict[str, Tensor] | None = None
        self.ran: set[CacheGroup] = set()
        """The layers that have run."""
        self.sequences: list[int] = []
        """Ids of the sequences, in the order given."""
        self.packed: dict[int, SequenceStep] = {}
        """What each does, in the order in which their tokens lie in the inputs."""
        self._lengths: dict[int, int] = {}
        """Of sequences some of whose tokens are forgotten in the end."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """``input_ids`` and ``position_ids``, int64 [1, total_tokens], the sequences one after the other.

        A step of one token has it twice, since torch.compile would compile size 1 anew.

        Raises:
            SessionError: the batch is not open.
        """
        if self._inputs is None or self._session.open_batch is not self:
            raise SessionError(
                "a batch has inputs within its context only: `with session.decode(...) as batch:`."
            )
        return self._inputs

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(len(step.token_ids) for step in self.packed.values())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens of each of ``sequences`` lie in the inputs and logits: (first, one past last)."""
        ends = accumulate(len(step.token_ids) for step in self.packed.values())
        where = {
            sequence: (end - len(step.token_ids), end)
            for (sequence, step), end in zip(self.packed.items(), ends, strict=True)
        }
        return [where[sequence] for sequence in self.sequences]

    def last_logits(self, logits: Tensor) -> Tensor:
        """The rows from which the next tokens are sampled.

        Args:
            logits: [1, total_tokens, vocab], from a compiled model.

        Returns:
            [number of sequences, vocab], in the order of ``sequences``.
        """
        rows = [end - 1 for _, end in self.spans]
        if rows == list(range(self.num_tokens)):
            return logits[0, : len(rows)]
        return logits[0].index_select(0, torch.tensor(rows, device=logits.device))

    def accept(self, logits: Tensor, chosen: Tensor | None = None) -> list[list[int]]:
        """Keep the guesses that are what is chosen in their places, up to the first that is not.

        The others are forgotten when the context ends. Who samples each place from its own logits gets tokens
        of the same distribution as one by one. Waits for the device.

        Args:
            logits: [1, total_tokens, vocab], from a compiled model.
            chosen: int64 [total_tokens], the token that follows each; default: the most likely ones.

        Returns:
            For each of ``sequences``, the tokens that it gets: guesses that are kept, and one more, which
            is not in the cache yet: it begins the next step.

        Raises:
            SessionError: the batch is not open, a sequence begins with it, a token has no other that follows
                it, or chosen are no tokens.
        """
        if self._session.open_batch is not self:
            raise SessionError(
                "a batch accepts tokens within its context only, which then forgets the others."
            )
        for sequence, step in self.packed.items():
            if not step.input_pos:
                raise SessionError(
                    f"sequence {sequence} begins with this batch: its tokens are a prompt, and no guesses. "
                    "Take its next token from last_logits."
                )
        if chosen is not None and (not isinstance(chosen, Tensor) or chosen.dtype != torch.int64):
            given = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
            raise SessionError(f"chosen must be a tensor of int64, got {given}.")
        tokens = logits[0, : self.num_tokens].argmax(-1) if chosen is None else chosen
        following, accepted = tokens.flatten().tolist(), list[list[int]]()
        if len(following) != self.num_tokens:
            name, rows = ("logits", logits) if chosen is None else ("chosen", chosen)
            raise SessionError(
                f"accept takes what follows each of the batch's {self.num_tokens} tokens, got "
                f"{len(following)} from {name} of shape {tuple(rows.shape)}."
            )
        for sequence, (first, end) in zip(self.sequences, self.spans, strict=True):
            step, own = self.packed[sequence], following[first:end]
            guesses = zip(step.token_ids[1:], own, strict=False)
            num_kept = next(
                (i for i, (guess, token) in enumerate(guesses) if guess != token), end - first - 1
            )
            accepted.append(own[: num_kept + 1])
            self._lengths[sequence] = step.input_pos + num_kept + 1
        return accepted

    def nest_by(self, nest: Callable[[Sequence[SequenceStep]], None]) -> None:
        """Write the metadata of the step by a function that does, unless it did."""
        if self._nested_by == nest:
            return
        info = self._session.sequence_info
        if self._sampled is not None:
            info.tokens[: len(self._sampled)] = self._sampled
        nest(list(self.packed.values()))
        self._nested_by = nest

    def was_overwritten(self) -> None:
        """The metadata are those of another step: capture writes its own."""
        self._nested_by = None

    def __enter__(self) -> Batch:
        session = self._session
        if self.packed:
            raise SessionError("a batch is entered once: ask the session for the next one.")
        session.refuse_if_open()
        # The session may have changed since the batch was made.
        entries = session.sequences.checked(self.entries, sort=self._sort)
        self.sequences, steps, self._new_pages = session.sequences.plan(entries)
        packed = list(zip(self.sequences, steps, strict=True))
        if self._sort:
            packed.sort(key=lambda item: Kind.of(item[1].input_pos, len(item[1].token_ids)))
        self.packed = dict(packed)
        try:
            self._inputs = self._written()
        except BaseException:
            session.release(self._new_pages)
            raise
        session.open_batch = self
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._session.open_batch = None
        if kind is None and self.ran:
            self._commit()
            return
        self._session.release(self._new_pages)
        if kind is None:
            raise SessionError(
                "no attention with a cache ran in this batch, so its sequences did not grow: call a model "
                'that was compiled with backend="flashinfer_trtllm" and this session, once. If one was '
                "called, torch.compile ran it without its graphs: TORCH_LOGS=recompiles,graph_breaks says "
                "why."
            )

    def _written(self) -> dict[str, Tensor]:
        """Write the metadata, and give the inputs of a model."""
        is_decode = all(len(step.token_ids) == 1 for step in self.packed.values())
        info, decoder = self._session.sequence_info, self._session.last_decoder
        self.nest_by(decoder.nest if is_decode and decoder is not None else info.nest_sequences)
        args = info.named_args()
        times = 2 if self.num_tokens == 1 else 1
        inputs = {}
        for name in ("input_ids", "position_ids"):
            # A copy, since torch.compile would take the place of a view in its buffer for a size that varies.
            inputs[name] = args[name].view(1, -1)[:, : self.num_tokens].repeat(1, times)
            torch._dynamo.maybe_mark_dynamic(inputs[name], 1)
        return inputs

    def _commit(self) -> None:
        for sequence in self.sequences:  # in the order given, which is that of decode
            length = self._session.sequences.commit(sequence, self.packed[sequence])
            for group in self.ran:
                group.lengths[sequence] = length
        for sequence, length in self._lengths.items():
            self._session.truncate(sequence, length)


class CacheGroup:
    """The caches of the attention layers that one graph has, with what they hold.

    Two graphs with the same layers, say of a model that was compiled twice, have the same group.
    """

    def __init__(
        self, keys: tuple[Hashable, ...], caches: list[Tensor], where: str, weights: Sequence[Tensor]
    ) -> None:
        self.keys = keys
        self.caches = caches
        self.weights = weights
        self.where = where
        """The first layer, for messages."""
        self.lengths: dict[int, int] = {}
        """Tokens in these caches, by sequence."""

    def check(self, batch: Batch) -> None:
        """Refuse a batch that does not continue what the caches hold.

        Raises:
            SessionError: names the sequence, its length and that of the batch.
        """
        if self in batch.ran:
            raise SessionError(
                f"{self.where} has already run in this batch. Call a compiled model once a batch; layers "
                "that share their weights across a graph break cannot be told apart (use fullgraph=True)."
            )
        for sequence, step in batch.packed.items():
            held = self.lengths.get(sequence, 0)
            if held != step.input_pos:
                raise SessionError(
                    f"sequence {sequence} has {step.input_pos} tokens and the caches of {self.where} hold "
                    f"{held} of them: run every step of a sequence through every model that serves it, in "
                    "order."
                )
