"""Reads attention out of a graph: what SDPA calls and eager matmul-softmax-matmul chains compute.

An eager chain is read backwards from its softmax. The logits are a sum and product of known parts:
a product of query and key, constant factors, one cap, additive or boolean masks, sinks. Each part is put into
the ``AttentionMatch``, or the chain is refused; no part is passed over.

Layouts are not recognised but followed: every step carries the axes of its tensor (see ``axes``), so heads
may be merged with the batch, grouped, repeated or transposed, by whatever views.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, fx, nn

from ad_flashinfer_pass import axes as ax
from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass import masks
from ad_flashinfer_pass.axes import Axis, Dims, Size
from ad_flashinfer_pass.errors import UnsupportedError

aten = torch.ops.aten

SDPA = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math,
)
SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)

_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
_CASTS = (aten.to, aten._to_copy, aten.type_as)
_COPIES = (aten.clone, aten.contiguous, aten.lift_fresh_copy)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What stands between a product and the softmax of its result, beside arithmetic.
_PASSED = (
    *ax.VIEWS,
    *ax.PERMUTATIONS,
    *ax.EXPANSIONS,
    *_CASTS,
    *_COPIES,
    aten.where,
    aten.masked_fill,
    aten.masked_fill_,
    aten.cat,
    aten.slice,
    aten.dropout,
    aten.repeat_interleave,
)
_SLICES = (aten.slice, aten.select, aten.index, aten.tril, aten.triu)
# Read nothing of a tensor but its shape.
_LIKE = (
    aten.full_like,
    aten.zeros_like,
    aten.ones_like,
    aten.new_full,
    aten.new_zeros,
    aten.new_ones,
)


class NotAttention(Exception):
    """Why a softmax is not the softmax of an attention."""


@dataclass(frozen=True)
class Operand:
    """A node and its axes."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class MaskTerm:
    """One thing done to the logits: an addition, or positions hidden or shown."""

    node: fx.Node
    dims: Dims
    """Of the logits where the term is applied; the node is broadcast to them."""
    factor: float = 1.0
    """Of an additive term: a constant by which the logits are multiplied after the addition."""
    is_bool: bool = False
    """True and False, or 1 and 0."""
    hides: bool = False
    """Of a boolean term: True hides a key; else True shows it."""


@dataclass(frozen=True)
class SiteAxes:
    """The axes of an attention by their part in it."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    """Query heads of a KV head."""
    queries: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    head_dim: tuple[Axis, ...]
    v_head_dim: tuple[Axis, ...]

    @property
    def heads(self) -> tuple[Axis, ...]:
        """Query heads; those of a KV head stand together."""
        return self.kv_heads + self.group

    @property
    def query(self) -> Dims:
        """[b, s, num_heads, head_dim]."""
        return self.batch, self.queries, self.heads, self.head_dim

    @property
    def key(self) -> Dims:
        """[b, t, num_kv_heads, head_dim]."""
        return self.batch, self.keys, self.kv_heads, self.head_dim

    @property
    def value(self) -> Dims:
        """[b, t, num_kv_heads, v_head_dim]."""
        return self.batch, self.keys, self.kv_heads, self.v_head_dim

    @property
    def result(self) -> Dims:
        """[b, s, num_heads, v_head_dim]."""
        return self.batch, self.queries, self.heads, self.v_head_dim

    @property
    def logits(self) -> Dims:
        """[b, num_heads, s, t]."""
        return self.batch, self.heads, self.queries, self.keys


@dataclass(kw_only=True)
class AttentionMatch:
    """One attention in its own terms."""

    form: str
    """How it stands in the graph, in words."""
    result: Operand
    """Makes the result."""
    axes: SiteAxes = field(init=False)
    query: Operand = field(init=False)
    key: Operand = field(init=False)
    value: Operand = field(init=False)
    mask_terms: list[MaskTerm] = field(default_factory=list)
    is_causal: bool = False
    scale: float = 1.0
    logit_cap: float | None = None
    sinks: Operand | None = None


@dataclass(frozen=True)
class _Place:
    """A node from which an operand can be taken, and the constant by which it is multiplied after it."""

    node: fx.Node
    dims: Dims
    factor: float = 1.0


def read_sdpa(node: fx.Node) -> AttentionMatch:
    """An SDPA node, or one of the ops that it decomposes to.

    Raises:
        UnsupportedError: it does more than the attention op can express.
    """
    args = g.op_args(node)
    query, key, value = args["query"], args["key"], args["value"]
    if args.get("dropout_p"):
        raise _refuse(node, f"has dropout {args['dropout_p']}; export the model in eval mode")
    if args["is_causal"] and not g.same_size(g.shape(query)[-2], g.shape(key)[-2]):
        raise _refuse(
            node,
            f"is_causal with {g.shape(query)[-2]} queries and {g.shape(key)[-2]} keys is aligned to the "
            "upper left, which no cached kernel does; the graph must hold no cache",
        )
    scale = args.get("scale")
    scale = g.shape(query)[-1] ** -0.5 if scale is None else constant(scale)
    if scale is None:
        raise _refuse(node, f"has a scale that is computed in the graph ({args['scale']})")
    last = node
    if isinstance(g.value(node), (tuple, list)):
        used = {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}
        if set(used) != {0}:
            raise _refuse(node, "returns more than its result to the rest of the graph")
        last = used[0]
    *lead, queries, head_dim = ax.of_shape(g.shape(query))
    keys, v_head_dim = ax.of_shape(g.shape(value)[-2:])
    lead_k, lead_v = _lead(node, lead, key), _lead(node, lead, value)
    logits = (*lead, queries, keys)
    mask = args.get("attn_mask", args.get("attn_bias"))
    terms = [] if mask is None else [MaskTerm(mask, logits, is_bool=g.value(mask).dtype == torch.bool)]
    return _matched(
        AttentionMatch(
            form=str(node.target).removeprefix("aten.").partition(".")[0],
            result=Operand(last, (*lead, queries, v_head_dim)),
            mask_terms=terms,
            is_causal=args["is_causal"],
            scale=scale,
        ),
        logits,
        keys,
        (_walk(query, (*lead, queries, head_dim), scaled=True), head_dim),
        _walk(key, (*lead_k, keys, head_dim), scaled=True),
        (_walk(value, (*lead_v, keys, v_head_dim)), v_head_dim),
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
        raise _refuse(
            sdpa,
            f"has K or V of shape {tuple(g.shape(source))} for a query of shape "
            f"{tuple(g.shape(g.args(sdpa)[0]))}: a whole number of query heads must share each KV head",
        )
    return tuple(result)


def read_eager(softmax: fx.Node) -> AttentionMatch:
    """The attention whose softmax this is.

    Raises:
        NotAttention: it is another softmax, of a router for example.
        UnsupportedError: it is attention, but does more than the attention op can express.
    """
    args = g.op_args(softmax)
    shape, logits = g.shape(softmax), args["self"]
    dim = args["dim"] % max(len(shape), 1)
    if not _is_over_pairs(shape, dim):
        raise NotAttention("a softmax, but not of each token's logits for the other tokens")
    if not _contains_product(logits):
        raise NotAttention("a softmax of something other than a query-key product")
    dims = ax.of_shape(shape)
    reader = _LogitsReader(dims, dim)
    product = reader.read(logits)
    query, key, head_dim = _query_and_key(product, reader)
    value, v_head_dim, result = _read_value(softmax, dims, dim, reader.keys)
    sinks = reader.sinks
    lse = _log_sum_exp(logits, dim)
    if sinks is None and lse is not None:
        sinks, result = _sinks_by_scaling(lse, (*dims[:dim], *dims[dim + 1 :]), result)
        reader.readers.append(lse)
    reader.check_readers(softmax)
    return _matched(
        AttentionMatch(
            form="product, softmax, product",
            result=result,
            mask_terms=reader.terms,
            scale=reader.scale,
            logit_cap=reader.logit_cap,
            sinks=sinks,
        ),
        (*dims[:dim], reader.keys, *dims[dim + 1 :]),
        reader.keys,
        (query, head_dim),
        key,
        (value, v_head_dim),
    )


def written_out_softmax(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if the node is exp(x) / sum(exp(x)) or exp(log_softmax(x)) of token pairs: softmax(x, dim)."""
    dim: Any = None
    if g.is_op(node, aten.exp) and g.is_op(node.args[0], aten.log_softmax, aten._log_softmax):
        logits, dim = g.args(_node(node, 0))[:2]
    elif g.is_op(node, aten.div) and len(node.args) == 2 and g.is_op(node.args[1], aten.sum):
        weights, total = g.args(node)
        args = g.op_args(total)
        if args["self"] is weights and args.get("keepdim") and g.is_op(weights, aten.exp):
            logits, dims = _node(weights, 0), args["dim"]
            dim = dims[0] if len(dims) == 1 else None
    if dim is None or not _is_over_pairs(g.shape(node), dim % g.value(node).dim()):
        return None
    return logits, dim


def written_out_log_sum_exp(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if the node is log(sum(exp(x - m))) + m, with one m a row of pairs: logsumexp(x, dim)."""
    if not g.is_op(node, aten.add) or not all(map(g.is_tensor, g.args(node)[:2])):
        return None
    for log, shift in (g.args(node)[:2], g.args(node)[1::-1]):
        total: Any = g.args(log)[0] if g.is_op(log, aten.log) else None
        weights: Any = g.args(total)[0] if g.is_op(total, aten.sum) else None
        shifted: Any = g.args(weights)[0] if g.is_op(weights, aten.exp) else None
        if not g.is_op(shifted, aten.sub) or g.op_args(total).get("keepdim"):
            continue
        (logits, of_row), dims = g.args(shifted)[:2], g.op_args(total)["dim"]
        if len(dims or ()) != 1 or not g.is_tensor(of_row):
            continue
        rank = g.value(logits).dim()
        same = _skip(shift, *ax.VIEWS) is _skip(of_row, *ax.VIEWS)
        is_one = Size.of(g.shape(of_row)[dims[0] % rank]).is_one
        if same and is_one and _is_over_pairs(g.shape(logits), dims[0] % rank):
            return logits, dims[0]
    return None


def _is_over_pairs(shape: Sequence[int | SymInt], dim: int) -> bool:
    """Whether a dimension and another one count tokens: both sizes have a symbol in common."""
    if not shape or not isinstance(shape[dim], SymInt):
        return False
    names = shape[dim].node.expr.free_symbols  # type: ignore[union-attr]
    others = [size for at, size in enumerate(shape) if at != dim and isinstance(size, SymInt)]
    return any(names & size.node.expr.free_symbols for size in others)


def _matched(
    match: AttentionMatch,
    logits: Dims,
    keys: tuple[Axis, ...],
    query: tuple[list[_Place], tuple[Axis, ...]],
    key: list[_Place],
    value: tuple[list[_Place], tuple[Axis, ...]],
) -> AttentionMatch:
    """Fill in the axes, told apart by who has them, and where query, key and value are taken from.

    Raises:
        UnsupportedError: the axes are not those of an attention of tokens to the same tokens.
    """
    node = match.result.node
    cached = {*ax.flat(key[-1].dims), *ax.flat(value[0][-1].dims)}
    every, keys = [axis for axis in ax.flat(logits) if axis not in ax.flat((keys,))], ax.flat((keys,))
    queries = [a for a in every if len(keys) == 1 and a.size == keys[0].size and a not in cached]
    if not queries:
        raise _refuse(
            node,
            f"has logits of shape ({', '.join(str(ax.size_of(dim)) for dim in logits)}) that are not of "
            "tokens to the same tokens; export the model without a cache: cross-attention and keys in blocks "
            "have no place in it",
        )
    others = [part for axis in every if axis is not queries[-1] for part in _batch_apart(axis)]
    cached = {*ax.flat(key[-1].dims), *ax.flat(value[0][-1].dims)}
    batch = [axis for axis in others if axis.is_dynamic]
    if not batch and len(logits) > 3:
        batch = [axis for axis in ax.whole(logits)[0] if axis in others]
    heads = [axis for axis in others if axis not in batch]
    match.axes = SiteAxes(
        batch=tuple(batch),
        kv_heads=tuple(axis for axis in heads if axis in cached),
        group=tuple(axis for axis in heads if axis not in cached),
        queries=(queries[-1],),
        keys=keys,
        head_dim=ax.flat((query[1],)),
        v_head_dim=ax.flat((value[1],)),
    )
    places = _taken(node, query[0], match.axes.query), _taken(node, key, match.axes.key)
    match.query, match.key = (Operand(place.node, place.dims) for place in places)
    match.scale *= places[0].factor * places[1].factor
    place = _taken(node, value[0], match.axes.value)
    match.value = Operand(place.node, place.dims)
    return match


def _batch_apart(axis: Axis) -> tuple[Axis, ...]:
    """A merged axis of batch and heads as two; ``check_packing`` runs the graph and sees whether it is so."""
    if not axis.is_dynamic or axis.size.constant == 1:
        return (axis,)
    return axis.split(Size(1, axis.size.symbols), Size.of(axis.size.constant))


def _taken(node: fx.Node, places: list[_Place], wanted: Dims) -> _Place:
    """The place with the fewest axes, farthest back, that has the wanted dimensions in some order.

    Raises:
        UnsupportedError: it has axes that the attention has not.
    """
    axes = set(ax.flat(places[-1].dims))
    if not axes <= set(ax.flat(wanted)):
        raise _refuse(node, f"has an operand of shape {tuple(g.shape(places[-1].node))} that no kernel takes")
    dims = {tuple(axis for axis in dim if axis in axes) for dim in wanted}
    fewest = [place for place in places if set(ax.flat(place.dims)) == axes]
    plain = [place for place in fewest if {*ax.whole(place.dims), ()} == {*dims, ()}]
    usable = [p for p in fewest if all(sum(a.is_dynamic for a in dim) < 2 for dim in ax.whole(p.dims))]
    return (plain or usable or fewest)[-1]


def _walk(node: fx.Node, dims: Dims, scaled: bool = False) -> list[_Place]:
    """The node and those before it that hold the same numbers: before views, copies, casts to float32.

    ``scaled``: also before a multiplication by a constant.
    """
    places = [_Place(node, dims)]
    factor = 1.0
    while True:
        viewed = ax.before(node, dims)
        scalar = _scalar_factor(node) if scaled else None
        if viewed is not None:
            node, dims = viewed
        elif _skip_upcasts(node) is not node:
            node = _node(node, 0)
        elif scalar is not None and g.same_shape(g.shape(scalar[0]), g.shape(node)):
            node, factor = scalar[0], factor * scalar[1]
        else:
            return places
        places.append(_Place(node, dims, factor))


def constant(arg: Any) -> float | None:
    """The number that an argument always has; None if it depends on inputs or is learned."""
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node):
        return None
    nodes = set(g.ancestors(arg, stop=lambda n: False))
    if any(n.op == "placeholder" for n in nodes):
        return None
    attributes = [g.attribute(n) for n in nodes if n.op == "get_attr"]
    if any(isinstance(a, nn.Parameter) or a.numel() > 1 for a in attributes):
        return None
    env: dict[fx.Node, Any] = {}
    for node in arg.graph.nodes:
        if node in nodes:
            if node.op == "get_attr":
                env[node] = g.attribute(node)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    result = env[arg]
    return float(result) if not isinstance(result, torch.Tensor) or result.numel() == 1 else None


class _LogitsReader:
    """Walks from the softmax to the query-key product and collects what is done to the logits."""

    def __init__(self, dims: Dims, dim: int) -> None:
        self.dims, self.keys = dims, dims[dim]
        """Axes of the node that was reached, and those of the keys, without the column of sinks."""
        self.passed: list[fx.Node] = []
        self.terms: list[MaskTerm] = []
        self.scale = 1.0
        """Of the product; until the product is reached, of everything below the current node."""
        self.logit_cap: float | None = None
        self.sinks: Operand | None = None
        self.readers: list[fx.Node] = []
        """Nodes beside the path whose reading of the logits is accounted for."""

    def read(self, node: fx.Node) -> fx.Node:
        """Read on until the product and return it.

        Raises:
            UnsupportedError: a node that is none of the known parts.
        """
        while not g.is_op(node, *_PRODUCTS):
            self.passed.append(node)
            node = self._step(node)
            self.dims = ax.aligned(g.shape(node), self.dims)
        if g.is_op(node, aten.baddbmm):
            self._read_baddbmm(node)
        self.passed.append(node)
        return node

    def check_readers(self, softmax: fx.Node) -> None:
        """Refuse logits that something else reads: they would have to be computed beside the attention.

        Raises:
            UnsupportedError: names the reader.
        """
        known = {*self.passed, *self.readers, softmax}
        for node in self.passed[::-1]:
            for user in node.users:
                if user in known or _reads_shape(user):
                    continue
                if not (g.is_op(user, aten.eq) and g.args(user)[1] == float("-inf")):
                    raise _refuse(
                        softmax,
                        f"has logits that {g.where(user)} reads too ({user.target}), which a kernel does "
                        "not give; compute the logits without it, or sinks as one more column of the softmax",
                    )

    def _step(self, node: fx.Node) -> fx.Node:
        """Take one node in; returns the next one towards the product."""
        if g.is_op(node, *_CASTS) and g.value(node).dtype not in _FLOATS:
            raise _refuse(node, f"casts the logits to {g.value(node).dtype}")
        if g.is_op(node, *_CASTS, *_COPIES) or (g.is_op(node, aten.dropout) and _is_identity_dropout(node)):
            return _node(node, 0)
        viewed = ax.before(node, self.dims)
        if viewed is not None:
            source, self.dims = viewed
            return source
        if g.mutates_input(node) and len(_node(node, 0).users) > 1:
            raise _refuse(node, "changes logits in place that something else reads")
        for part in (self._cap, self._factor, self._sinks, self._row_maximum, self._floor, self._mask):
            inner = part(node)
            if inner is not None:
                return inner
        raise _refuse(node, f"applies {node.target} to the logits, which no kernel does")

    def _cap(self, node: fx.Node) -> fx.Node | None:
        """C * tanh(x / c) -> x."""
        outer = _scalar_factor(node)
        tanh = _skip(outer[0], *_CASTS) if outer is not None else node
        if outer is None or not g.is_op(tanh, aten.tanh):
            return None
        inner = _scalar_factor(_skip(_node(tanh, 0), *_CASTS))
        if inner is None or abs(inner[1] * outer[1] - 1.0) > 1e-6:
            raise _refuse(node, "has a tanh in the logits that is not c * tanh(x / c)")
        if self.logit_cap is not None or self.scale != 1.0:
            raise _refuse(node, "caps the logits and scales them afterwards")
        self.logit_cap = outer[1]
        self.passed += _between(node, inner[0])
        return inner[0]

    def _factor(self, node: fx.Node) -> fx.Node | None:
        found = _scalar_factor(node)
        if found is None:
            return None
        self.scale *= found[1]
        return found[0]

    def _sinks(self, node: fx.Node) -> fx.Node | None:
        """cat((logits, one column of sinks), keys) -> logits."""
        if not g.is_op(node, aten.cat):
            return None
        tensors, dim = g.args(node)[0], g.op_args(node)["dim"] % g.value(node).dim()
        if self.scale != 1.0 or self.logit_cap is not None:
            raise _refuse(node, "scales or caps its sinks together with the logits")
        if (
            len(tensors) != 2
            or ax.whole(self.dims)[dim] != self.keys
            or not Size.of(g.shape(tensors[1])[dim]).is_one
            or self.terms
        ):
            raise _refuse(node, "concatenates something other than one column of sinks to the logits")
        self.sinks = _sink_of_each_head(node, tensors[1], self.dims)
        (self.keys,) = ax.of_shape(g.shape(tensors[0])[dim : dim + 1])
        self.dims = (*self.dims[:dim], self.keys, *self.dims[dim + 1 :])
        return tensors[0]

    def _row_maximum(self, node: fx.Node) -> fx.Node | None:
        """X - max(x) -> x: a softmax does not change when a constant is taken from a row."""
        if not g.is_op(node, aten.sub, aten.sub_):
            return None
        maximum = _skip(g.args(node)[1], aten.detach)
        if g.is_op(maximum, operator.getitem):
            maximum = _node(maximum, 0)
        if not g.is_op(maximum, aten.max, aten.amax) or _node(maximum, 0) is not _node(node, 0):
            return None
        # One number a row: a maximum over the queries would move the keys against each other.
        shape = g.shape(g.args(node)[1])
        if self.keys in [dim for dim in ax.aligned(shape, self.dims) if dim]:
            return None
        self.readers.append(maximum)
        return _node(node, 0)

    def _floor(self, node: fx.Node) -> fx.Node | None:
        """Max(x, c) -> x where c is so low that softmax takes it to zero."""
        if g.is_op(node, aten.max, aten.maximum, aten.clamp_min, aten.clamp_min_):
            logits, floor = (*g.args(node), None)[:2]
        elif g.is_op(node, aten.clamp, aten.clamp_) and g.op_args(node).get("max") is None:
            logits, floor = g.args(node)[0], g.op_args(node)["min"]
        else:
            return None
        return logits if _hides(floor, self.scale) else None

    def _mask(self, node: fx.Node) -> fx.Node | None:
        """masked_fill, where, an addition, or x * m + c * (1 - m) -> logits."""
        found = _hidden_keys(node, self.scale, self.dims)
        is_sum = g.is_op(node, aten.add, aten.add_, aten.sub, aten.sub_)
        if found is None and is_sum and all(map(g.is_tensor, g.args(node)[:2])):
            found = self._gated(node) or self._added(node)
        if found is None:
            return None
        if self.logit_cap is not None:
            raise _refuse(node, "applies a mask before the logits are capped")
        logits, term = found
        self.terms.append(term)
        return logits

    def _added(self, node: fx.Node) -> tuple[fx.Node, MaskTerm] | None:
        """(logits, term) of logits + term."""
        summands = _summands(node)
        for logits, term in (summands, summands[::-1]):
            if logits[1] == 1.0 and _contains_product(logits[0]) and not _contains_product(term[0]):
                return logits[0], MaskTerm(term[0], self.dims, factor=self.scale * term[1])
        return None

    def _gated(self, node: fx.Node) -> tuple[fx.Node, MaskTerm] | None:
        """(logits, m) of logits * m + c * (1 - m), where m is 0 or 1."""
        (gated, _), (penalty, weight) = _summands(node)
        if not g.is_op(gated, aten.mul, aten.mul_):
            return None
        scaled = _scalar_factor(penalty) or (penalty, 1.0)
        gate = _complement(scaled[0])
        logits = [n for n in g.args(gated)[:2] if g.is_tensor(n) and gate is not None and not _same(n, gate)]
        if len(logits) != 1 or gate is None or not _is_zero_or_one(gate):
            return None
        if scaled[1] * weight * self.scale > masks.HIDDEN or not _contains_product(logits[0]):
            return None
        self.passed.append(gated)
        return logits[0], MaskTerm(gate, self.dims, is_bool=True)

    def _read_baddbmm(self, node: fx.Node) -> None:
        """Beta * bias + alpha * product."""
        args = g.op_args(node)
        if args["beta"] != 0:
            if self.logit_cap is not None:
                raise _refuse(node, "adds a bias before the logits are capped")
            self.terms.append(MaskTerm(args["self"], self.dims, factor=self.scale * args["beta"]))
        self.scale *= args["alpha"]


def _summands(node: fx.Node) -> tuple[tuple[fx.Node, float], tuple[fx.Node, float]]:
    """The two terms of an addition or subtraction, each with its factor."""
    sign = -1.0 if g.is_op(node, aten.sub, aten.sub_) else 1.0
    return (_node(node, 0), 1.0), (_node(node, 1), sign * float(g.op_args(node)["alpha"]))


def _complement(node: fx.Node) -> fx.Node | None:
    """M of 1 - m."""
    if g.is_op(node, aten.rsub):
        inner, one, alpha = g.args(node)[0], g.args(node)[1], g.op_args(node).get("alpha", 1)
    elif g.is_op(node, aten.sub):
        (one, inner), alpha = g.args(node)[:2], g.op_args(node).get("alpha", 1)
    else:
        return None
    is_whole = g.is_tensor(inner) and alpha == 1 and constant_fill(one) == 1.0
    return inner if is_whole else None


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are computed by the same steps from the same tensors."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    if a is b:
        return True
    same_call = a.op == b.op == "call_function" and a.target is b.target and not g.mutates_input(a)
    return (
        same_call
        and (a.kwargs, len(a.args)) == (b.kwargs, len(b.args))
        and all(_same(x, y) for x, y in zip(a.args, b.args, strict=True))
    )


def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The nodes after ``first`` through which ``last`` is computed from it by arguments."""
    return [node for node in g.ancestors(last, stop=lambda n: n is first or not n.args) if node is not first]


def _sink_of_each_head(node: fx.Node, sinks: fx.Node, dims: Dims) -> Operand:
    """The sinks as one value a head.

    Raises:
        UnsupportedError: they depend on more than the head.
    """
    places = _walk_all_casts(sinks, ax.aligned(g.shape(sinks), dims))
    found = places[-1]
    if (
        g.value(found.node).dim() != 1
        or not ax.flat(found.dims)
        or any(a.is_dynamic for a in ax.flat(found.dims))
    ):
        raise _refuse(node, "has sinks that are not one value a head")
    return Operand(found.node, found.dims)


def _walk_all_casts(node: fx.Node, dims: Dims) -> list[_Place]:
    """As ``_walk``, but also before casts to shorter formats: sinks are added in float32."""
    places = _walk(node, dims)
    while g.is_op(places[-1].node, *_CASTS) and g.value(_node(places[-1].node, 0)).dtype in _FLOATS:
        places += _walk(_node(places[-1].node, 0), places[-1].dims)
    return places


def _log_sum_exp(logits: fx.Node, dim: int) -> fx.Node | None:
    """The logarithm of the sum over a row of the logits' exponentials, if something takes it."""
    rank = g.value(logits).dim()
    for user in logits.users:
        if g.is_op(user, aten.logsumexp) and [d % rank for d in g.op_args(user)["dim"]] == [dim]:
            return user
    return None


def _sinks_by_scaling(lse: fx.Node, rows: Dims, result: Operand) -> tuple[Operand, Operand]:
    """The sinks of sigmoid(lse - sinks) * result, and that product.

    It is the softmax with one more logit a head:
    sum(exp(x)) / (sum(exp(x)) + exp(sink)) = sigmoid(logsumexp(x) - sink).

    Raises:
        UnsupportedError: something else is done with the sum of the exponentials.
    """

    def back(node: fx.Node, dims: Dims) -> _Place:
        return _walk_all_casts(node, dims)[-1]

    refusal = _refuse(
        lse,
        "takes the logarithm of a sum over the logits for something other than sinks, sigmoid(lse - sinks)",
    )
    node, dims = result.node, result.dims
    while len(node.users) == 1 and (viewed := ax.after(next(iter(node.users)), dims)) is not None:
        node, dims = next(iter(node.users)), viewed
    scaled = next(iter(node.users))
    gate: Any = None
    if g.is_op(scaled, aten.mul):
        (gate,) = [n for n in g.args(scaled) if n is not node]
    if len(node.users) != 1 or not g.is_tensor(gate) or not g.same_shape(g.shape(scaled), g.shape(node)):
        raise refusal
    place = back(gate, ax.aligned(g.shape(gate), dims))
    if not g.is_op(place.node, aten.sigmoid):
        raise refusal
    place = back(_node(place.node, 0), place.dims)
    if not g.is_op(place.node, aten.sub) or g.op_args(place.node)["alpha"] != 1:
        raise refusal
    total, sinks = g.args(place.node)
    if not g.is_tensor(total) or not g.is_tensor(sinks):
        raise refusal
    found = back(total, ax.aligned(g.shape(total), place.dims))
    if found.node is not lse or ax.flat(found.dims) != ax.flat(rows):
        raise refusal
    return _sink_of_each_head(lse, sinks, place.dims), Operand(scaled, dims)


def _hidden_keys(node: fx.Node, factor: float, dims: Dims) -> tuple[fx.Node, MaskTerm] | None:
    """(logits, term) if the node sets logits to what, times ``factor``, softmax takes to zero."""
    if g.is_op(node, aten.masked_fill, aten.masked_fill_):
        logits, mask, fill = g.args(node)
        return (logits, MaskTerm(mask, dims, is_bool=True, hides=True)) if _hides(fill, factor) else None
    if g.is_op(node, aten.where) and len(node.args) == 3:
        condition, if_true, if_false = g.args(node)
        if _hides(if_false, factor) and g.is_tensor(if_true) and _contains_product(if_true):
            return if_true, MaskTerm(condition, dims, is_bool=True)
        if _hides(if_true, factor) and g.is_tensor(if_false) and _contains_product(if_false):
            return if_false, MaskTerm(condition, dims, is_bool=True, hides=True)
    return None


def _hides(fill: Any, factor: float) -> bool:
    value = None if fill is None else constant_fill(fill)
    return value is not None and value * factor <= masks.HIDDEN


def _query_and_key(
    product: fx.Node, reader: _LogitsReader
) -> tuple[list[_Place], list[_Place], tuple[Axis, ...]]:
    """Query, key, and the axes of a head; the key is the operand that has the keys.

    Raises:
        UnsupportedError: neither or both have them.
    """
    left, right, head_dim = _factors(product, reader.dims)
    has_keys = [set(reader.keys) <= set(ax.flat(operand.dims)) for operand in (left, right)]
    if has_keys == [True, False]:
        left, right = right, left
    elif has_keys != [False, True]:
        raise _refuse(
            product, f"is a product of shape {tuple(g.shape(product))} that is not of query and key"
        )
    query, key = (_walk(operand.node, operand.dims, scaled=True) for operand in (left, right))
    return query, key, head_dim


def _factors(node: fx.Node, dims: Dims) -> tuple[Operand, Operand, tuple[Axis, ...]]:
    """Both operands of a product whose result has ``dims``, and the axes that are summed."""
    if g.is_op(node, aten.einsum):
        (left, right), (a, b), out = _einsum(node)
        by_letter = dict(zip(out, dims, strict=True))
        summed = [x for x in a if x in b and x not in out]
        if len(summed) != 1 or set(a + b) - set(out) - set(summed):
            raise _refuse(node, f"is the einsum {g.args(node)[0]}, not the product of query and key")
        by_letter[summed[0]] = ax.of_shape(g.shape(left))[a.index(summed[0])]
        left_dims, right_dims = (_lettered(x, letters, by_letter) for x, letters in ((left, a), (right, b)))
        return Operand(left, left_dims), Operand(right, right_dims), by_letter[summed[0]]
    first = 1 if g.is_op(node, aten.baddbmm) else 0
    left, right = g.args(node)[first : first + 2]
    if min(g.value(left).dim(), g.value(right).dim()) < 2:
        raise _refuse(node, "has a query or key without a dimension of tokens")
    (inner,) = ax.of_shape(g.shape(left)[-1:])
    lead, rows, columns = dims[:-2], dims[-2], dims[-1]
    return (
        Operand(left, (*ax.aligned(g.shape(left)[:-2], lead), rows, inner)),
        Operand(right, (*ax.aligned(g.shape(right)[:-2], lead), inner, columns)),
        inner,
    )


def _einsum(node: fx.Node) -> tuple[Sequence[fx.Node], list[str], str]:
    """Operands, their letters, and those of the result.

    Raises:
        UnsupportedError: it is not a written out equation of two tensors.
    """
    equation, operands = g.args(node)[:2]
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if (
        len(operands) != 2
        or not arrow
        or "." in equation
        or any(len({*x}) != len(x) for x in (*letters, out))
    ):
        raise _refuse(node, f"is the einsum {equation}, not one of two tensors with all its letters")
    return operands, letters, out


def _lettered(node: fx.Node, letters: str, by_letter: dict[str, tuple[Axis, ...]]) -> Dims:
    sizes = g.shape(node)
    return tuple(() if Size.of(n).is_one else by_letter[x] for x, n in zip(letters, sizes, strict=True))


def _read_value(
    softmax: fx.Node, dims: Dims, dim: int, keys: tuple[Axis, ...]
) -> tuple[list[_Place], tuple[Axis, ...], Operand]:
    """Follow the probabilities to their product with V: V, the axes of its heads, and that product.

    Args:
        softmax: makes the probabilities.
        dims: its axes.
        dim: its dimension of keys.
        keys: axes of the keys; others than in ``dims`` if a column of sinks must be cut off.
    """
    node, needs_cut = softmax, dims[dim] is not keys
    while True:
        users = [user for user in node.users if not _reads_shape(user)]
        if len(users) != 1:
            raise _refuse(softmax, f"has probabilities that {len(users)} nodes read, not V alone")
        (user,) = users
        if needs_cut and g.is_op(user, aten.slice):
            args = g.op_args(user)
            size = g.shape(user)[args["dim"]]
            if args["start"] not in (None, 0) or Size.of(size) != ax.size_of(keys):
                raise _refuse(user, "cuts off something other than the column of sinks")
            dims, needs_cut = (
                (*dims[: args["dim"] % len(dims)], keys, *dims[args["dim"] % len(dims) + 1 :]),
                False,
            )
        elif g.is_op(user, *_PRODUCTS) and not needs_cut:
            return _times_value(user, node, dims, keys)
        elif not _keeps_probabilities(user, node):
            viewed = ax.after(user, dims)
            if viewed is None:
                raise _refuse(user, f"applies {user.target} to the probabilities, which no kernel does")
            dims = viewed
        node = user


def _keeps_probabilities(node: fx.Node, probabilities: fx.Node) -> bool:
    """Whether a node between softmax and V leaves the probabilities as they are, and in their place."""
    if g.is_op(node, *_CASTS):
        return g.value(node).dtype in _FLOATS
    if g.is_op(node, *_COPIES):
        return True
    if g.is_op(node, aten.dropout):
        return _is_identity_dropout(node)
    if g.is_op(node, aten.where) and len(node.args) == 3:
        # What SDPA decomposes to: rows without a visible key become zero. A proved mask has none.
        condition, zeros, kept = g.args(node)
        return kept is probabilities and constant_fill(zeros) == 0.0 and _is_row_check(condition)
    return False


def _times_value(
    product: fx.Node, probabilities: fx.Node, dims: Dims, keys: tuple[Axis, ...]
) -> tuple[list[_Place], tuple[Axis, ...], Operand]:
    """V, the axes of its heads, and the product with its axes."""
    if g.is_op(product, aten.baddbmm):
        raise _refuse(product, "adds a tensor to its result in one baddbmm; use bmm, and add afterwards")
    if g.is_op(product, aten.einsum):
        operands, letters, out = _einsum(product)
    else:
        operands, letters, out = _as_einsum(product)
    if operands.count(probabilities) != 1:
        raise _refuse(product, "multiplies the probabilities by themselves")
    mine = operands.index(probabilities)
    value, (p_letters, v_letters) = operands[1 - mine], (letters[mine], letters[1 - mine])
    by_letter = dict(zip(p_letters, dims, strict=True))
    fresh = dict(zip(v_letters, ax.of_shape(g.shape(value)), strict=True))
    new = [x for x in v_letters if x not in by_letter]
    summed = ax.flat(tuple(by_letter[x] for x in p_letters if x not in out))
    if summed != ax.flat((keys,)) or len(new) != 1 or new[0] not in out:
        raise _refuse(product, "multiplies the probabilities by something other than V, with a row a key")
    by_letter[new[0]] = fresh[new[0]]
    v_dims = _lettered(value, v_letters, by_letter)
    result = Operand(product, tuple(by_letter[x] for x in out))
    return _walk(value, v_dims), fresh[new[0]], result


def _as_einsum(product: fx.Node) -> tuple[list[fx.Node], list[str], str]:
    """A matrix product as operands, their letters, and those of the result."""
    operands = list(g.args(product)[:2])
    ranks = [g.value(operand).dim() for operand in operands]
    if min(ranks) < 2:
        raise _refuse(product, "multiplies the probabilities by a vector")
    lead = string.ascii_lowercase[: max(ranks) - 2]
    letters = [lead[len(lead) + 2 - rank :] + pair for rank, pair in zip(ranks, ("YX", "XZ"), strict=True)]
    return operands, letters, lead + "YZ"


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node reads nothing of a tensor but its shape."""
    return g.is_op(node, *_LIKE) or not g.is_tensor(node)


def constant_fill(node: Any) -> float | None:
    """The value that fills a tensor, if it is one value."""
    if g.is_op(node, aten.full_like, aten.full, aten.new_full, aten.scalar_tensor):
        args = g.op_args(node)
        return constant(args.get("fill_value", args.get("s")))
    if g.is_op(node, aten.ones, aten.ones_like, aten.new_ones):
        return 1.0
    return 0.0 if g.is_op(node, aten.zeros_like, aten.zeros, aten.new_zeros) else constant(node)


def _is_row_check(node: fx.Node) -> bool:
    """Whether a node is the question if a row has a visible key: not(any(not(logits == -inf)))."""
    for target in (aten.logical_not, aten.any, aten.logical_not, aten.eq):
        if not g.is_op(node, target):
            return False
        if target is aten.eq:
            return bool(g.args(node)[1] == float("-inf"))
        node = _node(node, 0)
    return False


def _is_zero_or_one(node: Any) -> bool:
    """Whether all elements of a tensor are 0 or 1, by how it is made."""
    if not g.is_tensor(node):
        return False
    if g.value(node).dtype == torch.bool or constant_fill(node) in (0.0, 1.0):
        return True
    if node.op == "get_attr":
        values = g.attribute(node)
        return not values.is_meta and bool(((values == 0) | (values == 1)).all())
    kept = (*_CASTS, *_COPIES, *_SLICES, *ax.VIEWS, *ax.PERMUTATIONS, *ax.EXPANSIONS)
    return g.is_op(node, *kept) and _is_zero_or_one(g.args(node)[0])


def _scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) if the node is x * c or x / c with a constant c."""
    is_product = g.is_op(node, aten.mul, aten.mul_)
    if not (is_product or g.is_op(node, aten.div, aten.div_)) or len(node.args) != 2 or node.kwargs:
        return None
    tensor, other = g.args(node)
    if not g.is_tensor(tensor):
        return None
    factor = constant(other)
    if factor is None and is_product and g.is_tensor(other):
        tensor, factor = other, constant(tensor)
    if factor is None or factor == 0:
        return None
    return tensor, factor if is_product else 1.0 / factor


def _contains_product(node: fx.Node) -> bool:
    """Whether a tensor is made of a product over pairs of tokens, by what may stand after one."""

    def is_other(n: fx.Node) -> bool:
        return g.is_op(n, *_PRODUCTS) or not (g.is_pointwise(n) or g.is_op(n, *_PASSED))

    for found in g.ancestors(node, stop=is_other):
        if g.is_op(found, *_PRODUCTS):
            shape = g.shape(found)
            if any(_is_over_pairs(shape, dim) for dim in range(len(shape))):
                return True
    return False


def _is_identity_dropout(node: fx.Node) -> bool:
    args = g.op_args(node)
    if args["train"] and args["p"]:
        raise _refuse(node, "has dropout; export the model in eval mode")
    return True


def _skip(node: fx.Node, *targets: Any) -> fx.Node:
    while g.is_op(node, *targets):
        node = _node(node, 0)
    return node


def _skip_upcasts(node: fx.Node) -> fx.Node:
    """The tensor before copies and casts to float32; kernels take their inputs as projected."""
    while g.is_op(node, *_COPIES) or (g.is_op(node, *_CASTS) and g.value(node).dtype == torch.float32):
        if g.value(_node(node, 0)).dtype not in (torch.float16, torch.bfloat16, torch.float32):
            break
        node = _node(node, 0)
    return node


def _node(node: fx.Node, index: int) -> fx.Node:
    source = g.args(node)[index]
    assert isinstance(source, fx.Node), node.format_node()
    return source


def _refuse(node: fx.Node, what: str) -> UnsupportedError:
    return UnsupportedError(f"{g.where(node)}: this attention {what}.", node=node)
