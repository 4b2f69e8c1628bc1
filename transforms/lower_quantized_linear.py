"""Float8 linears of many tokens as ops that Inductor fuses: activations are quantized where they are made.

Before: n = rms_norm(x); y = quantized_linear(n, w, w_scale, activation="token")
After:  n = rms_norm(x); s = amax(abs(n)) / 448; q = float8(n / s); y = scaled_mm(q, w, s, w_scale)

Legal because these are the operations that the op stands for. For ``torch-opt`` on CUDA, in the graph of many
tokens: that of few has ``ad_flashinfer.linear`` in place of these ops.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.linear.float8 import LARGEST
from ad_flashinfer_pass.kernels.linear.quantized import Quantization, fits_scaled_mm
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
    x, dtype, rows = args["x"], g.value(args["x"]).dtype, int(g.shape(args["weight"])[0])

    def call(target: torch._ops.OpOverload, *operands: object) -> fx.Node:
        return g.call_op(graph, target, *operands)

    with graph.inserting_before(node):
        wide = call(aten.to.dtype, call(aten.reshape.default, x, [-1, int(g.shape(x)[-1])]), torch.float32)
        if args["activation"] == "token":
            largest = call(aten.amax.default, call(aten.abs.default, wide), [-1], True)
            scale = call(aten.div.Tensor, largest, LARGEST)
            scale = call(aten.masked_fill.Scalar, scale, call(aten.eq.Scalar, scale, 0.0), 1.0)
        else:
            scale = call(aten.reshape.default, call(aten.to.dtype, args["input_scale"], torch.float32), [1])
        clamped = call(aten.clamp.default, call(aten.div.Tensor, wide, scale), -LARGEST, LARGEST)
        values = call(aten.to.dtype, clamped, torch.float8_e4m3fn)
        weight_scale = call(aten.to.dtype, args["weight_scale"], torch.float32)
        weight_scale = call(aten.reshape.default, weight_scale, [-1, 1])
        scaled_mm = torch.ops.ad_flashinfer.scaled_mm.default
        out = call(scaled_mm, values, args["weight"], scale, weight_scale, args["bias"], dtype)
        sizes = [call(aten.sym_size.int, x, dim) for dim in range(len(g.shape(x)) - 1)]
        out = call(aten.reshape.default, out, [*sizes, rows])
    g.copy_origin(out, node)
    g.replace(node, out)
