"""Buckets, padding, guard and reasons for eager steps, on a CPU, where a replay is another run."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.runtime.cuda_graph import (
    CudaGraphModule,
    _to_warm,
    default_batch_sizes,
    default_token_buckets,
    prefill_buckets,
)
from ad_flashinfer_pass.runtime.sequence_info import BatchInfo, Bucket, SequenceInfo, SequenceStep
from tests.runtime.two_layers import Sizes, TwoLayers, changed_slots, random_step

CPU = torch.device("cpu")
SMALL = Sizes(
    heads=4,
    kv_heads=2,
    head_dim=8,
    page_size=4,
    num_pages=40,
    max_seq_len=24,
    max_batch_size=4,
    max_num_tokens=32,
)


def decode(past: int = 3, gather: bool = True) -> SequenceStep:
    return SequenceStep([5], past, range(1, 2 + past // 4), gather)


def prompt(length: int, gather: bool = True) -> SequenceStep:
    return SequenceStep([7] * length, 0, range(11, 12 + (length - 1) // 4), gather)


def info() -> SequenceInfo:
    return SequenceInfo(max_seq_len=16, max_batch_size=4, max_num_tokens=40, tokens_per_block=4, device=CPU)


def captured(
    batch_sizes: list[int], token_buckets: list[int]
) -> tuple[CudaGraphModule, SequenceInfo, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = TwoLayers(SMALL, CPU, torch.float32)
    module, sequence_info, caches = (
        CudaGraphModule(model, batch_sizes, token_buckets),
        model.info(),
        model.caches(),
    )
    module.capture(sequence_info, caches)
    return module, sequence_info, caches


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_default_batch_sizes(largest: int, sizes: list[int]) -> None:
    """Powers of two, and always the largest batch."""
    assert default_batch_sizes(largest) == sizes


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (32, [32]),
        (64, [64]),
        (200, [64, 128, 192, 200]),
        (600, [64, 128, 192, 256, 320, 384, 448, 512, 576, 600]),
    ],
)
def test_default_token_buckets(largest: int, sizes: list[int]) -> None:
    """A ninth of padding at most from 512 tokens on, and always the largest step."""
    assert default_token_buckets(largest) == sizes


def test_buckets_of_prefill_hold_every_step_and_few_rows_that_are_not_there() -> None:
    """Any step within the limits has a bucket; a few prompts have one without the rows of a full batch."""
    totals = default_token_buckets(2048)
    buckets = prefill_buckets(totals, 32)
    rows = [bucket.num_tokens + bucket.num_decode for bucket in buckets]
    assert rows == sorted(rows)
    assert max(rows) == 2048 + 32

    def smallest(num_tokens: int, num_decode: int, num_prompts: int) -> Bucket:
        needed = (num_tokens, num_decode, num_prompts, 0)
        return next(b for b in buckets if all(has >= n for has, n in zip(b, needed, strict=True)))

    assert smallest(1024, 0, 1) == Bucket(1024, 0, 8)
    assert smallest(1000, 30, 3) == Bucket(1120, 32, 8)
    assert smallest(1000, 20, 9) == Bucket(1248, 32, 32)
    rng = random.Random(0)
    for _ in range(500):
        num_prompts = rng.randint(1, 32)
        num_decode = rng.randint(0, 32 - num_prompts)
        num_tokens = rng.randint(2 * num_prompts, 2048 - num_decode)
        assert sum(smallest(num_tokens, num_decode, num_prompts)[:2]) >= num_tokens + num_decode


def test_padding_of_decode_is_one_token_on_the_scratch_page() -> None:
    """Padded rows decode one token at position 0 and have no page; each has a row of logits."""
    step = info()
    step.nest_sequences([decode(3), decode(6)], pad_to=Bucket(0, 4))
    args = step.named_args()
    batch = BatchInfo._make(args["batch_info_host"].tolist())
    assert (batch.num_decode, batch.num_decode_tokens, batch.num_tokens_to_gather) == (4, 4, 4)
    assert args["input_ids"].tolist() == [[5], [5], [0], [0]]
    assert args["position_ids"].tolist() == [[3], [6], [0], [0]]
    assert args["seq_len_with_cache"][:4].tolist() == [4, 7, 1, 1]
    assert args["cu_num_pages"][:5].tolist() == [0, 1, 3, 3, 3]
    assert args["cache_loc"][:3].tolist() == [1, 1, 2]
    assert args["token_gather_indices"].tolist() == [0, 1, 2, 3]


def test_padding_of_prefill_is_a_prompt_on_the_scratch_page_and_empty_rows() -> None:
    """Prompts, padding prompts of at most max_seq_len tokens, rows without tokens; then the decodes."""
    step = info()
    step.nest_sequences([prompt(3), prompt(2, gather=False), decode(6)], pad_to=Bucket(30, 4, 4))
    args = step.named_args()
    batch = BatchInfo._make(args["batch_info_host"].tolist())
    rows = 4 + 3  # a batch of prompts, and 40 tokens of padding at most 16 each
    assert batch[:6] == (rows, 30, 0, 0, 4, 4)
    assert args["input_ids"].tolist() == [[7, 7, 7, 7, 7, *[0] * 25, 5, 0, 0, 0]]
    assert args["cu_seqlen"][: rows + 5].tolist() == [0, 3, 5, 21, 30, 30, 30, 30, 31, 32, 33, 34]
    assert args["seq_len_with_cache"][: rows + 4].tolist() == [3, 2, 16, 9, 0, 0, 0, 7, 1, 1, 1]
    assert args["cu_num_pages"][: rows + 5].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4]
    assert args["token_gather_indices"].tolist() == [2, 30, 0, 0], "two sequences want logits"


def test_padding_alone_is_a_step() -> None:
    """A graph is captured before there is any sequence."""
    step = info()
    step.nest_sequences([], pad_to=Bucket(0, 2))
    assert step.named_args()["input_ids"].tolist() == [[0], [0]]
    step.nest_sequences([], pad_to=Bucket(3, 2, 2))
    assert step.named_args()["input_ids"].tolist() == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("sequences", "pad_to"),
    [
        ([decode()] * 3, Bucket(0, 2)),
        ([prompt(2)], Bucket(0, 4)),
        ([prompt(3)], Bucket(2, 4, 4)),
        ([decode()], Bucket(0, 5)),
        ([prompt(2), prompt(2)], Bucket(8, 4, 1)),
    ],
    ids=["too_many", "prefill", "too_many_tokens", "beyond_max_batch_size", "too_many_prompts"],
)
def test_what_cannot_be_padded_is_refused(sequences: list[SequenceStep], pad_to: Bucket) -> None:
    """No more sequences and tokens than the bucket, no larger bucket than the batch."""
    with pytest.raises(ValueError, match="cannot be padded to"):
        info().nest_sequences(sequences, pad_to=pad_to)


@pytest.mark.parametrize("with_prefill", [False, True], ids=["decode", "mixed"])
def test_padded_steps_give_what_they_give_unpadded(with_prefill: bool) -> None:
    """100 random steps through all buckets: the same rows, the same pages, and no other byte."""
    module, step_info, caches = captured([1, 2, 4], [8, 32])
    rng = random.Random(0)
    buckets = set()
    for _ in range(100):
        steps = random_step(rng, SMALL, with_prefill=with_prefill)
        num_rows = sum(s.gather for s in steps)
        before = {name: cache.clone() for name, cache in caches.items()}
        step_info.nest_sequences(steps)
        expected = module.eager(**step_info.named_args(), **caches)
        after = {name: cache.clone() for name, cache in caches.items()}
        for name, cache in caches.items():
            cache.copy_(before[name])
        bucket = module.bucket(steps)
        assert bucket is not None
        buckets.add(bucket)
        step_info.nest_sequences(steps, pad_to=bucket)
        actual = module(**step_info.named_args(), **caches)
        torch.testing.assert_close(actual[:, :num_rows], expected)
        for name, cache in caches.items():
            torch.testing.assert_close(cache[1:], after[name][1:])
            assert not changed_slots(before[name], cache, steps).any()
    assert (module.num_replays, module.fallbacks) == (100, {})
    assert buckets == (
        {Bucket(8, 0, 4), Bucket(4, 4, 4), Bucket(32, 0, 4), Bucket(32, 4, 4)}
        if with_prefill
        else {Bucket(0, n) for n in (1, 2, 4)}
    )


def test_capture_shows_its_progress_and_goes_from_large_to_small() -> None:
    """A line for each bucket, warm-up before capture; token buckets need the most memory and come first."""
    model = TwoLayers(SMALL, CPU, torch.float32)
    module = CudaGraphModule(model, [1, 4], [8, 32])
    lines: list[str] = []
    module.capture(model.info(), model.caches(), lines.append)
    names = [
        "32 tokens of 4 prompts, 4 decodes",
        "32 tokens of 4 prompts, 0 decodes",
        "4 tokens of 4 prompts, 4 decodes",
        "8 tokens of 4 prompts, 0 decodes",
        "batch size 4",
        "batch size 1",
    ]
    warmed = [name for name in names if not name.startswith("8 tokens")]  # as those of 32, and of 4 beside 4
    assert lines == [
        *(f"warm-up {i}: {name}" for i, name in enumerate(warmed, 1)),
        *(f"capture {i} of 6: {name}" for i, name in enumerate(names, 1)),
    ]
    assert [str(cost.bucket) for cost in module.costs] == names


def test_a_bucket_is_warmed_if_its_rows_or_their_kinds_are_new() -> None:
    """Or if a kernel keeps something for each graph of that kind."""
    buckets = [*prefill_buckets([64, 128, 256], 16)[::-1], Bucket(0, 16), Bucket(0, 8)]
    for keeps, expected in (
        (
            False,
            [
                "256 tokens of 16 prompts, 16 decodes",
                "256 tokens of 8 prompts, 16 decodes",
                "256 tokens of 8 prompts, 0 decodes",
                "112 tokens of 8 prompts, 16 decodes",
                "48 tokens of 16 prompts, 16 decodes",
                "batch size 16",
                "batch size 8",
            ],
        ),
        (True, list(map(str, buckets))),
    ):
        states = [GraphState() for _ in buckets]
        warmed = []
        for index in _to_warm(buckets, states):
            warmed.append(str(buckets[index]))
            with states[index].begin_capture():
                if keeps:
                    workspaces.of_graph(Kept)
        assert warmed == expected


class Kept:
    def before_replay(self, inputs: object) -> None: ...


def test_steps_that_no_graph_holds_run_eagerly_and_are_counted() -> None:
    """Each with what the user would have to change."""
    module, step_info, caches = captured([1, 2], [8])
    steps = [[decode()] * 3, [decode()], [prompt(9)], [prompt(8)], [decode(gather=False)]]
    for sequences in steps:
        step_info.nest_sequences(sequences, pad_to=module.bucket(sequences))
        module(**step_info.named_args(), **caches)
    assert module.fallbacks == {
        "no graph for 3 sequences": 1,
        "prefill of more than 8 tokens": 1,
        "logits of only some sequences": 1,
    }
    assert module.num_replays == 2


def test_a_phase_whose_kernel_reads_the_host_is_not_captured() -> None:
    """No step with prefill is captured if prefill cannot be, nor if the decodes beside it cannot."""
    model = TwoLayers(SMALL, CPU, torch.float32)
    for host_kernels, batch_sizes in (({"prefill": "reference"}, [1]), ({"decode": "fa2"}, [])):
        module = CudaGraphModule(model, [1], [8], host_kernels)  # type: ignore[arg-type]
        step_info, caches = model.info(), model.caches()
        module.capture(step_info, caches)
        assert (module.batch_sizes, module.token_buckets) == (batch_sizes, [])
        for sequences in ([decode()], [prompt(3)]):
            step_info.nest_sequences(sequences, pad_to=module.bucket(sequences))
            module(**step_info.named_args(), **caches)
        phase, kernel = next(iter(host_kernels.items()))
        assert module.fallbacks == {
            f"{phase} by {kernel}, which reads lengths on the host": 1 if phase == "prefill" else 2
        }


def test_the_guard_notices_what_a_graph_has_baked_in() -> None:
    """A moved cache, other bounds, and released workspaces: eager, right, and counted with the cause."""
    module, step_info, caches = captured([1], [])
    step_info.nest_sequences([decode()], pad_to=Bucket(0, 1))
    args = step_info.named_args()
    expected = module(**args, **caches).clone()
    moved = {**caches, "kv_cache_1": caches["kv_cache_1"].clone()}
    torch.testing.assert_close(module(**args, **moved), expected)
    args["batch_info_host"][6] -= 1
    module(**args, **caches)
    args["batch_info_host"][6] += 1
    workspaces.release()
    torch.testing.assert_close(module(**args, **caches), expected)
    assert module.num_replays == 1
    assert module.fallbacks == {
        "moved since capture: kv_cache_1": 1,
        "captured with other bounds": 1,
        "workspaces were released since capture": 1,
    }


def test_graphs_need_cuda() -> None:
    """A device that cannot capture is refused when the config is made."""
    with pytest.raises(ConfigError, match="torch-cudagraph captures CUDA graphs, got device: cpu"):
        AutoDeployConfig(compile_backend="torch-cudagraph")


@pytest.mark.parametrize("sizes", [[], [0, 1], [1, 9]], ids=str)
def test_batch_sizes_lie_within_the_batch(sizes: list[int]) -> None:
    """No bucket is empty or larger than the largest batch."""
    with pytest.raises(ConfigError, match=r"cuda_graph_batch_sizes must lie within 1\.\.max_batch_size=8"):
        AutoDeployConfig(cuda_graph_batch_sizes=sizes)


@pytest.mark.parametrize("sizes", [[1], [64, 513]], ids=str)
def test_token_buckets_lie_within_the_step(sizes: list[int]) -> None:
    """Prefill has two tokens or more, and no more than the budget of a step."""
    with pytest.raises(
        ConfigError, match=r"cuda_graph_token_buckets must lie within 2\.\.max_num_tokens=512"
    ):
        AutoDeployConfig(cuda_graph_token_buckets=sizes)
