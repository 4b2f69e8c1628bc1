"""Buckets, padding and reasons for eager steps; what needs a GPU is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.metadata import BatchInfo, SequenceInfo, SequenceStep
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule, default_batch_sizes

CPU = torch.device("cpu")


class Logits(nn.Module):
    """A model whose logits are the rows asked for."""

    def forward(self, token_gather_indices: Tensor, **_: Tensor) -> Tensor:
        """[1, rows, 1]."""
        return token_gather_indices[None, :, None].float()


def decode(past: int = 3, gather: bool = True) -> SequenceStep:
    return SequenceStep([5], past, range(1, 2 + past // 4), gather)


def info() -> SequenceInfo:
    return SequenceInfo(max_seq_len=16, max_batch_size=4, max_num_tokens=16, tokens_per_block=4, device=CPU)


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_default_batch_sizes(largest: int, sizes: list[int]) -> None:
    """Powers of two, and always the largest batch."""
    assert default_batch_sizes(largest) == sizes


def test_padding_is_one_token_on_the_scratch_page() -> None:
    """Padded rows decode one token at position 0 of page 0, and each has a row of logits."""
    step = info()
    step.nest_sequences([decode(3), decode(6)], pad_to=4)
    args = step.named_args()
    batch = BatchInfo._make(args["batch_info_host"].tolist())
    assert (batch.num_decode, batch.num_decode_tokens, batch.num_tokens_to_gather) == (4, 4, 4)
    assert args["input_ids"].tolist() == [[5], [5], [0], [0]]
    assert args["position_ids"].tolist() == [[3], [6], [0], [0]]
    assert args["seq_len_with_cache"].tolist() == [4, 7, 1, 1]
    assert args["cu_num_pages"].tolist() == [0, 1, 3, 4, 5]
    assert args["cache_loc"][:5].tolist() == [1, 1, 2, 0, 0]
    assert args["token_gather_indices"].tolist() == [0, 1, 2, 3]


def test_padding_alone_is_a_step() -> None:
    """A graph is captured before there is any sequence."""
    step = info()
    step.nest_sequences([], pad_to=2)
    assert step.named_args()["input_ids"].tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("sequences", "pad_to"),
    [([decode()] * 3, 2), ([SequenceStep([1, 2], 0, [1])], 2), ([decode()], 5)],
    ids=["too_many", "prefill", "beyond_max_batch_size"],
)
def test_what_cannot_be_padded_is_refused(sequences: list[SequenceStep], pad_to: int) -> None:
    """Only decode sequences, no more of them than the bucket, no larger bucket than the batch."""
    with pytest.raises(ValueError, match="got "):
        info().nest_sequences(sequences, pad_to=pad_to)


def test_without_a_graph_every_step_is_eager_and_counted() -> None:
    """The result is the eager one, and the count of its reason goes up."""
    module, step = CudaGraphModule(Logits(), [1, 2]), info()
    for sequences in ([decode()], [decode()], [SequenceStep([1, 2], 0, [1])]):
        assert module.bucket(sequences) is None
        step.nest_sequences(sequences)
        assert module(**step.named_args()).shape == (1, 1, 1)
    assert module.fallbacks == {"no graph for 1 sequences": 2, "prefill": 1}
    assert module.num_replays == 0


def test_graphs_need_cuda() -> None:
    """A device that cannot capture is refused when the config is made."""
    with pytest.raises(ConfigError, match="torch-cudagraph captures CUDA graphs, got device: cpu"):
        AutoDeployConfig(compile_backend="torch-cudagraph")


@pytest.mark.parametrize("sizes", [[], [0, 1], [1, 9]], ids=str)
def test_batch_sizes_lie_within_the_batch(sizes: list[int]) -> None:
    """No bucket is empty or larger than the largest batch."""
    with pytest.raises(ConfigError, match=r"cuda_graph_batch_sizes must lie within 1\.\.max_batch_size=8"):
        AutoDeployConfig(cuda_graph_batch_sizes=sizes)
