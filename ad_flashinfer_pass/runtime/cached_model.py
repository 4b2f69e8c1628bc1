"""``CachedModel``: what the pass returns. A graph, its caches and its metadata, called step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.weights import StepWeights
from ad_flashinfer_pass.runtime.cuda_graph import Steps
from ad_flashinfer_pass.runtime.drafts.drafter import Drafter
from ad_flashinfer_pass.runtime.ranks import Ranks
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceInfo, SequenceStep

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import GenerationConfig

    from ad_flashinfer_pass.kernels.cache.clear import Pools


_VERIFY_COST = 1.2
"""Of a step that verifies drafts, in decode steps, where it was not measured."""
POOLS = ("kv_cache_", "conv_state_", "recurrent_state_")
"""How the names of graph inputs begin that are memory of the runtime's: pages, and states of two kinds."""


class CachedModel:
    """A transformed graph with its resources.

    Args:
        module: called with the metadata and the caches by name; returns logits [1, n, vocab].
        caches: pools by the name of their graph input: of pages, ``kv_cache_*`` [num_pages, 2, heads,
            page_size, head_dim], and of states, [num_slots, ...].
        sequence_info: owner of the metadata tensors.
        vocab_size: width of the logits.
        weights: what a step reads of the weights; None if that is not known.
        drafter: guesses tokens of the next steps; None: nobody does.
    """

    def __init__(
        self,
        module: nn.Module,
        caches: dict[str, Tensor],
        sequence_info: SequenceInfo,
        vocab_size: int,
        weights: StepWeights | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.module = module
        self.drafter = drafter
        self.caches = caches
        self.sequence_info = sequence_info
        self.device = sequence_info.device
        self.paged = [cache for name, cache in caches.items() if name.startswith(POOLS[0])]
        """Those of ``caches`` that are of pages."""
        guessing = drafter.caches if drafter is not None else {}
        pools = [cache for name, cache in guessing.items() if name.startswith(POOLS[0])]
        # Eight bytes an element: four times faster to clear than bfloat16.
        self._words = [_as_words(cache) for cache in (*self.paged, *pools)]
        self._pools: Pools | None = None
        """All of those, where one launch clears pages of all of them."""
        if self.device.type == "cuda" and {words.dtype for words in self._words} == {torch.int64}:
            from ad_flashinfer_pass.kernels.cache.clear import Pools  # needs triton

            self._pools = Pools(self._words)
        self.states = [cache for name, cache in caches.items() if name.startswith(POOLS[1:])]
        """Those that are of states."""
        pages = sequence_info.max_batch_size * sequence_info.max_blocks_per_seq + 1
        self.num_pages = self.paged[0].shape[0] if self.paged else pages  # which then hold nothing
        self.vocab_size = vocab_size
        self.weights = weights or StepWeights()
        self.num_lone_steps = 0
        """Calls of ``step`` and ``step_with``, which write pages that an engine does not know of."""
        self.ranks: Ranks | None = None
        """The other ranks that compute the model and follow this one."""
        self.are_logits_alike = False
        """Whether they get the same logits, bit by bit, and so choose the same tokens."""
        self.generation_config: GenerationConfig | None = None
        """What transformers' ``generate`` would go by, of a model of theirs."""
        self._steps = module if isinstance(module, Steps) else Steps()
        self.verify_cost: Mapping[int, float] = self._steps.verify_cost or {1: _VERIFY_COST}
        """What a step that verifies drafts takes, in decode steps, by the number of sequences."""
        self._takes_vectors = "inputs_embeds" in g.parameters(module)

    @property
    def is_captured(self) -> bool:
        """Whether some steps are replays of captured graphs."""
        return self._steps.is_captured

    @property
    def num_replays(self) -> int:
        """Steps that were replays of captured graphs."""
        return self._steps.num_replays

    @property
    def eager_steps(self) -> dict[str, int]:
        """Steps that ran eagerly although graphs were captured, by reason."""
        return dict(self._steps.fallbacks)

    def nest(
        self,
        sequences: Sequence[SequenceStep],
        row_params: Sequence[RowParams] = (),
        verifies: bool = False,
    ) -> None:
        """Write the metadata of a step, padded to the shape of a captured graph if there is one.

        Args:
            sequences: ordered prefill, extend, decode; see ``sequence_info.SequenceStep``.
            row_params: see ``SequenceInfo.nest_sequences``.
            verifies: likewise.

        Raises:
            ValueError: the step is empty, out of order or too large.
        """
        bucket = self._steps.bucket(sequences, verifies=verifies)
        self.sequence_info.nest_sequences(sequences, pad_to=bucket, row_params=row_params, verifies=verifies)
        if self.ranks is not None:  # and the step can be
            self.ranks.add("nest", list(sequences), list(row_params))

    @contextmanager
    def leading(self, num_tokens: int = 0, is_greedy: bool | None = None) -> Iterator[None]:
        """Let the other ranks, if there are any, do a step with this one, which is within.

        Args:
            num_tokens: rows by whose tokens they advance.
            is_greedy: let them choose the tokens on the device as this one does, by ``row_params``; None:
                they get them from this one.

        Raises:
            RankError: they are lost.
        """
        if self.ranks is None:
            yield
            return
        is_greedy = is_greedy if self.are_logits_alike else None
        try:
            self.ranks.tell("step", num_tokens, is_greedy)
            yield
            if num_tokens and is_greedy is None:
                self.ranks.share_tokens(self.sequence_info.tokens[:num_tokens])
        except BaseException:
            self.ranks.lose()
            raise

    def forward(self) -> Tensor:
        """Run the graph on the metadata as they are; K and V of the new tokens are written to their pages.

        Returns:
            Logits [n, vocab_size] on the device: first those of the sequences with gather, in order, then of
            tokens that are scored, or of padding rows. The next call may overwrite them.
        """
        if self._takes_vectors:
            raise ValueError(
                "the graph takes inputs_embeds, not tokens: call step_with(..., inputs_embeds=...)."
            )
        with torch.inference_mode():
            return self.module(**self.sequence_info.named_args(), **self.caches)[0]

    def sample_and_advance(self, *, is_greedy: bool) -> bool:
        """Choose tokens from the last ``forward``, and make the metadata those of the next step, by a replay.

        Args:
            is_greedy: whether all rows take the most likely token.

        Returns:
            Whether a captured graph did it; if not, nothing was done.
        """
        return self._steps.sample_and_advance(is_greedy=is_greedy)

    def step_with(self, sequences: Sequence[SequenceStep], **inputs: Tensor) -> Tensor:
        """Like ``step``, but the caller gives some of the inputs; the graph must not be captured.

        Args:
            sequences: as for ``step``; if inputs_embeds are given, only the number of their token_ids counts.
            inputs: by name, for the tokens of all sequences in order: inputs_embeds [tokens, d], position_ids
                [tokens], or [n, tokens] if a token has several.

        Raises:
            ValueError: as ``step``; the graph is captured, or an input has another number of tokens.
        """
        if self.ranks is not None:
            raise ValueError("several ranks compute this model, and only the first has these inputs.")
        if self.is_captured:
            raise ValueError(
                "a captured graph reads the metadata alone; set compile_backend to torch-simple."
            )
        self.num_lone_steps += 1
        self.nest(sequences)
        args = self.sequence_info.named_args()
        shape = args["position_ids"].shape
        for name, value in inputs.items():
            lead = value.shape[:-1] if name == "position_ids" else ()
            rest = value.shape[1:] if name != "position_ids" else ()
            if value.numel() != prod((*lead, *shape, *rest)):
                raise ValueError(f"{name} must be for {prod(shape)} tokens, got shape {tuple(value.shape)}.")
            args[name] = value.reshape(*lead, *shape, *rest)
        if "inputs_embeds" in inputs:
            del args["input_ids"]
        with torch.inference_mode():
            logits: Tensor = self.module(**args, **self.caches)[0]
        return logits[: sum(seq.gather for seq in sequences)]

    def step(self, sequences: Sequence[SequenceStep]) -> Tensor:
        """Run the graph once; K and V of the new tokens are written to their pages.

        Args:
            sequences: ordered prefill, extend, decode; see ``sequence_info.SequenceStep``.

        Returns:
            Logits [number of sequences with gather, vocab_size], in order, on the device.

        Raises:
            ValueError: the step is empty, out of order or too large; nothing was run.
        """
        self.num_lone_steps += 1
        self.nest(sequences)
        with self.leading():
            logits = self.forward()[: sum(seq.gather for seq in sequences)]
        return logits.clone() if self.is_captured else logits

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero some pages: NaN left behind in one would reach the sequence that owns it next."""
        if self.ranks is not None:
            self.ranks.add("clear_pages", list(pages))
        index = torch.tensor(pages)
        if self.device.type == "cuda":
            index = index.pin_memory().to(self.device, non_blocking=True)
        if self._pools is not None:
            self._pools.clear(index)
            return
        with torch.inference_mode():
            for words in self._words:
                words.index_fill_(0, index, 0)  # words[index] = 0 would copy the 0 from the host, and wait


def _as_words(cache: Tensor) -> Tensor:
    """The same memory as int64 [num_pages, words of a page], if that can be."""
    pages = cache.flatten(1) if cache.is_contiguous() else cache
    return pages.view(torch.int64) if pages.shape[1] * cache.itemsize % 8 == 0 and pages.dim() == 2 else cache
