"""Float8 linears of many tokens: activations are quantized where they are made, and both factors are float8.

Before: n = rms_norm(x); y = quantized_linear(n, w, w_scale, activation="token")
After:  q, s = quantize(x, norm); y = _scaled_mm(q, w^T, s, w_scale)
Before: g, u = gate_up in halves; y = quantized_linear(silu(g) * u, w, w_scale, activation="token")
After:  q, s = quantize(gate_up, gated=True); y = _scaled_mm(q, w^T) * s * w_scale

Legal because these are the operations that the op stands for. _scaled_mm takes scales of tokens and rows
where the weight has more rows than columns. Where it has not, it is faster without, for few tokens above all;
the sum is then rounded to 16 bits once more, before the scales multiply it. For ``torch-opt`` on CUDA, where
Inductor fuses that with what follows, in the graph of many tokens: that of few has ``ad_flashinfer.linear``
in place of these ops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.linear.quantized import Quantization, fits_scaled_mm
from ad_flashinfer_pass.matching.rms_norm import rms_norm
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


@register("lower_quantized_linear")
def lower_quantized_linear(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Write out each float8 linear that torch._scaled_mm computes."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("lower_quantized_linear")
    if ctx.device.type != "cuda" or ctx.config.compile_backend != "torch-opt":
        return model, report
    nodes = model.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.quantized_linear.default
    )
    for node in nodes:
        reason = _unfit(node)
        if reason is None:
            lower(model, node)
            report.num_matches += 1
        else:
            report.skipped.append(Skip(g.where(node), reason))
    if report.num_matches:
        g.finish(model)
    return model, report


def _unfit(node: fx.Node) -> str | None:
    args = g.op_args(node)
    names = [name for name in ("weight", "weight_scale", "input_scale") if args[name] is not None]
    if any(args[name].op != "get_attr" for name in names):
        return "its weight or a scale is computed"
    weight, *scales = (g.attribute(args[name]) for name in names)
    how = Quantization(scales[0], scales[1] if len(scales) > 1 else None, args["activation"])
    dtype = g.value(args["x"]).dtype
    if dtype not in (torch.bfloat16, torch.float16) or not fits_scaled_mm(dtype, weight, how):
        return "torch._scaled_mm has no such scales, sizes or dtypes"
    return None


def lower(gm: fx.GraphModule, node: fx.Node) -> None:
    """Write out one node; its weight and scales are parameters."""
    args, graph = g.op_args(node), gm.graph
    x, dtype, (rows, depth) = args["x"], g.value(args["x"]).dtype, map(int, g.shape(args["weight"]))
    weight_scale = g.attribute(args["weight_scale"]).detach().float()
    norm = rms_norm(x) if len(x.users) == 1 else None
    gate = None if norm is not None or len(x.users) > 1 else _swiglu(x)
    source = norm.x if norm is not None else gate if gate is not None else x
    around = (None, 0.0) if norm is None else (norm.weight, norm.eps)

    def call(target: Callable[..., Any], *operands: object) -> fx.Node:
        return g.call_op(graph, target, *operands)

    def constant(name: str, tensor: Tensor) -> fx.Node:
        name = f"{str(args['weight'].target).replace('.', '_')}_{name}"
        with graph.inserting_before(graph.find_nodes(op="placeholder")[0]):
            return g.add_attribute(gm, name, nn.Parameter(tensor, requires_grad=False))

    has_many_scales = args["activation"] == "token" or weight_scale.numel() > 1
    is_by_rows = has_many_scales and rows > depth
    if not has_many_scales:
        given = g.attribute(args["input_scale"]).detach().float()
        scales = [constant("input", given.reshape(1)), constant("scale", weight_scale.reshape(1))]
    elif is_by_rows:
        by_row = weight_scale.reshape(1, -1).expand(1, rows).contiguous()
        scales = [constant("scale", by_row)]
    else:
        one = torch.ones(1, device=weight_scale.device)
        scales = [constant("one", one)] * 2
    with graph.inserting_before(node):
        quantize = torch.ops.ad_flashinfer.quantize.default
        both = call(quantize, source, args["input_scale"], *around, gate is not None)
        values, scale = (call(operator.getitem, both, place) for place in (0, 1))
        scale = call(aten.reshape.default, scale, [-1, 1])
        flat, weight = call(aten.reshape.default, values, [-1, depth]), call(aten.t.default, args["weight"])
        if is_by_rows:
            scales.insert(0, scale)
        out = call(aten._scaled_mm.default, flat, weight, *scales, None, None, dtype, True)
        is_scaled = is_by_rows or not has_many_scales
        if not is_scaled or args["bias"] is not None:
            out = call(aten.to.dtype, out, torch.float32)
            if not is_scaled:
                by_row = call(aten.reshape.default, args["weight_scale"], [1, -1])
                out = call(aten.mul.Tensor, call(aten.mul.Tensor, out, scale), by_row)
            if args["bias"] is not None:
                out = call(aten.add.Tensor, out, args["bias"])
            out = call(aten.to.dtype, out, dtype)
        sizes = [call(aten.sym_size.int, x, dim) for dim in range(len(g.shape(x)) - 1)]
        out = call(aten.reshape.default, out, [*sizes, rows])
    g.copy_origin(out, node)
    g.replace(node, out)


def _swiglu(product: fx.Node) -> fx.Node | None:
    """Of silu(first half) * second half the whole, if nothing else reads what stands between."""
    if not g.is_op(product, aten.mul.Tensor):
        return None
    silu = next((n for n in product.all_input_nodes if g.is_op(n, aten.silu.default)), None)
    other = next((n for n in product.all_input_nodes if n is not silu), None)
    if silu is None or other is None:
        return None
    first = g.args(silu)[0]
    if not all(g.is_op(half, aten.slice.Tensor) for half in (first, other)):
        return None
    halves = [g.op_args(half) for half in (first, other)]
    whole, size = halves[0]["self"], g.shape(product)[-1]
    is_whole = whole is halves[1]["self"] and g.shape(whole)[-1] == 2 * size
    places = [(half["dim"], half["start"], half["end"], half["step"]) for half in halves]
    is_halved = places == [(-1, 0, size, 1), (-1, size, 2 * size, 1)]
    is_alone = all(len(node.users) == 1 for node in (silu, other, first))
    return whole if is_whole and is_halved and is_alone else None
