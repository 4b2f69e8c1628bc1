"""Attention in float64, written out, and ops with a state: what the cached ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.inspection.check.recording import SiteValues
from ad_flashinfer_pass.inspection.check.steps import Step
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.ops.attention import expand

# Elements of a block of attention weights: 128 MiB.
_BLOCK = 2**24


def expected(needs: Site | None, site: SiteValues, steps: Sequence[Step]) -> Tensor:
    """float64 results of a site for all tokens, in the order of the steps.

    Over the arguments that the site saw; K and V of an attention as the cache's dtype rounds them. An op with
    a state has no ``needs``.
    """
    parts = [
        (owner, range(s.input_pos, s.input_pos + len(s.token_ids)))
        for step in steps
        for owner, s in zip(step.owners, step.sequences, strict=True)
    ]
    owners = torch.tensor([owner for owner, span in parts for _ in span])
    positions = torch.tensor([position for _, span in parts for position in span])
    rows = site.rows()
    result = torch.empty_like(rows.pop("out"), dtype=torch.float64)
    if needs is not None:
        rows["key"] = _rounded(rows["key"], needs.k_scale, needs.kv_dtype)
        rows["value"] = _rounded(rows["value"], needs.v_scale, needs.kv_dtype)
    for owner in owners.unique():
        mine = (owners == owner).nonzero()[:, 0]
        mine = mine[positions[mine].argsort()].to(result.device)
        own = {name: values[mine] for name, values in rows.items()}
        result[mine] = _with_state(site.node, own) if needs is None else attention(site.node, **own)
    return result


def _with_state(node: fx.Node, rows: dict[str, Tensor]) -> Tensor:
    """The source op over one sequence, [tokens, ...] of each argument that is by token."""
    assert callable(node.target)
    args: dict[str, Any] = {}
    for name, arg in g.op_args(node).items():
        if name in rows:
            args[name] = rows[name][None].double()
        else:
            args[name] = _tensor(arg).double() if isinstance(arg, fx.Node) else arg
    result: Tensor = node.target(**args)
    return result[0]


def attention(node: fx.Node, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The source attention of one sequence.

    Args:
        node: has the scale, window, chunk, cap, slopes and sinks.
        query: [tokens, heads, size].
        key: [tokens, KV heads, size].
        value: likewise.

    Raises:
        AssertionError: the node still has a mask, which the insertion does not take.
    """
    args = g.op_args(node)
    assert args["attn_mask"] is None
    tensors = ("alibi_slopes", "sinks", "key_up", "value_up")
    args |= {name: _tensor(args[name]) for name in tensors if args[name] is not None}
    if args["key_up"] is not None:
        key, value = expand(key, value, args["key_up"].double(), args["value_up"].double())
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    size = max(1, _BLOCK // (k.shape[0] * k.shape[1]))
    blocks = [_rows(args, q[:, first : first + size], k, v, first) for first in range(0, q.shape[1], size)]
    return torch.cat(blocks, 1).transpose(0, 1)


def _rows(args: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """The queries from position ``first`` on, [heads, queries, size]."""
    scale = args["scale"] if args["scale"] is not None else q.shape[-1] ** -0.5
    logits = q @ k.transpose(1, 2) * scale
    if args["logit_cap"] is not None:
        logits = args["logit_cap"] * torch.tanh(logits / args["logit_cap"])
    at = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    to = torch.arange(k.shape[1], device=q.device)[None]
    if args["alibi_slopes"] is not None:
        logits = logits - args["alibi_slopes"][:, None, None].double() * (at - to)
    hidden = at < to
    if args["sliding_window"] is not None:
        hidden |= at - to >= args["sliding_window"]
    if args["chunk"] is not None:
        hidden |= at // args["chunk"] != to // args["chunk"]
    logits = logits.masked_fill(hidden, float("-inf"))
    if args["sinks"] is not None:
        sinks = args["sinks"].double()[:, None, None].expand(-1, q.shape[1], 1)
        logits = torch.cat((logits, sinks), -1)
    return torch.softmax(logits, -1)[..., : k.shape[1]] @ v


def _rounded(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of that dtype holds of x, by the rule of ``ops.append_kv``."""
    limit = torch.finfo(dtype).max
    if scale != 1.0:
        x = x.float() * torch.tensor(1.0 / scale, dtype=torch.float32, device=x.device)
    return x.clamp(-limit, limit).to(dtype).double() * scale


def _tensor(node: fx.Node) -> Tensor:
    """The value of a node that is made of weights alone."""
    if node.op == "get_attr":
        value: Tensor = g.attribute(node)
        return value
    assert callable(node.target)
    result: Tensor = node.target(*map_arg(node.args, _tensor), **map_arg(node.kwargs, _tensor))
    return result
