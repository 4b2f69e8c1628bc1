"""Experts run the kernels that were measured to be the fastest, by number of tokens.

Before: out = experts(x, index, weights, gate_up, down)
After:  out = experts(x, index, weights, gate_up, down, plan="triton 1=gemv/2/1024/4/2/512/2 ...")

Legal because the kernels compute what the op says, rounded once where torch's round several times. Weights
that lie transposed get other strides, so that a kernel reads whole rows: the parameters of the module that
was transformed do, so no weight is in memory twice. Under torch.compile, which would compile anew for other
strides, such experts are left to torch. On CUDA, in bfloat16 and float16; only sizes that are captured are
timed.

Experts in float8 run the same kernels: with few tokens, or if the checkpoint quantizes weights alone, the
weights become 16 bits in registers, which is exact, and activations stay in 16 bits. With more tokens both
are multiplied in float8, as the checkpoint says (grouped_w8a8). Those in 4 bits have kernels of the same
names, and activations of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.weights import EXPERTS_WEIGHTS
from ad_flashinfer_pass.kernels.experts.arguments import DEFAULT
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.kernels.measure import tune
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes, verified_batches

_EXPERTS = torch.ops.ad_flashinfer.experts.default
_QUANTIZED = torch.ops.ad_flashinfer.quantized_experts.default
_SCALES = (
    *("gate_up_scale", "down_scale", "up_scale", "gate_up_input_scale", "down_input_scale"),
    *("gate_up_zero_point", "down_zero_point", "up_zero_point"),
)
_OPTIONS = (
    *("activation", "alpha", "beta", "limit", "in_float32"),
    *("has_gate", "is_concatenated", "is_transposed", "weigh_input", "input_quantization"),
)
"""Arguments that are no tensors."""
_FLOATS = (torch.bfloat16, torch.float16)
_PROJECTIONS = EXPERTS_WEIGHTS[:3]
_EACH = 4
"""Of the numbers of tokens that are captured with prefill, which ones are timed: two for each doubling."""


@register("tune_experts")
def tune_experts(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Lay out the weights of experts and choose their kernels."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("tune_experts")
    nodes = [node for node in model.graph.nodes if g.is_op(node, _EXPERTS, _QUANTIZED)]
    if not nodes or (ctx.target or ctx.device).type != "cuda":
        return model, report
    served = []
    for node in nodes:
        reason = _unfit(g.op_args(node))
        if reason is not None:
            report.skipped.append(Skip(g.where(node), f"{reason}: by torch's kernels"))
            continue
        if not _lies_by_rows(model, node, ctx):
            report.skipped.append(Skip(g.where(node), "its weights lie transposed: by torch's kernels"))
            continue
        node.kwargs = {**node.kwargs, "plan": DEFAULT}
        served.append(node)
    report.num_matches = len(served)
    if ctx.config.compile_backend != "torch-simple" and g.has_weights(model):
        _tune([node for node in served if _reads_weights(node)], ctx, report)
    g.finish(model)
    return model, report


def _unfit(args: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot run experts with these arguments."""
    weights = [(g.value(args[f"{name}_proj"]), args.get(f"{name}_scale")) for name in ("gate_up", "down")]
    dtype, x_dtype = (g.value(args[name]).dtype for name in ("down_proj", "hidden_states"))
    if dtype in _FLOATS:
        return None
    if x_dtype not in _FLOATS or weights[0][1] is None:
        return f"its experts are {dtype}"
    if not all(scale is not None and float8.has_kernels(weight, g.value(scale)) for weight, scale in weights):
        return "its experts of 4 bits have groups of other than 32 or a multiple of 64 elements"
    return None


def _lies_by_rows(gm: fx.GraphModule, node: fx.Node, ctx: TransformContext) -> bool:
    """Whether experts read whole rows; parameters that lie otherwise are laid out so, with the same shape."""
    args = g.op_args(node)

    def by_rows(weight: Tensor) -> Tensor:
        return weight.mT.contiguous().mT if args["is_transposed"] else weight.contiguous()

    for weight in (args[name] for name in _PROJECTIONS if args[name] is not None):
        if g.value(weight).stride(-2 if args["is_transposed"] else -1) == 1:
            continue
        if weight.op != "get_attr" or ctx.keeps_strides:
            return False
        parameter, weight.meta["val"] = g.attribute(weight), by_rows(g.value(weight))
        if g.has_weights(gm):
            parameter.data = by_rows(parameter.data)
    return True


def _reads_weights(node: fx.Node) -> bool:
    args = g.op_args(node)
    tensors = (args.get(name) for name in (*EXPERTS_WEIGHTS, *_SCALES))
    return all(tensor is None or tensor.op == "get_attr" for tensor in tensors)


def _tune(nodes: list[fx.Node], ctx: TransformContext, report: TransformReport) -> None:
    """Measure the kernels of each kind of experts, and let the graph use what was found."""
    from ad_flashinfer_pass.kernels.experts.tune import ExpertsLayers  # needs triton

    if not nodes:
        return
    row = []
    for args in map(g.op_args, nodes):
        tensors = [name for name in (*EXPERTS_WEIGHTS, *_SCALES) if name in args]
        weights = {name: None if args[name] is None else g.attribute(args[name]) for name in tensors}
        options = {name: args[name] for name in _OPTIONS if name in args}
        x_dtype = g.value(args["hidden_states"]).dtype
        row.append((int(g.shape(args["top_k_index"])[1]), x_dtype, weights, options))
    layers = ExpertsLayers(row)
    sizes, buckets = bucket_sizes(ctx.config)
    drafted = [size * (1 + ctx.config.num_drafts) for size in verified_batches(ctx.config)]
    measured = sorted({*sizes, *drafted, *buckets[::-_EACH]})
    plans, notes = tune(
        layers,
        measured,
        lambda done, total: ctx.on_event(f"tune_experts: {done} of {total} numbers of tokens"),
    )
    report.notes += notes
    for node, (kind, _) in zip(nodes, layers.row, strict=True):
        node.kwargs = {**node.kwargs, "plan": _with_all(plans[kind], measured, buckets)}


def _with_all(plan: str, measured: list[int], sizes: list[int]) -> str:
    """The plan with sizes between the measured ones, which take the kernel of the next."""
    found = KernelPlan.parse(plan)
    others = {size: found.at(next(m for m in measured if m >= size)) for size in sizes}
    return str(KernelPlan(found.default, {**others, **found.by_size}))
