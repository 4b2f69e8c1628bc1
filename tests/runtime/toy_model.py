"""A language model without weights, for tests of the runtime.

The logits after some tokens are drawn from a hash of all of them. ``ToyModel`` gets those tokens by
reading them back from the pages that it was given, so that a wrong page, position or order gives
wrong logits. Beside them a hash of its tokens goes from step to step in the slot of each sequence: where it
is not that of the pages, the logits are wrong, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor, nn

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule, default_batch_sizes, default_token_buckets
from ad_flashinfer_pass.runtime.drafts.drafter import Drafter
from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter
from ad_flashinfer_pass.runtime.sequence_info import BatchInfo, SequenceInfo, SequenceStep

VOCAB_SIZE = 48
NAN_TOKEN = VOCAB_SIZE - 1
"""All logits after a sequence that holds this token are NaN."""


@lru_cache(maxsize=20_000)
def toy_logits(token_ids: tuple[int, ...]) -> Tensor:
    """float32 [VOCAB_SIZE]; NAN_TOKEN is never drawn."""
    digest = blake2b(repr(token_ids).encode(), digest_size=8).digest()
    normal = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCAB_SIZE)
    logits = torch.from_numpy(normal).float() * 3
    logits[NAN_TOKEN] = -torch.inf
    return logits * torch.nan if NAN_TOKEN in token_ids else logits


def greedy_alone(prompt: Sequence[int], num_tokens: int, eos: Sequence[int] = ()) -> list[int]:
    """The continuation of a prompt without pages, batch or engine."""
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens and (token_ids[-1] not in eos):
        token_ids.append(int(toy_logits(tuple(token_ids)).argmax()))
    return token_ids[len(prompt) :]


def _hashed(state: int, token_ids: Sequence[int]) -> int:
    """A state after some more tokens."""
    for token in token_ids:
        state = (state * 1009 + token + 2) % (2**61 - 1)
    return state


class ToyGraph(nn.Module):
    """Stands for a transformed graph: writes tokens into pages, and hashes all tokens read back from them."""

    def __init__(self, tokens_per_page: int, has_states: bool, max_seq_len: int) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.tokens_per_page = tokens_per_page
        self.has_states = has_states
        self.fail_next: BaseException | None = None
        self.steps: list[list[SequenceStep]] = []

    def forward(self, kv_cache_0: Tensor, recurrent_state_0: Tensor, **inputs: Tensor) -> Tensor:
        """[1, gathered tokens, VOCAB_SIZE]; page 0 is written and never read."""
        tokens = inputs["input_ids"].flatten().tolist()
        logits = dict.fromkeys(range(len(tokens)), torch.zeros(VOCAB_SIZE))
        step = self._sequences(inputs, tokens)
        self.steps.append([sequence for _, sequence in step])
        pages = [page for _, s in step for page in s.pages]
        written = {page for _, s in step for page in s.pages[s.input_pos // self.tokens_per_page :]}
        assert all(pages.count(page) == 1 for page in written), f"a page with two users is written: {pages}"
        assert not pages or 0 < min(pages) <= max(pages) < len(kv_cache_0), f"a page is out of range: {pages}"
        owned = [s.slot for _, s in step]
        assert len(set(owned)) == len(owned), f"a slot belongs to two sequences: {owned}"
        assert not owned or 0 < min(owned) <= max(owned) < len(recurrent_state_0), f"out of range: {owned}"
        kv_cache_0[0] = recurrent_state_0[0] = -1
        gathered = set(inputs["token_gather_indices"].tolist())
        for last, s in step:
            slots = [self._slot(s, position) for position in range(s.input_pos + len(s.token_ids))]
            for slot, token in zip(slots[s.input_pos :], s.token_ids, strict=True):
                assert 0 <= token < VOCAB_SIZE
                kv_cache_0[slot] = token + 1
            # -1 where nothing was written: only a sequence that has stopped may have that, and nobody looks.
            seen = tuple(int(kv_cache_0[slot]) - 1 for slot in slots)
            state = _hashed(int(recurrent_state_0[s.slot]) if s.input_pos else 0, s.token_ids)
            recurrent_state_0[s.slot] = state
            is_right = not self.has_states or state == _hashed(0, seen)
            logits[last] = toy_logits(seen if is_right else (-1, *seen))
            for back in range(1, len(s.token_ids)):
                if last - back in gathered:
                    logits[last - back] = toy_logits(seen[:-back])
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        rows = [logits[row] for row in inputs["token_gather_indices"].tolist()]
        return torch.stack(rows)[None] if rows else torch.empty(1, 0, VOCAB_SIZE)

    def _sequences(self, inputs: dict[str, Tensor], tokens: list[int]) -> list[tuple[int, SequenceStep]]:
        """Those that are no padding and do not rest on page 0, with the place of their last token."""
        info = BatchInfo._make(inputs["batch_info_host"].tolist())
        ends, starts = inputs["cu_seqlen"].tolist(), inputs["input_pos"].tolist()
        page_ends, pages = inputs["cu_num_pages"].tolist(), inputs["cache_loc"].tolist()
        positions = inputs["position_ids"].flatten().tolist()
        last = self.max_seq_len - 1
        gathered = set(inputs["token_gather_indices"].tolist())
        found: list[tuple[int, SequenceStep]] = []
        for row in range(info.num_prefill + info.num_extend + info.num_decode):
            first, end, start = ends[row], ends[row + 1], starts[row]
            length = start + end - first
            own = pages[page_ends[row] : page_ends[row + 1]][: -(-length // self.tokens_per_page)]
            assert inputs["seq_len_with_cache"][row] == length
            assert positions[first:end] == [min(at, last) for at in range(start, length)] or not own
            if own and own[0] != 0:
                slot = int(inputs["slot_idx"][row]) if self.has_states else len(found) + 1
                step = SequenceStep(tokens[first:end], start, own, end - 1 in gathered, slot=slot)
                found.append((end - 1, step))
        return found

    def _slot(self, s: SequenceStep, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.tokens_per_page)
        return (s.pages[page] if page < len(s.pages) else 0), offset  # drafts may stand beyond


class ToyModel(CachedModel):
    """A ``CachedModel``; ``fail_next`` is raised by the next step, after it has written its pages.

    Args:
        with_graphs: pad and replay as with CUDA graphs.
        has_states: the state counts, so that requests cannot share pages.
        num_drafts: tokens that a step may verify; has_states must be False.
        drafter: who guesses them; default: ``NgramDrafter``.
    """

    def __init__(
        self,
        *,
        num_pages: int = 100,
        tokens_per_page: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        max_seq_len: int = 200,
        with_graphs: bool = False,
        has_states: bool = True,
        num_drafts: int = 0,
        drafter: Callable[[SequenceInfo], Drafter] = NgramDrafter,
    ) -> None:
        self.graph = ToyGraph(tokens_per_page, has_states, max_seq_len)
        sizes = (max_seq_len, max_batch_size, max_num_tokens, tokens_per_page)
        info = SequenceInfo(*sizes, torch.device("cpu"), num_drafts)
        guesses = drafter(info) if num_drafts else None
        info.has_states = has_states
        caches = {
            "kv_cache_0": torch.zeros(num_pages, tokens_per_page, dtype=torch.int64),
            "recurrent_state_0": torch.full((info.num_slots,), 7, dtype=torch.int64),
        }
        module: nn.Module = self.graph
        if with_graphs:
            buckets = default_token_buckets(max_num_tokens)
            sizes_of_graphs = default_batch_sizes(max_batch_size)
            module = CudaGraphModule(self.graph, sizes_of_graphs, buckets, drafter=guesses)
            module.capture(info, caches)
            self.graph.steps.clear()
        super().__init__(module, caches, info, VOCAB_SIZE, drafter=guesses)
        self.verify_cost = {1: 0.0}  # so that drafts always pay

    @property
    def steps(self) -> list[list[SequenceStep]]:
        """What ran, padding left out."""
        return self.graph.steps

    @property
    def fail_next(self) -> BaseException | None:
        """Raised by the next step."""
        return self.graph.fail_next

    @fail_next.setter
    def fail_next(self, error: BaseException | None) -> None:
        self.graph.fail_next = error

    @property
    def num_dirty_pages(self) -> int:
        """Pages that were written and not cleared."""
        return int((self.caches["kv_cache_0"][1:] != 0).any(1).sum())
