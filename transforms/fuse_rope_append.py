"""Rotary embedding and append in one node.

Before: q' = q * cos + rotate_half(q) * sin, k' likewise; append_kv(k', v, ...); cached_attention(q', ...)
After:  q' = rope_append(q, k, v, cos, sin, ...); cached_attention(q', ...)

Legal because the rotated K is read by the append alone and the rotated Q by the attention alone, both by the
same angles, of which the second half of each row was proved to repeat the first. K goes from its projection
to its page once, and is rounded once. RMSNorms of the heads of Q and K before the rotation are taken in, too,
where nothing else reads what they give. Only on CUDA, where it is one kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.matching.rms_norm import RmsNorm, rms_norm
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
_END = 2**63 - 1


@register("fuse_rope_append")
def fuse_rope_append(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Fuse every append whose K is rotated as the Q of its attention is."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("fuse_rope_append")
    if (ctx.target or ctx.device).type != "cuda":
        report.notes.append("the rotation stays where there is no kernel for it")
        return model, report
    report.num_matches, report.skipped = fuse(model)
    return model, report


def fuse(model: fx.GraphModule) -> tuple[int, list[Skip]]:
    """Fuse in place; returns how many appends, and those that stay."""
    count, skipped = 0, []
    for append in list(
        model.graph.find_nodes(op="call_function", target=torch.ops.ad_flashinfer.append_kv.default)
    ):
        reason = _fuse_one(model, append)
        if reason is None:
            count += 1
        else:
            skipped.append(Skip(g.where(append), reason))
    if count:
        g.finish(model)
    return count, skipped


def _fuse_one(model: fx.GraphModule, append: fx.Node) -> str | None:
    """Fuse an append, or say why not."""
    args = g.op_args(append)
    readers = [n for n in args["kv_cache"].users if g.is_op(n, torch.ops.ad_flashinfer.cached_attention)]
    if len(readers) != 1:
        return f"{len(readers)} attentions read this cache"
    (attend,) = readers
    query, key = g.args(attend)[0], args["key"]
    q, k = _rotation(query), _rotation(key)
    if q is None or k is None:
        return "Q or K is not rotated by halves just before"
    if (q.cos, q.sin) != (k.cos, k.sin):
        return "Q and K are rotated by different angles"
    if len(query.users) > 1 or len(key.users) > 1:
        return "the rotated Q or K is read elsewhere, too"
    q_norm, k_norm = _norm_before(q.x), _norm_before(k.x)
    normed: tuple[Any, ...] = ()
    with model.graph.inserting_before(append):
        sources = [
            _layout_source(x) or g.call_op(model.graph, aten.transpose.int, x, 1, 2) for x in (q.x, k.x)
        ]
        if q_norm is not None and k_norm is not None and q_norm.eps == k_norm.eps:
            sources, normed = [q_norm.x, k_norm.x], (q_norm.weight, k_norm.weight, q_norm.eps)
        fused = g.call_op(
            model.graph,
            torch.ops.ad_flashinfer.rope_append.default,
            *sources,
            args["value"],
            q.cos,
            q.sin,
            *(args[name] for name in ("slot_mapping", "kv_cache", "k_scale", "v_scale")),
            *normed,
        )
    g.copy_origin(fused, append)
    attend.replace_input_with(query, fused)
    model.graph.erase_node(append)
    return None


def _norm_before(x: fx.Node) -> RmsNorm | None:
    """The norm of each head [b, s, heads, head_dim] that gives what is rotated, if nothing else reads it."""
    source = _layout_source(x)
    return None if source is None or len(source.users) > 1 else rms_norm(source)


class _Rotation(NamedTuple):
    x: fx.Node
    """[b, heads, s, head_dim], before."""
    cos: fx.Node
    """[b, s, head_dim]"""
    sin: fx.Node


def _rotation(node: fx.Node) -> _Rotation | None:
    """x * cos + rotate_half(x) * sin of [b, heads, s, head_dim], seen as [b, s, heads, head_dim].

    Of the first elements of each head only, if cos has fewer; the others are concatenated as they are.
    """
    total = _layout_source(node)
    rest = None
    if g.is_op(total, aten.cat.default) and len(g.args(total)[0]) == 2 and g.args(total)[1:] in ((-1,), (3,)):
        total, rest = g.args(total)[0]
    if not g.is_op(total, aten.add.Tensor) or len(total.users) > 1 or total.kwargs:
        return None
    left, right = g.args(total)
    if not (g.is_op(left, aten.mul.Tensor) and g.is_op(right, aten.mul.Tensor)):
        return None
    (x, cos), (rotated, sin) = g.args(left), g.args(right)
    if not (isinstance(x, fx.Node) and _is_rotate_half(rotated, x)):
        return None
    cos, sin, width = _angles(cos), _angles(sin), int(g.shape(x)[-1])
    if cos is None or sin is None or g.shape(cos)[-1] != width:
        return None
    whole = g.args(x)[0] if rest is not None and g.is_op(x, aten.slice.Tensor) else x
    head_dim = int(g.shape(whole)[-1])
    if whole is not x and not _is_slice(x, whole, 0, width):
        return None
    if (rest is None and width != head_dim) or (
        rest is not None and not _is_slice(rest, whole, width, head_dim)
    ):
        return None
    return _Rotation(whole, cos, sin)


def _layout_source(node: object) -> fx.Node | None:
    """What was transposed from [b, heads, s, d] to [b, s, heads, d] or back; one head may be moved, too."""
    if g.is_op(node, aten.transpose.int) and g.args(node)[1:] == (1, 2):
        return g.args(node)[0]
    if g.is_op(node, aten.unsqueeze.default) and g.args(node)[1] == 2:
        squeezed = g.args(node)[0]
        if g.is_op(squeezed, aten.squeeze.dim) and g.args(squeezed)[1] == 1:
            return g.args(squeezed)[0]
    return None


def _is_rotate_half(node: object, x: fx.Node) -> bool:
    """cat(-x[second half], x[first half]) over the last dimension."""
    dim = len(g.shape(x)) - 1
    if not (g.is_op(node, aten.cat.default) and g.args(node)[1:] in ((-1,), (dim,))):
        return False
    parts = g.args(node)[0]
    if len(parts) != 2 or not g.is_op(parts[0], aten.neg.default):
        return False
    head_dim = int(g.shape(x)[-1])
    second, first = g.args(parts[0])[0], parts[1]
    return _is_slice(second, x, head_dim // 2, head_dim) and _is_slice(first, x, 0, head_dim // 2)


def _is_slice(node: object, x: fx.Node, start: int, end: int) -> bool:
    """Whether this is x[..., start:end]."""
    if not g.is_op(node, aten.slice.Tensor):
        return False
    args = g.op_args(node)
    dim, size = len(g.shape(x)) - 1, int(g.shape(x)[-1])
    return (
        args["self"] is x
        and args["dim"] in (dim, -1)
        and (args["start"] or 0) == start
        and min(_END if args["end"] is None else args["end"], size) == end
        and args["step"] == 1
    )


def _angles(node: object) -> fx.Node | None:
    """[b, s, head_dim] seen with a dimension of heads, whose second half repeats the first; else None."""
    if not (g.is_op(node, aten.unsqueeze.default) and g.args(node)[1] == 1):
        return None
    angles = g.args(node)[0]
    return angles if len(g.shape(angles)) == 3 and g.halves_repeat(angles) else None
