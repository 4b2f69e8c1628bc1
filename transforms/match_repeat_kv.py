"""Expanded heads -> one canonical op.

Before: t: [b, h, s, d] -> unsqueeze(2) -> expand [b, h, n, s, d] -> reshape [b, h * n, s, d]
After:  aten.repeat_interleave(t, n, 1)

Legal because both repeat each head n times, in order. ``match_attention`` then takes t itself as K or
V, with grouped-query attention implied by the head counts; a repeat that feeds anything else stays.
The same is done for an ``expand`` of a dimension of size one, which is how some models write
multi-query attention.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


@register("match_repeat_kv")
def match_repeat_kv(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Bring every head expansion of a 4-D tensor to ``aten.repeat_interleave.self_int``."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("match_repeat_kv")
    for node in list(model.graph.nodes):
        match = _expanded_group(node) or _expanded_single(node)
        if match is None:
            continue
        source, repeats, dim = match
        g.replace_op(node, aten.repeat_interleave.self_int, source, repeats, dim)
        report.num_matches += 1
    if report.num_matches:
        g.finish(model)
    return model, report


def _expanded_group(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(source, repeats, dim) if the node is reshape(expand(unsqueeze(source)))."""
    if not g.is_op(node, aten.reshape, aten.view, aten._unsafe_view, aten.flatten):
        return None
    expand = _skip_copies(g.args(node)[0])
    if not g.is_op(expand, aten.expand) or not g.is_op(g.args(expand)[0], aten.unsqueeze):
        return None
    unsqueeze = g.args(expand)[0]
    source = g.args(unsqueeze)[0]
    if not g.is_tensor(source) or g.value(source).dim() != 4:
        return None
    at = g.args(unsqueeze)[1] % 5
    sizes, expanded = g.shape(source), g.shape(expand)
    repeats = expanded[at]
    dim = at - 1
    merged = [*sizes[:dim], sizes[dim] * repeats, *sizes[dim + 1 :]] if dim >= 0 else []
    if not isinstance(repeats, int) or not isinstance(sizes[dim], int):
        return None
    if not g.same_shape(g.shape(node), merged):
        return None
    return source, repeats, dim


def _expanded_single(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(source, repeats, dim) if the node expands one dimension of size one by a constant."""
    if not g.is_op(node, aten.expand) or not g.is_tensor(g.args(node)[0]):
        return None
    before, after = g.shape(g.args(node)[0]), g.shape(node)
    if len(before) != 4 or len(after) != 4:
        return None
    changed = [i for i in range(4) if not g.same_size(before[i], after[i])]
    if len(changed) != 1 or before[changed[0]] != 1:
        return None
    repeats = after[changed[0]]
    return (g.args(node)[0], repeats, changed[0]) if isinstance(repeats, int) else None


def _skip_copies(node: fx.Node) -> fx.Node:
    while g.is_op(node, aten.clone, aten.contiguous):
        node = g.args(node)[0]
    return node
