"""Removes nodes that return their input: casts to the same dtype, full slices, eval dropout, ...

Legal because each op in the table returns what its input holds when dtype, device and shape do not change,
and nothing is written in place any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten

# Return their input itself, or an alias of it, when shape, dtype and device stay the same.
_ALIASING = {
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.view.default,
    aten.reshape.default,
}
# Dtype, device and layout as they were at export; they cannot change in a fixed graph.
_ASSERTIONS = {aten._assert_tensor_metadata.default}


@register("eliminate_noops")
def eliminate_noops(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Replace each no-op by its input and drop the assertions that export put in."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("eliminate_noops", num_matches=_read_sizes_of_inputs(model))
    for node in list(model.graph.nodes):
        if node.target in _ASSERTIONS:
            model.graph.erase_node(node)
        elif node.op == "call_function" and _is_noop(node):
            g.replace(node, g.args(node)[0])
        else:
            continue
        report.num_matches += 1
    if report.num_matches:
        g.finish(model)
    return model, report


def _read_sizes_of_inputs(gm: fx.GraphModule) -> int:
    """Batch and sequence are read from input_ids, not from tensors that are there for nothing else.

    Legal because the sizes are equal for all values of their symbols. A mask that is only asked for its
    size would otherwise outlive its classification.
    """
    ids = g.token_input(gm)
    if ids is None:
        return 0
    symbols = {str(size): dim for dim, size in enumerate(g.shape(ids)[:2]) if isinstance(size, torch.SymInt)}
    canonical: dict[str, fx.Node] = {}
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        symbol = str(g.value(node))
        if symbol not in symbols or g.args(node)[0].op == "placeholder":
            continue
        if symbol not in canonical:
            inputs = gm.graph.find_nodes(op="placeholder")
            with gm.graph.inserting_after(inputs[-1]):
                canonical[symbol] = g.call_op(gm.graph, aten.sym_size.int, ids, symbols[symbol])
        g.replace(node, canonical[symbol])
        count += 1
    return count


def _is_noop(node: fx.Node) -> bool:
    source = g.args(node)[0] if node.args else None
    if not (g.is_tensor(source) and g.is_tensor(node)) or not _same_value_type(source, node):
        return False
    if node.target in _ALIASING:
        return not g.op_args(node).get("copy", False)
    check = _CHECKED.get(node.target)
    return check is not None and check(g.op_args(node))


def _same_value_type(a: Any, b: fx.Node) -> bool:
    va, vb = g.value(a), g.value(b)
    return (va.dtype, va.device) == (vb.dtype, vb.device) and g.same_shape(va.shape, vb.shape)


def _is_full_slice(args: dict[str, Any]) -> bool:
    # The shapes are equal, so a slice with step 1 takes everything.
    return args["step"] == 1


def _is_eval_dropout(args: dict[str, Any]) -> bool:
    return args["p"] == 0.0 or not args["train"]


_CHECKED: dict[Any, Callable[[dict[str, Any]], bool]] = {
    aten.slice.Tensor: _is_full_slice,
    aten.dropout.default: _is_eval_dropout,
}
