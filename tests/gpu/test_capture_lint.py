"""The capture rules against the truth: each example is captured, and replayed with other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ad_flashinfer_pass.inspection.capture_lint import lint
from tests.inspection.capture_examples import EXAMPLES, Example, inputs_of
from tests.inspection.test_capture_lint import traced

pytestmark = pytest.mark.gpu


def replayed(run: Any, example: Example) -> bool:
    """Whether a graph is captured, and a replay does what a call does, to its inputs too.

    As a runner does it: inputs are copied into tensors of the graph.
    """
    static = inputs_of(example.inputs, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(*[t.clone() for t in static])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = run(*static)
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return False
    given, twin = (inputs_of(example.inputs, "cuda", seed=1) for _ in range(2))
    for tensor, new in zip(static, given, strict=True):
        tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    outputs = [t.clone() for t in tree_leaves(result) if isinstance(t, Tensor)]
    if example.is_random:
        graph.replay()
        torch.cuda.synchronize()
        return not torch.equal(outputs[0], tree_leaves(result)[0])
    expected = [t for t in tree_leaves(run(*twin)) if isinstance(t, Tensor)]
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-4, rtol=1e-4)
        for a, b in zip([*outputs, *given], [*expected, *twin], strict=True)
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rule_fires_exactly_where_capture_or_replay_fails(name: str) -> None:
    example = EXAMPLES[name]
    gm = traced(name)
    assert (lint(gm) == []) == replayed(example.run, example)
