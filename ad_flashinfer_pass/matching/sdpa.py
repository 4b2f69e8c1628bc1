"""Reads SDPA calls, and the ops that they decompose to."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Axis, Dims, Size
from ad_flashinfer_pass.matching.nodes import constant, refuse
from ad_flashinfer_pass.matching.operands import matched, walk
from ad_flashinfer_pass.matching.parts import AttentionMatch, MaskTerm, Operand

aten = torch.ops.aten

SDPA = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
    aten._scaled_dot_product_attention_math,
)


def read_sdpa(node: fx.Node) -> AttentionMatch:
    """An SDPA node, or one of the ops that it decomposes to.

    Raises:
        UnsupportedError: it does more than the attention op can express.
    """
    args = g.op_args(node)
    query, key, value = args["query"], args["key"], args["value"]
    if args.get("dropout_p"):
        raise refuse(node, f"has dropout {args['dropout_p']}; export the model in eval mode")
    if args["is_causal"] and not g.same_size(g.shape(query)[-2], g.shape(key)[-2]):
        raise refuse(
            node,
            f"is_causal with {g.shape(query)[-2]} queries and {g.shape(key)[-2]} keys is aligned to the "
            "upper left, which no cached kernel does; the graph must hold no cache",
        )
    scale = args.get("scale")
    scale = g.shape(query)[-1] ** -0.5 if scale is None else constant(scale)
    if scale is None:
        raise refuse(node, f"has a scale that is computed in the graph ({args['scale']})")
    last = node
    if isinstance(g.value(node), (tuple, list)):
        used = {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}
        if set(used) != {0}:
            raise refuse(node, "returns more than its result to the rest of the graph")
        last = used[0]
    *lead, queries, head_dim = ax.of_shape(g.shape(query))
    keys, v_head_dim = ax.of_shape(g.shape(value)[-2:])
    lead_k, lead_v = _lead(node, lead, key), _lead(node, lead, value)
    logits = (*lead, queries, keys)
    mask = args.get("attn_mask", args.get("attn_bias"))
    terms = [] if mask is None else [MaskTerm(mask, logits, is_bool=g.value(mask).dtype == torch.bool)]
    return matched(
        AttentionMatch(
            form=str(node.target).removeprefix("aten.").partition(".")[0],
            result=Operand(last, (*lead, queries, v_head_dim)),
            mask_terms=terms,
            is_causal=args["is_causal"],
            scale=scale,
        ),
        logits,
        keys,
        (walk(query, (*lead, queries, head_dim), scaled=True), head_dim),
        walk(key, (*lead_k, keys, head_dim), scaled=True),
        (walk(value, (*lead_v, keys, v_head_dim)), v_head_dim),
    )


def _lead(sdpa: fx.Node, lead: Sequence[tuple[Axis, ...]], source: fx.Node) -> Dims:
    """Axes of K's or V's batch and heads: the query's, or the outer ones of them where they are fewer."""
    shape = g.shape(source)[:-2]
    result = []
    if len(shape) == len(lead):
        for axes, size in zip(lead, shape, strict=True):
            group = ax.size_of(axes).over(Size.of(size))
            if group is None or group.symbols:
                break
            found = ax.regrouped((axes,), (size, group.constant))
            if found is None:
                break
            result.append(found[0])
    if len(result) != len(lead):
        raise refuse(
            sdpa,
            f"has K or V of shape {tuple(g.shape(source))} for a query of shape "
            f"{tuple(g.shape(g.args(sdpa)[0]))}: a whole number of query heads must share each KV head",
        )
    return tuple(result)
