"""SDPA and eager matmul-softmax-matmul -> ``ad_flashinfer.attention``.

Before: out: [b, n, s, d] = aten.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=c)
  or:   out = matmul(softmax(cap(matmul(q, repeat(k)^T) * c) + mask), repeat(v))
After:  out = attention(q^T, k^T, v^T, mask, scale=c, logit_cap=..., sinks=...)^T, layout bsnd

Legal because the op computes the same expression: ``matching`` reads every part of it, and refuses a site
with a part that the op does not have. The mask is still the whole mask, additive terms and boolean ones
combined; ``classify_mask`` decides what it means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass import matching, ops
from ad_flashinfer_pass.errors import NoAttentionError
from ad_flashinfer_pass.matching import AttentionMatch, MaskTerm, Operand
from ad_flashinfer_pass.registry import SiteNotes, Skip, TransformContext, TransformReport, register

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer
aten = torch.ops.aten


@register("match_attention")
def match_attention(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Canonicalise every attention.

    Raises:
        UnsupportedError: a node is attention, but does more than the op can express.
        NoAttentionError: there is no attention in the graph; says what was looked for.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("match_attention")
    for node in list(model.graph.nodes):
        if g.is_op(node, *matching.SDPA):
            match = matching.read_sdpa(node)
        elif g.is_op(node, *matching.SOFTMAX):
            try:
                match = matching.read_eager(node)
            except matching.NotAttention as reason:
                report.skipped.append(Skip(g.where(node), str(reason)))
                continue
        else:
            continue
        _replace(model.graph, match)
        report.num_matches += 1
    if not report.num_matches:
        raise NoAttentionError(_nothing_found(model, report.skipped))
    g.finish(model)
    return model, report


def _nothing_found(gm: fx.GraphModule, skipped: list[Skip]) -> str:
    seen = "; ".join(f"{skip.where}: {skip.reason}" for skip in skipped[:3])
    return (
        f"no attention was found in a graph of {len(gm.graph.nodes)} nodes: looked for "
        "scaled_dot_product_attention and for matmul -> softmax -> matmul"
        + (f", and passed over {seen}" if seen else "")
        + ". Models without attention (state-space, recurrent) have no KV cache to insert."
    )


def _replace(graph: fx.Graph, match: AttentionMatch) -> None:
    last = match.last
    options: dict[str, Any] = {"scale": match.scale}
    if match.logit_cap is not None:
        options["logit_cap"] = match.logit_cap
    if match.sinks is not None:
        options["sinks"] = match.sinks
    with graph.inserting_before(last):
        attention = g.call_op(
            graph,
            torch.ops.ad_flashinfer.attention.default,
            *(_seq_first(graph, operand) for operand in (match.query, match.key, match.value)),
            _mask(graph, match.mask_terms),
            match.is_causal,
            **options,
        )
        for key in ("stack_trace", "nn_module_stack"):
            attention.meta[key] = last.meta.get(key)
        attention.meta["site_notes"] = SiteNotes(match.form, _folded(match))
        # bsnd -> bnsd -> the layout of the node that is replaced.
        order = tuple((0, 2, 1, 3)[dim] for dim in match.result_order)
        result = _permuted(graph, attention, order)
        if g.value(last).dim() == 3:
            result = g.call_op(graph, aten.flatten.using_ints, result, 0, 1)
        if g.value(result).dtype != g.value(last).dtype:
            result = g.call_op(graph, aten.to.dtype, result, g.value(last).dtype)
    last.replace_all_uses_with(result)
    _reshape_for_view(result)
    # Dead code elimination keeps SDPA, because dropout could be in it.
    source = last.all_input_nodes[0]
    graph.erase_node(last)
    if g.is_op(source, *matching.SDPA):
        for user in list(source.users):
            graph.erase_node(user)
        graph.erase_node(source)


def _reshape_for_view(result: fx.Node) -> None:
    """Let views of the result copy where they must: its strides may differ from those that were traced."""
    stack = [result]
    while stack:
        for user in stack.pop().users:
            if g.is_op(user, aten.view):
                user.target = aten.reshape.default
            elif g.is_op(user, aten.transpose, aten.permute, aten.to, aten.unsqueeze, aten.squeeze):
                stack.append(user)


def _folded(match: AttentionMatch) -> list[str]:
    """What the op takes over, in words."""
    heads, kv_heads = (g.shape(x.node)[x.order[1]] for x in (match.query, match.key))
    parts = [f"scale {match.scale:.6g}"]
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads != kv_heads:
        parts.append(f"{heads // kv_heads} query heads a KV head")
    if match.logit_cap is not None:
        parts.append(f"logit cap {match.logit_cap:g}")
    if match.sinks is not None:
        parts.append("sinks")
    kinds = ["boolean" if term.is_bool else "additive" for term in match.mask_terms]
    if kinds:
        parts.append(f"mask ({', '.join(kinds)})")
    return parts


def _seq_first(graph: fx.Graph, operand: Operand) -> fx.Node:
    """The operand in layout bsnd."""
    b, n, s, d = operand.order
    return _permuted(graph, operand.node, (b, s, n, d))


def _permuted(graph: fx.Graph, node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    if order == (0, 1, 2, 3):
        return node
    if order == (0, 2, 1, 3):
        return g.call_op(graph, aten.transpose.int, node, 1, 2)
    return g.call_op(graph, aten.permute.default, node, list(order))


def _mask(graph: fx.Graph, terms: list[MaskTerm]) -> fx.Node | None:
    """One mask, boolean (True = may attend) if all terms are, else additive."""
    added = [term for term in terms if not term.is_bool]
    shown = None
    for term in terms:
        if term.is_bool:
            node = term.node
            if term.hides:
                node = g.call_op(graph, aten.logical_not.default, node)
            shown = node if shown is None else g.call_op(graph, aten.logical_and.default, shown, node)
    total = None
    for term in added:
        node = _with_heads(graph, term.node)
        if term.factor != 1.0:
            node = g.call_op(graph, aten.mul.Tensor, node, term.factor)
        total = node if total is None else g.call_op(graph, aten.add.Tensor, total, node)
    if total is None or shown is None:
        return shown if total is None else total
    hidden = g.call_op(graph, aten.logical_not.default, shown)
    return g.call_op(graph, aten.masked_fill.Scalar, total, hidden, float("-inf"))


def _with_heads(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A bias [b * h, 1 or s, t] as [b, h, 1 or s, t]; the prover sees whether b is the batch."""
    rows = g.shape(node)[0]
    if g.value(node).dim() != 3 or not isinstance(rows, torch.SymInt):
        return node
    heads, _ = rows.node.expr.as_coeff_Mul()
    return g.call_op(graph, aten.unflatten.int, node, 0, [-1, int(heads)])
