"""What ranks make of their parts; they are threads here, processes in tests/runtime/test_ranks.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import ad_flashinfer_pass.ops  # noqa: F401 -- registers the ops
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.kernels.collectives import in_threads

_ours = torch.ops.ad_flashinfer


def parts(size: int) -> list[Tensor]:
    return [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_joins(size: int) -> None:
    """On each rank, of strided operands too; the operands stay as they are."""
    given = [part.transpose(0, 1) for part in parts(size)]
    sums = in_threads([partial(_ours.all_reduce, part) for part in given])
    joined = in_threads([partial(_ours.all_gather, part, 4 * size) for part in given])
    for total, whole in zip(sums, joined, strict=True):
        torch.testing.assert_close(total, torch.stack(parts(size)).sum(0).transpose(0, 1))
        assert torch.equal(whole, torch.cat(given, -1))
        assert total.is_contiguous()
        assert whole.is_contiguous()


def test_contracts() -> None:
    """No alias, fakes with the real sizes and strides."""
    x = parts(1)[0]

    def check() -> None:
        torch.library.opcheck(_ours.all_reduce.default, (x,))
        torch.library.opcheck(_ours.all_gather.default, (x, 4))

    in_threads([check])


def test_an_error_of_one_ends_all() -> None:
    """Where the others would wait for it."""

    def fails() -> Tensor:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        in_threads([fails, lambda: _ours.all_reduce(torch.zeros(1))])


def test_without_ranks() -> None:
    with pytest.raises(ConfigError, match=r"where torch\.distributed has a process group"):
        _ours.all_reduce(torch.zeros(1))
