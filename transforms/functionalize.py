"""Writes in place -> values of their own.

Before: part = aten.slice(x, -1, 0, r); aten.mul_(part, c); out = linear(x, weight)
After:  part = aten.slice(x, -1, 0, r); new = aten.mul(part, c)
        y = aten.slice_scatter(x, new, -1, 0, r); out = linear(y, weight)

Every transform after this one takes a node for one value. That is right only if no node is written to after
it was made, so each write becomes nodes of its own: the tensor that was written, the tensors it is a view
of, and the other views of those are computed anew, and whatever came after the write reads them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import SymInt, fx, nn

from ad_flashinfer_pass.errors import ExportError
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


@register("functionalize")
def functionalize(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Replace every write in place.

    Raises:
        ExportError: names a write that has no counterpart, or that outlives the step.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("functionalize")
    for node in _writes(model):  # these change what the tensor looks like, and nothing that it holds
        if torch.Tag.inplace_view in node.target.tags:  # type: ignore[union-attr]
            _replace_by_view(model, node)
            report.num_matches += 1
    writes = _writes(model)
    # Of the graph as it was traced: afterwards values that are computed anew lie elsewhere.
    views = {node for node in model.graph.nodes if _is_view(node)} if writes else set()
    live = _live(model.graph, writes, views)
    memory = _Memory(model, views)
    for node in writes:
        if node in live:
            memory.replace(node)
        else:
            g.replace(node, node.all_input_nodes[0])
        report.num_matches += 1
    if report.num_matches:
        for node in model.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default  # the new values may lie in memory in another order
        g.finish(model)
    return model, report


def _writes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and g.mutates_input(node)]


def _live(graph: fx.Graph, writes: list[fx.Node], views: set[fx.Node]) -> set[fx.Node]:
    """What the results of a graph need: what they are computed from, and the writes to any of that."""

    def base(node: fx.Node) -> object:
        if node.op == "get_attr":  # of which a graph can have several nodes
            return node.target
        return base(_source(node)) if node in views else node

    live, pending = set(g.ancestors(graph.output_node(), stop=lambda n: False)), list(writes)
    while found := [w for w in pending if w in live or not {base(g.args(w)[0])}.isdisjoint(map(base, live))]:
        for write in found:
            live.update(g.ancestors(write, stop=lambda n: False))
        pending = [write for write in pending if write not in found]
    return live


class _Memory:
    """What the tensors of the traced graph hold, write after write."""

    def __init__(self, gm: fx.GraphModule, views: set[fx.Node]) -> None:
        self.gm, self.views = gm, views
        self.latest: dict[fx.Node, fx.Node] = {}
        """The node that has the value of a traced tensor now, where that is not its own."""
        self.traced: dict[fx.Node, fx.Node] = {}
        """The reverse, for all values that it had."""

    def replace(self, write: fx.Node) -> None:
        """Make a write a value, and whatever comes after it read that.

        Raises:
            ExportError: there is no such value, or it outlives the step.
        """
        nodes = list(self.gm.graph.nodes)
        place = nodes.index(write)
        base = written = self._origin(g.args(write)[0])
        with self.gm.graph.inserting_before(write):
            values = {written: _value(self.gm.graph, write, g.args(write)[0])}
            while base in self.views:
                source = _source(base)
                if base.target is operator.getitem:  # of what split cut up
                    source = _source(source)
                source = self._origin(source)
                whole = self.latest.get(source, source)
                values[source] = _with_part(self.gm.graph, base, whole, values[base])
                base = source
            if base.op == "get_attr":
                raise _refusal(
                    write,
                    f"writes to the weight or buffer {base.target}, which would carry over to other requests",
                )
            for node in nodes[:place]:  # another view of what was written shows the new values
                source = self._origin(_source(node)) if node in self.views else node
                if node in self.views and node not in values and source in values:
                    values[node] = _again(self.gm.graph, node, values[source])
        later = set(nodes[place + 1 :])
        for old, new in values.items():
            self.latest.get(old, old).replace_all_uses_with(new, delete_user_cb=later.__contains__)
            self.latest[old], self.traced[new] = new, old
        g.replace(write, values[written])

    def _origin(self, node: fx.Node) -> fx.Node:
        return self.traced.get(node, node)


def _replace_by_view(gm: fx.GraphModule, node: fx.Node) -> None:
    """``x.unsqueeze_(0)`` is a view by another name.

    Raises:
        ExportError: there is no view that does it.
    """
    if g.is_op(node, aten.detach_):
        new = g.args(node)[0]
    else:
        with gm.graph.inserting_before(node):
            new = g.call_op(gm.graph, _without_write(node), *node.args, **node.kwargs)
        nodes = list(gm.graph.nodes)
        later = set(nodes[nodes.index(node) + 1 :])
        g.args(node)[0].replace_all_uses_with(new, delete_user_cb=later.__contains__)
    g.replace(node, new)


def _source(view: fx.Node) -> fx.Node:
    source: fx.Node = view.all_input_nodes[0]
    return source


def _again(graph: fx.Graph, view: fx.Node, source: fx.Node) -> fx.Node:
    """A view of the new value of its source; its other arguments, sizes, are as they were."""
    _, *rest = g.args(view)
    target: Any = aten.reshape.default if view.target is aten.view.default else view.target
    new = g.call_op(graph, target, source, *rest, **view.kwargs)
    g.copy_origin(new, view)
    return new


def _without_write(write: fx.Node) -> torch._ops.OpOverload:
    """The op that returns what this one writes.

    Raises:
        ExportError: it writes to another argument than its first, or has no counterpart without a write.
    """
    target = write.target
    assert isinstance(target, torch._ops.OpOverload)
    arguments = [arg for arg in target._schema.arguments if arg.alias_info and arg.alias_info.is_write]
    packet = getattr(aten, target.overloadpacket.__name__.removesuffix("_"), None)
    # transpose_ has one overload, and transpose several.
    found = getattr(packet, target._overloadname, getattr(packet, "int", None))
    if target.namespace != "aten" or arguments != [target._schema.arguments[0]] or found is None:
        raise _refusal(write, f"writes to a tensor in place by {target}, which has no form that does not")
    assert isinstance(found, torch._ops.OpOverload)
    return found


def _value(graph: fx.Graph, write: fx.Node, written: fx.Node) -> fx.Node:
    """What the written tensor holds after the write, as a new node."""
    if g.is_op(write, aten.copy_):
        new = g.call_op(graph, aten.clone.default, g.args(write)[1])  # nobody writes to that one by this name
        if not g.same_shape(g.shape(new), g.shape(written)):
            new = g.call_op(graph, aten.expand_as.default, new, written)
    else:
        new = g.call_op(graph, _without_write(write), *write.args, **write.kwargs)
    if g.value(new).dtype != g.value(written).dtype:
        new = g.call_op(graph, aten.to.dtype, new, g.value(written).dtype)
    g.copy_origin(new, write)
    return new


def _is_view(node: fx.Node) -> bool:
    """Whether a node has the memory of its first argument."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _is_view(g.args(node)[0])
    if g.mutates_input(node) or not g.is_view(node):
        return False
    # Whether reshape, contiguous and to are views depends on what they are given.
    try:
        own, given = ({t.untyped_storage()._cdata for t in g.tensors(n)} for n in (node, _source(node)))
    except NotImplementedError:  # under vmap, in flex_attention's mods
        return True
    return not own.isdisjoint(given)


def _with_part(graph: fx.Graph, view: fx.Node, source: fx.Node, new: fx.Node) -> fx.Node:
    """The source of a view, with the view's elements replaced.

    Raises:
        ExportError: the elements of the view are not told apart in the source.
    """
    if view.target is operator.getitem:
        return _with_piece(graph, view, source, new)
    args = g.op_args(view)
    if g.is_op(view, aten.slice):
        if g.same_shape(g.shape(view), g.shape(source)):  # all of it, as every x[:, 0] begins
            return new
        return g.call_op(
            graph,
            aten.slice_scatter.default,
            source,
            new,
            *(args[k] for k in ("dim", "start", "end", "step")),
        )
    if g.is_op(view, aten.select):
        return g.call_op(graph, aten.select_scatter.default, source, new, args["dim"], args["index"])
    if g.is_op(view, aten.narrow) and isinstance(args["start"], int) and isinstance(args["length"], int):
        ends = args["start"], args["start"] + args["length"]
        return g.call_op(graph, aten.slice_scatter.default, source, new, args["dim"], *ends)
    order = ax.order_of(view)
    if order is not None:
        return g.call_op(graph, aten.permute.default, new, [order.index(dim) for dim in range(len(order))])
    if g.value(view).dtype == g.value(source).dtype and g.same_size(
        g.value(view).numel(), g.value(source).numel()
    ):
        if g.same_shape(g.shape(view), g.shape(source)):
            return new
        if g.is_op(view, *ax.VIEWS):
            return g.call_op(graph, aten.reshape_as.default, new, source)
    raise _refusal(view, f"is written to in place through {view.target}, which has no inverse")


def _with_piece(graph: fx.Graph, piece: fx.Node, whole: fx.Node, new: fx.Node) -> fx.Node:
    """The tensor that unbind, split or chunk cut up, with one piece replaced."""
    pieces, index = g.args(piece)
    dim = g.op_args(pieces)["dim"]
    if g.is_op(pieces, aten.unbind):
        return g.call_op(graph, aten.select_scatter.default, whole, new, dim, index)
    sizes: list[int | SymInt] = [part.shape[dim] for part in g.value(pieces)[: index + 1]]
    if not all(isinstance(size, int) for size in sizes):
        raise _refusal(piece, f"is written to in place through {pieces.target} of tokens")
    return g.call_op(graph, aten.slice_scatter.default, whole, new, dim, sum(sizes[:-1]), sum(sizes))


def _refusal(node: fx.Node, what: str) -> ExportError:
    return ExportError(f"{g.where(node)}: {node.name} {what}; compute a new tensor instead.", node=node)
