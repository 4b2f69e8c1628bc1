"""The callable of ``compile_backend``.

``torch-simple``: the graph's own Python code, op by op.
"""

from __future__ import annotations

from torch import fx, nn

from ad_flashinfer_pass.registry import TransformContext, TransformReport, register


@register("compile_model")
def compile_model(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Make the graph ready to be called."""
    assert isinstance(model, fx.GraphModule)
    model.recompile()
    report = TransformReport("compile_model", num_matches=1)
    report.notes.append(f"{ctx.config.compile_backend}: {len(model.graph.nodes)} nodes")
    return model, report
