"""The capture rules against the truth: each example is captured, and replayed with other inputs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.utils._pytree import tree_leaves

from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.inspection.lint import lint_graph
from ad_flashinfer_pass.kernels.attention.capability import Phase
from tests.gpu import test_graphs
from tests.gpu.test_graphs import PLAIN, SIZES
from tests.inspection.capture_examples import EXAMPLES, Example, inputs_of
from tests.inspection.test_lint import traced
from tests.runtime.two_layers import random_step

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
        # torch's generator takes a capture that failed to go on, until one has ended.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device="cuda")
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


def step_replays(phase: Phase, kernel: str) -> bool:
    """Whether steps that run a kernel are captured, and replays with other lengths are right."""
    kernels: dict[Phase, str] = {"prefill": "fmha_v2", "decode": "xqa", phase: kernel}
    with_prefill = phase == "prefill"
    buckets = [SIZES.max_num_tokens] if with_prefill else []
    module, info, caches = test_graphs.graphs(PLAIN, kernels, [SIZES.max_batch_size], buckets)
    try:
        module.capture(info, caches)
    except (KernelError, RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return False
    rng = random.Random(0)
    with torch.inference_mode():
        for _ in range(20):
            steps = random_step(rng, SIZES, with_prefill=with_prefill)
            rows = sum(step.gather for step in steps)
            info.nest_sequences(steps, pad_to=module.bucket(steps))
            inputs = {**info.named_args(), **caches}
            replayed = module(**inputs)[0, :rows].clone()
            eager = module.eager(**inputs)[0, :rows]  # appends the same again
            if not torch.allclose(replayed, eager, atol=1e-2, rtol=1e-2):
                return False
    return module.num_replays == 20


@pytest.mark.parametrize(
    ("phase", "kernel"),
    [
        *(("prefill", kernel) for kernel in ("reference", "fmha_v2", "fa2")),
        *(("decode", kernel) for kernel in ("reference", "xqa", "split_decode", "fa2")),
    ],
)
def test_host_plan_fires_exactly_where_a_step_is_not_captured(phase: Phase, kernel: str) -> None:
    """The graph has the one node of which the rule reads the kernels."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("q", "kv_cache_0", "info", "cu", "lens", "table")]
    kernels: dict[str, Any] = {"prefill_kernel": "fmha_v2", "decode_kernel": "xqa", f"{phase}_kernel": kernel}
    op = torch.ops.ad_flashinfer.cached_attention.default
    graph.output(graph.call_function(op, (*inputs, 1.0, 128), kernels))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    found = lint_graph(gm, suppress=["missing-fake"])
    assert ([f.rule for f in found] == []) == step_replays(phase, kernel)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rule_fires_exactly_where_capture_or_replay_fails(name: str) -> None:
    example = EXAMPLES[name]
    gm = traced(name)
    assert (lint_graph(gm) == []) == replayed(example.run, example)


def test_a_generator_of_its_own_is_not_captured() -> None:
    """What the rule says, also of a torch that can neither trace one nor hold it in a graph."""
    example = EXAMPLES["own_generator"]
    assert not replayed(example.run, example)


def test_an_op_without_a_fake_is_not_judged() -> None:
    """It is captured, and as well it might not be: the one rule that says that nothing can be said."""
    with torch.library._scoped_library("see_test", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CUDA")
        op = torch.ops.see_test.twice.default
        assert replayed(op, EXAMPLES["relu"])
        with pytest.raises((NotImplementedError, UnsupportedOperatorException)), FakeTensorMode():
            op(torch.empty(8, 8, device="cuda"))
        graph = fx.Graph()
        graph.output(graph.call_function(op, (graph.placeholder("x"),)))
        gm = fx.GraphModule(torch.nn.Module(), graph)
        assert [f.rule for f in lint_graph(gm)] == ["missing-fake"]
