"""The sums of all ranks run by what was measured to be the fastest, by the number of rows.

Before: y = all_reduce(x)
After:  y = all_reduce(x, "torch 1=one_shot 8=one_shot")

Legal because all of them give the sum, and the same bits on each rank. Only where steps are captured.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels import collectives, symmetric_memory
from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan
from ad_flashinfer_pass.kernels.measure import fastest, microseconds
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes

_DEFAULT = "torch"


@register("tune_all_reduce")
def tune_all_reduce(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Measure the sums of each width, on all ranks together, and let the graph use what was found."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("tune_all_reduce")
    op = torch.ops.ad_flashinfer.all_reduce.default
    nodes = list(model.graph.find_nodes(op="call_function", target=op))
    if not nodes or ctx.device.type != "cuda" or ctx.config.compile_backend == "torch-simple":
        report.notes.append("no sums in captured steps" if nodes else "no sums")
        return model, report
    for kind in dict.fromkeys((int(g.shape(node)[-1]), g.value(node).dtype) for node in nodes):
        plan = _plan(*kind, ctx, report)
        for node in nodes:
            if (g.shape(node)[-1], g.value(node).dtype) == kind:
                node.kwargs = {**node.kwargs, "plan": plan}
                report.num_matches += 1
    g.finish(model)
    return model, report


def _plan(width: int, dtype: torch.dtype, ctx: TransformContext, report: TransformReport) -> str:
    """The fastest for each number of rows; nothing is kept, so that all ranks measure the same together."""
    sizes, buckets = bucket_sizes(ctx.config)
    size, chosen = ctx.config.world_size, {}
    can = collectives.least(int(symmetric_memory.can_be_used(ctx.device, size)))
    for rows in sorted({*sizes, *buckets}):
        num_bytes = rows * width * dtype.itemsize
        names = [_DEFAULT, *(symmetric_memory.kernels(size, num_bytes, dtype) if can else ())]
        x = torch.zeros(rows, width, dtype=dtype, device=ctx.device)
        ranks = collectives.current()
        times = {}
        for name in names if len(names) > 1 else ():
            spent = microseconds([partial(ranks.all_reduce, x, name)])
            times[name] = [collectives.most(spent)]
        if not times:
            continue
        best = fastest(times, _DEFAULT)
        shown = ", ".join(f"{name} {spent:.1f} us" for name, (spent,) in times.items())
        report.notes.append(f"{rows} rows of {num_bytes // rows} bytes: {best} ({shown})")
        if best != _DEFAULT:
            chosen[rows] = Kernel(best)
    return str(KernelPlan(Kernel(_DEFAULT), chosen))
