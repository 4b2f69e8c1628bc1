"""``ad_flashinfer.all_reduce`` and ``all_gather``: what the ranks of one model make of their parts."""

from __future__ import annotations

from torch import Tensor

from ad_flashinfer_pass.kernels import collectives
from ad_flashinfer_pass.ops.define import define


def all_reduce(x: Tensor, plan: str = "torch") -> Tensor:
    """The sum of the x of all ranks, the same bits on each.

    Args:
        x: of one shape and dtype on all ranks, contiguous.
        plan: torch, one_shot or two_shot, by the number of rows of x: a ``KernelPlan``. On a CPU it is
            torch.

    Returns:
        [...], the shape and dtype of x.
    """
    return collectives.current().all_reduce(x.contiguous(), plan)


def all_gather(x: Tensor, size: int) -> Tensor:
    """The columns of all ranks beside each other, in the order of the ranks.

    Args:
        x: [..., ceil(size / number of ranks)], fewer columns on the last rank if it does not divide size.
        size: columns of the result.

    Returns:
        [..., size], contiguous, in the dtype of x.
    """
    return collectives.current().all_gather(x.contiguous(), size)


define(all_reduce, fake=lambda x, **_: x.new_empty(x.shape))
define(all_gather, fake=lambda x, size: x.new_empty((*x.shape[:-1], size)))
