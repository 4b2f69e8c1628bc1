"""Bytes of what a graph computes, for given values of its symbols."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ad_flashinfer_pass.graph.data import NodeData, Size, TensorType

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
# What torch.utils._sympy prints.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "IntTrueDiv": operator.truediv,
    "floor": math.floor,
    "ceiling": math.ceil,
}


def size(expression: Size, symbols: Mapping[str, int]) -> int | None:
    """The value of a size; None if it has a symbol without a value, or is no arithmetic."""
    if isinstance(expression, int):
        return expression
    try:
        return int(_evaluate(ast.parse(expression, mode="eval").body, symbols))
    except (LookupError, SyntaxError, TypeError, ZeroDivisionError):
        return None


def tensor_bytes(tensor: TensorType, symbols: Mapping[str, int]) -> int | None:
    """Bytes of a tensor; None if a size is not known."""
    sizes = [size(dim, symbols) for dim in tensor.shape]
    if any(dim is None for dim in sizes):
        return None
    return math.prod(dim for dim in sizes if dim is not None) * tensor.itemsize


def allocated_bytes(node: NodeData, symbols: Mapping[str, int]) -> int:
    """Bytes of memory that the node's result takes: 0 for inputs, weights and views, and if not known."""
    if node.op != "call_function" or node.is_view:
        return 0
    return sum(tensor_bytes(tensor, symbols) or 0 for tensor in node.tensors)


def _evaluate(node: ast.expr, symbols: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return symbols[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, symbols)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left, symbols), _evaluate(node.right, symbols))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_evaluate(arg, symbols) for arg in node.args))
    raise TypeError(f"no arithmetic: {ast.dump(node)}")
