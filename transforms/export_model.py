"""nn.Module -> aten graph with dynamic batch and sequence.

After: logits: [b, s, vocab] = graph(input_ids: int64 [b, s], position_ids: int64 [b, s])

The graph shares the module's parameters. A model of transformers is called without a cache; a module
of one's own is called with input_ids and position_ids, and returns logits or an object with them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.errors import ExportError
from ad_flashinfer_pass.registry import TransformContext, TransformReport, register

# Large enough that sizes are not confused with small constants, distinct, and not 0 or 1, which
# torch.export specialises.
_EXAMPLE_BATCH, _EXAMPLE_SEQ = 2, 13


@register("export_model")
def export_model(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Export ``model``.

    Raises:
        ExportError: torch.export refused; its own words are in the message.
    """
    input_ids = torch.zeros((_EXAMPLE_BATCH, _EXAMPLE_SEQ), dtype=torch.int64, device=ctx.device)
    position_ids = torch.arange(_EXAMPLE_SEQ, device=ctx.device).repeat(_EXAMPLE_BATCH, 1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    wrapped = _Logits(model).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(
                wrapped,
                (input_ids, position_ids),
                dynamic_shapes=(dynamic, dynamic),
                strict=False,
            )
    except Exception as err:  # torch.export raises whatever the model's own code raises
        reason = " ".join(str(err).split())[:600] or type(err).__name__
        raise ExportError(
            f"{type(model).__name__} cannot be exported with dynamic batch and sequence: {reason}"
        ) from err
    gm = _plain_module(program)
    report = TransformReport("export_model", num_matches=1)
    report.notes.append(f"{len(gm.graph.nodes)} nodes")
    return gm, report


class _Logits(nn.Module):
    """The model as a function of input_ids and position_ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_positions = "position_ids" in parameters
        self.extra: dict[str, Any] = {}
        if "use_cache" in parameters or (takes_any and "past_key_values" in parameters):
            self.extra = {"use_cache": False}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        kwargs = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.model(input_ids=input_ids, **kwargs, **self.extra)
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out[0]


def _plain_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program with its parameters as attributes, plain inputs, one tensor out, and no hooks."""
    module = program.module(check_guards=False)
    graph = module.graph
    output = graph.output_node()
    (result,) = g.args(output)[0]
    output.args = (result,)
    graph.set_codegen(fx.graph.CodeGen())
    gm = fx.GraphModule(module, graph)
    g.finish(gm)
    return gm
