"""``CacheSession``: the pages, metadata and sequences behind a model that a user's own loop calls.

A session owns what a step needs and a model does not have: which sequences there are, how long they are,
on which pages their K and V lie, and the tensors that say so. ``prefill``, ``decode`` and ``step`` each make
one ``Batch``, a context within which models that were compiled with ``backend="flashinfer_trtllm"`` and this
session may be called once. The sequences grow when the context ends without an error; else nothing happened.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import CapacityError, SessionError
from ad_flashinfer_pass.metadata import SequenceInfo, SequenceStep
from ad_flashinfer_pass.registry import KvCacheResource
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.page_pool import PagePool
from ad_flashinfer_pass.transforms.initialize_cache import free_bytes

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]
_NUM_TOKENS = 8192
_KINDS = ("prefill", "extend", "decode")


@dataclass
class _Sequence:
    length: int
    """Tokens that are in the cache."""
    pages: list[int]


class CompileRecord(NamedTuple):
    """One compilation on behalf of a session."""

    what: str
    """``dynamo`` (a graph was captured), ``pass`` (the caches were inserted), or the compile backend."""
    shape: str
    """The token counts for which it holds."""
    seconds: float
    """0 for dynamo, which does not say."""


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
        for sequence, step in zip(batch.packed_ids, batch.steps, strict=True):
            held = self.lengths.get(sequence, 0)
            if held != step.input_pos:
                raise SessionError(
                    f"sequence {sequence} has {step.input_pos} tokens and the caches of {self.where} hold "
                    f"{held} of them: run every step of a sequence through every model that serves it, in "
                    "order."
                )


class CacheSession:
    """Sequences with a paged KV cache, for models compiled with ``backend="flashinfer_trtllm"``.

    Args:
        max_batch_size: sequences of one step, at most.
        max_seq_len: tokens of one sequence, at most.
        max_num_tokens: tokens of one step, at most; default: all sequences at full length if that is 8192 or
            fewer, else 8192, and always one longest prompt.
        device: where the models are.
        kv_cache_config: as in ``AutoDeployConfig``. ``max_tokens`` bounds what the pools hold; default:
            max_batch_size * max_seq_len.
        on_event: called with a line of text as each part of a compilation begins; the first call of a large
            model takes a minute or more.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        *,
        max_batch_size: int = 8,
        max_seq_len: int = 2048,
        max_num_tokens: int | None = None,
        device: str = "cpu",
        kv_cache_config: KvCacheConfig | Mapping[str, Any] | None = None,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "max_batch_size": max_batch_size,
            "max_seq_len": max_seq_len,
            "max_num_tokens": max_num_tokens,
            "device": device,
            "kv_cache_config": kv_cache_config or KvCacheConfig(),
        }
        config = AutoDeployConfig(**self._settings)
        if max_num_tokens is None:
            self._settings["max_num_tokens"] = max(
                max_seq_len, min(max_batch_size * max_seq_len, _NUM_TOKENS)
            )
            config = self.config()
        self.on_event = on_event
        self.device = torch.device(device)
        self.sequence_info = SequenceInfo(
            max_seq_len=config.max_seq_len,
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.token_budget,
            tokens_per_block=config.kv_cache_config.tokens_per_block,
            device=self.device,
        )
        pages = config.max_batch_size * self.sequence_info.max_blocks_per_seq
        if config.kv_cache_config.max_tokens is not None:
            pages = min(pages, -(-config.kv_cache_config.max_tokens // self.sequence_info.tokens_per_block))
        self.compiles: list[CompileRecord] = []
        """Every compilation for this session, in order."""
        self._memory_fraction = config.kv_cache_config.free_gpu_memory_fraction
        self._pages = PagePool(pages + 1)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._caches: dict[Hashable, Tensor] = {}
        self._groups: dict[tuple[Hashable, ...], CacheGroup] = {}
        self._open: Batch | None = None
        self._is_split_noted = False
        self.captured: list[CachedModel] = []
        """The models with captured graphs, in the order of their compilation."""
        self.last_decoder: CachedModel | None = None
        """The captured model that ran a decode step last; the next is written for it at once."""

    def __reduce__(self) -> NoReturn:
        raise SessionError(
            "a session can be neither copied nor saved: it owns the pages of its sequences. To copy a "
            "compiled model, copy the model (compiled._orig_mod) and compile the copy with the same session."
        )

    def config(self, **changes: Any) -> AutoDeployConfig:
        """The session's settings as a config of the pass, with ``changes``.

        Raises:
            ConfigError: a value is out of range.
        """
        return AutoDeployConfig(**{**self._settings, **changes})

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens in the cache, by sequence."""
        return {sequence: state.length for sequence, state in self._sequences.items()}

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return self._pages.num_free

    @property
    def num_replays(self) -> int:
        """Steps that were replays of captured graphs."""
        return sum(model.num_replays for model in self.captured)

    @property
    def eager_steps(self) -> dict[str, int]:
        """Steps that models with captured graphs ran eagerly, by reason; those with prefill always do."""
        return dict(sum((Counter(model.eager_steps) for model in self.captured), Counter[str]()))

    @property
    def cache_bytes(self) -> int:
        """Bytes of all pools; 0 before the first call of a compiled model."""
        return sum(cache.nbytes for cache in self._caches.values())

    def prefill(self, input_ids: TokenIds) -> Batch:
        """New sequences with their prompts.

        Args:
            input_ids: int64 [b, s] or [s], or one list of tokens a sequence, of any lengths.

        Raises:
            SessionError: a batch is open, or a prompt is empty.
            CapacityError: the session is too small.
        """
        return self.step([(None, prompt) for prompt in _prompts(input_ids)], sort=True)

    def decode(self, token_ids: Tensor | Sequence[int], sequences: Sequence[int] | None = None) -> Batch:
        """One more token for each sequence. The host does not wait for tokens that are on the device.

        Args:
            token_ids: int64 [b] or [b, 1], or a list: the tokens, as sampled from the step before.
            sequences: whose they are; default: all, in the order in which they began.

        Raises:
            SessionError: a batch is open, a sequence is unknown, or there are more or fewer tokens than
                sequences.
            CapacityError: the session is too small.
        """
        if isinstance(token_ids, Tensor) and token_ids.is_floating_point():
            raise SessionError(f"tokens are integers, got a tensor of {token_ids.dtype}.")
        chosen = list(self._sequences) if sequences is None else list(sequences)
        num_tokens = token_ids.numel() if isinstance(token_ids, Tensor) else len(token_ids)
        if num_tokens != len(chosen):
            raise SessionError(f"decode takes one token a sequence, got {num_tokens} for {len(chosen)}.")
        if isinstance(token_ids, Tensor) and token_ids.device.type != "cpu":
            # They stay on the device: what stands for token i of a tensor is -1 - i.
            schedule = [(sequence, [-1 - i]) for i, sequence in enumerate(chosen)]
            return Batch(self, self._checked(schedule, sort=False), sampled=token_ids.flatten())
        tokens = token_ids.flatten().tolist() if isinstance(token_ids, Tensor) else token_ids
        return self.step([(sequence, [token]) for sequence, token in zip(chosen, tokens, strict=True)])

    def step(self, schedule: Sequence[tuple[int | None, Sequence[int]]], *, sort: bool = False) -> Batch:
        """Any mixture of prompts, chunks and single tokens.

        Args:
            schedule: (sequence, its new tokens) in the order prefill (no past), extend (several tokens on a
                past), decode (one token); None begins a sequence.
            sort: bring the schedule into that order; results stay in the order given.

        Raises:
            SessionError: a batch is open, the order is another, a sequence is unknown or given twice, or has
                no tokens.
            CapacityError: the session is too small.
        """
        entries = self._checked(schedule, sort)
        if min(min(tokens) for _, tokens in entries) < 0:
            raise SessionError("token ids must be 0 or more.")
        return Batch(self, entries, sort=sort)

    def free(self, sequences: Iterable[int] | None = None) -> None:
        """End sequences, by default all, and take their pages back.

        Raises:
            SessionError: a sequence is unknown, or a batch is open.
        """
        if self._open is not None:
            raise SessionError("sequences cannot be freed while a batch is open.")
        chosen = list(self._sequences) if sequences is None else list(sequences)
        for sequence in chosen:
            self._known(sequence)
        for sequence in chosen:
            self._release(self._sequences.pop(sequence).pages)
            for group in self._groups.values():
                group.lengths.pop(sequence, None)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the last tokens of a sequence, for example drafts that were refused.

        Args:
            sequence: which.
            length: tokens that stay, 1 or more.

        Raises:
            SessionError: the sequence is unknown, has not that many tokens, or a batch is open.
        """
        state = self._known(sequence)
        if self._open is not None or not 1 <= length <= state.length:
            raise SessionError(
                f"sequence {sequence} can be cut to 1..{state.length} tokens while no batch is open, got "
                f"{length}."
            )
        keep = self._num_pages(length)
        self._release(state.pages[keep:])
        state.length, state.pages = length, state.pages[:keep]
        for group in self._groups.values():
            group.lengths[sequence] = min(group.lengths.get(sequence, 0), length)

    @property
    def batch(self) -> Batch:
        """The open batch.

        Raises:
            SessionError: there is none.
        """
        if self._open is None:
            raise SessionError(
                "a compiled model was called outside a batch: use `with session.prefill(input_ids) as "
                "batch:` (or decode, or step) and call it with batch.inputs."
            )
        return self._open

    def group(
        self,
        keys: Sequence[Hashable],
        resources: Sequence[KvCacheResource],
        where: str,
        weights: Sequence[Tensor],
    ) -> CacheGroup:
        """The caches of some layers; those that are new are allocated.

        Args:
            keys: what tells each layer from all others, of this model and others.
            resources: of each key.
            where: the first layer, for messages.
            weights: of the layers; kept alive, because the keys are made of their identities.

        Raises:
            CapacityError: the memory does not hold them.
        """
        group_key = tuple(keys)
        if group_key not in self._groups:
            new = [(key, r) for key, r in zip(keys, resources, strict=True) if key not in self._caches]
            num_pages = self._pages.capacity + 1
            needed = num_pages * sum(resource.bytes_per_page for _, resource in new)
            free = int(free_bytes(self.device) * self._memory_fraction)
            if needed > free:
                raise CapacityError(
                    f"{len(new)} caches of {num_pages} pages need {needed} bytes, {free} are free on "
                    f"{self.device}. Lower max_batch_size, max_seq_len or kv_cache_config.max_tokens of "
                    "the session."
                )
            for key, resource in new:
                self._caches[key] = resource.allocate(num_pages, self.device)
            caches = [self._caches[key] for key in keys]
            self._groups[group_key] = CacheGroup(group_key, caches, where, weights)
        return self._groups[group_key]

    def note_split(self, message: str) -> None:
        """Warn once that a model was split."""
        if not self._is_split_noted:
            self._is_split_noted = True
            warnings.warn(message, stacklevel=2)

    def _checked(
        self, schedule: Sequence[tuple[int | None, Sequence[int]]], sort: bool
    ) -> list[tuple[int | None, list[int]]]:
        if self._open is not None:
            raise SessionError("a batch is open: leave its context before the next step.")
        entries = [(sequence, _integers(tokens)) for sequence, tokens in schedule]
        named = [sequence for sequence, _ in entries if sequence is not None]
        if not entries or not all(tokens for _, tokens in entries) or len(set(named)) < len(named):
            raise SessionError("a step takes one sequence or more, each once and with one token or more.")
        info, total = self.sequence_info, sum(len(tokens) for _, tokens in entries)
        if len(entries) > info.max_batch_size or total > info.max_num_tokens:
            raise CapacityError(
                f"the session takes max_batch_size={info.max_batch_size} sequences and "
                f"max_num_tokens={info.max_num_tokens} tokens a step, got {len(entries)} and {total}. Make "
                "it larger, or run long prompts in several steps."
            )
        kinds, needed = [], 0
        for sequence, tokens in entries:
            past = self._known(sequence).length if sequence is not None else 0
            if past + len(tokens) > info.max_seq_len:
                raise CapacityError(
                    f"a sequence of {past} and {len(tokens)} more tokens is longer than the session's "
                    f"max_seq_len={info.max_seq_len}. Make the session larger."
                )
            kinds.append(2 if len(tokens) == 1 else 1 if past else 0)
            needed += self._num_pages(past + len(tokens)) - self._num_pages(past)
        if not sort and kinds != sorted(kinds):
            given = ", ".join(_KINDS[kind] for kind in kinds)
            raise SessionError(f"a step must be ordered prefill, extend, decode, got {given}.")
        if needed > self._pages.num_free:
            raise CapacityError(
                f"the step needs {needed} more pages of {info.tokens_per_block} tokens, "
                f"{self._pages.num_free} are free. Free sequences, or raise kv_cache_config.max_tokens of "
                "the session."
            )
        return entries

    def _known(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            known = ", ".join(map(str, self._sequences)) or "none"
            raise SessionError(f"there is no sequence {sequence} in the session; known: {known}.")
        return self._sequences[sequence]

    def _num_pages(self, length: int) -> int:
        return -(-length // self.sequence_info.tokens_per_block)

    def _release(self, pages: list[int]) -> None:
        """Give pages back, zeroed: NaN left behind in one would reach the sequence that owns it next."""
        if not pages:
            return
        index = torch.tensor(pages, device=self.device)
        with torch.no_grad():
            for cache in self._caches.values():
                cache[index] = 0
        self._pages.free(pages)


class Batch:
    """One step of a session: a context in which its compiled models may be called.

    Gradients are off within it.
    """

    def __init__(
        self,
        session: CacheSession,
        entries: list[tuple[int | None, list[int]]],
        *,
        sort: bool = False,
        sampled: Tensor | None = None,
    ) -> None:
        self._session = session
        self._entries = entries
        self._sort = sort
        self._sampled = sampled
        self._is_nested = False
        self._nested_for: CachedModel | None = None
        self._stack = contextlib.ExitStack()
        self._new_pages: list[list[int]] = []
        self._inputs: dict[str, Tensor] | None = None
        self.ran: set[CacheGroup] = set()
        """The layers that have run."""
        self.sequences: list[int] = []
        """Ids of the sequences, in the order given."""
        self.packed_ids: list[int] = []
        """The same in the order in which their tokens lie in the inputs."""
        self.steps: list[SequenceStep] = []
        """What each of ``packed_ids`` does."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """``input_ids`` and ``position_ids``, int64 [1, total_tokens], the sequences one after the other.

        A step of one token has it twice, since torch.compile would compile size 1 anew.

        Raises:
            SessionError: the batch is not open.
        """
        if self._inputs is None or self._session._open is not self:
            raise SessionError(
                "a batch has inputs within its context only: `with session.decode(...) as batch:`."
            )
        return self._inputs

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(len(step.token_ids) for step in self.steps)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the tokens of each of ``sequences`` lie in the inputs and logits: (first, one past last)."""
        ends = list(accumulate(len(step.token_ids) for step in self.steps))
        where = {
            sequence: (end - len(step.token_ids), end)
            for sequence, step, end in zip(self.packed_ids, self.steps, ends, strict=True)
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

    def nest(self, model: CachedModel | None) -> None:
        """Write the metadata of the step, unless that was done.

        Args:
            model: with captured graphs, to the shape of one of which the step is padded; None: not padded.
        """
        if self._is_nested and self._nested_for is model:
            return
        info = self._session.sequence_info
        if self._sampled is not None:
            info.tokens[: len(self._sampled)] = self._sampled
        if model is None:
            info.nest_sequences(self.steps)
        else:
            model.nest(self.steps)
        self._is_nested, self._nested_for = True, model

    def was_overwritten(self) -> None:
        """The metadata are those of another step: capture writes its own."""
        self._is_nested = False

    def __enter__(self) -> Batch:
        session = self._session
        if self.steps:
            raise SessionError("a batch is entered once: ask the session for the next one.")
        session._checked(self._entries, self._sort)  # the session may have changed since the batch was made
        order = list(range(len(self._entries)))
        ids = []
        for sequence, _ in self._entries:
            if sequence is None:
                sequence, session._next_id = session._next_id, session._next_id + 1
            ids.append(sequence)
        if self._sort:
            order.sort(
                key=lambda i: len(self._entries[i][1]) == 1
            )  # all are prompts; those of one token decode
        self.sequences = ids
        self.packed_ids = [ids[i] for i in order]
        self.steps = [self._step(ids[i], self._entries[i][1]) for i in order]
        self.nest(session.last_decoder if all(len(step.token_ids) == 1 for step in self.steps) else None)
        args = session.sequence_info.named_args()
        # Copies, since torch.compile would take the places of views in their buffer for sizes that vary.
        times = 2 if self.num_tokens == 1 else 1
        tokens = {
            name: args[name].view(1, -1)[:, : self.num_tokens] for name in ("input_ids", "position_ids")
        }
        packed = {name: tensor.repeat(1, times) for name, tensor in tokens.items()}
        for tensor in packed.values():
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        self._inputs = packed
        session._open = self
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._session._open = None
        if kind is None and self.ran:
            self._commit()
            return
        for pages in self._new_pages:
            self._session._release(pages)
        if kind is None:
            raise SessionError(
                "no attention with a cache ran in this batch, so its sequences did not grow: call a model "
                "that was "
                'compiled with backend="flashinfer_trtllm" and this session, once. If one was called, '
                "torch.compile "
                "ran it without its graphs: TORCH_LOGS=recompiles,graph_breaks says why."
            )

    def _step(self, sequence: int, tokens: list[int]) -> SequenceStep:
        session = self._session
        state = session._sequences.get(sequence, _Sequence(0, []))
        end = state.length + len(tokens)
        new = session._pages.allocate(session._num_pages(end) - len(state.pages))
        self._new_pages.append(new)
        return SequenceStep(tokens, state.length, [*state.pages, *new])

    def _commit(self) -> None:
        steps = dict(zip(self.packed_ids, self.steps, strict=True))
        for sequence in self.sequences:
            step = steps[sequence]
            end = step.input_pos + len(step.token_ids)
            self._session._sequences[sequence] = _Sequence(end, list(step.pages))
            for group in self.ran:
                group.lengths[sequence] = end


def _prompts(input_ids: TokenIds) -> list[Sequence[int]]:
    rows: Any = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    if not isinstance(rows, Iterable):
        raise SessionError(f"a prompt is a list of tokens, got {input_ids!r}.")
    rows = list(rows)
    return rows if any(isinstance(row, Iterable) for row in rows) else [rows]


def _integers(tokens: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as err:
        raise SessionError(f"tokens are integers, got {tokens!r}.") from err
