"""SDPA and eager matmul-softmax-matmul -> ``ad_flashinfer.attention``.

Before: out: [b, n, s, d] = aten.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=c)
  or:   out = matmul(softmax(cap(matmul(q, repeat(k)^T) * c) + mask), repeat(v))
After:  out = attention(q^T, k^T, v^T, mask, scale=c, logit_cap=..., sinks=...)^T, layout bsnd

Legal because the op computes the same expression; what the expression holds beyond it (dropout, a
scale after the mask, logits that something else reads) is refused for that site, never dropped. The
mask is still the whole mask: ``classify_mask`` decides what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass import masks, ops
from ad_flashinfer_pass.errors import NoAttentionError, UnsupportedError
from ad_flashinfer_pass.registry import Skip, TransformContext, TransformReport, register

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer
aten = torch.ops.aten

_CASTS = (aten.to, aten._to_copy, aten.type_as)
_COPIES = (aten.clone, aten.contiguous)


@dataclass(kw_only=True)
class _Match:
    """One attention in its own terms: q, k, v are 4-D nodes of layout bnsd."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    mask_hides: bool = False
    """The mask is boolean with True where a key is hidden."""
    is_causal: bool = False
    scale: float = 1.0
    logit_cap: float | None = None
    sinks: fx.Node | None = None


class _NoMatch(Exception):
    """Why a candidate is not attention, or not one that can be taken over."""


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
        if g.is_op(node, aten.scaled_dot_product_attention):
            match, last = _match_sdpa(node), node
        elif g.is_op(node, aten.softmax, aten._softmax, aten._safe_softmax):
            try:
                match, last = _match_eager(node)
            except _NoMatch as reason:
                report.skipped.append(Skip(g.where(node), str(reason)))
                continue
        else:
            continue
        _replace(model.graph, match, last)
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


def _match_sdpa(node: fx.Node) -> _Match:
    args = g.op_args(node)
    query, key, value = args["query"], args["key"], args["value"]
    if args["dropout_p"]:
        raise UnsupportedError(
            f"{g.where(node)}: attention has dropout {args['dropout_p']}; export the model in eval mode."
        )
    if g.value(query).dim() != 4:
        raise UnsupportedError(
            f"{g.where(node)}: attention needs query, key and value of 4 dimensions "
            f"[batch, heads, seq, head_dim], got query {tuple(g.shape(query))}."
        )
    if args["is_causal"] and not g.same_size(g.shape(query)[2], g.shape(key)[2]):
        raise UnsupportedError(
            f"{g.where(node)}: is_causal with {g.shape(query)[2]} queries and {g.shape(key)[2]} keys is "
            "aligned to the upper left, which no cached kernel does; the graph must hold no cache."
        )
    scale = args["scale"]
    if scale is None:
        scale = g.shape(query)[-1] ** -0.5
    if not isinstance(scale, (int, float)):
        raise UnsupportedError(f"{g.where(node)}: the scale is computed in the graph ({scale}).")
    return _Match(
        query=query,
        key=key,
        value=value,
        mask=args["attn_mask"],
        is_causal=args["is_causal"],
        scale=float(scale),
    )


def _match_eager(softmax: fx.Node) -> tuple[_Match, fx.Node]:
    """The match and the node of its result."""
    args = g.op_args(softmax)
    rank = g.value(softmax).dim()
    if args["dim"] % rank != rank - 1 or rank != 4:
        raise _NoMatch("a softmax, but not over the last of 4 dimensions")
    parts = _Match(query=softmax, key=softmax, value=softmax)
    _read_logits(args["self"], parts)
    probabilities = softmax
    if parts.sinks is not None:
        probabilities = _only_user(probabilities, aten.slice, "the sink's column is not cut off")
    last = _find_value(probabilities, parts)
    return parts, last


def _read_logits(node: fx.Node, parts: _Match) -> None:
    """Walk from the softmax to the query-key product, collecting what is applied to the logits."""
    factors: list[float] = []
    while True:
        node = _skip(node, *_CASTS, *_COPIES)
        if g.is_op(node, aten.matmul, aten.bmm):
            break
        node = _read_step(node, parts, factors)
    key_t = _skip_upcasts(node.args[1])
    if not g.is_op(key_t, aten.transpose) or {d % 4 for d in key_t.args[1:3]} != {2, 3}:
        raise _NoMatch("a product before the softmax whose second operand is not a transposed key")
    parts.query, factor_q = _unscaled(_skip_upcasts(node.args[0]))
    parts.key, factor_k = _unscaled(_skip_upcasts(key_t.args[0]))
    for factor in (*factors, factor_q, factor_k):
        parts.scale *= factor


def _read_step(node: fx.Node, parts: _Match, factors: list[float]) -> fx.Node:
    """One node between softmax and product; returns the next one towards the product."""
    if parts.logit_cap is None and not factors:
        cap = _read_cap(node)
        if cap is not None:
            parts.logit_cap, inner = cap
            return inner
    if g.is_op(node, aten.cat) and parts.mask is None and parts.sinks is None:
        return _read_sinks(node, parts)
    if g.is_op(node, aten.sub) and g.is_op(_skip_getitem(node.args[1]), aten.max, aten.amax):
        return node.args[0]  # softmax does not change when a row's maximum is taken off first
    scalar = _scalar_factor(node)
    if scalar is not None:
        factors.append(scalar[1])
        return scalar[0]
    if parts.mask is None and parts.logit_cap is None and not factors:
        logits = _read_mask(node, parts)
        if logits is not None:
            return logits
    raise _NoMatch(f"a softmax of {node.format_node() or node.name}, not of a query-key product")


def _read_cap(node: fx.Node) -> tuple[float, fx.Node] | None:
    """(c, x) if the node is c * tanh(x / c)."""
    outer = _scalar_factor(node)
    if outer is None:
        return None
    tanh = _skip(outer[0], *_CASTS)
    if not g.is_op(tanh, aten.tanh):
        return None
    inner = _scalar_factor(_skip(tanh.args[0], *_CASTS))
    if inner is None or abs(inner[1] * outer[1] - 1.0) > 1e-6:
        raise _NoMatch("a tanh in the logits that is not c * tanh(x / c)")
    return outer[1], inner[0]


def _read_sinks(cat: fx.Node, parts: _Match) -> fx.Node:
    """cat((logits, sinks expanded to one column), -1) -> logits."""
    tensors, dim = cat.args[0], g.op_args(cat)["dim"]
    if len(tensors) != 2 or dim % 4 != 3 or g.shape(tensors[1])[-1] != 1:
        raise _NoMatch("a concatenation in the logits that is not one column of sinks")
    sinks = _skip(tensors[1], *_CASTS, *_COPIES, aten.expand, aten.repeat_interleave)
    while g.is_op(sinks, aten.reshape, aten.view, aten.expand, aten.unsqueeze, aten.repeat_interleave):
        sinks = sinks.args[0]
    if g.value(sinks).dim() != 1 or g.shape(sinks)[0] != g.shape(cat)[1]:
        raise _NoMatch("a column beside the logits that is not one value a head")
    parts.sinks = sinks
    return tensors[0]


def _read_mask(node: fx.Node, parts: _Match) -> fx.Node | None:
    """The logits, if the node applies a mask to them: an addition, masked_fill or where."""
    if g.is_op(node, aten.masked_fill) and _hides(node.args[2]):
        parts.mask, parts.mask_hides = node.args[1], True
        return node.args[0]
    if g.is_op(node, aten.where) and len(node.args) == 3:
        condition, if_true, if_false = node.args
        if _hides(if_false) and _leads_to_product(if_true):
            parts.mask = condition
            return if_true
        if _hides(if_true) and _leads_to_product(if_false):
            parts.mask, parts.mask_hides = condition, True
            return if_false
    if g.is_op(node, aten.add) and g.op_args(node)["alpha"] == 1:
        a, b = node.args
        if g.is_tensor(a) and g.is_tensor(b):
            sides = [(a, b), (b, a)]
            found = [(x, y) for x, y in sides if _leads_to_product(x) and not _leads_to_product(y)]
            if len(found) == 1:
                logits, parts.mask = found[0]
                return logits
    return None


def _hides(fill: Any) -> bool:
    """Whether a fill value takes a key's weight to zero: a constant so low that exp gives 0."""
    if isinstance(fill, fx.Node):
        if g.is_op(fill, aten.full, aten.scalar_tensor):
            fill = fill.args[-1]
        elif g.is_op(fill, aten.lift_fresh_copy, aten.clone, aten.to):
            return _hides(fill.args[0])
    return isinstance(fill, (int, float)) and fill <= masks.HIDDEN


def _leads_to_product(node: fx.Node) -> bool:
    """Whether a chain of casts, scales, caps and masks begins at a matrix product."""
    for _ in range(12):
        if g.is_op(node, aten.matmul, aten.bmm):
            return True
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _find_value(probabilities: fx.Node, parts: _Match) -> fx.Node:
    """Follow the probabilities to their product with V; returns that product."""
    node = probabilities
    while True:
        if len(node.users) != 1:
            raise _NoMatch(f"probabilities that {len(node.users)} nodes read, not one product with V")
        (user,) = node.users
        if g.is_op(user, aten.matmul, aten.bmm) and user.args[0] is node:
            parts.value = _skip_upcasts(user.args[1])
            return user
        if not g.is_op(user, *_CASTS, *_COPIES, aten.dropout):
            raise _NoMatch(f"probabilities that go to {user.target}, not to a product with V")
        if g.is_op(user, aten.dropout) and g.op_args(user)["train"] and g.op_args(user)["p"]:
            raise UnsupportedError(f"{g.where(user)}: attention has dropout; export in eval mode.")
        node = user


def _replace(graph: fx.Graph, match: _Match, last: fx.Node) -> None:
    with graph.inserting_before(last):
        query, key, value = (
            g.call_op(graph, aten.transpose.int, tensor, 1, 2)
            for tensor in (match.query, _unrepeated(match.key), _unrepeated(match.value))
        )
        mask = match.mask
        if match.mask_hides:
            mask = g.call_op(graph, aten.logical_not.default, mask)
        kwargs: dict[str, Any] = {"scale": match.scale}
        if match.logit_cap is not None:
            kwargs["logit_cap"] = match.logit_cap
        if match.sinks is not None:
            kwargs["sinks"] = match.sinks
        attention = g.call_op(
            graph,
            torch.ops.ad_flashinfer.attention.default,
            query,
            key,
            value,
            mask,
            match.is_causal,
            **kwargs,
        )
        attention.meta["stack_trace"] = last.meta.get("stack_trace")
        attention.meta["nn_module_stack"] = last.meta.get("nn_module_stack")
        result = g.call_op(graph, aten.transpose.int, attention, 1, 2)
        if g.value(result).dtype != g.value(last).dtype:
            result = g.call_op(graph, aten.to.dtype, result, g.value(last).dtype)
    last.replace_all_uses_with(result)
    graph.erase_node(last)  # dead code elimination keeps SDPA, because dropout could be in it


def _unrepeated(node: fx.Node) -> fx.Node:
    """K or V as projected, if the node repeats its heads."""
    node = _skip(node, *_COPIES)
    if g.is_op(node, aten.repeat_interleave) and len(node.args) == 3 and node.args[2] % 4 == 1:
        return node.args[0]
    return node


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """Query or key without copies, and the constant that it was multiplied by."""
    node = _skip(node, *_COPIES)
    scalar = _scalar_factor(node)
    return scalar if scalar is not None else (node, 1.0)


def _scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) if the node is x * c or x / c with a constant c."""
    if not g.is_op(node, aten.mul, aten.div) or len(node.args) != 2:
        return None
    tensor, factor = node.args
    if not isinstance(factor, (int, float)) or not g.is_tensor(tensor):
        return None
    return tensor, float(factor) if g.is_op(node, aten.mul) else 1.0 / factor


def _only_user(node: fx.Node, target: Any, otherwise: str) -> fx.Node:
    users = list(node.users)
    while len(users) == 1 and g.is_op(users[0], *_CASTS, *_COPIES):
        users = list(users[0].users)
    if len(users) != 1 or not g.is_op(users[0], target):
        raise _NoMatch(otherwise)
    return users[0]


def _skip(node: fx.Node, *targets: Any) -> fx.Node:
    while g.is_op(node, *targets):
        node = node.args[0]
    return node


def _skip_upcasts(node: fx.Node) -> fx.Node:
    """The tensor before copies and casts to float32; kernels take their inputs as projected."""
    while g.is_op(node, *_COPIES) or (g.is_op(node, *_CASTS) and g.value(node).dtype == torch.float32):
        node = node.args[0]
    return node


def _skip_getitem(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and "getitem" in str(node.target) else node
