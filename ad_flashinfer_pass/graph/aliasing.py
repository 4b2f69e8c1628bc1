"""Which nodes return a view of one of their inputs, so that they take no memory of their own.

For some ops that depends on strides: reshape copies after an expand and does not after a linear. So the
ops that may return a view are run on meta tensors, which have strides and storages but no memory, for
an example of the batch and sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from ad_flashinfer_pass.graph import edit as g

# Distinct, and neither 0 nor 1, for which anything is contiguous. Other symbols get the last.
_EXAMPLE = (2, 13, 5)


def views(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose results, all of them, lie in the memory of an input."""
    sizes = _Sizes(gm)
    values: dict[fx.Node, Any] = {}
    found = set()
    for node in gm.graph.nodes:
        value = g.value(node)
        values[node] = tree_map(lambda item: _like(item, sizes), value)
        if not g.is_view(node):
            continue
        sources = _storages([values[source] for source in node.all_input_nodes])
        try:
            args = map_arg(node.args, values.__getitem__)
            values[node] = node.target(*args, **map_arg(node.kwargs, values.__getitem__))
        except (RuntimeError, TypeError, IndexError, ValueError):
            continue  # for the example's sizes the op is not defined: counted as new memory
        if (results := _storages(values[node])) and results <= sources:
            found.add(node)
    return found


class _Sizes:
    """Numbers for symbols."""

    def __init__(self, gm: fx.GraphModule) -> None:
        ids = next((n for n in gm.graph.find_nodes(op="placeholder") if n.name == "input_ids"), None)
        shape = g.shape(ids) if ids is not None and g.is_tensor(ids) else ()
        self._examples = {str(size): example for size, example in zip(shape, _EXAMPLE[:2], strict=False)}
        self._known: dict[str, int] = {}

    def __call__(self, size: int | SymInt) -> int:
        if isinstance(size, int):
            return size
        text = str(size)
        if text not in self._known:
            expression = size.node.expr
            examples = {s: self._examples.get(str(s), _EXAMPLE[-1]) for s in expression.free_symbols}
            self._known[text] = int(expression.xreplace(examples))
        return self._known[text]


def _like(value: Any, sizes: _Sizes) -> Any:
    """A meta tensor of the same layout, or a number."""
    if isinstance(value, Tensor):
        shape, strides = (tuple(map(sizes, each)) for each in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
    return sizes(value) if isinstance(value, SymInt) else value


def _storages(values: Any) -> set[int]:
    """Of the tensors in nested values."""
    return {t.untyped_storage()._cdata for t in tree_leaves(values) if isinstance(t, Tensor)}
