"""``graph/edit.py``: what it says of nodes, and that what it makes carries its value."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.graph import edit as g

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer
aten = torch.ops.aten


class Affine(nn.Module):
    """(x * w + 1) with a cast, over a dynamic number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight + 1.0).to(torch.float64)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sum(-1)


@pytest.fixture
def gm() -> fx.GraphModule:
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.STATIC},)
    module = torch.export.export(Outer(), (torch.zeros(5, 3),), dynamic_shapes=dynamic).module()
    assert isinstance(module, fx.GraphModule)
    return module


def only(gm: fx.GraphModule, *targets: Any) -> fx.Node:
    (node,) = [n for n in gm.graph.nodes if g.is_op(n, *targets)]
    return node


def test_call_op_fills_the_value_and_the_origin(gm: fx.GraphModule) -> None:
    """A new node has a fake value with the symbols of its inputs, and their module and source line."""
    mul = only(gm, aten.mul)
    with gm.graph.inserting_after(mul):
        node = g.call_op(gm.graph, aten.unsqueeze.default, mul, 0)
    assert g.same_shape(g.shape(node), (1, *g.shape(mul)))
    assert g.value(node).dtype == torch.float32
    assert g.value(node).fake_mode is g.fake_mode(gm)
    assert g.where(node).startswith("node unsqueeze_default (")
    assert g.module_path(node) == g.module_path(mul) != ""


def test_call_op_of_an_op_with_several_results(gm: fx.GraphModule) -> None:
    """The value of such a node is a tuple, and getitem on it has the element's."""
    mul = only(gm, aten.mul)
    with gm.graph.inserting_after(mul):
        both = g.call_op(gm.graph, aten.max.dim, mul, -1)
    with gm.graph.inserting_after(both):
        indices = g.call_op(gm.graph, operator.getitem, both, 1)
    assert not g.is_tensor(both)
    assert g.value(indices).dtype == torch.int64


def test_add_input_goes_after_the_last_one(gm: fx.GraphModule) -> None:
    """Inputs are appended, never reordered, and carry the example's shape and dtype."""
    g.add_input(gm, "first", torch.zeros(4, dtype=torch.int32))
    g.add_input(gm, "second", torch.zeros(2, device="meta"))
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert [node.name for node in placeholders] == ["x", "first", "second"]
    assert g.value(placeholders[1]).dtype == torch.int32
    assert g.shape(placeholders[2]) == (2,)
    gm.graph.lint()


def test_finish_drops_dead_nodes_and_keeps_writes(gm: fx.GraphModule) -> None:
    """What nobody reads goes, unless it writes to an input; the code is that of the new graph."""
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(x):
        g.call_op(gm.graph, aten.cos.default, x)
        write = g.call_op(gm.graph, aten.add_.Tensor, x, 1.0)
    g.finish(gm)
    assert not [n for n in gm.graph.nodes if g.is_op(n, aten.cos)]
    assert write in gm.graph.nodes
    assert "aten.add_" in gm.code


def test_is_op_takes_overloads_packets_and_functions(gm: fx.GraphModule) -> None:
    """A packet matches each of its overloads, an overload only itself; other things match nothing."""
    mul = only(gm, aten.mul.Tensor)
    assert g.is_op(mul, aten.mul)
    assert g.is_op(mul, aten.add, aten.mul)
    assert not g.is_op(mul, aten.mul.Scalar)
    with gm.graph.inserting_after(mul):
        item = gm.graph.call_function(operator.getitem, ((mul,), 0))
    assert g.is_op(item, operator.getitem)
    (x,) = gm.graph.find_nodes(op="placeholder")
    for other in (x, 3, None, "mul"):
        assert not g.is_op(other, aten.mul)


def test_op_args_are_named_with_defaults_filled_in(gm: fx.GraphModule) -> None:
    """Positional and keyword arguments and defaults come under the names of the schema."""
    add = only(gm, aten.add)
    assert g.op_args(add) == {"self": add.args[0], "other": 1.0, "alpha": 1}
    to = only(gm, aten.to, aten._to_copy)
    assert g.op_args(to)["dtype"] == torch.float64


def test_pointwise_and_writes_are_told_by_the_op(gm: fx.GraphModule) -> None:
    """Arithmetic is pointwise, a sum is not; only an op whose schema says so writes."""
    assert g.is_pointwise(only(gm, aten.mul))
    assert not g.is_pointwise(only(gm, aten.sum))
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert not g.is_pointwise(x)
    with gm.graph.inserting_after(x):
        write = g.call_op(gm.graph, aten.add_.Tensor, x, 1.0)
    assert g.mutates_input(write)
    assert not g.mutates_input(only(gm, aten.mul))


def test_sizes_are_compared_without_a_guard(gm: fx.GraphModule) -> None:
    """Symbolic sizes are equal if they are the same expression; asking does not fix them."""
    rows, columns = g.shape(only(gm, aten.mul))
    assert g.same_size(rows, rows)
    assert not g.same_size(rows, columns)
    assert not g.same_size(rows, rows * 2)
    assert not g.same_size(rows, 5), "5 is only the size of the example"
    assert g.same_shape((rows, 3), [rows, columns])
    assert not g.same_shape((rows,), (rows, columns))
    assert isinstance(rows, torch.SymInt)


def test_where_names_the_line_of_the_user() -> None:
    """The place of a node is the innermost frame of its trace; without a trace, its name alone."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    assert g.where(node) == "node x"
    node.meta["stack_trace"] = (
        'File "/models/outer.py", line 7, in forward\n    y = self.inner(x)\n'
        'File "/models/inner.py", line 31, in forward\n    return x * 2'
    )
    assert g.where(node) == "node x (/models/inner.py:31)"


def test_module_path_is_that_of_the_innermost_module(gm: fx.GraphModule) -> None:
    """A node of a submodule has the submodule's path; a node without origin has none."""
    assert g.module_path(only(gm, aten.mul)).endswith("inner")
    assert g.module_path(fx.Graph().placeholder("x")) == ""


def test_ancestors_come_once_and_stop_where_told(gm: fx.GraphModule) -> None:
    """Every node that the result depends on is given once; past a stopped node nothing is."""
    total = only(gm, aten.sum)
    found = list(g.ancestors(total, stop=lambda node: False))
    assert found[0] is total
    assert len(found) == len(set(found))
    assert {n.name for n in found if n.op == "placeholder"} == {"x"}
    short = list(g.ancestors(total, stop=lambda node: g.is_op(node, aten.add)))
    assert only(gm, aten.add) in short
    assert only(gm, aten.mul) not in short


def test_append_to_a_pool_is_kept() -> None:
    """append_kv returns nothing and its cache is an input: no dead code, also if no attend reads the pool."""
    graph = fx.Graph()
    key, slots, cache = (graph.placeholder(name) for name in ("key", "slots", "cache"))
    append = graph.call_function(torch.ops.ad_flashinfer.append_kv.default, (key, key, slots, cache))
    view = graph.call_function(aten.view.default, (key, [-1]))
    alive = graph.call_function(aten.add_.Tensor, (view, 1.0))
    graph.output(slots)

    g.finish(fx.GraphModule(nn.Module(), graph))

    assert append in graph.nodes
    assert alive in graph.nodes, "it writes to an input, through a view"


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.detach], ids=["parameter", "buffer"])
def test_an_attribute_is_kept_and_read(gm: fx.GraphModule, kind: Any) -> None:
    """A parameter stays one; its node has a fake value in the graph's mode, and gives the tensor."""
    tensor = kind(torch.arange(3.0))
    mul = only(gm, aten.mul)
    with gm.graph.inserting_before(mul):
        node = g.add_attribute(gm, "scale", tensor)
    assert g.attribute(node) is tensor
    kept = gm.named_parameters() if kind is nn.Parameter else gm.named_buffers()
    assert dict(kept)["scale"] is tensor
    assert g.value(node).fake_mode is g.fake_mode(gm)
    assert type(g.value(node)) is type(g.value(mul))
    mul.args = (mul.args[0], node)
    g.finish(gm)
    x = torch.randn(4, 3)
    torch.testing.assert_close(gm(x), (x * tensor + 1.0).double().sum(-1))


def test_a_copy_shares_the_weights_and_nothing_of_the_graph(gm: fx.GraphModule) -> None:
    """What is edited in it, here by a replacement, leaves the original alone."""
    text, x = str(gm.graph), torch.randn(4, 3)
    copy = g.copied(gm)
    add = only(copy, aten.add)
    g.replace(add, g.args(add)[0])
    g.finish(copy)
    assert str(gm.graph) == text
    assert [id(p) for p in copy.parameters()] == [id(p) for p in gm.parameters()]
    torch.testing.assert_close(gm(x) - copy(x), torch.full((4,), 3.0, dtype=torch.float64))


def test_a_view_is_told_by_the_schema_or_is_one_of_several(gm: fx.GraphModule) -> None:
    """Pieces of a tensor lie in its memory, a sum does not, and neither does an input."""
    mul = only(gm, aten.mul)
    with gm.graph.inserting_after(mul):
        pieces = g.call_op(gm.graph, aten.split.Tensor, mul, 2, -1)
    with gm.graph.inserting_after(pieces):
        piece = g.call_op(gm.graph, operator.getitem, pieces, 0)
    assert g.is_view(pieces)
    assert g.is_view(piece)
    assert not any(g.is_view(node) for node in [mul, *gm.graph.find_nodes(op="placeholder")])
