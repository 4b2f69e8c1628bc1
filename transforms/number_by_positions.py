"""Positions by ``arange`` over the tokens -> ``position_ids``.

Before: x: [b, s, d] = tokens + embedding(wpe, arange(s))
After:  x: [b, s, d] = tokens + embedding(wpe, position_ids)

Legal because the positions of a sequence are 0 .. n - 1 wherever a graph is served: what a table has at
``arange(s)[i]``, or at row i of its first s rows, it has at ``position_ids[b, i]``. What is computed from
it is computed anew with the batch in front, up to where it meets a tensor that has one. If something on that
way is none of the ops below, the graph stays as it is, and ``check_packing`` says why it cannot be served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
_KEPT = (aten.clone, aten.contiguous, aten.to, aten._to_copy, aten.detach, aten.alias)
_SHAPED = (aten.expand, aten.expand_as, aten.unsqueeze, aten.squeeze, aten.view, aten.reshape, aten.flatten)
"""The same numbers in another shape."""


@register("number_by_positions")
def number_by_positions(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Number the tokens by ``position_ids`` where the graph numbers them by their place.

    Raises:
        ConfigError: the model looks positions up in a table that ends before max_seq_len.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("number_by_positions")
    (positions,) = (n for n in model.graph.find_nodes(op="placeholder") if n.name == "position_ids")
    tokens = g.token_input(model)
    if tokens is None or g.value(positions).dim() != 2:
        return model, report
    if not positions.users:  # then nothing has told that its sizes are those of the tokens
        positions.meta["val"] = g.value(tokens).new_empty(g.shape(tokens)[:2], dtype=torch.int64)
    model.graph.eliminate_dead_code()
    for node in list(model.graph.nodes):
        if not _is_numbering(node, g.shape(positions)[1]):
            continue
        failed = _Lifting(model.graph, positions).lift(node)
        if failed is None:
            report.num_matches += 1
        else:
            report.skipped.append(Skip(g.where(node), f"{g.where(failed)} is not known"))
    g.finish(model)
    _check_tables(model, positions, ctx)
    return model, report


def _check_tables(gm: fx.GraphModule, positions: fx.Node, ctx: TransformContext) -> None:
    """Refuse a table of positions that ends before max_seq_len; frequencies, which are computed, have none.

    Raises:
        ConfigError: one is too short; names it.
    """
    max_seq_len = ctx.config.sequence_limit
    of, other = ("speculative_config.model: ", ", or give another model") if ctx.is_draft else ("", "")
    found = {positions: torch.arange(max_seq_len)}
    """Of nodes that are made of positions alone, what each position gives: of a query and a key the same."""
    for node in gm.graph.nodes:
        lookups = _lookups(node)
        for table, dim, index in lookups:
            rows = g.shape(table)[dim]
            if index not in found or not isinstance(rows, int):
                continue
            lowest = -rows if g.is_op(node, aten.index) else 0
            missing = (found[index] >= rows) | (found[index] < lowest)
            if missing.any():
                most = int(missing.int().argmax())
                way = (
                    f"set max_seq_len: {most}{other}"
                    if most
                    else "the first is none of them: give another model"
                )
                raise ConfigError(
                    f"{of}{g.where(node)} has a table of {rows} positions, and max_seq_len is {max_seq_len}; "
                    f"{way}."
                )
            if table.op == "get_attr" and len(g.shape(table)) == 1 and g.has_numbers(g.attribute(table)):
                found[node] = g.attribute(table).cpu()[found[index]]  # rows of another table
        if lookups or not g.is_tensor(node):
            continue
        sources = node.all_input_nodes
        if g.is_op(node, *_KEPT, *_SHAPED) and sources[0] in found:
            found[node] = found[sources[0]].to(g.value(node).dtype)
        elif g.is_pointwise(node) and sources and found.keys() >= {*sources}:
            found[node] = node.target(*_with(node.args, found), **_with(node.kwargs, found))


def _lookups(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node]]:
    """What a node looks up: tables, a dimension of each, and the numbers of rows there."""
    if g.is_op(node, aten.embedding):
        args = g.op_args(node)
        return [(args["weight"], 0, args["indices"])]
    if g.is_op(node, aten.index_select, aten.gather):
        args = g.op_args(node)
        return [(args["self"], args["dim"], args["index"])]
    if g.is_op(node, aten.index):
        table, indices = g.args(node)
        return [(table, dim, index) for dim, index in enumerate(indices)]
    return []


def _is_numbering(node: fx.Node, size: int | torch.SymInt) -> bool:
    """Whether this is 0, 1, ... up to the number of tokens, or so many rows of a table, from the first."""
    if g.is_op(node, aten.arange):
        args = g.op_args(node)
        starts = args.get("start", 0) == 0 and args.get("step", 1) == 1
        return starts and g.same_size(g.shape(node)[0], size) and not g.value(node).is_floating_point()
    if not g.is_op(node, aten.slice):
        return False
    args = g.op_args(node)
    table, dim = args["self"], args["dim"]
    is_first = args["start"] in (None, 0) and args["step"] == 1 and g.same_size(g.shape(node)[dim], size)
    return is_first and all(isinstance(n, int) for n in g.shape(table))


class _Lifting:
    """Computes what is made of a numbering again with the batch as a new first dimension."""

    def __init__(self, graph: fx.Graph, positions: fx.Node) -> None:
        self.graph, self.positions = graph, positions
        self.batch = g.shape(positions)[0]
        self.lifted: dict[fx.Node, fx.Node] = {}

    def lift(self, source: fx.Node) -> fx.Node | None:
        """Do it up to where the batch is met, or change nothing and return the node that stood in the way."""
        with self.graph.inserting_before(source):
            self.lifted[source] = self._numbered(source)
        meetings: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        for node in list(self.graph.nodes):
            operands = [n for n in node.all_input_nodes if n in self.lifted]
            if not operands:
                continue
            if not g.is_tensor(node):
                return node
            with self.graph.inserting_before(node):
                if self._has_batch(node):
                    is_expansion = g.is_op(node, aten.expand, aten.expand_as) and operands == [node.args[0]]
                    if not (g.is_pointwise(node) or is_expansion) or not self._is_first(node):
                        return node
                    pairs = [(node, n, self._aligned(n, g.value(node).dim())) for n in operands]
                    meetings += [(at, old, new) for at, old, new in pairs if new is not None]
                    if len(meetings) < len(pairs) or any(new is None for *_, new in pairs):
                        return node
                else:
                    new = self._again(node)
                    if new is None:
                        return node
                    self.lifted[node] = new
        for node, old, new in meetings:
            node.replace_input_with(old, new)
        return None

    def _numbered(self, source: fx.Node) -> fx.Node:
        args = g.op_args(source)
        if g.is_op(source, aten.arange):
            dtype = g.value(source).dtype
            if dtype == g.value(self.positions).dtype:
                return self.positions
            return g.call_op(self.graph, aten.to.dtype, self.positions, dtype)
        dim = args["dim"] % g.value(source).dim()
        found = g.call_op(self.graph, aten.index.Tensor, args["self"], [None] * dim + [self.positions])
        order = [dim, *range(dim), *range(dim + 1, g.value(found).dim())]
        return g.call_op(self.graph, aten.permute.default, found, order) if dim else found

    def _has_batch(self, node: fx.Node) -> bool:
        return any(not isinstance(n, int) and g.same_size(n, self.batch) for n in g.shape(node))

    def _is_first(self, node: fx.Node) -> bool:
        first = g.shape(node)[0]
        return not isinstance(first, int) and g.same_size(first, self.batch)

    def _aligned(self, node: fx.Node, rank: int) -> fx.Node | None:
        """The lifted operand, to be broadcast to a tensor of ``rank`` whose first dimension is the batch."""
        new, missing = self.lifted[node], rank - g.value(node).dim()
        if missing == 0:
            if not isinstance(g.shape(node)[0], int) or g.shape(node)[0] != 1:
                return None
            return g.call_op(self.graph, aten.squeeze.dim, new, 1)
        for _ in range(missing - 1):
            new = g.call_op(self.graph, aten.unsqueeze.default, new, 1)
        return new

    def _again(self, node: fx.Node) -> fx.Node | None:
        """The same op on lifted operands."""
        args = g.op_args(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        rank = g.value(node).dim()
        call: Any = node.target
        if g.is_pointwise(node):
            tensors = [n for n in node.all_input_nodes if g.is_tensor(n)]
            new = {n: self._widened(n, rank) if n in self.lifted else n for n in tensors}
            return g.call_op(self.graph, call, *_with(node.args, new), **_with(node.kwargs, new))
        if g.is_op(node, aten.unsqueeze):
            dim = args["dim"] % rank + 1
            return g.call_op(self.graph, call, self.lifted[args["self"]], dim)
        if g.is_op(node, *_KEPT):
            return g.call_op(self.graph, call, *_with(node.args, self.lifted), **node.kwargs)
        if g.is_op(node, aten.view, aten.reshape):
            rows = g.call_op(self.graph, aten.sym_size.int, self.positions, 0)
            sizes = [rows, *(args["size"] if g.is_op(node, aten.view) else args["shape"])]
            return g.call_op(self.graph, aten.reshape.default, self.lifted[args["self"]], sizes)
        if g.is_op(node, aten.embedding) and args["weight"] not in self.lifted:
            return g.call_op(self.graph, call, args["weight"], self.lifted[args["indices"]])
        if g.is_op(node, aten.outer) and args["vec2"] not in self.lifted:
            column = g.call_op(self.graph, aten.unsqueeze.default, self.lifted[args["self"]], -1)
            return g.call_op(self.graph, aten.mul.Tensor, column, args["vec2"])
        if g.is_op(node, aten.cat, aten.stack) and all(n in self.lifted for n in node.all_input_nodes):
            new_parts = [self.lifted[n] for n in args["tensors"]]
            return g.call_op(self.graph, call, new_parts, args["dim"] % rank + 1)
        return None

    def _widened(self, node: fx.Node, rank: int) -> fx.Node:
        """The lifted operand with the dimensions that broadcasting adds, after the batch."""
        new = self.lifted[node]
        for _ in range(rank - g.value(node).dim()):
            new = g.call_op(self.graph, aten.unsqueeze.default, new, 1)
        return new


def _with(args: Any, new: Mapping[fx.Node, Any]) -> Any:
    return fx.node.map_arg(args, lambda n: new.get(n, n))
