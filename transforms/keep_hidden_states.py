"""What some modules give, kept beside the logits for a head that guesses tokens.

Before: h = layer(...): [b, s, d]
After:  the same, and keep_hidden_state(h, hidden_states, column) once a module, one beside the other

``ctx.hidden_states`` names the modules; where it is empty, nothing changes. New graph input: hidden_states
[tokens of a step, widths of all modules together]. Legal because nothing that the graph computes reads it.

What a module gives is the one tensor of tokens and features that is computed within it and read outside.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

NAME = "hidden_states"
"""The graph input, and where ``ctx.caches`` has it."""


@register("keep_hidden_states")
def keep_hidden_states(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Insert an op after each module that is named, and allocate what they write.

    Raises:
        UnsupportedError: a module is not in the graph, or gives no tensor, or several, of that kind.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("keep_hidden_states", num_matches=len(ctx.hidden_states))
    if not ctx.hidden_states:
        return model, report
    found = [result_of(model, path) for path in ctx.hidden_states]
    widths = [int(g.shape(node)[-1]) for node in found]
    info, dtype = ctx.sequence_info, g.value(found[0]).dtype
    kept = torch.zeros(info.max_num_tokens + info.max_batch_size, sum(widths), dtype=dtype, device=ctx.device)
    ctx.caches[NAME] = kept
    target = g.add_input(model, NAME, kept)
    for index, (path, node) in enumerate(zip(ctx.hidden_states, found, strict=True)):
        with model.graph.inserting_after(node):
            op = torch.ops.ad_flashinfer.keep_hidden_state.default
            g.call_op(model.graph, op, node, target, sum(widths[:index]))
        report.notes.append(f"{path}: {widths[index]} of {sum(widths)} columns, from {node.name}")
    report.notes.append(f"of {len(kept)} tokens: {kept.nbytes / 2**20:.1f} MiB")
    g.finish(model)
    return model, report


def result_of(gm: fx.GraphModule, path: str) -> fx.Node:
    """The node of what a module gives to others.

    Args:
        gm: a graph that was just exported, in which each node knows its modules.
        path: of the module.

    Raises:
        UnsupportedError: see ``keep_hidden_states``.
    """
    tokens = g.token_input(gm)
    assert tokens is not None
    inside = {node for node in gm.graph.nodes if f"model.{path}" in _modules(node)}  # of export_model.Logits
    leaving = [node for node in gm.graph.nodes if node in inside and not inside.issuperset(node.users)]
    found = [
        node
        for node in leaving
        if g.is_tensor(node)
        and g.value(node).is_floating_point()
        and len(g.shape(node)) == 3
        and g.same_shape(g.shape(node)[:2], g.shape(tokens)[:2])
    ]
    if len(found) != 1:
        what = ", ".join(g.where(node) for node in found) if found else "none"
        raise UnsupportedError(
            f"the hidden states after {path}, which the head reads, must be one tensor [batch, tokens, "
            f"features] that leaves that module; found {what}. Use another drafter."
        )
    return found[0]


def _modules(node: fx.Node) -> set[str]:
    """Paths of the modules that a node was made in, the outer ones included."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(path) for path, _ in stack.values()}
