"""A router's choice of experts and the softmax around it in one kernel.

Before: p = softmax(logits); best, index = topk(p, k); weights = best / sum(best)
After:  weights, index = ad_flashinfer.top_k(logits, k, softmax="chosen")

Likewise without the division (``all``), with the softmax after the choice (``chosen``), and without any.

Legal because softmax keeps the order, so that the largest logits have the largest probabilities; because a
softmax over the chosen logits is what the others' are after the division by their sum; and because nothing
else reads what stood between. All is computed in float32 and rounded once. Only on CUDA, where it is one
kernel, for rows of as few numbers as routers have.
"""

from __future__ import annotations

import operator
from typing import TypeGuard

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.experts.arguments import MAX_COLUMNS, MAX_K
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALF, torch.float32)


@register("fuse_top_k")
def fuse_top_k(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Replace each ``topk`` of a router."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("fuse_top_k")
    if (ctx.target or ctx.device).type != "cuda":
        return model, report
    for node in model.graph.find_nodes(op="call_function", target=aten.topk.default):
        reason = _unfit(node)
        if reason is None:
            _fuse(node)
            report.num_matches += 1
        else:
            report.skipped.append(Skip(g.where(node), reason))
    if report.num_matches:
        g.finish(model)
    return model, report


def _unfit(node: fx.Node) -> str | None:
    """Why the kernel cannot run a ``topk``."""
    args, shape = g.op_args(node), g.shape(g.args(node)[0])
    if g.value(args["self"]).dtype not in _FLOATS:
        return f"it is of {g.value(args['self']).dtype}"
    if not (args["largest"] and args["dim"] in (-1, len(shape) - 1) and len(shape) == 2):
        return "it is not of the largest of each row of a matrix"
    if not (isinstance(shape[1], int) and shape[1] <= MAX_COLUMNS and isinstance(args["k"], int)):
        return f"its rows have {shape[1]} numbers, and the kernel takes at most {MAX_COLUMNS}"
    return None if args["k"] <= MAX_K else f"it takes {args['k']} of a row, and the kernel at most {MAX_K}"


def _fuse(node: fx.Node) -> None:
    x, k = g.op_args(node)["self"], g.op_args(node)["k"]
    softmax, dtype = "none", g.value(x).dtype
    values, index = ([u for u in node.users if g.args(u)[1] == place] for place in (0, 1))
    last = values[0] if len(values) == 1 else None
    if _is_softmax(x) and len(x.users) == 1 and dtype == torch.float32:
        softmax, x = "all", g.args(x)[0]
        divided = None if last is None else _over_its_sum(last)
        if divided is not None:
            softmax, last = "chosen", divided
    elif last is not None and _is_softmax(after := _only_user(last)) and g.value(after).dtype in _FLOATS:
        softmax, last, dtype = "chosen", after, g.value(after).dtype
    if g.is_op(x, aten.to.dtype, aten._to_copy) and g.value(g.args(x)[0]).dtype in _FLOATS:
        x = g.args(x)[0] if g.value(x).dtype == torch.float32 else x  # exact
    cast = None if last is None else _only_user(last)
    if g.is_op(cast, aten.to.dtype, aten._to_copy, aten.type_as) and g.value(cast).dtype in _HALF:
        last, dtype = cast, g.value(cast).dtype
    with node.graph.inserting_before(node):
        fused = g.call_op(node.graph, torch.ops.ad_flashinfer.top_k.default, x, k, softmax, dtype)
        parts = [g.call_op(node.graph, operator.getitem, fused, place) for place in (0, 1)]
    g.copy_origin(fused, node)
    for old, new in ((last, parts[0]), *((each, parts[1]) for each in index)):
        if old is not None:
            g.replace(old, new)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_softmax(node: fx.Node | None) -> TypeGuard[fx.Node]:
    return g.is_op(node, aten.softmax.int, aten._softmax) and g.args(node)[1] in (-1, len(g.shape(node)) - 1)


def _over_its_sum(values: fx.Node) -> fx.Node | None:
    """values / sum(values), if nothing else reads the values."""
    total = next((user for user in values.users if g.is_op(user, aten.sum.dim_IntList)), None)
    if (
        total is None
        or total.kwargs
        or len(values.users) != 2
        or list(g.args(total)[1:]) not in ([[-1], True], [[1], True])
    ):
        return None
    divided = _only_user(total)
    is_share = g.is_op(divided, aten.div.Tensor) and g.args(divided) == (values, total)
    return divided if is_share else None
