"""``CachedModel``: what the pass returns. A graph, its caches and its metadata, called step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.metadata import SequenceInfo, SequenceStep
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule


class CachedModel:
    """A transformed graph with its resources.

    Args:
        module: called with the metadata and the caches by name; returns logits [1, n, vocab].
        caches: pools by the name of their graph input, [num_pages, 2, heads, page_size, head_dim].
        sequence_info: owner of the metadata tensors.
        vocab_size: width of the logits.
    """

    def __init__(
        self,
        module: nn.Module,
        caches: dict[str, Tensor],
        sequence_info: SequenceInfo,
        vocab_size: int,
    ) -> None:
        self.module = module
        self.caches = caches
        self.sequence_info = sequence_info
        self.device = sequence_info.device
        self.num_pages = next(iter(caches.values())).shape[0]
        self.vocab_size = vocab_size

    def step(self, sequences: Sequence[SequenceStep]) -> Tensor:
        """Run the graph once; K and V of the new tokens are written to their pages.

        Args:
            sequences: ordered prefill, extend, decode; see ``metadata.SequenceStep``.

        Returns:
            Logits [number of sequences with gather, vocab_size], in order, on the device.

        Raises:
            ValueError: the step is empty, out of order or too large; nothing was run.
        """
        bucket = self.module.bucket(sequences) if isinstance(self.module, CudaGraphModule) else None
        self.sequence_info.nest_sequences(sequences, pad_to=bucket)
        with torch.inference_mode():
            logits = self.module(**self.sequence_info.named_args(), **self.caches)[0]
        return logits if bucket is None else logits[: len(sequences)]

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero some pages: NaN left behind in one would reach the sequence that owns it next."""
        index = torch.tensor(pages, device=self.device)
        with torch.inference_mode():
            for cache in self.caches.values():
                cache[index] = 0
