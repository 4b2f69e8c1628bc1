"""Linears that read the same tensor become one, whose result is cut.

Before: q = linear(x, w_q, b_q), k = linear(x, w_k, b_k), v = linear(x, w_v, b_v)
After:  qkv = linear(x, cat(w_q, w_k, w_v), cat(b_q, b_k, b_v)), q = qkv[..., :n_q], ...

Legal because an output feature of a linear depends on its own row of the weight only. One GEMM with many rows
streams its weight faster than three with few. Weights that something else reads, too, stay as they are:
fused, they would be in memory twice. Those of ``quantized_linear`` stay, too, each with its own scales. The
parameters of the module that was transformed become views of the fused ones: they are what they were, and no
weight is in memory twice, however long that module lives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


@register("fuse_gemms")
def fuse_gemms(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Fuse every group of linears that share their input."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("fuse_gemms")
    groups: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    readers = Counter(id(g.attribute(node)) for node in model.graph.find_nodes(op="get_attr"))
    for node in model.graph.find_nodes(op="call_function", target=aten.linear.default):
        args = g.op_args(node)
        weight, bias = args["weight"], args["bias"]
        weights = [weight] if bias is None else [weight, bias]
        if all(tensor.op == "get_attr" for tensor in weights):
            shared = [t for t in weights if len(t.users) > 1 or readers[id(g.attribute(t))] > 1]
            if shared:
                report.skipped.append(Skip(g.where(node), f"{shared[0].target} is read elsewhere, too"))
                continue
            dtypes = tuple(g.value(tensor).dtype for tensor in weights)
            groups[args["input"], g.value(weight).device, dtypes].append(node)
    quantized = model.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.quantized_linear.default
    )
    if quantized:
        report.notes.append(f"{len(quantized)} quantized linears stay apart, each with scales of its own")
    for linears in groups.values():
        if len(linears) > 1:
            _fuse(model, linears)
            report.num_matches += 1
    if report.num_matches:
        g.finish(model)
        g.delete_unread(model)
    return model, report


def _fuse(gm: fx.GraphModule, linears: list[fx.Node]) -> None:
    args = [g.op_args(node) for node in linears]
    names = [str(each["weight"].target) for each in args]
    name = "_".join([names[0].rpartition(".")[0], *(n.split(".")[-2] for n in names[1:])]).replace(".", "_")
    weight = _add_parameter(gm, f"{name}_weight", [each["weight"] for each in args])
    bias = None
    if args[0]["bias"] is not None:
        bias = _add_parameter(gm, f"{name}_bias", [each["bias"] for each in args])
    with gm.graph.inserting_before(linears[0]):
        fused = g.call_op(gm.graph, aten.linear.default, args[0]["input"], weight, bias)
    g.copy_origin(fused, linears[0])
    start, after = 0, fused
    for node in linears:
        end = start + int(g.shape(node)[-1])
        with gm.graph.inserting_after(after):
            part = after = g.call_op(gm.graph, aten.slice.Tensor, fused, -1, start, end)
        start = end
        g.replace(node, part)
        for user in list(part.users):
            # A view across rows exists of a tensor without gaps only; reshape is the same where it does.
            if g.is_op(user, aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default


def _add_parameter(gm: fx.GraphModule, name: str, parts: list[fx.Node]) -> fx.Node:
    tensors = [g.attribute(part) for part in parts]
    with torch.no_grad():
        fused = _joined(tensors)
    if not isinstance(fused, FakeTensor):
        for tensor, rows in zip(tensors, fused.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = rows
    with gm.graph.inserting_before(gm.graph.find_nodes(op="placeholder")[0]):
        return g.add_attribute(gm, name, nn.Parameter(fused, requires_grad=False))


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor with the parts below each other: a copy, unless they lie like that in memory."""
    first = parts[0]
    if isinstance(first, FakeTensor):  # it lies nowhere
        return torch.cat(parts)
    ends = [part.data_ptr() + part.nbytes for part in parts]
    if (
        all(part.is_contiguous() for part in parts)
        and len({part.untyped_storage().data_ptr() for part in parts}) == 1
        and [part.data_ptr() for part in parts[1:]] == ends[:-1]
    ):
        rows = sum(len(part) for part in parts)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    return torch.cat(parts)
