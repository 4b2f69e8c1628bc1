"""Attention over keys and values that are made of one latent -> attention over the latent (MLA).

Before: k, v = W_k[h] c, W_v[h] c for each head h; out = attention([q, r], [k, shared], v)
After:  row = [c, shared]; out = attention([q, r], row, row[:, :len(c)], key_up=W_k, value_up=W_v)

``insert_cached_attention`` then caches ``row``: of DeepSeek-V3 576 elements a token and layer, not 49,152.
Kernels absorb W_k and W_v, or expand K and V where that is faster (``attention.latent``). That K
and V are such images is read in the graph, element by element: each is a row of one linear of one
tensor ``c``, or the same for all heads. Logits are the same reals, so that scale, window, cap and sinks stay
as they are. A bias of K adds the same to all logits of a query, which a softmax without cap and sinks does
not see; one of V is added to the result. What is not proved, or would not halve the cache, stays as it is.
Weights are read as views of the model's own, but quantized ones, which are dequantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Dims
from ad_flashinfer_pass.graph.elements import Source, trace
from ad_flashinfer_pass.kernels.attention import reference, select
from ad_flashinfer_pass.kernels.attention.capability import PHASES
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.records import SiteNotes, Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.transforms.insert_cached_attention import site_of

aten = torch.ops.aten
_OURS = torch.ops.ad_flashinfer


class _NotLatentError(Exception):
    """Why a site stays as it is."""


class _Cut(NamedTuple):
    """Rows first + h * stride + start ... + length of a weight, of each head h."""

    first: int
    heads: int
    stride: int
    start: int
    length: int


@dataclass
class _Image:
    """Elements of each head that are rows of a linear of one tensor."""

    linear: fx.Node
    dims: Dims
    """Axes of the linear's input."""
    cut: _Cut
    """The weight's rows."""
    columns: Tensor
    """int64 [n]: which elements of a head they are."""


@dataclass
class _Latent:
    """What a site's K and V are made of."""

    tokens: Dims
    """Axes of batch and tokens."""
    key: _Image
    value: _Image
    shared: list[Source]
    """The rest of K, in the order of its columns."""
    columns: list[Tensor]
    """Of each of them."""
    expanded: int
    """Elements of a token in K and V."""

    @property
    def rank(self) -> int:
        """Elements of the latent."""
        return int(g.shape(_input(self.key.linear))[-1])

    @property
    def width(self) -> int:
        """Elements of a token in the cache."""
        return self.rank + sum(map(len, self.columns))


@register("cache_latent")
def cache_latent(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Bring each attention over a latent to attention over one head."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("cache_latent")
    rows: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] = {}
    for node in model.graph.find_nodes(op="call_function", target=_OURS.attention.default):
        tokens = ax.of_shape(g.shape(node)[:2])
        if (value := _narrow(node, tokens)) is None:
            continue
        try:
            latent = _read(node, tokens, value)
            _rewrite(model, node, latent, rows, ctx)
        except _NotLatentError as why:
            report.skipped.append(Skip(g.where(node), f"K and V are cached for each head, because {why}"))
            continue
        report.num_matches += 1
        report.notes.append(f"{latent.width} elements of a token are cached in place of {latent.expanded}")
    report.notes = list(dict.fromkeys(report.notes))
    if report.num_matches or report.skipped:
        g.finish(model)
        g.delete_unread(model)
    return model, report


def _input(linear: fx.Node) -> fx.Node:
    return linear.all_input_nodes[0]


def _is_linear(source: Source) -> bool:
    return g.is_op(source.node, aten.linear.default, _OURS.quantized_linear.default)


def _narrow(site: fx.Node, tokens: Dims) -> _Image | None:
    """V, if it is an image of fewer elements than it has: the sign of a latent."""
    node = g.op_args(site)["value"]
    heads, size = map(int, g.shape(node)[2:])
    if heads == 1:
        return None
    try:
        value = _image(trace(node, tokens, _is_linear), tokens, heads, size)
    except _NotLatentError:
        return None
    return value if g.shape(_input(value.linear))[-1] < heads * size else None


def _read(site: fx.Node, tokens: Dims, value: _Image) -> _Latent:
    """The latent of a site.

    Raises:
        _NotLatentError: there is none; says why.
    """
    args = g.op_args(site)
    heads, size = map(int, g.shape(args["key"])[2:])
    if g.shape(args["query"])[2] != heads:
        raise _NotLatentError("several query heads share a KV head")
    sources = trace(args["key"], tokens, lambda at: _is_linear(at) or _is_shared(at, heads, size))
    of_heads = [each for each in sources if not _is_shared(each, heads, size)]
    key = _image(of_heads, tokens, heads, size)
    shared = sorted((each for each in sources if each not in of_heads), key=lambda each: int(each.places[0]))
    columns = [each.places[: len(each.places) // heads] for each in shared]
    expanded = heads * (size + int(g.shape(args["value"])[3]))
    latent = _Latent(tokens, key, value, shared, columns, expanded)
    for part in (key.columns, *columns, *(s.flat()[: len(c)] for s, c in zip(shared, columns, strict=True))):
        if not torch.equal(part, part[0] + torch.arange(len(part))):
            raise _NotLatentError("the parts of K do not lie together")
    if _origin(key) != _origin(value):
        raise _NotLatentError(f"K is linear in {_input(key.linear).name}, V in {_input(value.linear).name}")
    has_bias = any(g.op_args(each.linear)["bias"] is not None for each in (key, value))
    if has_bias and (args["sinks"] is not None or args["logit_cap"] is not None):
        raise _NotLatentError(f"{g.where(key.linear)} has a bias, which a softmax with a cap or sinks sees")
    if 2 * latent.width > expanded:
        raise _NotLatentError(f"{latent.width} elements of a token would take the place of {expanded}")
    return latent


def _is_shared(source: Source, heads: int, size: int) -> bool:
    """Whether all heads have the same elements."""
    if len(source.places) % heads:
        return False
    columns = (source.places % size).view(heads, -1)
    return all(
        bool((each == each[0]).all())
        for each in (columns, *(i.view(heads, -1) for i in source.coordinates.values()))
    )


def _image(sources: list[Source], tokens: Dims, heads: int, size: int) -> _Image:
    """What several sources, of all elements of heads that are not shared, are as one image.

    Raises:
        _NotLatentError: they are none.
    """
    if not sources:
        raise _NotLatentError("no element of K is a head's own")
    for each in sources:
        if not _is_linear(each):
            raise _NotLatentError(f"{g.where(each.node)} computes each head's own elements")
    (source, *others), rows = sources, sources[0].along(-1)
    linear, dims = source.node, ax.whole(source.dims)
    scales = [arg for arg in g.op_args(linear).values() if g.is_tensor(arg)][1:]
    if not g.is_op(linear, aten.linear.default) and any(scale.op != "get_attr" for scale in scales):
        raise _NotLatentError(f"the quantized weight of {g.where(linear)} is computed")
    if others:
        raise _NotLatentError(f"{g.where(others[0].node)} makes a part of a head, {linear.name} another")
    columns = (source.places % size).view(heads, -1) if len(source.places) % heads == 0 else source.places
    is_even = bool((columns == columns[0]).all())
    if rows is None or set(ax.flat(dims[:-1])) != set(ax.flat(tokens)) or not is_even:
        raise _NotLatentError(f"{g.where(linear)} is not one linear of each token for all heads")
    cut = _cut(rows.view(heads, -1), int(g.shape(linear)[-1]))
    latent = ax.of_shape(g.shape(_input(linear))[-1:])
    return _Image(linear, (*dims[:-1], *latent), cut, columns[0])


def _origin(image: _Image) -> list[tuple[object, ...]]:
    """Where the elements of a linear's input come from, to compare two of them."""
    found = trace(_input(image.linear), image.dims[:-1], lambda at: False)
    return [
        (each.node, each.tokens, each.places.tolist(), each.flat().tolist())
        for each in sorted(found, key=lambda each: int(each.places[0]))
    ]


def _cut(rows: Tensor, number: int) -> _Cut:
    """How rows [heads, n] are cut from that number of rows.

    Raises:
        _NotLatentError: they do not lie evenly.
    """
    heads, length = rows.shape
    low, stride = int(rows[0, 0]), int(rows[1, 0] - rows[0, 0])
    start = 0 if low + heads * stride <= number else stride - length
    even = low + stride * torch.arange(heads)[:, None] + torch.arange(length)
    if stride < length or start > low or not torch.equal(rows, even):
        raise _NotLatentError("the rows of the heads do not lie evenly in their weight")
    return _Cut(low - start, heads, stride, start, length)


def _rewrite(
    gm: fx.GraphModule,
    node: fx.Node,
    latent: _Latent,
    rows: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]],
    ctx: TransformContext,
) -> None:
    args, graph = g.op_args(node), gm.graph
    query, pair = args["query"], (args["key"], args["value"])
    with graph.inserting_before(node):
        if pair not in rows:
            rows[pair] = _row(graph, latent)
        key, value = rows[pair]
        order = [latent.key.columns, *latent.columns]
        if not torch.equal(torch.cat(order), torch.arange(int(g.shape(query)[3]))):
            parts = [_cut_to(graph, query, -1, int(columns[0]), len(columns)) for columns in order]
            query = g.call_op(graph, aten.cat.default, parts, -1)
        ups = {f"{name}_up": _weight(gm, getattr(latent, name), "weight") for name in ("key", "value")}
        attended = g.call_op(
            graph,
            _OURS.attention.default,
            *{**args, "query": query, "key": key, "value": value, **ups}.values(),
        )
        _check_kernels(ctx, node, attended)
        out = attended
        if g.op_args(latent.value.linear)["bias"] is not None:
            out = g.call_op(graph, aten.add.Tensor, out, _weight(gm, latent.value, "bias"))
    for new in (attended, out):
        g.copy_origin(new, node)
    notes = node.meta.get("site_notes", SiteNotes("ad_flashinfer.attention"))
    attended.meta["site_notes"] = notes
    notes.folded.append(f"latent of {latent.rank} + {latent.width - latent.rank} elements")
    g.replace(node, out)


def _check_kernels(ctx: TransformContext, node: fx.Node, attended: fx.Node) -> None:
    """Whether kernels of the GPU that will run the graph attend over the latent, if any do over K and V.

    Raises:
        _NotLatentError: only the reference does.
    """
    target = ctx.target or ctx.device
    for phase in PHASES if target.type == "cuda" else ():
        before, after = (
            select.choose(
                site_of(ctx, g.op_args(each), (1.0, 1.0), shares_kv=False, is_latent=each is attended),
                phase,
                target,
                g.where(node),
                ctx.sm,
            ).kernel
            for each in (node, attended)
        )
        if after == reference.PROVIDER.name != before:
            raise _NotLatentError(f"no kernel of the GPU has {phase} over it, and {before} has over K and V")


def _row(graph: fx.Graph, latent: _Latent) -> tuple[fx.Node, fx.Node]:
    """[b, s, 1, width], what is cached of a token, and its part of which V is made.

    Raises:
        _NotLatentError: a part does not have a batch and tokens of its own.
    """
    parts = [_arranged(graph, latent, _input(latent.key.linear), latent.key.dims)]
    for source, columns in zip(latent.shared, latent.columns, strict=True):
        part = _arranged(graph, latent, source.node, source.dims)
        first = int(source.flat()[0])
        parts.append(_cut_to(graph, part, -1, first, len(columns)))
    row = g.call_op(graph, aten.cat.default, parts, -1) if len(parts) > 1 else parts[0]
    return row, g.call_op(graph, aten.slice.Tensor, row, -1, 0, latent.rank)


def _arranged(graph: fx.Graph, latent: _Latent, node: fx.Node, dims: Dims) -> fx.Node:
    """[b, s, 1, all other elements in their order]."""
    tokens = ax.whole(latent.tokens)
    rest = tuple(axis for axis in ax.flat(dims) if axis not in ax.flat(tokens))
    found = ax.arrange(graph, node, dims, (*tokens, (), rest))
    if found is None:
        raise _NotLatentError(f"{g.where(node)} cannot be brought to [batch, tokens, elements]")
    return found


def _cut_to(graph: fx.Graph, node: fx.Node, dim: int, start: int, length: int) -> fx.Node:
    """node[start : start + length] along a dimension."""
    if length == g.shape(node)[dim]:
        return node
    return g.call_op(graph, aten.slice.Tensor, node, dim, start, start + length)


def _weight(gm: fx.GraphModule, image: _Image, name: str) -> fx.Node:
    """The rows of a linear's weight or bias, [heads, n, ...], as a view."""
    cut, node = image.cut, _plain(gm, image.linear) if name == "weight" else g.op_args(image.linear)[name]
    rows = _cut_to(gm.graph, node, 0, cut.first, cut.heads * cut.stride)
    by_head = g.call_op(gm.graph, aten.unflatten.int, rows, 0, [cut.heads, cut.stride])
    return _cut_to(gm.graph, by_head, 1, cut.start, cut.length)


def _plain(gm: fx.GraphModule, linear: fx.Node) -> fx.Node:
    """The weight of a linear, in the dtype of what it multiplies."""
    args = g.op_args(linear)
    if not g.is_op(linear, _OURS.quantized_linear.default):
        return args["weight"]
    name = str(args["weight"].target).replace(".", "_") + "_dequantized"
    if hasattr(gm, name):
        return gm.graph.find_nodes(op="get_attr", target=name)[0]
    weight, scale = g.attribute(args["weight"]), g.attribute(args["weight_scale"])
    zero_point = None if args["zero_point"] is None else g.attribute(args["zero_point"])
    weight = float8.dequantized(weight, scale, g.value(linear).dtype, zero_point)
    with gm.graph.inserting_before(gm.graph.find_nodes(op="placeholder")[0]):
        return g.add_attribute(gm, name, nn.Parameter(weight, requires_grad=False))
