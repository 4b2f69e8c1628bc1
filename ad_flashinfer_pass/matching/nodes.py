"""Questions about single nodes: what they compute, whether it is a constant, what they leave as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt, fx, nn

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g

aten = torch.ops.aten

PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
CASTS = (aten.to, aten._to_copy, aten.type_as)
COPIES = (aten.clone, aten.contiguous, aten.lift_fresh_copy)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What stands between a product and the softmax of its result, beside arithmetic.
_PASSED = (
    *ax.VIEWS,
    *ax.PERMUTATIONS,
    *ax.EXPANSIONS,
    *CASTS,
    *COPIES,
    aten.where,
    aten.masked_fill,
    aten.cat,
    aten.slice,
    aten.dropout,
    aten.repeat_interleave,
)
_SLICES = (aten.slice, aten.select, aten.index, aten.tril, aten.triu)
# Read nothing of a tensor but its shape.
_LIKE = (
    aten.full_like,
    aten.zeros_like,
    aten.ones_like,
    aten.new_full,
    aten.new_zeros,
    aten.new_ones,
)


def refuse(node: fx.Node, what: str) -> UnsupportedError:
    """The error to raise for an attention that does what no kernel does."""
    return UnsupportedError(f"{g.where(node)}: this attention {what}.", node=node)


def source_node(node: fx.Node, index: int) -> fx.Node:
    """A positional argument that is a node."""
    source = g.args(node)[index]
    assert isinstance(source, fx.Node), node.format_node()
    return source


def skip(node: fx.Node, *targets: Any) -> fx.Node:
    """The node before as many of these ops as stand here."""
    while g.is_op(node, *targets):
        node = source_node(node, 0)
    return node


def skip_upcasts(node: fx.Node) -> fx.Node:
    """The tensor before copies and casts to float32; kernels take their inputs as projected."""
    while g.is_op(node, *COPIES) or (g.is_op(node, *CASTS) and g.value(node).dtype == torch.float32):
        if g.value(source_node(node, 0)).dtype not in (torch.float16, torch.bfloat16, torch.float32):
            break
        node = source_node(node, 0)
    return node


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads nothing of a tensor but its shape."""
    return g.is_op(node, *_LIKE) or not g.is_tensor(node)


def is_over_pairs(shape: Sequence[int | SymInt], dim: int) -> bool:
    """Whether a dimension and another one count tokens: both sizes have a symbol in common."""
    if not shape or not isinstance(shape[dim], SymInt):
        return False
    names = shape[dim].node.expr.free_symbols  # type: ignore[union-attr]
    others = [size for at, size in enumerate(shape) if at != dim and isinstance(size, SymInt)]
    return any(names & size.node.expr.free_symbols for size in others)


def contains_product(node: fx.Node) -> bool:
    """Whether a tensor is made of a product over pairs of tokens, by what may stand after one."""

    def is_other(n: fx.Node) -> bool:
        return g.is_op(n, *PRODUCTS) or not (g.is_pointwise(n) or g.is_op(n, *_PASSED))

    for found in g.ancestors(node, stop=is_other):
        if g.is_op(found, *PRODUCTS):
            shape = g.shape(found)
            if any(is_over_pairs(shape, dim) for dim in range(len(shape))):
                return True
    return False


def constant(arg: Any) -> float | None:
    """The number that an argument always has; None if it depends on inputs or is learned."""
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node):
        return None
    nodes = set(g.ancestors(arg, stop=lambda n: False))
    if any(n.op == "placeholder" for n in nodes):
        return None
    attributes = [g.attribute(n) for n in nodes if n.op == "get_attr"]
    if any(isinstance(a, nn.Parameter) or a.numel() > 1 for a in attributes):
        return None
    env: dict[fx.Node, Any] = {}
    for node in arg.graph.nodes:
        if node in nodes:
            if node.op == "get_attr":
                env[node] = g.attribute(node)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    result = env[arg]
    return float(result) if not isinstance(result, torch.Tensor) or result.numel() == 1 else None


def constant_fill(node: Any) -> float | None:
    """The value that fills a tensor, if it is one value."""
    if g.is_op(node, aten.full_like, aten.full, aten.new_full, aten.scalar_tensor):
        args = g.op_args(node)
        return constant(args.get("fill_value", args.get("s")))
    if g.is_op(node, aten.ones, aten.ones_like, aten.new_ones):
        return 1.0
    return 0.0 if g.is_op(node, aten.zeros_like, aten.zeros, aten.new_zeros) else constant(node)


def scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) if the node is x * c or x / c with a constant c."""
    is_product = g.is_op(node, aten.mul)
    if not (is_product or g.is_op(node, aten.div)) or len(node.args) != 2 or node.kwargs:
        return None
    tensor, other = g.args(node)
    if not g.is_tensor(tensor):
        return None
    factor = constant(other)
    if factor is None and is_product and g.is_tensor(other):
        tensor, factor = other, constant(tensor)
    if factor is None or factor == 0:
        return None
    return tensor, factor if is_product else 1.0 / factor


def is_zero_or_one(node: Any) -> bool:
    """Whether all elements of a tensor are 0 or 1, by how it is made."""
    if not g.is_tensor(node):
        return False
    if g.value(node).dtype == torch.bool or constant_fill(node) in (0.0, 1.0):
        return True
    if node.op == "get_attr":
        values = g.attribute(node)
        return not values.is_meta and bool(((values == 0) | (values == 1)).all())
    kept = (*CASTS, *COPIES, *_SLICES, *ax.VIEWS, *ax.PERMUTATIONS, *ax.EXPANSIONS)
    return g.is_op(node, *kept) and is_zero_or_one(g.args(node)[0])


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are computed by the same steps from the same tensors."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    if a is b:
        return True
    same_call = a.op == b.op == "call_function" and a.target is b.target
    return (
        same_call
        and (a.kwargs, len(a.args)) == (b.kwargs, len(b.args))
        and all(same(x, y) for x, y in zip(a.args, b.args, strict=True))
    )


def is_identity_dropout(node: fx.Node) -> bool:
    """True, for a dropout that does nothing.

    Raises:
        UnsupportedError: it drops.
    """
    args = g.op_args(node)
    if args["train"] and args["p"]:
        raise refuse(node, "has dropout; export the model in eval mode")
    return True
