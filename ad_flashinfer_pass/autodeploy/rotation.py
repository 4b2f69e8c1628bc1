"""The rotation of Q and K joins the append of K and V.

Before: q', k' = rope(q, k, ...); out = attention(q', k', v)
After:  out = attention(q, k, v, ..., cos, sin), one kernel for rotation and append

Legal where nothing else reads q' and k', and the rotation is FlashInfer's by a table, or the explicit one
with angles whose second half is shown to repeat the first. Any other rotation stays where it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass.graph import edit as g

NONE = (None, None, None, False)


def take(attention: fx.Node) -> tuple[Any, ...]:
    """rope_cos, rope_sin, rope_positions and rope_interleaved of the cached attention; ``NONE``: it stays."""
    args = g.op_args(attention)
    query, key = args["query"], args["key"]
    found = [_rotation(query), _rotation(key)]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return NONE
    if args.get("shared_kv_source_layer_idx") is not None or args["value"] in (query, key):
        return NONE
    if not all(_ignores(reader, query, key) for reader in {*query.users, *key.users} - {attention}):
        return NONE
    # An alias, in place: the insertion holds the nodes of q and k already.
    for rotated, (source, _) in zip((query, key), found, strict=True):  # type: ignore[misc]
        rotated.target, rotated.args, rotated.kwargs = torch.ops.aten.alias.default, (source,), {}
    return found[0][1]


def _ignores(node: fx.Node, query: fx.Node, key: fx.Node) -> bool:
    """Whether nothing that comes of ``node`` depends on these two, which are among its arguments."""
    if g.is_op(node, torch.ops.auto_deploy.torch_attention):  # whose K and V are the cache of another layer
        args = g.op_args(node)
        return args.get("shared_kv_source_layer_idx") is not None and args["query"] not in (query, key)
    used = ["k" if pick.args[1:] == (1,) else "q" for pick in node.users]  # of a rotation
    is_rope = g.is_op(node, torch.ops.auto_deploy.torch_rope_with_explicit_cos_sin)
    return is_rope and all(g.op_args(node)[name] not in (query, key) for name in used)


def _rotation(rotated: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """What was rotated, and by what."""
    if rotated.target is not operator.getitem or rotated.args[1] not in (0, 1):
        return None
    rope: Any = rotated.args[0]
    is_table = g.is_op(rope, torch.ops.auto_deploy.flashinfer_rope)
    if not is_table and not g.is_op(rope, torch.ops.auto_deploy.torch_rope_with_explicit_cos_sin):
        return None
    args = g.op_args(rope)
    source = args["k" if rotated.args[1] else "q"]
    if is_table:
        return source, (args["cos_sin_cache"], None, args["position_ids"], not args["is_neox"])
    if args["unsqueeze_dim"] == 2 and g.halves_repeat(args["cos"]) and g.halves_repeat(args["sin"]):
        return source, (args["cos"], args["sin"], None, False)
    return None
