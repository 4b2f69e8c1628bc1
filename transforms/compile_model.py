"""The callable of ``compile_backend``.

``torch-simple``: the graph's own Python code, op by op. ``torch-cudagraph``: the same, with decode steps
captured for the batch sizes of ``cuda_graph_batch_sizes`` and replayed; see ``runtime.cuda_graph``.
``torch-opt``: all but our ops compiled by Inductor, see ``pieces``; on CUDA captured likewise.

Parameters move to the top of the module: reading ``model.layers.0.mlp.up_proj.weight`` takes six lookups
in Python, for each parameter and step.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.metadata import SequenceStep
from ad_flashinfer_pass.pieces import compile_pieces
from ad_flashinfer_pass.registry import TransformContext, TransformReport, register
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule, default_batch_sizes


@register("compile_model")
def compile_model(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Make the graph ready to be called."""
    assert isinstance(model, fx.GraphModule)
    model = _with_flat_attributes(model)
    report = TransformReport("compile_model", num_matches=1)
    report.notes.append(f"{ctx.config.compile_backend}: {len(model.graph.nodes)} nodes")
    if ctx.config.compile_backend == "torch-opt":
        model, pieces = compile_pieces(model)
        _warm_up(model, ctx)
        num_calls = sum(piece.num_calls for piece in pieces)
        report.notes.append(f"Inductor: {len(pieces)} distinct pieces, called {num_calls} times a step")
    if ctx.config.compile_backend == "torch-simple" or ctx.device.type != "cuda":
        return model, report
    sizes = ctx.config.cuda_graph_batch_sizes or default_batch_sizes(ctx.config.max_batch_size)
    captured = CudaGraphModule(model, sizes)
    captured.capture(ctx.sequence_info, ctx.caches)
    report.notes.append(f"decode captured for batch sizes {', '.join(map(str, captured.batch_sizes))}")
    return captured, report


def _warm_up(model: nn.Module, ctx: TransformContext) -> None:
    """Compile what steps need: one token, many, and no, one or many rows of logits.

    Runs on page 1, which no sequence owns yet, and clears it.
    """
    info = ctx.sequence_info
    long, short = min(2, info.max_seq_len, info.max_num_tokens // 2), info.max_batch_size >= 2
    for lengths, gather in (([1], True), ([long], True), ([long], False), ([long] * (1 + short), True)):
        info.nest_sequences([SequenceStep([0] * n, 0, [1], gather) for n in lengths])
        with torch.inference_mode():
            model(**info.named_args(), **ctx.caches)
    for cache in ctx.caches.values():
        cache[1] = 0


def _with_flat_attributes(model: fx.GraphModule) -> fx.GraphModule:
    root = nn.Module()
    for node in model.graph.find_nodes(op="get_attr"):
        tensor, name = g.attribute(node), str(node.target).replace(".", "_")
        while hasattr(root, name) and getattr(root, name) is not tensor:
            name += "_"
        if isinstance(tensor, nn.Parameter):
            root.register_parameter(name, tensor)
        elif not hasattr(root, name):
            root.register_buffer(name, tensor, persistent=False)
        node.target = name
    return fx.GraphModule(root, model.graph)
