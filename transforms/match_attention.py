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

from ad_flashinfer_pass import matching, ops
from ad_flashinfer_pass.errors import NoAttentionError, UnsupportedError
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Dims
from ad_flashinfer_pass.matching import AttentionMatch, MaskTerm, Operand
from ad_flashinfer_pass.records import SiteNotes, Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

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
    _fold_softmaxes(model.graph)
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
    if not report.num_matches and not any(g.is_op(node, *ops.STATES) for node in model.graph.nodes):
        raise NoAttentionError(_nothing_found(model, report.skipped))
    g.finish(model)
    return model, report


def _fold_softmaxes(graph: fx.Graph) -> None:
    """exp(x) / sum(exp(x)) -> softmax(x), and log(sum(exp(x))) -> logsumexp(x), for logits of token pairs."""
    for node in list(graph.nodes):
        if (found := matching.written_out_softmax(node)) is not None:
            g.replace_op(node, aten._softmax.default, *found, False)
        elif (found := matching.written_out_log_sum_exp(node)) is not None:
            g.replace_op(node, aten.logsumexp.default, found[0], [found[1]])
    graph.eliminate_dead_code()


def _nothing_found(gm: fx.GraphModule, skipped: list[Skip]) -> str:
    seen = "; ".join(f"{skip.where}: {skip.reason}" for skip in skipped[:3])
    return (
        f"no attention was found in a graph of {len(gm.graph.nodes)} nodes: looked for "
        "scaled_dot_product_attention and for matmul -> softmax -> matmul"
        + (f", and passed over {seen}" if seen else "")
        + ". Of models without attention those can be served whose layers are ops with a state "
        "(ad_flashinfer_pass.ops.STATES)."
    )


def _replace(graph: fx.Graph, match: AttentionMatch) -> None:
    last, axes = match.result.node, match.axes
    options: dict[str, Any] = {"scale": match.scale}
    if match.logit_cap is not None:
        options["logit_cap"] = match.logit_cap
    with graph.inserting_before(last):
        if match.sinks is not None:
            options["sinks"] = _arranged(graph, match, match.sinks, (axes.heads,))
        attention = g.call_op(
            graph,
            torch.ops.ad_flashinfer.attention.default,
            _query(graph, match),
            _arranged(graph, match, match.key, axes.key),
            _arranged(graph, match, match.value, axes.value),
            _mask(graph, match),
            match.is_causal,
            **options,
        )
        g.copy_origin(attention, last)
        attention.meta["site_notes"] = SiteNotes(match.form, _folded(match))
        result = _arranged(graph, match, Operand(attention, axes.result), match.result.dims)
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


def _query(graph: fx.Graph, match: AttentionMatch) -> fx.Node:
    """The query, multiplied by what the logits are multiplied by for each head or token."""
    axes = match.axes
    query = _arranged(graph, match, match.query, axes.query)
    dtype = g.value(query).dtype
    for factor, divides in match.temperatures:
        wanted = (axes.batch, axes.queries, axes.heads, ())
        node = _arranged(graph, match, factor, wanted, broadcasts=True)
        query = g.call_op(graph, aten.div.Tensor if divides else aten.mul.Tensor, query, node)
        if g.value(query).dtype != dtype:
            query = g.call_op(graph, aten.to.dtype, query, dtype)
    return query


def _arranged(
    graph: fx.Graph, match: AttentionMatch, operand: Operand, wanted: Dims, *, broadcasts: bool = False
) -> fx.Node:
    """The operand with its axes as wanted.

    Raises:
        UnsupportedError: it has a dimension that cannot be taken apart.
    """
    node = ax.arrange(graph, operand.node, operand.dims, wanted, broadcasts=broadcasts)
    if node is None:
        raise UnsupportedError(
            f"{g.where(operand.node)}: an operand {tuple(g.shape(operand.node))} of the attention at "
            f"{g.where(match.result.node)} cannot be brought to [batch, tokens, heads, head_dim]: it lacks "
            "the batch or the tokens, or merges them in one dimension. Keep both apart around attention."
        )
    return node


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
    group = ax.size_of(match.axes.group)
    parts = [f"scale {match.scale:.6g}"]
    if not group.is_one:
        parts.append(f"{group} query heads a KV head")
    if match.temperatures:
        parts.append("temperature in the query")
    if match.logit_cap is not None:
        parts.append(f"logit cap {match.logit_cap:g}")
    if match.sinks is not None:
        parts.append("sinks")
    kinds = ["boolean" if term.is_bool else "additive" for term in match.mask_terms]
    if kinds:
        parts.append(f"mask ({', '.join(kinds)})")
    return parts


def _mask(graph: fx.Graph, match: AttentionMatch) -> fx.Node | None:
    """One mask, boolean (True = may attend) if all terms are, else additive."""
    shown, total = None, None
    for term in match.mask_terms:
        node = _over_logits(graph, match, term)
        if term.is_bool:
            if g.value(node).dtype != torch.bool:
                node = g.call_op(graph, aten.ne.Scalar, node, 0)
            if term.hides:
                node = g.call_op(graph, aten.logical_not.default, node)
            shown = node if shown is None else g.call_op(graph, aten.logical_and.default, shown, node)
        else:
            if term.factor != 1.0:
                node = g.call_op(graph, aten.mul.Tensor, node, term.factor)
            total = node if total is None else g.call_op(graph, aten.add.Tensor, total, node)
    if total is None or shown is None:
        return shown if total is None else total
    hidden = g.call_op(graph, aten.logical_not.default, shown)
    return g.call_op(graph, aten.masked_fill.Scalar, total, hidden, float("-inf"))


def _over_logits(graph: fx.Graph, match: AttentionMatch, term: MaskTerm) -> fx.Node:
    """The term's node, broadcastable to [b, num_heads, s, t]; the prover sees whether b is the batch."""
    if ax.whole(term.dims) == match.axes.logits:
        return term.node
    dims = ax.aligned(g.shape(term.node), term.dims)
    return _arranged(graph, match, Operand(term.node, dims), match.axes.logits, broadcasts=True)
