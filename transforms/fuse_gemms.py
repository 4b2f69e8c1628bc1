"""Linears that read the same tensor become one, whose result is cut.

Before: q = linear(x, w_q, b_q), k = linear(x, w_k, b_k), v = linear(x, w_v, b_v)
After:  qkv = linear(x, cat(w_q, w_k, w_v), cat(b_q, b_k, b_v)), q = qkv[..., :n_q], ...

Legal because an output feature of a linear depends on its own row of the weight only. One GEMM with many rows
streams its weight faster than three with few. Weights that something else reads, too, stay as they are:
fused, they would be in memory twice. The parameters of the module that was transformed become views of the
fused ones: they are what they were, and no weight is in memory twice, however long that module lives.

Linears that are quantized alike are fused, too, where each number keeps its scale: those of whole weights
become scales of rows, those of blocks lie below each other if no block is cut. Static scales of activations
must be equal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


_QUANTIZED = torch.ops.ad_flashinfer.quantized_linear.default
_TENSORS = ("weight", "bias", "weight_scale", "input_scale", "zero_point")


@register("fuse_gemms")
def fuse_gemms(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Fuse every group of linears that share their input."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("fuse_gemms")
    if (ctx.target or ctx.device).type == "cpu":
        report.notes.append("on a CPU one linear of many rows is no faster than several of few")
        return model, report
    groups: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    readers = Counter(id(g.attribute(node)) for node in model.graph.find_nodes(op="get_attr"))
    for node in [node for node in model.graph.nodes if g.is_op(node, aten.linear.default, _QUANTIZED)]:
        args = g.op_args(node)
        tensors = [args[name] for name in _TENSORS if args.get(name) is not None]
        if any(tensor.op != "get_attr" for tensor in tensors):
            continue
        shared = [t for t in tensors if len(t.users) > 1 or readers[id(g.attribute(t))] > 1]
        if shared:
            report.skipped.append(Skip(g.where(node), f"{shared[0].target} is read elsewhere, too"))
            continue
        dtypes = tuple(g.value(tensor).dtype for tensor in tensors)
        x, device = args["input"] if "input" in args else args["x"], g.value(args["weight"]).device
        groups[x, device, dtypes, _quantization(model, args)].append(node)
    for linears in groups.values():
        if len(linears) > 1:
            _fuse(model, linears)
            report.num_matches += 1
    if report.num_matches:
        g.finish(model)
        g.delete_unread(model)
    return model, report


def _quantization(gm: fx.GraphModule, args: Mapping[str, Any]) -> tuple[Any, ...]:
    """What linears must have in common beside their input; () if they are not quantized."""
    if "weight_scale" not in args:
        return ()
    weight, scale = g.attribute(args["weight"]), g.attribute(args["weight_scale"])
    if weight.dtype == torch.uint8:
        return scale.shape[1], args["zero_point"] is None
    by_blocks = float8.is_by_blocks(weight, scale)
    if by_blocks and len(weight) % float8.BLOCK:
        return (args["weight"],)  # with none: the next one's rows would begin within a block
    given = args["input_scale"]
    if given is not None and g.has_weights(gm):
        given = float(g.attribute(given))
    return args["activation"], by_blocks, given if isinstance(given, float) else given is None


def _fuse(gm: fx.GraphModule, linears: list[fx.Node]) -> None:
    args = [g.op_args(node) for node in linears]
    targets = [str(each["weight"].target) for each in args]
    owners = [target.rpartition(".")[0] or target for target in targets]  # of the root, the weight itself
    name = "_".join([owners[0], *(owner.rpartition(".")[2] for owner in owners[1:])]).replace(".", "_")
    weight = _add_parameter(gm, f"{name}_weight", [each["weight"] for each in args])
    bias = None
    if args[0]["bias"] is not None:
        bias = _add_parameter(gm, f"{name}_bias", [each["bias"] for each in args])
    x, op, operands = args[0].get("input"), aten.linear.default, [bias]
    if "weight_scale" in args[0]:
        rows = [len(g.attribute(each["weight"])) for each in args]
        scale = _add_scales(gm, f"{name}_weight_scale", [each["weight_scale"] for each in args], rows)
        zero = None
        if args[0]["zero_point"] is not None:
            zero = _add_scales(gm, f"{name}_zero_point", [each["zero_point"] for each in args], rows)
        x, op = args[0]["x"], _QUANTIZED
        operands = [scale, args[0]["input_scale"], bias, args[0]["activation"], zero]
    with gm.graph.inserting_before(linears[0]):
        fused = g.call_op(gm.graph, op, x, weight, *operands)
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


def _add_scales(gm: fx.GraphModule, name: str, parts: list[fx.Node], rows: list[int]) -> fx.Node:
    """Those of weights below each other; they are few, and the transformed module keeps its own."""
    scales = [g.attribute(part).detach() for part in parts]
    by_rows = [
        scale.reshape(1, 1).expand(number, 1) if scale.numel() == 1 else scale
        for scale, number in zip(scales, rows, strict=True)
    ]
    with gm.graph.inserting_before(gm.graph.find_nodes(op="placeholder")[0]):
        return g.add_attribute(gm, name, nn.Parameter(torch.cat(by_rows), requires_grad=False))


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
