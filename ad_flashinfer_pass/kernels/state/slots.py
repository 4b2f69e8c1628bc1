"""Recurrences over whole sequences, and over a ragged batch whose states lie in slots.

A recurrence is given as a function of a chunk: from the states of some sequences and a few of their next
tokens to what these tokens get, and the states after them. One token more is a chunk of one. A token whose
inputs are all zero must leave the state as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Chunk = Callable[..., tuple[Tensor, Tensor]]
"""Of states [n, ...] and inputs [n, tokens, ...]: results [n, tokens, ...], and the states after them."""


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

    def read(self, pool: Tensor, num: int) -> Tensor:
        """States of the first sequences: zero for one that begins, whatever is in its slot."""
        is_new = self.input_pos[:num] == 0
        return pool[self.slot_idx[:num]].masked_fill(is_new.view(-1, *[1] * (pool.dim() - 1)), 0)

    def write(self, pool: Tensor, states: Tensor) -> None:
        """Keep the states of the first sequences. Those of padding share slot 0, which nobody reads."""
        pool.index_copy_(0, self.slot_idx[: states.shape[0]], states.to(pool.dtype))


def scan(chunk: Chunk, state: Tensor, inputs: Sequence[Tensor], size: int) -> Tensor:
    """Results [b, s, ...] of inputs [b, s, ...], from the states [b, ...] on, in chunks of some tokens."""
    results = []
    for parts in zip(*(x.split(size, 1) for x in inputs), strict=True):
        result, state = chunk(state, *parts)
        results.append(result)
    return torch.cat(results, 1)


def cached_scan(chunk: Chunk, pool: Tensor, inputs: Sequence[Tensor], size: int, batch: Batch) -> Tensor:
    """Results of the tokens of a ragged batch; nothing waits for the device, and shapes are the host's.

    Args:
        chunk: see ``Chunk``.
        pool: [num_slots, ...]; read and written at the slots of the sequences.
        inputs: [b, s, ...], all of the tokens.
        size: tokens of a chunk, at most.
        batch: of the tokens.

    Returns:
        [b, s, ...]; zeros for padding tokens.
    """
    lead = inputs[0].shape[:2]
    inputs = [x.flatten(0, 1) for x in inputs]
    num_long, long_tokens, num_decode = batch.counts()
    states = batch.read(pool, num_long + num_decode).to(inputs[0].dtype)
    results, after = [], []
    if num_long:
        long = [x[:long_tokens] for x in inputs]
        result, state = _long(chunk, states[:num_long], long, min(size, long_tokens), batch.cu_seqlen)
        results.append(result)
        after.append(state)
    if num_decode:
        one_each = (x[long_tokens : long_tokens + num_decode, None] for x in inputs)
        result, state = chunk(states[num_long:], *one_each)
        results.append(result[:, 0])
        after.append(state)
    batch.write(pool, torch.cat(after))
    padding = inputs[0].shape[0] - long_tokens - num_decode
    if padding:
        results.append(results[0].new_zeros(padding, *results[0].shape[1:]))
    return torch.cat(results).view(*lead, *results[0].shape[1:])


def _long(
    chunk: Chunk, states: Tensor, inputs: list[Tensor], size: int, cu_seqlen: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences of many tokens: their chunks one after the other, as many as there are at most."""
    num, num_tokens, device = states.shape[0], inputs[0].shape[0], states.device
    starts = cu_seqlen[: num + 1].long()
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
    states = _one_more(states)
    results = []
    for index in range(at.shape[0]):
        here = slice(index, index + 1)
        result, state = chunk(states.index_select(0, row[here]), *(x[here] for x in chunks))
        states.index_copy_(0, row[here], state)
        results.append(result)
    by_chunk = torch.cat(results)
    by_token = by_chunk.new_empty(num_tokens + 1, *by_chunk.shape[2:])
    by_token[at] = by_chunk
    return by_token[:-1], states[:-1]


def _one_more(x: Tensor) -> Tensor:
    """With one row of zeros at the end."""
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
