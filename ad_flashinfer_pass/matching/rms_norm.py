"""Reads RMSNorm, as transformers writes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from ad_flashinfer_pass.graph import edit as g

aten = torch.ops.aten


class RmsNorm(NamedTuple):
    """A norm over the last dimension."""

    x: fx.Node
    weight: fx.Node
    """[elements of the last dimension], a parameter."""
    eps: float
    """Added to the mean square."""


def rms_norm(node: fx.Node) -> RmsNorm | None:
    """weight * (x * rsqrt(mean(x^2) + eps)), with x in float32 up to the last product."""
    weight, scaled = _operands(node, aten.mul.Tensor, lambda n: n.op == "get_attr")
    if weight is None or scaled is None or g.attribute(weight).dim() != 1:
        return None
    rsqrt, wide = _operands(_uncast(scaled), aten.mul.Tensor, lambda n: g.is_op(n, aten.rsqrt))
    if rsqrt is None or wide is None:
        return None
    total = g.args(rsqrt)[0]
    if not (g.is_op(total, aten.add.Tensor) and isinstance(g.args(total)[1], float)) or total.kwargs:
        return None
    mean = g.args(total)[0]
    if not (g.is_op(mean, aten.mean.dim) and list(g.args(mean)[1:3]) == [[-1], True]):
        return None
    square = g.args(mean)[0]
    if not (g.is_op(square, aten.pow.Tensor_Scalar) and g.args(square) == (wide, 2)):
        return None
    x = _uncast(wide)
    if g.value(wide).dtype != torch.float32 or g.value(x).dtype != g.value(node).dtype:
        return None
    if g.shape(weight)[0] != g.shape(x)[-1]:  # one number for all elements
        return None
    return RmsNorm(x, weight, g.args(total)[1])


def _operands(node: fx.Node, target: object, is_first: object) -> tuple[fx.Node | None, fx.Node | None]:
    """The two operands of a product, the one for which ``is_first`` holds before the other."""
    if not g.is_op(node, target):
        return None, None
    a, b = g.args(node)[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None, None
    if is_first(a):  # type: ignore[operator]
        return a, b
    return (b, a) if is_first(b) else (None, None)  # type: ignore[operator]


def _uncast(node: fx.Node) -> fx.Node:
    """What a cast was made of."""
    return g.args(node)[0] if g.is_op(node, aten.to.dtype, aten._to_copy) else node
