"""A second graph for steps of few tokens, whose linears take in what stands around them.

Before: n = rms_norm(x); y = linear(n, w); z = residual + y                 three kernels
        n = rms_norm(x); g, u = linear(n, w) cut in two; z = silu(g) * u    three kernels
After:  z = ad_flashinfer.linear(x, w, b, norm, eps, residual, gated)       one, or two

Legal because each part is taken in only where nothing else reads what stood between. The sums are the same,
in float32; what was rounded between two kernels is not rounded any more. Only where steps are captured, for
up to ``small_gemm.max_tokens``: beyond, a linear is bound by arithmetic, and cuBLAS and Inductor are
better. The op's ``plan`` is what was measured to be the fastest, by number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.linear import float8, four_bits
from ad_flashinfer_pass.kernels.linear.quantized import Quantization
from ad_flashinfer_pass.kernels.measure import tune
from ad_flashinfer_pass.matching.rms_norm import rms_norm
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes, verified_batches

aten = torch.ops.aten
_LINEAR = torch.ops.ad_flashinfer.linear.default
_QUANTIZED = torch.ops.ad_flashinfer.quantized_linear.default
_QUANTIZATION = ("weight_scale", "input_scale", "activation", "zero_point")
"""Arguments of both ops."""


@register("fuse_small_batch")
def fuse_small_batch(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Make ``ctx.small_batch_model``, which shares the weights of the model, and measure its linears."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("fuse_small_batch")
    if ctx.device.type != "cuda" or ctx.config.compile_backend == "torch-simple":
        report.notes.append("steps are not captured: one graph for all")
        return model, report
    small, report.num_matches, report.skipped = with_fused_linears(model)
    ctx.small_batch_model = small
    if report.num_matches:
        _tune(small, ctx, report)
    return model, report


def _tune(small: fx.GraphModule, ctx: TransformContext, report: TransformReport) -> None:
    """Measure the kernels of each kind of linear, and let the graph use what was found."""
    from ad_flashinfer_pass.kernels.linear.tune import Linear, Linears  # needs triton

    sizes, buckets = bucket_sizes(ctx.config)
    nodes = small.graph.find_nodes(op="call_function", target=_LINEAR)
    linears = Linears(
        [
            Linear(
                g.attribute(args["weight"]),
                g.value(args["x"]).dtype,
                _quantization(args),
                args["norm"] is not None,
                args["residual"] is not None,
                args["gated"],
            )
            for args in map(g.op_args, nodes)
        ]
    )
    plans, notes = tune(
        linears,
        sorted({*sizes, *buckets, *(n * (1 + ctx.config.num_drafts) for n in verified_batches(ctx.config))}),
        lambda done, total: ctx.on_event(f"fuse_small_batch: {done} of {total} numbers of tokens"),
    )
    report.notes += notes
    for node, (kind, _) in zip(nodes, linears.row, strict=True):
        node.kwargs = {**node.kwargs, "plan": plans[kind]}
    g.finish(small)


def _quantization(args: Mapping[str, Any]) -> Quantization | None:
    if args["weight_scale"] is None:
        return None
    given = None if args["input_scale"] is None else g.attribute(args["input_scale"])
    zero = None if args["zero_point"] is None else g.attribute(args["zero_point"])
    return Quantization(g.attribute(args["weight_scale"]), given, args["activation"], zero)


def with_fused_linears(model: fx.GraphModule) -> tuple[fx.GraphModule, int, list[Skip]]:
    """A copy of a graph with its linears replaced, each with as much of its surroundings as it can take in.

    Returns:
        The copy, which shares the weights; how many were replaced, and those that were not.
    """
    gm = g.copied(model)
    skipped, count = [], 0
    for node in [node for node in gm.graph.nodes if g.is_op(node, aten.linear.default, _QUANTIZED)]:
        args = g.op_args(node)
        reason = _unfit(args)
        if reason is not None:
            skipped.append(Skip(g.where(node), reason))
            continue
        x = args["x"] if "x" in args else args["input"]
        norm = rms_norm(x)
        if norm is not None and not all(g.is_op(user, aten.linear, _LINEAR, _QUANTIZED) for user in x.users):
            norm = None  # the normed x is needed anyway
        last, gated = _swiglu(node) if _can_be_gated(args) else (node, False)
        residual, last = (None, last) if gated else _residual(last)
        x = x if norm is None else norm.x
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        how = [args[name] for name in _QUANTIZATION if name in args]
        g.replace_op(last, _LINEAR, x, args["weight"], args["bias"], weight, eps, residual, gated, *how)
        count += 1
    g.finish(gm)
    return gm, count, skipped


def _unfit(args: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot run a linear with these arguments."""
    for name in ("weight", "weight_scale", "input_scale", "zero_point"):
        if args.get(name) is not None and args[name].op != "get_attr":
            return f"its {name} is computed"
    weight = g.attribute(args["weight"])
    dtype = g.value(args["x"]).dtype if "x" in args else weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its {'activations are' if 'x' in args else 'weight is'} {dtype}"
    if weight.dtype == torch.uint8 and not four_bits.has_kernels(weight, g.attribute(args["weight_scale"])):
        return "its weight of 4 bits has groups of other than 32 or a multiple of 64 elements"
    if not weight.is_contiguous():
        return "its weight is strided"
    return None


def _can_be_gated(args: Mapping[str, Any]) -> bool:
    """Whether the kernels find the scales of both halves of the weight's rows."""
    if "weight_scale" not in args:
        return True
    weight, scale = g.attribute(args["weight"]), g.attribute(args["weight_scale"])
    if weight.dtype == torch.uint8:
        return True
    return not float8.is_by_blocks(weight, scale) or len(weight) % (2 * float8.BLOCK) == 0


def _swiglu(linear: fx.Node) -> tuple[fx.Node, bool]:
    """The product silu(first half) * second half of a linear that nothing else reads; else the linear."""
    width = g.shape(linear)[-1]
    if len(linear.users) != 2 or not isinstance(width, int):
        return linear, False
    halves = {}
    for part in linear.users:
        if not (g.is_op(part, aten.slice.Tensor) and len(part.users) == 1):
            return linear, False
        dim, start, end, step = (g.op_args(part)[name] for name in ("dim", "start", "end", "step"))
        if (dim, step) != (-1, 1):
            return linear, False
        halves[start, end] = part
    gate, up = halves.get((0, width // 2)), halves.get((width // 2, width))
    if gate is None or up is None:
        return linear, False
    silu = next(iter(gate.users))
    if not g.is_op(silu, aten.silu.default) or len(silu.users) != 1:
        return linear, False
    product = next(iter(silu.users))
    is_product = g.is_op(product, aten.mul.Tensor) and set(product.all_input_nodes) == {silu, up}
    return (product, True) if is_product else (linear, False)


def _residual(linear: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """What a linear that nothing else reads is added to, and the sum; else None and the linear."""
    if len(linear.users) != 1:
        return None, linear
    total = next(iter(linear.users))
    if not g.is_op(total, aten.add.Tensor) or len(total.all_input_nodes) != 2 or "alpha" in total.kwargs:
        return None, linear
    (other,) = (node for node in total.all_input_nodes if node is not linear)
    same = g.same_shape(g.shape(other), g.shape(linear)) and g.value(other).dtype == g.value(linear).dtype
    return (other, total) if same else (None, linear)
