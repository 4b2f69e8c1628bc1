"""The per-step metadata: which token belongs to which sequence and page.

Names, dtypes and formulas are those of AutoDeploy's ``SequenceInfo``, so that a graph made here and a
graph made in AutoDeploy take the same inputs. All tensors are views of one device buffer, allocated once at
full capacity; a step writes them into pinned memory and copies that in one go. Entries past the current
length are stale and must not be read. R is ``max_rows``, room for sequences and padding rows.

====================  ============  =======================================================================
name                  dtype         content, for sequences 0..n-1 ordered prefill, extend, decode
====================  ============  =======================================================================
input_ids             int64         tokens of this step: [b, 1] if every sequence decodes, else [1, total]
position_ids          int64         absolute position of each token, shaped as input_ids
batch_info_host       int32 [12]    host only, see ``BatchInfo``
cu_seqlen             int32 [R+1]   exclusive prefix sum of the new tokens of each sequence
input_pos             int32 [R]     tokens already in the cache
seq_len_with_cache    int32 [R]     input_pos + new tokens
cache_loc             int32 [*]     page ids of all sequences, concatenated
cu_num_pages          int32 [R+1]   exclusive prefix sum of the pages of each sequence
token_gather_indices  int64 [n]     rows of the flattened tokens whose logits are wanted
slot_idx              int64 [R]     slot of the state of each sequence, 0 for padding; only for graphs that
                                    take it (``has_states``)
next_ids              int64         for each token the one after it, for a head that guesses (``has_next``);
                                    see ``next_args``
sequence_lengths      int64         length of its sequence when a token is first computed, shaped as
                                    input_ids; only for graphs that take it (``has_lengths``)
====================  ============  =======================================================================

Source: TensorRT-LLM ``_torch/auto_deploy/custom_ops/attention_interface.py`` (the 12-int generation).

Decode steps can follow one another without the host: ``advance`` takes the tokens that were sampled and
writes the metadata of the next step on the device.

A step that verifies drafts has 1 + ``num_drafts`` tokens of each sequence: its newest one, and guesses at
those after it. They are counted as extends, and each has its row of logits. ``accept`` keeps the guesses
that are what was chosen in their places, and writes the metadata of the next such step. K and V of the
others lie beyond the length of the sequence, where nobody reads, until tokens of later steps are written
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate, chain, zip_longest
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ad_flashinfer_pass.runtime.staged_buffer import StagedBuffer

METADATA_ARGS = (
    "batch_info_host",
    "cu_seqlen",
    "input_pos",
    "seq_len_with_cache",
    "cache_loc",
    "cu_num_pages",
)


IDLE = -2
"""In place of a token: the sequence had stopped before this step."""
_MAX_STOP_TOKENS = 8


class Kind(IntEnum):
    """What a sequence does in a step; the sequences of a step stand in this order."""

    PREFILL = 0
    """Many tokens, none in the cache."""
    EXTEND = 1
    """Many tokens, others of the sequence in the cache."""
    DECODE = 2
    """One token."""

    @classmethod
    def of(cls, num_cached: int, num_new: int) -> Kind:
        """The kind of a sequence with so many tokens in the cache, and so many new ones."""
        if num_new == 1:
            return cls.DECODE
        return cls.EXTEND if num_cached else cls.PREFILL


class SequenceStep(NamedTuple):
    """What one sequence does in one step."""

    token_ids: Sequence[int]
    """New tokens, at least one. -1 - i is the i-th token that the step before sampled, whatever it is."""
    input_pos: int
    """Tokens of the sequence that are already in the cache."""
    pages: Sequence[int]
    """Page ids that hold positions 0 .. input_pos + len(token_ids) - 1 at least, none of them page 0."""
    gather: bool = True
    """Whether the logits of the last token are wanted."""
    first_len: int = 0
    """Tokens that the sequence began with, to which rotary frequencies may go, although a chunk or a second
    computation of it has fewer or more; 0: those up to the end of this step. For a generated token its own
    place decides."""
    slot: int = 0
    """Where its state is, other than slot 0; only for graphs with states. Where input_pos is 0, what is there
    does not count; elsewhere it is what the step before has left, so that no step can be run twice."""
    num_scored: int = 0
    """New tokens, the first ones, whose logits are wanted, too; they follow those of all sequences with
    gather. No captured graph runs such a step."""
    next_token: int = 0
    """Where gather is false, the token after the new ones; for ``has_next`` alone."""
    max_cached: int = 0
    """In a step that verifies drafts: tokens of the sequence that may be cached, at most; no draft beyond is
    accepted. token_ids are the newest token and as many of any as there are drafts."""


class RowParams(NamedTuple):
    """How the token of one row of logits is chosen on the device; see ``runtime.sampling.SamplingParams``."""

    stop_token_ids: Sequence[int] = ()
    """After one of them the sequence rests; only the first eight are used."""
    temperature: float = 0.0
    top_k: int = 0
    tail_mass: float = -1.0
    """1 - top_p; negative keeps all."""
    min_p: float = 0.0
    seed: int = 0
    """int64."""
    num_generated: int = 0
    """Tokens that the sequence has generated before this one."""


class Bucket(NamedTuple):
    """The shape to which a step is padded, so that a captured graph can run it.

    Padding rows use page 0. With ``num_tokens`` there are rows for ``num_prompts`` and the padding, the last
    of them without tokens, and max_batch_size rows of logits; without, each sequence has its row of logits.
    """

    num_tokens: int
    """Tokens of prefill and extend sequences; 0 in a bucket of decode steps."""
    num_decode: int
    """Decode sequences, of one token each."""
    num_prompts: int = 0
    """Prefill and extend sequences, at most."""
    num_drafts: int = 0
    """Of each of ``num_decode`` sequences; 0: nothing is verified."""

    def __str__(self) -> str:
        if self.num_drafts:
            return f"batch size {self.num_decode}, {self.num_drafts} drafts each"
        if self.num_tokens == 0:
            return f"batch size {self.num_decode}"
        return f"{self.num_tokens} tokens of {self.num_prompts} prompts, {self.num_decode} decodes"


class BatchInfo(NamedTuple):
    """The integers of ``batch_info_host``, in order; the only metadata that the host may read."""

    num_prefill: int
    num_prefill_tokens: int
    num_extend: int
    num_extend_tokens: int
    num_decode: int
    num_decode_tokens: int
    max_context_length: int
    max_blocks_per_seq: int
    block_offset_multiplier: int
    max_batch_size: int
    num_tokens_to_gather: int
    gather_required: int


class _Layout(NamedTuple):
    """A step as it is written."""

    sequences: Sequence[SequenceStep]
    """Padding rows included."""
    counts: list[int]
    """The first six of ``BatchInfo``."""
    gather: list[int]
    num_real: int
    """How many of ``gather`` belong to sequences that are no padding."""


class SequenceInfo:
    """Owner of the metadata tensors.

    Args:
        max_seq_len: tokens of one sequence, at most.
        max_batch_size: sequences of one step, at most.
        max_num_tokens: new tokens of one step, at most.
        tokens_per_block: tokens of one page.
        device: where the graph runs.
        num_drafts: tokens that a step may verify beside the newest one of each sequence; fewer than a page
            has.
        has_next: write ``next_ids`` and ``slot_idx`` in all steps but those that verify.
    """

    def __init__(
        self,
        max_seq_len: int,
        max_batch_size: int,
        max_num_tokens: int,
        tokens_per_block: int,
        device: torch.device,
        num_drafts: int = 0,
        has_next: bool = False,
    ) -> None:
        assert num_drafts < max(tokens_per_block, 1), "a sequence that rests has its tokens on one page"
        self.max_seq_len = max_seq_len
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.tokens_per_block = tokens_per_block
        self.max_extend_len = 0
        """If not 0, extends of more tokens are counted as prefill, and all but drafts if there are some; see
        ``ops.cached_attention``."""
        self.has_lengths = False
        """Whether the graph takes ``sequence_lengths``."""
        self.has_states = False
        """Whether the graph takes ``slot_idx``."""
        self.has_next = has_next
        self.recompute_at: int | None = None
        """If not None, a sequence that grows beyond so many tokens is to be computed anew, as one that began
        with one token more."""
        self.num_drafts = num_drafts
        self.max_blocks_per_seq = -(-(max_seq_len + num_drafts) // tokens_per_block)
        self.num_slots = max_batch_size + 1
        """States that a pool holds, of which slot 0 is scratch."""
        self.device = device
        self._padding_prompts = -(-max_num_tokens // max_seq_len)
        """Rows for what pads the tokens of a bucket."""
        self.max_rows = 2 * max_batch_size + self._padding_prompts
        max_logits = max_batch_size * (1 + num_drafts)
        """Rows of them from which tokens are chosen."""
        self._batch_info_host = torch.zeros(len(BatchInfo._fields), dtype=torch.int32)
        self._buffer = StagedBuffer(
            {
                "input_ids": (torch.int64, (max_num_tokens + max_batch_size,)),
                "position_ids": (torch.int64, (max_num_tokens + max_batch_size,)),
                "sequence_lengths": (torch.int64, (max_num_tokens + max_batch_size,)),
                "next_ids": (torch.int64, ((max_num_tokens + max_batch_size) * has_next,)),
                "token_gather_indices": (torch.int64, (max_batch_size + max_num_tokens,)),
                "stop_token_ids": (torch.int64, (max_logits, _MAX_STOP_TOKENS)),
                "seed": (torch.int64, (max_logits,)),
                "num_generated": (torch.int64, (max_logits,)),
                "temperature": (torch.float32, (max_logits,)),
                "tail_mass": (torch.float32, (max_logits,)),
                "min_p": (torch.float32, (max_logits,)),
                "top_k": (torch.int32, (max_logits,)),
                "is_stopped": (torch.int32, (max_logits,)),
                "max_cached": (torch.int32, (max_batch_size,)),
                "slot_idx": (torch.int64, (self.max_rows,)),
                "cu_seqlen": (torch.int32, (self.max_rows + 1,)),
                "input_pos": (torch.int32, (self.max_rows,)),
                "seq_len_with_cache": (torch.int32, (self.max_rows,)),
                "cu_num_pages": (torch.int32, (self.max_rows + 1,)),
                # Last, because only the part that is used is copied. One more, as in AutoDeploy: where the
                # first page of a padding row would stand.
                "cache_loc": (torch.int32, (max_batch_size * self.max_blocks_per_seq + 1,)),
            },
            device,
        )
        self.tokens = torch.zeros(max_logits, dtype=torch.int64, device=device)
        """Tokens sampled in the last step for which ``advance`` or ``accept`` was called, in the order of its
        logits."""
        self.num_verified = 0
        """Rows of the step that verify drafts, padding included; 0: it is no such step."""
        self.decodes = False
        """Whether the step is one token of each sequence, with its row of logits, so that ``advance`` makes
        the metadata those of the next step."""
        self.num_rows = 0
        """Sequences of the step, padding included."""
        self._shape = (1, 0)
        self._num_gather = 0

    @property
    def drafts(self) -> Tensor:
        """int64 [num_verified, 1 + num_drafts], the tokens of the step: the newest of a sequence, and drafts,
        which whoever guesses writes here. With ``views``, slots and lengths are at hand."""
        return self._buffer.views["input_ids"][: prod(self._shape)].view(self.num_verified, -1)

    @property
    def advances(self) -> bool:
        """Whether the metadata of the step become those of the next one when its tokens are chosen."""
        return self.num_verified > 0 or self.decodes

    @property
    def views(self) -> dict[str, Tensor]:
        """All metadata on the device, at full capacity."""
        return self._buffer.views

    def nest_sequences(
        self,
        sequences: Sequence[SequenceStep],
        *,
        pad_to: Bucket | None = None,
        row_params: Sequence[RowParams] = (),
        verifies: bool = False,
    ) -> None:
        """Write the metadata of one step. Never waits for the device.

        Args:
            sequences: in the order of ``Kind``.
            pad_to: add padding rows up to this shape. There may be no sequences then.
            row_params: for each row of logits what ``advance`` and ``sample_and_advance`` go by, or, of a
                step that verifies, for each sequence; else that of the step before stands.
            verifies: each sequence has its newest token and drafts.

        Raises:
            ValueError: the step is empty, out of order, too large, or its pages do not cover it.
        """
        step = self._verification(sequences, pad_to) if verifies else self._layout(sequences, pad_to)
        sequences, lens = step.sequences, [len(seq.token_ids) for seq in step.sequences]
        ends = list(accumulate(lens))
        total, self._num_gather = ends[-1], len(step.gather)
        limits = (self.max_seq_len, self.max_blocks_per_seq, 2, self.max_batch_size)
        info = BatchInfo._make((*step.counts, *limits, self._num_gather, 1))
        self._batch_info_host.numpy()[:] = info
        tokens = chain.from_iterable(seq.token_ids for seq in sequences)
        ids = np.fromiter(tokens, dtype=np.int64, count=total)
        starts = [seq.input_pos for seq in sequences]
        # The n-th token of a sequence stands n places behind its first one.
        shifts = [at + n - end for at, n, end in zip(starts, lens, ends, strict=True)]
        positions = np.minimum(np.arange(total) + np.repeat(shifts, lens), self.max_seq_len - 1)
        ends_of_pages = list(accumulate(len(seq.pages) for seq in sequences))
        all_pages = chain.from_iterable(seq.pages for seq in sequences)
        pages = np.fromiter(all_pages, dtype=np.int32, count=ends_of_pages[-1])
        write = self._buffer.next_stage()
        write("input_ids", ids)
        write("position_ids", positions)
        if self.has_lengths:
            firsts = [seq.first_len or seq.input_pos + n for seq, n in zip(sequences, lens, strict=True)]
            write("sequence_lengths", np.maximum(np.repeat(firsts, lens), positions + 1))
        if self.has_next and not verifies:
            write("next_ids", _next_ids(sequences))
        write("token_gather_indices", step.gather)
        num_padding = 0 if pad_to is None else self._num_gather - step.num_real
        write("is_stopped", [0] * step.num_real + [1] * num_padding)
        if verifies:
            write("max_cached", [seq.max_cached for seq in sequences])
            places = range(1 + self.num_drafts)
            row_params = [
                row._replace(num_generated=row.num_generated + i) for row in row_params for i in places
            ]
        if row_params:
            stops, *columns = zip(*row_params, strict=True)
            stop_token_ids = np.full((len(stops), _MAX_STOP_TOKENS), -1)
            by_place = zip_longest(*stops, fillvalue=-1)
            for place, ids_there in zip(range(_MAX_STOP_TOKENS), by_place, strict=False):
                stop_token_ids[:, place] = ids_there
            write("stop_token_ids", stop_token_ids)
            for name, column in zip(RowParams._fields[1:], columns, strict=True):
                write(name, column)
        if self.has_states or self.has_next or verifies:
            write("slot_idx", [seq.slot for seq in sequences])
        write("cu_seqlen", [0, *ends])
        write("input_pos", starts)
        write("seq_len_with_cache", [at + n for at, n in zip(starts, lens, strict=True)])
        write("cu_num_pages", [0, *ends_of_pages])
        write("cache_loc", pages)
        self._buffer.copy_to_device(len(pages))
        if ids.min(initial=0) < 0:
            filled = self._buffer.views["input_ids"][:total]
            filled.copy_(self._filled_in(filled))
        self.num_rows, self.num_verified = len(sequences), len(sequences) if verifies else 0
        self._shape = (total, 1) if info.num_decode == total else (1, total)
        self.decodes = info.num_decode == total and all(seq.gather for seq in sequences)

    def named_args(self) -> dict[str, Tensor]:
        """The inputs of the graph by name; shapes as in the module docstring."""
        total = prod(self._shape)
        views = self._buffer.views
        args = {name: views[name] for name in METADATA_ARGS if name in views}
        args["batch_info_host"] = self._batch_info_host
        args["input_ids"] = views["input_ids"][:total].view(self._shape)
        args["position_ids"] = views["position_ids"][:total].view(self._shape)
        if self.has_lengths:
            args["sequence_lengths"] = views["sequence_lengths"][:total].view(self._shape)
        if self.has_states:
            args["slot_idx"] = views["slot_idx"]
        args["token_gather_indices"] = views["token_gather_indices"][: self._num_gather]
        return args

    def next_args(self) -> dict[str, Tensor]:
        """``named_args`` of the same step for the tokens one place later, of which no logits are wanted.

        The step must not advance, and its tokens have been chosen: what follows the last token of a sequence
        is the one that it got, or ``SequenceStep.next_token``.
        """
        args = self.named_args()
        ids = self._buffer.views["next_ids"][: prod(self._shape)]
        args["input_ids"] = self._filled_in(ids).view(self._shape)
        args["token_gather_indices"] = args["token_gather_indices"][:0]
        return args

    def advance(self, sampled: Tensor) -> None:
        """Take the sampled tokens, and make the metadata that of the next step if all sequences decode.

        Runs on the device alone, so that it can be captured. A sequence whose token stops it, or is none,
        rests from then on: it is one token on page 0, and its token is ``IDLE``. The pages of the others must
        hold one token more. After a step with prefill the next one must be nested.

        Args:
            sampled: int64 [n], tokens of the first n rows of logits; negative for none.
        """
        n = sampled.shape[0]
        views = self._buffer.views
        is_stopped = views["is_stopped"][:n]
        tokens = torch.where(is_stopped > 0, IDLE, sampled)
        self.tokens[:n] = tokens
        if not self.decodes:
            return
        is_stop = (tokens[:, None] == views["stop_token_ids"][:n]).any(1)
        goes_on = ~(is_stop | (tokens < 0))
        is_stopped.copy_(~goes_on)
        views["input_ids"][:n] = tokens * goes_on
        input_pos = (views["input_pos"][:n] + 1) * goes_on
        views["input_pos"][:n] = input_pos
        views["position_ids"][:n] = input_pos
        views["sequence_lengths"][:n] = input_pos + 1
        torch.add(input_pos, 1, out=views["seq_len_with_cache"][:n])
        first_page = views["cu_num_pages"][:n].long()
        cache_loc = views["cache_loc"]
        cache_loc[first_page] = cache_loc[first_page] * goes_on

    def follow(self, other: SequenceInfo, back: int = 0) -> None:
        """Make the metadata that of a decode step of the newest tokens of another's step, which verifies.

        Of the same sizes. Runs on the device alone but for the numbers of rows, so that it can be captured. A
        sequence that is near max_seq_len rests, as one that has stopped does.

        Args:
            other: whose pages these are, too.
            back: how many places before their own the tokens are read, down to place 0.
        """
        self._set_step(other, other.num_verified, 1, None, back)

    def look_back(self, other: SequenceInfo, got: Tensor) -> Tensor:
        """Make the metadata that of the step from which another has advanced, for the tokens one place later.

        Otherwise as ``follow``. The logits of the last token that each sequence got are wanted.

        Args:
            other: its step decoded, or verified drafts.
            got: int64 [rows, n], the tokens of its step, of each sequence some and then negative numbers.

        Returns:
            int64 [rows], the places of the last ones among those of all sequences; a view, which the next
            step overwrites.
        """
        rows, width = got.shape
        self._set_step(other, rows, width, got, 0)
        return self._buffer.views["token_gather_indices"][:rows]

    def _set_step(self, other: SequenceInfo, rows: int, width: int, got: Tensor | None, back: int) -> None:
        """``width`` tokens of each row of another's step: ``follow`` if got is None, else ``look_back``."""
        limits = (self.max_seq_len, self.max_blocks_per_seq, 2, self.max_batch_size)
        counts = (0, 0, rows, rows * width, 0, 0) if width > 1 else (0, 0, 0, 0, rows, rows)
        self._batch_info_host.numpy()[:] = BatchInfo._make((*counts, *limits, rows, 1))
        self._shape = (1, rows * width) if width > 1 else (rows, 1)
        self._num_gather, self.num_verified, self.decodes = rows, 0, width == 1
        ours, theirs, stride = self._buffer.views, other.views, 1 + other.num_drafts
        if self.device.type == "cuda":
            from ad_flashinfer_pass.kernels import drafts  # needs triton

            drafts.set_step(
                rows, width, ours, theirs, got, back=back, stride=stride, max_seq_len=self.max_seq_len
            )
            return
        input_pos, bounds = theirs["input_pos"][:rows], torch.arange(rows + 1) * width
        shift: Tensor | int = back
        if got is None:
            ids, last = theirs["input_ids"][: rows * stride : stride], bounds[:-1]
            rests = (theirs["is_stopped"][: rows * stride : stride] > 0) | (
                input_pos + stride >= self.max_seq_len
            )
        else:
            shift = (got >= 0).sum(1).clamp(min=1)
            ids, last = got.clamp(min=0).flatten(), bounds[:-1] + shift - 1
            rests = torch.zeros(rows, dtype=torch.bool)
        for name in ("cache_loc", "cu_num_pages"):
            ours[name].copy_(theirs[name])
        ours["is_stopped"][:rows] = rests
        ours["stop_token_ids"][:rows] = -1
        ours["temperature"][:rows] = 0
        input_pos = (input_pos - shift).clamp(min=0) * ~rests
        ours["input_pos"][:rows] = input_pos
        ours["seq_len_with_cache"][:rows] = input_pos + width
        positions = (input_pos[:, None] + torch.arange(width)).clamp(max=self.max_seq_len - 1).flatten()
        ours["position_ids"][: rows * width] = positions
        ours["sequence_lengths"][: rows * width] = positions + 1
        ours["input_ids"][: rows * width] = ids
        ours["cu_seqlen"][: rows + 1] = bounds
        ours["token_gather_indices"][:rows] = last
        first_page = ours["cu_num_pages"][:rows].long()
        ours["cache_loc"][first_page] = ours["cache_loc"][first_page] * ~rests

    def accept(self, sampled: Tensor) -> None:
        """Keep the drafts that were sampled in their places, and make the metadata that of the next step.

        Runs on the device alone, as ``advance``. A token that was sampled after a wrong draft is none: the
        sequence goes on after the first token that is not its draft. ``tokens`` are what it gets, and then
        ``IDLE``. What follows a token that stops it is for the reader to drop.

        Args:
            sampled: int64 [n * (1 + num_drafts)], of the first n sequences, in the order of the logits.
        """
        width, views = 1 + self.num_drafts, self._buffer.views
        n = sampled.shape[0] // width
        drafts, places = self.drafts[:n], torch.arange(width, device=sampled.device)
        is_stopped = views["is_stopped"][: n * width].view(n, width)
        input_pos = views["input_pos"][:n]
        tokens = torch.where(is_stopped > 0, IDLE, sampled.view(n, width))
        is_right = (tokens[:, :-1] == drafts[:, 1:]) & (
            input_pos[:, None] + places[1:] < views["max_cached"][:n, None]
        )
        num_right = is_right.cumprod(1).sum(1, keepdim=True)
        newest = tokens.gather(1, num_right)
        tokens = torch.where(places <= num_right, tokens, IDLE)
        self.tokens[: n * width] = tokens.flatten()
        stops = views["stop_token_ids"][: n * width : width]
        is_stop = (tokens[:, :, None] == stops[:, None]).flatten(1).any(1) | (newest[:, 0] < 0)
        goes_on = ~is_stop
        is_stopped.copy_(is_stop[:, None].expand(n, width))
        drafts[:, :1] = newest * goes_on[:, None]
        views["num_generated"][: n * width] += num_right.add(1).expand(n, width).flatten()
        input_pos = (input_pos + num_right[:, 0] + 1).int() * goes_on
        views["input_pos"][:n] = input_pos
        positions = (input_pos[:, None] + places).clamp(max=self.max_seq_len - 1).flatten()
        views["position_ids"][: n * width] = positions
        views["sequence_lengths"][: n * width] = positions + 1
        torch.add(input_pos, width, out=views["seq_len_with_cache"][:n])
        first_page, cache_loc = views["cu_num_pages"][:n].long(), views["cache_loc"]
        cache_loc[first_page] = cache_loc[first_page] * goes_on

    def sample_and_accept(self, scores: Tensor, *, is_greedy: bool = False) -> None:
        """Choose tokens as ``row_params`` say, and ``accept``, by Triton kernels.

        Args:
            scores: floating [n * (1 + num_drafts), vocab_size], the first rows of logits.
            is_greedy: as for ``sample_and_advance``.
        """
        from ad_flashinfer_pass.kernels import drafts  # needs triton

        self.sample_and_advance(scores, is_greedy=is_greedy)
        with torch.cuda.device_of(scores):
            drafts.accept(
                scores.shape[0],
                self.num_drafts,
                self.tokens,
                self._buffer.views,
                max_seq_len=self.max_seq_len,
                idle=IDLE,
            )

    def sample_and_advance(self, scores: Tensor, *, is_greedy: bool = False) -> None:
        """Choose tokens as ``row_params`` say, and ``advance``, by Triton kernels.

        Args:
            scores: floating [n, vocab_size], the first n rows of logits, penalised if they are to be.
            is_greedy: no temperature is above 0, so that the filters need not be looked at.
        """
        from ad_flashinfer_pass.kernels import sampling as advance  # needs triton

        views = self._buffer.views
        with torch.cuda.device_of(scores):
            kinds = {"advances": self.decodes, "is_greedy": is_greedy}
        advance.sample_and_advance(scores, self.tokens, views, idle=IDLE, **kinds)

    def _filled_in(self, ids: Tensor) -> Tensor:
        """Tokens, with those that were sampled in the places of -1, -2, ..."""
        return torch.where(ids < 0, self.tokens[(-1 - ids).clamp(min=0)].clamp(min=0), ids)

    def _layout(self, sequences: Sequence[SequenceStep], bucket: Bucket | None) -> _Layout:
        """The step as it is written: with padding, if to a bucket."""
        lens = [len(seq.token_ids) for seq in sequences]
        kinds = [Kind.of(seq.input_pos, n) for seq, n in zip(sequences, lens, strict=True)]
        self._check(sequences, lens, kinds, may_be_empty=bucket is not None)
        ends = list(accumulate(lens))
        gather = [end - 1 for seq, end in zip(sequences, ends, strict=True) if seq.gather]
        kinds = self._short_extends(kinds, lens)
        counts = [value for kind in Kind for value in _count(kinds, lens, kind)]
        if bucket is None:
            num_real = len(gather)
            for seq, n, end in zip(sequences, lens, ends, strict=True):
                gather += range(end - n, end - n + seq.num_scored)
            return _Layout(sequences, counts, gather, num_real)
        num_long, long_tokens = counts[0] + counts[2], counts[1] + counts[3]
        rows = self._padded_prompts(sequences[:num_long], bucket.num_tokens - long_tokens, bucket)
        decodes = sequences[num_long:]
        if len(decodes) > bucket.num_decode or bucket.num_decode > self.max_batch_size:
            raise ValueError(
                f"{len(decodes)} decode sequences cannot be padded to {bucket.num_decode} "
                f"(max_batch_size={self.max_batch_size})"
            )
        padding = SequenceStep((0,), 0, ())
        padded = [*rows, *decodes, *[padding] * (bucket.num_decode - len(decodes))]
        shift = bucket.num_tokens - long_tokens
        moved = [row if row < long_tokens else row + shift for row in gather]
        if bucket.num_tokens:
            moved += [0] * (self.max_batch_size - len(gather))
        else:
            moved = list(range(bucket.num_decode))
        counts = [len(rows), bucket.num_tokens, 0, 0, bucket.num_decode, bucket.num_decode]
        return _Layout(padded, counts, moved, len(gather))

    def _verification(self, sequences: Sequence[SequenceStep], bucket: Bucket | None) -> _Layout:
        """The step as it is written, if each sequence has its newest token and drafts."""
        width, count = 1 + self.num_drafts, len(sequences) if bucket is None else bucket.num_decode
        if not len(sequences) <= count <= self.max_batch_size or count * width > self.max_num_tokens:
            raise ValueError(f"{len(sequences)} sequences of {width} tokens cannot be padded to {count}")
        for index, seq in enumerate(sequences):
            if len(seq.token_ids) != width or not seq.gather or seq.num_scored:
                raise ValueError(f"sequence {index}: must have {width} tokens, whose logits are wanted")
        firsts = [seq._replace(token_ids=seq.token_ids[:1]) for seq in sequences]
        self._check(firsts, [1] * len(firsts), [Kind.DECODE] * len(firsts), may_be_empty=bucket is not None)
        padded = [*sequences, *[SequenceStep((0,) * width, 0, ())] * (count - len(sequences))]
        counts = [0, 0, count, count * width, 0, 0]
        return _Layout(padded, counts, list(range(count * width)), len(sequences) * width)

    def _short_extends(self, kinds: list[Kind], lens: list[int]) -> list[Kind]:
        """The kinds, with prefill for extends up to the last one that is too long to be one."""
        if self.num_drafts:
            return [Kind.PREFILL if kind is Kind.EXTEND else kind for kind in kinds]
        is_long = [
            kind is Kind.EXTEND and n > self.max_extend_len > 0 for kind, n in zip(kinds, lens, strict=True)
        ]
        lead = len(kinds) - is_long[::-1].index(True) if any(is_long) else 0
        return [Kind.PREFILL] * lead + kinds[lead:]

    def _padded_prompts(
        self, prompts: Sequence[SequenceStep], num_missing: int, bucket: Bucket
    ) -> list[SequenceStep]:
        """The prompts, then prompts on page 0 that fill up the tokens, then rows without tokens."""
        if num_missing < 0 or len(prompts) > bucket.num_prompts:
            raise ValueError(
                f"{bucket.num_tokens - num_missing} tokens of {len(prompts)} prompts cannot be padded to "
                f"{bucket}"
            )
        if bucket.num_tokens == 0:
            return []
        starts = range(0, num_missing, self.max_seq_len)
        sizes = [min(num_missing - start, self.max_seq_len) for start in starts]
        rows = [*prompts, *(SequenceStep((0,) * size, 0, ()) for size in sizes)]
        return rows + [SequenceStep((), 0, ())] * (bucket.num_prompts + self._padding_prompts - len(rows))

    def _check(
        self, sequences: Sequence[SequenceStep], lens: list[int], kinds: list[Kind], *, may_be_empty: bool
    ) -> None:
        if min(lens, default=int(may_be_empty)) == 0:
            raise ValueError("a step must hold at least one sequence, each with at least one token")
        if len(sequences) > self.max_batch_size or sum(lens) > self.max_num_tokens:
            raise ValueError(
                f"a step must hold at most max_batch_size={self.max_batch_size} sequences and "
                f"max_num_tokens={self.max_num_tokens} tokens, got {len(sequences)} and {sum(lens)}"
            )
        if kinds != sorted(kinds):
            raise ValueError("sequences must be ordered prefill, extend, decode")
        for index, (seq, n) in enumerate(zip(sequences, lens, strict=True)):
            end = seq.input_pos + n
            if not 0 <= seq.input_pos < end <= self.max_seq_len:
                raise ValueError(
                    f"sequence {index}: positions {seq.input_pos}..{end - 1} must lie within "
                    f"max_seq_len={self.max_seq_len}"
                )
            num_pages = -(-end // self.tokens_per_block)
            if not num_pages <= len(seq.pages) <= self.max_blocks_per_seq or min(seq.pages) < 1:
                raise ValueError(
                    f"sequence {index}: {end} tokens need {num_pages} pages or more, up to "
                    f"{self.max_blocks_per_seq}, other than page 0, got {list(seq.pages)}"
                )
        slots = [seq.slot for seq in sequences]
        if self.has_states and (len({*slots}) < len(slots) or not all(0 < s < self.num_slots for s in slots)):
            raise ValueError(
                f"the model has states: each sequence needs a slot of its own in 1..{self.num_slots - 1}, "
                f"got {slots}"
            )


def _next_ids(sequences: Sequence[SequenceStep]) -> list[int]:
    """For each token the one after it; -1 - i stands for the token of the i-th row of logits."""
    ids, row = list[int](), 0
    for seq in sequences:
        is_row = bool(seq.gather and seq.pages)  # what pads has no page
        ids += seq.token_ids[1:]
        ids += [-1 - row if is_row else seq.next_token][: len(seq.token_ids)]
        row += is_row
    return ids


def _count(kinds: list[Kind], lens: list[int], kind: Kind) -> tuple[int, int]:
    chosen = [n for k, n in zip(kinds, lens, strict=True) if k == kind]
    return len(chosen), sum(chosen)
