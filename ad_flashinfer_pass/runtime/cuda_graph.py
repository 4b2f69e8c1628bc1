"""Decode steps as CUDA graphs.

For each batch size of a list, the buckets, the transformed graph is captured once on rows that use the
scratch page. A decode step is padded with such rows to the smallest bucket that holds it, and replayed. Of a
step only the contents of the metadata and the caches may change: their addresses are in the graph and are
compared before each replay. All other steps run eagerly, each counted by its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.kernels import fa
from ad_flashinfer_pass.metadata import SequenceInfo, SequenceStep

_WARM_UPS = 2


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    """Where each replay puts its result."""
    addresses: list[int]
    """Of the inputs, in order."""
    plans: fa.GraphPlans
    """What kernels that need a plan read; renewed before each replay."""


class CudaGraphModule(nn.Module):
    """A transformed graph that replays its decode steps.

    Args:
        eager: the graph; called with metadata and caches by name, returns logits [1, n, vocab].
        batch_sizes: the buckets.
    """

    def __init__(self, eager: nn.Module, batch_sizes: Sequence[int]) -> None:
        super().__init__()
        self.eager = eager
        self.batch_sizes = sorted(set(batch_sizes))
        self.num_replays = 0
        self.fallbacks: Counter[str] = Counter()
        """Steps that ran eagerly, by reason."""
        self._captured: dict[int, _Captured] = {}

    def bucket(self, sequences: Sequence[SequenceStep]) -> int | None:
        """The batch size to which a step should be padded; None if no graph can run it."""
        if not all(len(seq.token_ids) == 1 and seq.gather for seq in sequences):
            return None
        sizes = (size for size in self.batch_sizes if size in self._captured)
        return next((size for size in sizes if size >= len(sequences)), None)

    def capture(self, sequence_info: SequenceInfo, caches: Mapping[str, Tensor]) -> None:
        """Capture every bucket, the largest first so that the smaller ones fit into its memory.

        Args:
            sequence_info: its tensors are the inputs of the graphs, from now on and at the same addresses.
            caches: likewise; only the scratch page is written.
        """
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(sequence_info.device)
        for size in reversed(self.batch_sizes):
            sequence_info.nest_sequences([], pad_to=size)
            inputs = {**sequence_info.named_args(), **caches}
            with torch.inference_mode():
                # Kernels are compiled, loaded and chosen by the first runs, none of which can be captured.
                stream.wait_stream(torch.cuda.current_stream())
                with fa.planning() as plans:
                    with torch.cuda.stream(stream):
                        for _ in range(_WARM_UPS):
                            self.eager(**inputs)
                    torch.cuda.current_stream().wait_stream(stream)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=stream):
                        logits = self.eager(**inputs)
            self._captured[size] = _Captured(graph, logits, _addresses(inputs), plans)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [1, n, vocab]; a replay if there is a graph for exactly these inputs."""
        captured = self._graph_for(inputs)
        if isinstance(captured, str):
            self.fallbacks[captured] += 1
            return self.eager(**inputs)
        captured.plans.renew(inputs["seq_len_with_cache"], inputs["cache_loc"])
        captured.graph.replay()
        self.num_replays += 1
        # The next replay overwrites its own result.
        return captured.logits.clone()

    def _graph_for(self, inputs: dict[str, Tensor]) -> _Captured | str:
        """The graph captured for these inputs, or why there is none."""
        batch_size, length = inputs["input_ids"].shape
        if length != 1:
            return "prefill"
        captured = self._captured.get(batch_size)
        if captured is None:
            return f"no graph for {batch_size} sequences"
        if inputs["token_gather_indices"].shape[0] != batch_size:
            return "logits of only some sequences"
        addresses = _addresses(inputs)
        if addresses != captured.addresses:
            moved = zip(inputs, addresses, captured.addresses, strict=True)
            return f"moved since capture: {', '.join(name for name, now, then in moved if now != then)}"
        return captured


def default_batch_sizes(max_batch_size: int) -> list[int]:
    """Powers of two up to the largest batch, and that one."""
    powers = [2**i for i in range(max_batch_size.bit_length()) if 2**i < max_batch_size]
    return [*powers, max_batch_size]


def _addresses(inputs: Mapping[str, Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in inputs.values()]
