"""The capture rules against the truth for every operator of torch's own table, with its own samples.

Each sample is captured and replayed with its tensors' elements in another order. The table is part of torch's
test suite (``torch.testing._internal``), which older and newer versions may have elsewhere.
"""

from __future__ import annotations

import itertools
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ad_flashinfer_pass.inspection.lint import lint_graph

pytestmark = pytest.mark.gpu

Run = Callable[[list[Tensor]], Any]
SAMPLES = 2
# By the beginning of their names; why they say nothing about a rule.
LEFT_OUT = {
    "_refs": "another spelling of ops that are here",
    "ops.": "likewise",
    "jiterator": "compiles when it is called",
    "nn.functional.ctc_loss": "its lengths are lists",
    "masked.": "its Python makes a tensor of a literal, which is a constant in a graph",
    "signal.": "likewise",
    "__getitem__": "likewise: a list of places",
    "narrow": "its place is a tensor of one element, which has no other order",
    "_softmax_backward_data": "its float16 inputs are not among its own samples",
    "_log_softmax_backward_data": "likewise",
    "_segment_reduce": "lengths in another order are not lengths, and the device stops",
    "as_strided.partial_views": "its inputs are part of a larger memory",
    "linalg.eig": "solvers that fail for elements in another order",
    "linalg.matrix_rank": "likewise",
    "linalg.pinv": "likewise",
    "linalg.svd": "likewise",
    "linalg.householder": "likewise",
    "native_batch_norm": "writes running statistics, of which its schema says nothing",
    "_native_batch_norm": "likewise",
    "_batch_norm": "likewise",
    "nn.functional.batch_norm": "likewise",
    "nn.functional.instance_norm": "likewise",
    "mode": "waits for the device if it has more than some thousand elements",
    "isin": "waits for the device if it has to sort",
    "sparse": "the tracer has no sparse tensors",
    "nn.functional.max_unpool": "places in another order are there twice, and the last one wins by chance",
    "torch.ops.aten._efficient_attention": "returns a place in the stream of random numbers",
}


def table() -> list[Any]:
    """torch's operators; its module wants a package that it uses for other things."""
    if "expecttest" not in sys.modules:
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    return [
        op
        for op in methods.op_db
        if torch.float32 in op.supported_dtypes("cuda") and not op.full_name.startswith(tuple(LEFT_OUT))
    ]


def samples(op: Any) -> Iterator[tuple[Run, list[Tensor]]]:
    """The op as a function of its tensors, for samples that are not empty."""
    for sample in itertools.islice(op.sample_inputs("cuda", torch.float32), SAMPLES):
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        if any(isinstance(leaf, Tensor) and not leaf.numel() for leaf in leaves):
            continue  # runs no kernel
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def run(
            tensors: list[Tensor], leaves: list[Any] = leaves, places: list[int] = places, spec: Any = spec
        ) -> Any:
            given = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            first, args, kwargs = tree_unflatten(given, spec)
            return op(first, *args, **kwargs)

        yield run, [leaves[place].detach() for place in places]


def traced(run: Run, tensors: list[Tensor]) -> fx.GraphModule | None:
    """Its graph; None if it cannot be traced."""
    try:
        with FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True)) as mode:
            fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
            return make_fx(lambda *given: run(list(given)))(*fakes)
    except Exception:  # whatever the tracer does not know
        return None


def is_random(gm: fx.GraphModule) -> bool:
    """Whether a graph draws, or returns memory as it finds it."""
    ops = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    return any(
        "empty" in str(op) or torch.Tag.nondeterministic_seeded in getattr(op, "tags", ()) for op in ops
    )


def replays(run: Run, tensors: list[Tensor], *, compared: bool) -> bool:
    """Whether it is captured, and a replay computes what a call does, with its inputs changed alike."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run([tensor.clone() for tensor in tensors])
    torch.cuda.synchronize()
    static = [tensor.clone() for tensor in tensors]
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = run(static)
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):  # puts generators in order again
            torch.ones(1, device="cuda")
        torch.cuda.synchronize()
        return False
    given = [shuffled(tensor) for tensor in tensors]
    twins = [tensor.clone() for tensor in given]
    for tensor, new in zip(static, given, strict=True):
        tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    outputs = [t.clone() for t in tree_leaves(result) if isinstance(t, Tensor)]
    try:
        expected = [t for t in tree_leaves(run(twins)) if isinstance(t, Tensor)]
    except RuntimeError:
        return True  # in another order the elements are not what the op takes, for example no triangle
    return not compared or all(map(same, [*outputs, *given], [*expected, *twins]))


def shuffled(tensor: Tensor) -> Tensor:
    """The same elements in another order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape).clone()


def same(a: Tensor, b: Tensor) -> bool:
    a, b = (x.resolve_conj().cpu().to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-2, rtol=1e-2, equal_nan=True)


def test_rules_fire_exactly_where_an_operator_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators of the table, two samples of each."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # samples call it, which no graph does
    wrong, num_judged = [], 0
    for op in table():
        for number, (run, tensors) in enumerate(samples(op)):
            gm = traced(run, tensors)
            if gm is None:
                continue
            num_judged += 1
            found = {finding.rule for finding in lint_graph(gm)}
            if found == {"input-mutation"} and is_random(gm):
                continue  # what it draws cannot be compared
            if (not found) != replays(run, tensors, compared=not is_random(gm)):
                shapes = [tuple(tensor.shape) for tensor in tensors]
                wrong.append(f"{op.full_name} {number} {shapes}: rules {sorted(found)}")
                print(wrong[-1], flush=True)
    assert num_judged > 900
    assert not wrong
