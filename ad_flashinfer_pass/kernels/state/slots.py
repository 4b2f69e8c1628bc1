"""Recurrences over whole sequences, and over a ragged batch whose states lie in slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Recurrence(NamedTuple):
    """What an op computes, as functions of its tensors by token."""

    inputs: Callable[..., tuple[Tensor, ...]]
    """Of them, [n, tokens, ...]: what ``chunk`` takes of each token."""
    chunk: Callable[..., tuple[Tensor, Tensor]]
    """Of states [n, ...] and inputs: results [n, tokens, ...], and the states after them. One token more is a
    chunk of one. A token whose inputs are all zero leaves the state as it is."""
    finish: Callable[..., Tensor]
    """Of results and the tensors by token: what the op gives."""
    size: int
    """Tokens of a chunk, at most."""
    step: Callable[..., None] | None = None
    """The whole, on a GPU: of where the result goes, the tensors by token, [n, ...], the pool, slot_idx and
    input_pos; and cu_seqlen, unless each sequence has one token."""
    prefill: Callable[..., None] | None = None
    """The same for many tokens of each sequence, of 16 bits."""


class Rows(NamedTuple):
    """Some sequences of a batch."""

    slot_idx: Tensor
    input_pos: Tensor

    def read(self, pool: Tensor) -> Tensor:
        """Their states: zero for one that begins, whatever is in its slot."""
        is_new = self.input_pos == 0
        return pool[self.slot_idx].masked_fill(is_new.view(-1, *[1] * (pool.dim() - 1)), 0)

    def write(self, pool: Tensor, states: Tensor) -> None:
        """Keep their states. Those of padding share slot 0, which nobody reads."""
        pool.index_copy_(0, self.slot_idx, states.to(pool.dtype))


class Batch(NamedTuple):
    """Which tokens and which slot belong to which sequence; see ``runtime.sequence_info``."""

    batch_info_host: Tensor
    cu_seqlen: Tensor
    input_pos: Tensor
    slot_idx: Tensor

    def counts(self) -> tuple[int, int, int]:
        """Sequences of many tokens, those tokens, and sequences of one token that follow."""
        num_prefill, prefill_tokens, num_extend, extend_tokens, num_decode = self.batch_info_host[:5].tolist()
        return num_prefill + num_extend, prefill_tokens + extend_tokens, num_decode

    def rows(self, first: int, num: int) -> Rows:
        """Some of the sequences."""
        return Rows(self.slot_idx[first : first + num], self.input_pos[first : first + num])


def scan(recurrence: Recurrence, state: Tensor, *tokens: Tensor) -> Tensor:
    """The op over whole sequences: tensors by token [b, s, ...], from the states [b, ...] on."""
    result, _ = _in_chunks(recurrence, state, tokens)
    return recurrence.finish(result, *tokens)


def _in_chunks(recurrence: Recurrence, state: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    results = []
    inputs = recurrence.inputs(*tokens)
    for parts in zip(*(x.split(recurrence.size, 1) for x in inputs), strict=True):
        result, state = recurrence.chunk(state.to(inputs[0].dtype), *parts)
        results.append(result)
    return torch.cat(results, 1), state


def cached_scan(recurrence: Recurrence, pool: Tensor, batch: Batch, out: Tensor, *tokens: Tensor) -> Tensor:
    """The op over a ragged batch; nothing waits for the device, and shapes are the host's.

    Args:
        recurrence: of the op.
        pool: [num_slots, ...]; read and written at the slots of the sequences.
        batch: of the tokens.
        out: [b, s, ...], written: zeros for padding tokens.
        tokens: tensors by token, [b, s, ...].

    Returns:
        out.
    """
    flat, result = [x.flatten(0, 1) for x in tokens], out.flatten(0, 1)
    num_long, long_tokens, num_decode = batch.counts()
    num_tokens = long_tokens + num_decode
    if num_long:
        long = [x[:long_tokens] for x in flat]
        prompts, starts = batch.rows(0, num_long), batch.cu_seqlen[: num_long + 1]
        if recurrence.step is not None:
            fast = recurrence.prefill if out.dtype.itemsize == 2 else None
            (fast or recurrence.step)(result[:long_tokens], *long, pool, *prompts, starts)
        else:
            by_batch = [x[None] for x in long]
            scanned, states = _long(recurrence, prompts.read(pool), by_batch, starts.long())
            prompts.write(pool, states)
            result[:long_tokens] = recurrence.finish(scanned[None], *by_batch)[0]
    if num_decode:
        rows = batch.rows(num_long, num_decode)
        one_each = [x[long_tokens:num_tokens] for x in flat]
        if recurrence.step is not None:
            recurrence.step(result[long_tokens:num_tokens], *one_each, pool, *rows)
        else:
            by_batch = [x[:, None] for x in one_each]
            scanned, states = _in_chunks(recurrence, rows.read(pool), by_batch)
            rows.write(pool, states)
            result[long_tokens:num_tokens] = recurrence.finish(scanned, *by_batch)[:, 0]
    result[num_tokens:] = 0
    return out


def _long(
    recurrence: Recurrence, states: Tensor, tokens: Sequence[Tensor], starts: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences of many tokens: their chunks one after the other, as many as there are at most."""
    inputs = [x[0] for x in recurrence.inputs(*tokens)]
    num, num_tokens, device = states.shape[0], inputs[0].shape[0], states.device
    size = min(recurrence.size, num_tokens)
    counts = (starts.diff() + size - 1) // size
    ends = counts.cumsum(0)
    number = torch.arange(num_tokens // size + num, device=device)
    row = torch.searchsorted(ends, number, right=True)  # num for a chunk that no sequence has
    of = row.clamp(max=num - 1)
    first = starts[of] + (number - ends[of] + counts[of]) * size
    at = first[:, None] + torch.arange(size, device=device)
    is_token = (row < num)[:, None] & (at < starts[of + 1][:, None])
    at = at.where(is_token, num_tokens)
    chunks = [_one_more(x)[at] for x in inputs]
    states = _one_more(states.to(inputs[0].dtype))
    results = []
    for index in range(at.shape[0]):
        here = slice(index, index + 1)
        result, state = recurrence.chunk(states.index_select(0, row[here]), *(x[here] for x in chunks))
        states.index_copy_(0, row[here], state)
        results.append(result)
    by_chunk = torch.cat(results)
    by_token = by_chunk.new_empty(num_tokens + 1, *by_chunk.shape[2:])
    by_token[at] = by_chunk
    return by_token[:-1], states[:-1]


def _one_more(x: Tensor) -> Tensor:
    """With one row of zeros at the end."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
