"""The per-step metadata: which token belongs to which sequence and page.

Names, dtypes and formulas are those of AutoDeploy's ``SequenceInfo``, so that a graph made here and a
graph made in AutoDeploy take the same inputs. All tensors are allocated once at full capacity and
written in place; entries past the current length are stale and must not be read.

====================  ============  =======================================================================
name                  dtype         content, for sequences 0..n-1 ordered prefill, extend, decode
====================  ============  =======================================================================
input_ids             int64         tokens of this step: [b, 1] if every sequence decodes, else [1, total]
position_ids          int64         absolute position of each token, shaped as input_ids
batch_info_host       int32 [12]    host only, see ``BatchInfo``
cu_seqlen             int32 [B+1]   exclusive prefix sum of the new tokens of each sequence
input_pos             int32 [B]     tokens already in the cache
seq_len_with_cache    int32 [B]     input_pos + new tokens
cache_loc             int32 [*]     page ids of all sequences, concatenated
cu_num_pages          int32 [B+1]   exclusive prefix sum of the pages of each sequence
token_gather_indices  int64 [n]     rows of the flattened tokens whose logits are wanted
====================  ============  =======================================================================

Source: TensorRT-LLM ``_torch/auto_deploy/custom_ops/attention_interface.py`` (the 12-int generation).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

METADATA_ARGS = (
    "batch_info_host",
    "cu_seqlen",
    "input_pos",
    "seq_len_with_cache",
    "cache_loc",
    "cu_num_pages",
)


class SequenceStep(NamedTuple):
    """What one sequence does in one step."""

    token_ids: Sequence[int]
    """New tokens, at least one."""
    input_pos: int
    """Tokens of the sequence that are already in the cache."""
    pages: Sequence[int]
    """Page ids that hold positions 0 .. input_pos + len(token_ids) - 1, none of them page 0."""
    gather: bool = True
    """Whether the logits of the last token are wanted."""


_PADDING = SequenceStep(token_ids=(0,), input_pos=0, pages=(0,))


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


class SequenceInfo:
    """Owner of the metadata tensors.

    Args:
        max_seq_len: tokens of one sequence, at most.
        max_batch_size: sequences of one step, at most.
        max_num_tokens: new tokens of one step, at most.
        tokens_per_block: tokens of one page.
        device: where the graph runs.
    """

    def __init__(
        self,
        max_seq_len: int,
        max_batch_size: int,
        max_num_tokens: int,
        tokens_per_block: int,
        device: torch.device,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.tokens_per_block = tokens_per_block
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.device = device
        self._batch_info_host = torch.zeros(len(BatchInfo._fields), dtype=torch.int32)
        sizes = {
            "cu_seqlen": max_batch_size + 1,
            "input_pos": max_batch_size,
            "seq_len_with_cache": max_batch_size,
            "cu_num_pages": max_batch_size + 1,
            "cache_loc": max_batch_size * self.max_blocks_per_seq,
        }
        # One buffer for all int32 metadata, one for the int64, so that a step is two copies.
        self._int32_host, self._int32, self._views = _packed(sizes, torch.int32, device)
        sizes64 = {
            "input_ids": max_num_tokens,
            "position_ids": max_num_tokens,
            "token_gather_indices": max_batch_size,
        }
        self._int64_host, self._int64, views64 = _packed(sizes64, torch.int64, device)
        self._views.update(views64)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._shape = (1, 0)
        self._num_gather = 0

    def nest_sequences(self, sequences: Sequence[SequenceStep], *, pad_to: int | None = None) -> None:
        """Write the metadata of one step.

        Args:
            sequences: ordered prefill (many tokens, no past), extend (many tokens, a past), decode (one
                token).
            pad_to: add decode sequences of length 1 on page 0 until there are this many; each has a row of
                logits. All of ``sequences`` must decode then, and there may be none.

        Raises:
            ValueError: the step is empty, out of order, too large, or its pages do not cover it.
        """
        if pad_to is not None:
            sequences = self._padded(sequences, pad_to)
        lens = [len(seq.token_ids) for seq in sequences]
        self._check(sequences, lens)
        if self._copied is not None:
            self._copied.synchronize()  # else the copy of the last step could read what is written now
        kinds = [_kind(seq) for seq in sequences]
        counts = [value for kind in range(3) for value in _count(kinds, lens, kind)]
        ends = list(accumulate(lens))
        self._num_gather = sum(seq.gather for seq in sequences)
        limits = (self.max_seq_len, self.max_blocks_per_seq, 2, self.max_batch_size)
        info = BatchInfo._make((*counts, *limits, self._num_gather, 1))
        self._batch_info_host.numpy()[:] = info
        pages = [page for seq in sequences for page in seq.pages]
        positions = [
            p for seq, n in zip(sequences, lens, strict=True) for p in range(seq.input_pos, seq.input_pos + n)
        ]
        self._write("cu_seqlen", [0, *ends])
        self._write("input_pos", [seq.input_pos for seq in sequences])
        self._write(
            "seq_len_with_cache",
            [seq.input_pos + n for seq, n in zip(sequences, lens, strict=True)],
        )
        self._write("cu_num_pages", [0, *accumulate(len(seq.pages) for seq in sequences)])
        self._write("cache_loc", pages)
        self._write("input_ids", [t for seq in sequences for t in seq.token_ids])
        self._write("position_ids", positions)
        gather = [end - 1 for seq, end in zip(sequences, ends, strict=True) if seq.gather]
        self._write("token_gather_indices", gather)
        if self._int32 is not self._int32_host:
            self._int32.copy_(self._int32_host, non_blocking=True)
            self._int64.copy_(self._int64_host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        total = ends[-1]
        self._shape = (total, 1) if kinds[0] == 2 else (1, total)

    def named_args(self) -> dict[str, Tensor]:
        """The inputs of the graph by name; shapes as in the module docstring."""
        total = self._shape[0] * self._shape[1]
        args = {name: self._views[name][1] for name in METADATA_ARGS if name in self._views}
        args["batch_info_host"] = self._batch_info_host
        args["input_ids"] = self._views["input_ids"][1][:total].view(self._shape)
        args["position_ids"] = self._views["position_ids"][1][:total].view(self._shape)
        args["token_gather_indices"] = self._views["token_gather_indices"][1][: self._num_gather]
        return args

    def _write(self, name: str, values: list[int]) -> None:
        # numpy takes a short list ten times faster than torch.
        self._views[name][0].numpy()[: len(values)] = values

    @staticmethod
    def _padded(sequences: Sequence[SequenceStep], pad_to: int) -> list[SequenceStep]:
        if len(sequences) > pad_to or any(_kind(seq) != 2 for seq in sequences):
            raise ValueError(
                f"only decode sequences can be padded, to no less than their number, got {len(sequences)} "
                f"sequences and pad_to={pad_to}"
            )
        return [*sequences, *[_PADDING] * (pad_to - len(sequences))]

    def _check(self, sequences: Sequence[SequenceStep], lens: list[int]) -> None:
        if not sequences or min(lens) == 0:
            raise ValueError("a step must hold at least one sequence, each with at least one token")
        if len(sequences) > self.max_batch_size or sum(lens) > self.max_num_tokens:
            raise ValueError(
                f"a step must hold at most max_batch_size={self.max_batch_size} sequences and "
                f"max_num_tokens={self.max_num_tokens} tokens, got {len(sequences)} and {sum(lens)}"
            )
        kinds = [_kind(seq) for seq in sequences]
        if kinds != sorted(kinds):
            raise ValueError("sequences must be ordered prefill, extend, decode")
        for index, (seq, n) in enumerate(zip(sequences, lens, strict=True)):
            end = seq.input_pos + n
            if not 0 <= seq.input_pos < end <= self.max_seq_len:
                raise ValueError(
                    f"sequence {index}: positions {seq.input_pos}..{end - 1} must lie within "
                    f"max_seq_len={self.max_seq_len}"
                )
            if seq is _PADDING:
                continue
            if len(seq.pages) != -(-end // self.tokens_per_block) or min(seq.pages) < 1:
                raise ValueError(
                    f"sequence {index}: {end} tokens need {-(-end // self.tokens_per_block)} pages "
                    f"other than page 0, got {list(seq.pages)}"
                )


def _kind(seq: SequenceStep) -> int:
    """0 prefill, 1 extend, 2 decode."""
    if len(seq.token_ids) == 1:
        return 2
    return 1 if seq.input_pos else 0


def _count(kinds: list[int], lens: list[int], kind: int) -> tuple[int, int]:
    chosen = [n for k, n in zip(kinds, lens, strict=True) if k == kind]
    return len(chosen), sum(chosen)


def _packed(
    sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """One host and one device buffer, and (host, device) views of them by name."""
    host = torch.zeros(sum(sizes.values()), dtype=dtype, pin_memory=device.type == "cuda")
    on_device = host if device.type == "cpu" else torch.zeros_like(host, device=device)
    starts = [0, *accumulate(sizes.values())]
    views = {
        name: (host[start : start + size], on_device[start : start + size])
        for (name, size), start in zip(sizes.items(), starts, strict=False)
    }
    return host, on_device, views
