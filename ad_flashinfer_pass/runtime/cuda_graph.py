"""Steps as CUDA graphs.

The transformed graph is captured once for each bucket, on padding rows alone: for each batch size of decode
steps, and for numbers of tokens of steps with prefill (``prefill_buckets``). A step is padded to the smallest
bucket that holds it, and replayed. Of a step only the contents of the metadata and the caches may change.
What a graph has baked in is compared before each replay: the integers of ``batch_info_host``, which hold the
bucket and the bounds, the addresses of all inputs, and the generation of the kernels' workspaces. All other
steps run eagerly, each counted by its reason.

The choice of tokens and ``SequenceInfo.advance`` are a second graph of each bucket, because a batch with a
repetition penalty goes another way between the two. There is one more for steps in which all are greedy.
Steps that verify drafts have buckets of their own, as many as decode; their second graphs accept and guess.

On a CPU there are no graphs: a replay runs the module again, with the same padding, checks and counts.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Phase
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.runtime.drafts.drafter import Drafter
from ad_flashinfer_pass.runtime.sampling import most_likely
from ad_flashinfer_pass.runtime.sequence_info import BatchInfo, Bucket, SequenceInfo, SequenceStep

logger = logging.getLogger(__name__)

_FEW_PROMPTS = 8
_BUCKETS_PER_DOUBLING = 8


class _Graph(Protocol):
    def replay(self) -> None: ...


class _Captured(NamedTuple):
    bucket: Bucket
    graph: _Graph
    logits: Tensor
    """Where each replay puts its result."""
    tails: dict[bool, _Graph]
    """Choose tokens from ``logits``, and advance; by whether all rows are greedy."""
    shape: torch.Size
    """Of the tokens."""
    addresses: list[int]
    """Of the inputs, in order."""
    generation: int
    """Of the workspaces."""
    state: GraphState
    """What its kernels keep; renewed before each replay."""


class CaptureCost(NamedTuple):
    """What it took to capture a bucket."""

    bucket: Bucket
    seconds: float
    bytes: int
    """Of device memory that the graph keeps; buckets share one pool, so most of it is the first one's."""


class Steps:
    """How the steps of a transformed graph run: here, each as it comes."""

    is_captured = False
    """Whether some are replays, which read the metadata alone and overwrite the last one's result."""
    num_replays = 0
    fallbacks: Mapping[str, int] = {}
    """Steps that ran eagerly although graphs were captured, by reason."""
    verify_cost: Mapping[int, float] = {}
    """What a step that verifies drafts takes, in decode steps, by the number of sequences, if known."""

    def bucket(self, sequences: Sequence[SequenceStep], *, verifies: bool = False) -> Bucket | None:
        """The shape to which a step should be padded; None if no graph can run it."""
        return None

    def sample_and_advance(self, *, is_greedy: bool) -> bool:
        """Choose tokens from the logits of the last call as they are, and advance, by a replay.

        Args:
            is_greedy: whether all rows take the most likely token. On a CPU nothing else has a graph.

        Returns:
            Whether there is a graph that does it; if not, nothing was done.
        """
        return False


class CudaGraphModule(Steps, nn.Module):
    """A transformed graph that replays its steps.

    Args:
        eager: the graph; called with metadata and caches by name, returns logits [1, n, vocab].
        batch_sizes: buckets of decode steps, in sequences.
        token_buckets: numbers of tokens of steps with prefill, see ``prefill_buckets``.
        host_kernels: for a phase that cannot be captured, which kernel it is that reads lengths on the host.
        drafter: whose drafts are verified, in steps of the same batch sizes; None: there are none.
        host_verifier: the kernel that verifies them, if it reads lengths on the host.
    """

    is_captured = True

    def __init__(
        self,
        eager: nn.Module,
        batch_sizes: Sequence[int],
        token_buckets: Sequence[int] = (),
        host_kernels: Mapping[Phase, str] | None = None,
        drafter: Drafter | None = None,
        host_verifier: str | None = None,
    ) -> None:
        super().__init__()
        self.eager, self.drafter, self.host_verifier = eager, drafter, host_verifier
        self.host_kernels = dict(host_kernels or {})
        self.batch_sizes = [] if "decode" in self.host_kernels else sorted(set(batch_sizes))
        self.token_buckets = [] if self.host_kernels else sorted(set(token_buckets))
        self.fallbacks: Counter[str] = Counter()
        self.costs: list[CaptureCost] = []
        """In the order of capture."""
        self._captured: dict[tuple[int, ...], _Captured] = {}
        """By the integers of ``batch_info_host``."""
        self._buckets: list[Bucket] = []
        """Those captured, the smallest first."""
        self._last: _Captured | None = None
        """What the last call replayed."""

    def bucket(self, sequences: Sequence[SequenceStep], *, verifies: bool = False) -> Bucket | None:
        """See ``Steps``."""
        if verifies:
            fitting = (
                each for each in self._buckets if each.num_drafts and each.num_decode >= len(sequences)
            )
            return next(fitting, None)
        num_tokens = sum(len(seq.token_ids) for seq in sequences if len(seq.token_ids) > 1)
        num_decode = sum(len(seq.token_ids) == 1 for seq in sequences)
        num_prompts = len(sequences) - num_decode
        if num_tokens == 0 and not all(seq.gather for seq in sequences):
            return None
        if any(seq.num_scored for seq in sequences):
            return None
        for bucket in self._buckets:
            same_kind = (bucket.num_tokens > 0) == (num_tokens > 0) and not bucket.num_drafts
            if same_kind and all(map(operator.ge, bucket, (num_tokens, num_decode, num_prompts))):
                return bucket
        return None

    def capture(
        self,
        sequence_info: SequenceInfo,
        caches: Mapping[str, Tensor],
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Capture every bucket, the largest first so that the smaller ones fit into its memory.

        What kernels need is there before the first is captured: they are compiled, loaded and chosen by their
        first runs, none of which can be captured. See ``_to_warm``.

        Args:
            sequence_info: its tensors are the inputs of the graphs, from now on and at the same addresses.
            caches: likewise; only the scratch page is written.
            on_progress: called with a line of text before each bucket.
        """
        buckets = [Bucket(0, size) for size in self.batch_sizes]
        num_drafts, most = sequence_info.num_drafts, sequence_info.max_num_tokens
        if self.drafter is not None and self.host_verifier is None:
            sizes = [size for size in self.batch_sizes if size * (1 + num_drafts) <= most]
            buckets += [Bucket(0, size, num_drafts=num_drafts) for size in sizes]
        buckets += prefill_buckets(self.token_buckets, sequence_info.max_batch_size)
        buckets.reverse()
        states = [GraphState() for _ in buckets]
        with torch.inference_mode():
            recorder = _recorder(sequence_info.device)
            for number, index in enumerate(_to_warm(buckets, states), 1):
                on_progress(f"warm-up {number}: {buckets[index]}")
                inputs = self._padding_step(buckets[index], sequence_info, caches)
                with recorder.warming(), states[index].begin_capture():
                    logits = self.eager(**inputs)[0]
                    for is_greedy in (True, False):
                        self._end_step(sequence_info, logits, is_greedy)
            recorder.release_warm_up()
            for index, bucket in enumerate(buckets):
                on_progress(f"capture {index + 1} of {len(buckets)}: {bucket}")
                self._capture_one(bucket, recorder, sequence_info, caches, states[index])
            self._buckets = buckets[::-1]
            self.verify_cost = self._costs_of_verifying(recorder, sequence_info, caches)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [1, n, vocab]; a replay if there is a graph for exactly these inputs.

        The result of a replay is overwritten by the next one.
        """
        captured = self._graph_for(inputs)
        if isinstance(captured, str):
            self._last = None
            if captured not in self.fallbacks:
                logger.debug("a step runs eagerly: %s", captured)
            self.fallbacks[captured] += 1
            return self.eager(**inputs)
        self._last = captured
        captured.state.before_replay(inputs)
        captured.graph.replay()
        self.num_replays += 1
        return captured.logits

    def sample_and_advance(self, *, is_greedy: bool) -> bool:
        """See ``Steps``."""
        if self._last is None or not (is_greedy or self._last.logits.device.type == "cuda"):
            return False
        self._last.tails[is_greedy].replay()
        return True

    @staticmethod
    def _padding_step(
        bucket: Bucket, sequence_info: SequenceInfo, caches: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        sequence_info.nest_sequences([], pad_to=bucket, verifies=bucket.num_drafts > 0)
        return {**sequence_info.named_args(), **caches}

    def _end_step(self, sequence_info: SequenceInfo, logits: Tensor, is_greedy: bool) -> Tensor:
        """Choose tokens, and write the metadata of the next step."""
        on_cuda, num_verified = logits.device.type == "cuda", sequence_info.num_verified
        drafter = self.drafter
        if num_verified and drafter is not None:
            if on_cuda:
                sequence_info.sample_and_accept(logits, is_greedy=is_greedy)
            else:
                sequence_info.accept(most_likely(logits))
            drafter.propose(sequence_info.tokens[: len(logits)].view(num_verified, -1))
            return sequence_info.tokens
        if on_cuda:
            sequence_info.sample_and_advance(logits, is_greedy=is_greedy)
        else:
            sequence_info.advance(most_likely(logits))
        if drafter is not None:
            drafter.read()
        return sequence_info.tokens

    def _costs_of_verifying(
        self, recorder: _CudaRecorder | _Rerunner, sequence_info: SequenceInfo, caches: Mapping[str, Tensor]
    ) -> dict[int, float]:
        """Of the steps that were captured, on padding, so that attention has little part in it."""

        def seconds(bucket: Bucket) -> float:
            inputs = self._padding_step(bucket, sequence_info, caches)
            captured = self._captured[tuple(inputs["batch_info_host"].tolist())]
            captured.state.before_replay(inputs)
            return recorder.seconds([captured.graph, captured.tails[True]])

        sizes = [bucket for bucket in self._buckets if bucket.num_drafts and recorder.has_clock]
        return {each.num_decode: seconds(each) / seconds(Bucket(0, each.num_decode)) for each in sizes}

    def _capture_one(
        self,
        bucket: Bucket,
        recorder: _CudaRecorder | _Rerunner,
        sequence_info: SequenceInfo,
        caches: Mapping[str, Tensor],
        state: GraphState,
    ) -> None:
        start, free = time.perf_counter(), recorder.free_bytes()
        inputs = self._padding_step(bucket, sequence_info, caches)
        with state.begin_capture():
            graph, logits = recorder.record(lambda: self.eager(**inputs))

        tails = {
            kind: recorder.record(partial(self._end_step, sequence_info, logits[0], kind))[0]
            for kind in (True, False)
        }
        self.costs.append(CaptureCost(bucket, time.perf_counter() - start, free - recorder.free_bytes()))
        self._captured[tuple(inputs["batch_info_host"].tolist())] = _Captured(
            bucket,
            graph,
            logits,
            tails,
            inputs["input_ids"].shape,
            _addresses(inputs),
            workspaces.generation(),
            state,
        )

    def _graph_for(self, inputs: dict[str, Tensor]) -> _Captured | str:
        """The graph captured for these inputs, or why there is none."""
        key = tuple(inputs["batch_info_host"].tolist())
        captured = self._captured.get(key)
        if captured is None:
            return self._why_no_graph(BatchInfo._make(key))
        if captured.generation != workspaces.generation():
            return "workspaces were released since capture"
        addresses = _addresses(inputs)
        if addresses != captured.addresses or inputs["input_ids"].shape != captured.shape:
            moved = zip(inputs, addresses, captured.addresses, strict=True)
            names = [name for name, now, then in moved if now != then]
            return f"moved since capture: {', '.join(names)}" if names else "tokens of another shape"
        return captured

    def _why_no_graph(self, info: BatchInfo) -> str:
        if any(key[:6] == info[:6] and key[10:] == info[10:] for key in self._captured):
            return "captured with other bounds"
        num_tokens = info.num_prefill_tokens + info.num_extend_tokens
        phases: tuple[Phase, ...] = ("prefill", "decode") if num_tokens else ("decode",)
        for phase in phases:
            if phase in self.host_kernels:
                return f"{phase} by {self.host_kernels[phase]}, which reads lengths on the host"
        if info.num_extend:
            by = f" by {self.host_verifier}, which reads lengths on the host" if self.host_verifier else ""
            return f"drafts of {info.num_extend} sequences{by}"
        if info.num_tokens_to_gather > info.max_batch_size:
            return "logits of the tokens of a prompt"
        if num_tokens:
            largest = max(self.token_buckets, default=0)
            return f"prefill of more than {largest} tokens" if largest else "prefill"
        if info.num_tokens_to_gather != info.num_decode:
            return "logits of only some sequences"
        return f"no graph for {info.num_decode} sequences"


def _to_warm(buckets: Sequence[Bucket], states: Sequence[GraphState]) -> Iterator[int]:
    """The places of buckets that must run once before they are captured, in order.

    A kernel depends on the rows of a step, as one of a linear does, or on what rows they are, as one of
    attention does. So another bucket of both runs the same ones, if nothing is kept for each graph: of the
    buckets for 8,192 tokens one is enough, where the GPU would compute for half a second.

    Args:
        buckets: in order.
        states: of their graphs; after each place those of the run.
    """
    rows, kinds = set[int](), set[tuple[int, ...]]()
    for index, bucket in enumerate(buckets):
        total, kind = bucket.num_tokens + bucket.num_decode * (1 + bucket.num_drafts), bucket[1:]
        if total not in rows or kind not in kinds:
            yield index
            rows.add(total)
            if states[index].is_empty:
                kinds.add(kind)


class _CudaRecorder:
    """Records CUDA graphs, all in one memory pool and from one stream."""

    has_clock = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def warming(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def release_warm_up(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def record(self, run: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Relaxed: the first launch of a kernel in a capture may load it, and a thread of NCCL's asks for
        # events.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
            result = run()
        return graph, result

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def seconds(self, graphs: Sequence[_Graph]) -> float:
        """Of these, replayed one after the other: the least of five times."""
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for graph in graphs:
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)


class _Rerunner:
    """Stands for ``_CudaRecorder`` on a CPU: a graph is the function, and runs again."""

    has_clock = False

    class _Function(NamedTuple):
        run: Callable[[], Tensor]
        result: Tensor

        def replay(self) -> None:
            with torch.inference_mode():
                self.result.copy_(self.run())

    @contextmanager
    def warming(self) -> Iterator[None]:
        yield

    def release_warm_up(self) -> None: ...

    def record(self, run: Callable[[], Tensor]) -> tuple[_Graph, Tensor]:
        graph = self._Function(run, run())
        return graph, graph.result

    def free_bytes(self) -> int:
        return 0

    def seconds(self, graphs: Sequence[_Graph]) -> float:
        raise NotImplementedError


def _recorder(device: torch.device) -> _CudaRecorder | _Rerunner:
    return _CudaRecorder(device) if device.type == "cuda" else _Rerunner()


def bucket_sizes(config: AutoDeployConfig) -> tuple[list[int], list[int]]:
    """Batch sizes of decode, and token counts of steps with prefill, for which a config captures graphs."""
    sizes, buckets = config.cuda_graph_batch_sizes, config.cuda_graph_token_buckets
    return (
        default_batch_sizes(config.max_batch_size) if sizes is None else sizes,
        default_token_buckets(config.token_budget) if buckets is None else buckets,
    )


def verified_batches(config: AutoDeployConfig) -> list[int]:
    """Batch sizes for which steps that verify drafts are captured, which a step's tokens may hold."""
    sizes, width = bucket_sizes(config)[0], 1 + config.num_drafts
    return [size for size in sizes if width > 1 and size * width <= config.token_budget]


def default_batch_sizes(max_batch_size: int) -> list[int]:
    """Powers of two up to the largest batch, and that one."""
    powers = [2**i for i in range(max_batch_size.bit_length()) if 2**i < max_batch_size]
    return [*powers, max_batch_size]


def default_token_buckets(max_num_tokens: int) -> list[int]:
    """Multiples of 64 up to 512, then eight for each doubling, up to the largest step, and that one.

    Padding then costs a ninth of a step at most. Once the largest is made, a capture takes little time and
    memory: AutoDeploy's ``piecewise_num_tokens``, powers of two, save less than they lose.
    """
    sizes, octave = [*range(64, 512, 64)], 512
    while octave < max_num_tokens:
        sizes += range(octave, 2 * octave, octave // _BUCKETS_PER_DOUBLING)
        octave *= 2
    return [*(size for size in sizes if size < max_num_tokens), max_num_tokens]


def prefill_buckets(totals: Sequence[int], max_batch_size: int) -> list[Bucket]:
    """The buckets of steps with prefill, those with the fewest rows first.

    Rows of sequences that are not there cost time: a linear has as many tokens more, and a kernel of prefill
    looks at the tiles of each. So there are buckets for a few prompts alone, for a few beside a full batch of
    decodes, and, at every second total, for any number of both.

    Args:
        totals: tokens of all sequences of a step; the largest has room for max_batch_size more.
        max_batch_size: sequences of a step, at most.
    """
    few, found = min(_FEW_PROMPTS, max_batch_size), set[Bucket]()
    for place, total in enumerate(sorted(set(totals), reverse=True)):
        beside = total - max_batch_size if place else total
        found |= {Bucket(total, 0, few), Bucket(beside, max_batch_size, few)}
        if place % 2 == 0:
            found.add(Bucket(beside, max_batch_size, max_batch_size))
    return sorted(
        (bucket for bucket in found if bucket.num_tokens > 1),
        key=lambda bucket: (bucket.num_tokens + bucket.num_decode, *bucket[1:]),
    )


def _addresses(inputs: Mapping[str, Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in inputs.values()]
