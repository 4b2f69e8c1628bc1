"""Experts on a GPU: the kernels of each dtype against float32 on the CPU, eager and captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass import ops

assert ops.__name__  # importing it registers the op
EXPERTS_OP = torch.ops.ad_flashinfer.experts
HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 48, 7, 3


def inputs(tokens: int, width: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    projections = [
        torch.randn(EXPERTS, *shape, generator=generator) / 8
        for shape in ((2 * width, HIDDEN), (HIDDEN, width))
    ]
    return torch.randn(tokens, HIDDEN, generator=generator), index, weights, *projections


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        pytest.param(torch.bfloat16, WIDTH, id="bfloat16"),
        pytest.param(torch.bfloat16, 42, id="bfloat16_unaligned"),
        pytest.param(torch.float32, WIDTH, id="float32"),
    ],
)
def test_captured_equals_eager_and_the_cpu(dtype: torch.dtype, width: int, tokens: int) -> None:
    """A graph that was captured with other tokens gives what float32 gives, but for rounding."""
    hidden, index, weights, *projections = inputs(tokens, width, seed=0)
    static = [hidden.cuda().to(dtype), index.cuda(), weights.cuda().to(dtype)]
    projections = [weight.cuda().to(dtype) for weight in projections]
    EXPERTS_OP(*static, *projections)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = EXPERTS_OP(*static, *projections)
    for buffer, other in zip(static, inputs(tokens, width, seed=1), strict=False):
        buffer.copy_(other)
    graph.replay()
    wanted = EXPERTS_OP(
        *(x.cpu().float() if x.is_floating_point() else x.cpu() for x in (*static, *projections))
    )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for found in (captured, EXPERTS_OP(*static, *projections)):
        assert float((found.cpu().float() - wanted).norm() / wanted.norm()) < tolerance
