"""``CacheSession``: the pages, metadata and sequences behind a model that a user's own loop calls.

A session owns what a step needs and a model does not have: which sequences there are, how long they are,
on which pages their K and V lie, and the tensors that say so. ``prefill``, ``decode`` and ``step`` each make
one ``Batch``, a context within which models that were compiled with ``backend="flashinfer_trtllm"`` and this
session may be called once. The sequences grow when the context ends without an error; else nothing happened.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ad_flashinfer_pass import pipeline
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import CapacityError, SessionError
from ad_flashinfer_pass.experts import offer_to_transformers
from ad_flashinfer_pass.records import KvCacheResource
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.page_pool import PagePool
from ad_flashinfer_pass.torch_compile.batch import Batch, CacheGroup
from ad_flashinfer_pass.torch_compile.sequences import Copies, Schedule, Sequences
from ad_flashinfer_pass.transforms.initialize_cache import free_bytes, pages_wanted

offer_to_transformers()

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]
_NUM_TOKENS = 8192


class CompileRecord(NamedTuple):
    """One compilation on behalf of a session."""

    what: str
    """``dynamo`` (a graph was captured), ``pass`` (the caches were inserted), or the compile backend."""
    shape: str
    """The token counts for which it holds."""
    seconds: float
    """0 for dynamo, which does not say."""


class CacheSession:
    """Sequences with a paged KV cache, for models compiled with ``backend="flashinfer_trtllm"``.

    Args:
        max_batch_size: sequences of one step, at most.
        max_seq_len: tokens of one sequence, at most.
        max_num_tokens: tokens of one step, at most. Default: max_batch_size * max_seq_len, but no more than
            8192, or max_seq_len if that is more.
        device: where the models are.
        kv_cache_config: as in ``AutoDeployConfig``. ``max_tokens`` bounds what the pools hold; default:
            max_batch_size * max_seq_len.
        kernel_dir: as in ``AutoDeployConfig``.
        transforms: as in ``AutoDeployConfig``, for every model of the session.
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
        kernel_dir: str | None = None,
        transforms: Mapping[str, Any] | None = None,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "max_batch_size": max_batch_size,
            "max_seq_len": max_seq_len,
            "max_num_tokens": max_num_tokens,
            "device": device,
            "kv_cache_config": kv_cache_config or KvCacheConfig(),
            "kernel_dir": kernel_dir,
        }
        self.transforms = dict(transforms or {})
        sizes = self.config()  # says what is wrong with them before they are multiplied
        if max_num_tokens is None:
            longest = sizes.sequence_limit
            self._settings["max_num_tokens"] = max(longest, min(sizes.max_batch_size * longest, _NUM_TOKENS))
        config = self.config()
        self.on_event = on_event
        with torch.inference_mode(False):  # else nothing could be written to outside of it
            ctx = pipeline.context(config)
        self.device, self.sequence_info = ctx.device, ctx.sequence_info
        self.compiles: list[CompileRecord] = []
        """Every compilation for this session, in order."""
        self._memory_fraction = config.kv_cache_config.free_gpu_memory_fraction
        self._pages = PagePool(pages_wanted(config, self.sequence_info) + 1)
        self.sequences = Sequences(self.sequence_info, self._pages)
        self._caches: dict[Hashable, Tensor] = {}
        self._groups: dict[tuple[Hashable, ...], CacheGroup] = {}
        self.open_batch: Batch | None = None
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

        Of a transform that both speak of, the session's settings hold.

        Raises:
            ConfigError: a value is out of range.
        """
        transforms = {**changes.pop("transforms", {}), **self.transforms}
        return AutoDeployConfig(**{**self._settings, **changes, "transforms": transforms})

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens in the cache, by sequence."""
        return self.sequences.lengths

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence uses."""
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
        """Begin sequences with their prompts.

        Args:
            input_ids: int64 [b, s] or [s], or one list of tokens a sequence, of any lengths.

        Raises:
            SessionError: a batch is open, or a prompt is empty.
            CapacityError: the session is too small.
        """
        return self.step([(None, prompt) for prompt in _prompts(input_ids)], sort=True)

    def decode(self, token_ids: Tensor | Sequence[int], sequences: Sequence[int] | None = None) -> Batch:
        """Add a token to each sequence. The host does not wait for tokens that are on the device.

        Args:
            token_ids: int64 [b] or [b, 1], or a list: the tokens, as sampled from the step before.
            sequences: the sequence of each token; default: all, in the order in which they began.

        Raises:
            SessionError: a batch is open, a sequence is unknown, or there are more or fewer tokens than
                sequences.
            CapacityError: the session is too small.
        """
        if isinstance(token_ids, Tensor) and token_ids.is_floating_point():
            raise SessionError(f"tokens must be integers, got a tensor of {token_ids.dtype}.")
        chosen = list(self.lengths) if sequences is None else list(sequences)
        num_tokens = token_ids.numel() if isinstance(token_ids, Tensor) else len(token_ids)
        if num_tokens != len(chosen):
            raise SessionError(f"decode takes one token a sequence, got {num_tokens} for {len(chosen)}.")
        if isinstance(token_ids, Tensor) and token_ids.device.type != "cpu":
            # They stay on the device: what stands for token i of a tensor is -1 - i.
            schedule = [(sequence, [-1 - i]) for i, sequence in enumerate(chosen)]
            return self._batch(schedule, sampled=token_ids.flatten())
        tokens = token_ids.flatten().tolist() if isinstance(token_ids, Tensor) else token_ids
        return self.step([(sequence, [token]) for sequence, token in zip(chosen, tokens, strict=True)])

    def verify(
        self, drafts: Tensor | Sequence[Sequence[int]], sequences: Sequence[int] | None = None
    ) -> Batch:
        """Add a token to each sequence, and guesses at those after it, of which ``Batch.accept`` keeps some.

        Args:
            drafts: of each sequence the newest token, as sampled from the step before, and then guesses:
                int64 [b, n], or lists of any lengths.
            sequences: the sequence of each; default: all, in the order in which they began.

        Raises:
            SessionError: as for ``step``, or there are more or fewer lists than sequences.
            CapacityError: the session is too small.
        """
        rows = _prompts(drafts)
        chosen = list(self.lengths) if sequences is None else list(sequences)
        if len(rows) != len(chosen):
            raise SessionError(
                f"verify takes a list of tokens a sequence, got {len(rows)} for {len(chosen)}."
            )
        return self.step(list(zip(chosen, rows, strict=True)), sort=True)

    def step(self, schedule: Schedule, *, sort: bool = False) -> Batch:
        """A step with any mixture of prompts, chunks and single tokens.

        Args:
            schedule: (sequence, its new tokens) in the order prefill (no past), extend (several tokens on a
                past), decode (one token); None begins a sequence.
            sort: bring the schedule into that order; results stay in the order given.

        Raises:
            SessionError: a batch is open, the order is wrong, or a sequence is unknown, given twice or
                without tokens.
            CapacityError: the session is too small.
        """
        batch = self._batch(schedule, sort=sort)
        if min(min(tokens) for _, tokens in batch.entries) < 0:
            raise SessionError("token ids must be 0 or more.")
        return batch

    def free(self, sequences: Iterable[int] | None = None) -> None:
        """End sequences, by default all, and take their pages back.

        Raises:
            SessionError: a sequence is unknown, or a batch is open.
        """
        self.refuse_if_open()
        chosen = list(self.lengths) if sequences is None else list(dict.fromkeys(sequences))
        for sequence in chosen:
            self.sequences.known(sequence)
        for sequence in chosen:
            self.release(self.sequences.cut(sequence, 0))
            for group in self._groups.values():
                group.lengths.pop(sequence, None)

    def fork(self, sequence: int) -> int:
        """Begin a sequence that has the tokens of another one so far, which goes on as it was.

        Full pages are shared, the last one is copied.

        Args:
            sequence: the other one.

        Returns:
            Its own number.

        Raises:
            SessionError: the sequence is unknown, or a batch is open.
            CapacityError: no page is free.
        """
        self.refuse_if_open()
        number, copies = self.sequences.fork(sequence)
        self._copy(copies)
        for group in self._groups.values():
            if sequence in group.lengths:
                group.lengths[number] = group.lengths[sequence]
        return number

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the last tokens of a sequence, for example drafts that were refused.

        Args:
            sequence: its number.
            length: tokens that stay, 1 or more.

        Raises:
            SessionError: the sequence is unknown, has not that many tokens, or a batch is open.
            CapacityError: its last page is then one of a fork's, too, and no page is free for a copy.
        """
        self.refuse_if_open()
        longest = self.sequences.known(sequence).length
        if not 1 <= length <= longest:
            raise SessionError(f"sequence {sequence} can be cut to 1..{longest} tokens, got {length}.")
        self._copy(self.sequences.own(sequence, length))
        self.release(self.sequences.cut(sequence, length))
        for group in self._groups.values():
            group.lengths[sequence] = min(group.lengths.get(sequence, 0), length)

    @property
    def batch(self) -> Batch:
        """The open batch.

        Raises:
            SessionError: there is none.
        """
        if self.open_batch is None:
            raise SessionError(
                "a compiled model was called outside a batch: use `with session.prefill(input_ids) as "
                "batch:` (or decode, or step) and call it with batch.inputs."
            )
        return self.open_batch

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
                    f"{len(new)} caches of {num_pages} pages need {needed} bytes, but {free} are free "
                    f"on {self.device}. Lower max_batch_size, max_seq_len or kv_cache_config.max_tokens of "
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

    def refuse_if_open(self) -> None:
        """Refuse what cannot be done within a batch.

        Raises:
            SessionError: a batch is open.
        """
        if self.open_batch is not None:
            raise SessionError("a batch is open: leave its context first.")

    def release(self, pages: list[int]) -> None:
        """Give pages back; those that nobody else uses are zeroed, because NaN left behind in one would reach
        the sequence that owns it next.
        """
        if not (freed := self._pages.free(pages)):
            return
        index = torch.tensor(freed, device=self.device)
        with torch.no_grad():
            for cache in self._caches.values():
                cache.index_fill_(0, index, 0)

    def _copy(self, pages: Copies) -> None:
        with torch.no_grad():
            for cache in self._caches.values():
                for page, copy in pages:
                    cache[copy].copy_(cache[page])

    def _batch(self, schedule: Schedule, *, sort: bool = False, sampled: Tensor | None = None) -> Batch:
        self.refuse_if_open()
        return Batch(self, self.sequences.checked(schedule, sort=sort), sort=sort, sampled=sampled)


def _prompts(input_ids: TokenIds) -> list[Sequence[int]]:
    rows: Any = input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids
    if not isinstance(rows, Iterable):
        raise SessionError(f"a prompt must be a list of tokens, got {input_ids!r}.")
    rows = list(rows)
    return rows if any(isinstance(row, Iterable) for row in rows) else [rows]
