"""The part of a tensor that one of several ranks computes, along one dimension, and nothing else of it.

``Parts.of(node, dim, kept)`` gives a node with those elements alone. It is made of the same parts of what the
node is made of, down to the weights, of which it reads the rows or columns that it needs. Each rule says why
that is right: what an element of the result depends on lies at its own place, or along other dimensions.
Where there is no rule the whole is computed and cut, which is right as well and saves nothing.

Heads that a view has put together with tokens, as [b * s * 4, d], are still heads: places along a dimension
of unknown size are those of each run of its known factor, here 4.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor, fx, nn
from torch.fx.node import map_arg

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g

aten = torch.ops.aten
_COPIES = (aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.dropout)
_SPLITS = (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.tensor_split)
_REDUCTIONS = (
    *(aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.linalg_vector_norm, aten.norm),
    *(aten._softmax, aten.softmax),
)
_NORMS = (aten.layer_norm, aten.rms_norm)
BLOCK = 128
"""Elements of a row, or rows, that have one scale in block fp8; the last block may have fewer."""
_OF_ANY_SIZE = (*ax.VIEWS, *ax.PERMUTATIONS, *_REDUCTIONS, *_NORMS)
"""What can be cut along a dimension whose size is not known, as what is pointwise can."""

Ranges = tuple[tuple[int, int], ...]
"""Places along a dimension, [start, end) one after the other, not necessarily rising."""

_ours = torch.ops.ad_flashinfer
_BY_HEADS: dict[Any, dict[str, int]] = {
    _ours.attention: {"query": 2, "key": 2, "value": 2, "sinks": 0, "alibi_slopes": 0},
    _ours.causal_conv1d: {"x": 2, "weight": 0, "bias": 0},
    _ours.gated_delta_rule: {"query": 2, "key": 2, "value": 2, "g": 2, "beta": 2},
    _ours.kda: {"query": 2, "key": 2, "value": 2, "g": 2, "beta": 2},
    _ours.selective_scan: {"hidden_states": 2, "dt": 2, "A": 0, "D": 0, "dt_bias": 0},
    _ours.ssd_scan: {"hidden_states": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0, "dt_bias": 0},
}
"""Ops that compute each head, or channel, of dimension 2 by itself: where it is in what they read. One that
several heads read, as those of K and V, is there once for all of them."""


class CannotCutError(Exception):
    """Why something cannot be cut there, as the end of a sentence that begins with its name.

    Args:
        reason: the end of the sentence.
        node: what it is about; None: what was asked for.
    """

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node

    @property
    def told(self) -> str:
        """The sentence."""
        return f"{'it' if self.node is None else g.where(self.node)} {self.reason}"


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same places, with ranges that follow each other in one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif end > start:
            found.append((start, end))
    return tuple(found)


def length(ranges: Ranges) -> int:
    """How many places they are."""
    return sum(end - start for start, end in ranges)


def shifted(ranges: Ranges, by: int) -> Ranges:
    """Places further on."""
    return tuple((start + by, end + by) for start, end in ranges)


def times(ranges: Ranges, count: int) -> Ranges:
    """The places of ``count`` elements for each."""
    return tuple((start * count, end * count) for start, end in ranges)


def over(ranges: Ranges, count: int) -> Ranges:
    """The places of which each stands for ``count``.

    Raises:
        CannotCutError: one of them would be cut.
    """
    if any(start % count or end % count for start, end in ranges):
        raise CannotCutError(f"has {count} elements that belong together, and a rank would get some of them")
    return tuple((start // count, end // count) for start, end in ranges)


class Part(NamedTuple):
    """Part of a weight."""

    whole: Tensor
    dim: int
    kept: Ranges | None
    """Places along the dimension; without any, zeros in place of all; None: the whole."""

    @property
    def is_run(self) -> bool:
        """Whether it is a view of the whole."""
        return self.kept is not None and len(self.kept) == 1

    def cut(self, whole: Tensor) -> Tensor:
        """The same part of a tensor of that shape."""
        if not self.kept:
            return torch.zeros_like(whole)
        pieces = [whole.narrow(self.dim, start, end - start) for start, end in self.kept]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


class Parts:
    """Parts of the nodes of a graph, each made once.

    Args:
        gm: whose graph gets more nodes.
        rank: that has the parts.
        size: how many ranks there are.
    """

    def __init__(self, gm: fx.GraphModule, rank: int, size: int) -> None:
        self.gm, self.rank, self.size = gm, rank, size
        self.weights: dict[str, Part] = {}
        """Parts of weights, by their new name."""
        self.seen: set[fx.Node] = set()
        """Nodes of which a part was made, or was found made, since this was last cleared."""
        self.is_strict = False
        """Raise in place of cutting what was computed whole."""
        self.is_even = True
        """Whether all ranks' parts are shown to be made of the same nodes: not where they may lie in one or
        another of several that are joined, in blocks of which the last is smaller, or where ranks would have
        some of the heads that read one."""
        self._made: dict[tuple[fx.Node, int, Ranges], fx.Node] = {}
        self._seen_for: dict[tuple[fx.Node, int, Ranges], set[fx.Node]] = {}
        self._values: dict[str, Any] = {}
        """Results by the call: layers are alike, and to compute one takes milliseconds."""
        self._failed: dict[tuple[fx.Node, int, Ranges], CannotCutError] = {}

    def of(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        """The part of a node.

        Args:
            node: a tensor.
            dim: of known size.
            kept: places along it.

        Raises:
            CannotCutError: in strict mode, the whole of a node has to be computed.
        """
        rank = g.value(node).dim()
        dim, kept = dim % rank, joined(kept)
        size = g.shape(node)[dim]
        # The whole of a piece, as of the only head of K, may be part of what it is a piece of.
        is_whole = kept == ((0, ax.Size.of(size).constant),)
        key = (node, dim, kept)
        if key not in self._made:
            if self.is_strict and key in self._failed:
                raise self._failed[key]
            seen, self.seen = self.seen, {node}
            try:
                self._made[key] = self._of(node, dim, kept)
                if g.value(self._made[key]).dim() != rank:  # as squeeze does of a single head
                    raise CannotCutError("loses a dimension of size one")
            except CannotCutError as err:
                self.seen = {node}
                if not is_whole:
                    self._failed[key] = CannotCutError(err.reason, err.node or node)
                    if self.is_strict or isinstance(size, SymInt):
                        raise self._failed[key] from None
                self._made[key] = node if is_whole else self._cut(node, dim, kept)
            finally:
                self._seen_for[key], self.seen = self.seen, seen
        if self._made[key] is not node:
            self.seen |= self._seen_for.get(key, {node})
        return self._made[key]

    def weight(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        """The part of a parameter or buffer that the graph reads.

        Raises:
            CannotCutError: it is none, but computed.
        """
        if node.op != "get_attr":
            return self.of(node, dim, kept)
        dim %= g.value(node).dim()
        if kept == ((0, g.shape(node)[dim]),):
            return node
        key = (node, dim, kept)
        if key not in self._made:
            name = f"{str(node.target).replace('.', '_')}_part"
            while hasattr(self.gm, name):
                name += "_"
            tensor = g.attribute(node)
            part = Part(tensor, dim, kept)
            held = part.cut(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                held = nn.Parameter(held, requires_grad=False)
            with self.gm.graph.inserting_after(node):
                self._made[key] = g.add_attribute(self.gm, name, held)
            self.weights[name] = part
        return self._made[key]

    def strictly(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        """Like ``of``, but nothing whole is cut, save what an attention reads.

        Raises:
            CannotCutError: something would be.
        """
        self.is_strict = True
        try:
            return self.of(node, dim, kept)
        finally:
            self.is_strict = False

    def join(self, op: Any) -> None:
        """Let one call make all parts of a call that are read, as one convolution does q, k and v."""
        alive = set(g.ancestors(self.gm.graph.output_node(), lambda node: False))
        made = defaultdict[tuple[fx.Node, int], list[tuple[Ranges, fx.Node]]](list)
        for (node, dim, kept), part in self._made.items():
            if g.is_op(node, op) and part in alive:
                made[node, dim].append((kept, part))
        for (node, dim), parts in made.items():
            if len(parts) == 1:
                continue
            parts.sort(key=operator.itemgetter(0))
            try:
                whole = self.strictly(node, dim, tuple(run for kept, _ in parts for run in kept))
            except CannotCutError:
                continue
            end = 0
            for kept, part in parts:
                start, end = end, end + length(kept)
                part.replace_all_uses_with(self.call(whole, aten.slice.Tensor, whole, dim, start, end))

    def call(self, node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call right behind a node, from the same line."""
        key = f"{target} {map_arg((args, kwargs), _described)}"
        with self.gm.graph.inserting_after(node):
            if key in self._values:
                made = self.gm.graph.call_function(target, args, kwargs)
                made.meta["val"] = self._values[key]
            else:
                made = g.call_op(self.gm.graph, target, *args, **kwargs)
                self._values[key] = g.value(made)
        g.copy_origin(made, node)
        return made

    def _cut(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        pieces, last = [], node
        for start, end in kept:
            last = self.call(last, aten.slice.Tensor, node, dim, start, end)
            pieces.append(last)
        return pieces[0] if len(pieces) == 1 else self.call(last, aten.cat.default, pieces, dim)

    def _of(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        if node.op == "get_attr":
            return self.weight(node, dim, kept)
        if node.op != "call_function" or not g.is_tensor(node):
            raise CannotCutError("is an input")
        is_pointwise = g.is_pointwise(node) or g.is_op(node, *_COPIES)
        if isinstance(g.shape(node)[dim], SymInt) and not (is_pointwise or g.is_op(node, *_OF_ANY_SIZE)):
            raise CannotCutError("has a size that is not known")
        if node.target is operator.getitem:
            return self._of_split(node, dim, kept)
        for rule, targets in self._rules():
            if g.is_op(node, *targets):
                return rule(node, dim, kept)
        if is_pointwise:
            return self._pointwise(node, dim, kept)
        raise CannotCutError("works on all elements together, as far as is known")

    def _rules(self) -> list[tuple[Callable[[fx.Node, int, Ranges], fx.Node], tuple[Any, ...]]]:
        return [
            (self._linear, (aten.linear,)),
            (self._addmm, (aten.addmm,)),
            (self._matmul, (aten.mm, aten.matmul)),
            (self._quantized_linear, (_ours.quantized_linear,)),
            (self._by_heads, tuple(_BY_HEADS)),
            (self._view, ax.VIEWS),
            (self._permutation, ax.PERMUTATIONS),
            (self._expansion, ax.EXPANSIONS),
            (self._repetition, (aten.repeat_interleave.self_int,)),
            (self._slice, (aten.slice,)),
            (self._select, (aten.select,)),
            (self._cat, (aten.cat,)),
            (self._norm, _NORMS),
            (self._reduction, _REDUCTIONS),
        ]

    def again(self, node: fx.Node, parts: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same call of parts of its arguments; itself if none is cut."""
        if all(part is whole for whole, part in parts.items()):
            return node
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda each: parts.get(each, each))
        assert callable(node.target)
        return self.call(node, node.target, *args, **kwargs)

    def _pointwise(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        rank, parts = g.value(node).dim(), {}
        for source in node.all_input_nodes:
            if not g.is_tensor(source):
                continue
            at = dim - rank + g.value(source).dim()
            if at >= 0 and g.same_size(g.shape(source)[at], g.shape(node)[dim]):
                parts[source] = self.of(source, at, kept)
            elif at >= 0 and not g.same_size(g.shape(source)[at], 1):
                raise CannotCutError("reads sizes that are not known to be equal")
        if not parts:
            raise CannotCutError("is the same everywhere")
        return self.again(node, parts)

    def _linear(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        _check_last(node, dim)
        _, weight, bias = (*g.args(node), None)[:3]
        return self.again(node, {weight: self.weight(weight, 0, kept), **self._bias(bias, kept)})

    def _bias(self, bias: fx.Node | None, kept: Ranges) -> dict[fx.Node, fx.Node]:
        if bias is None or g.shape(bias)[-1:] in ((), (1,)):  # one number for all, as addmm may have it
            return {}
        return {bias: self.weight(bias, -1, kept)}

    def _addmm(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        _check_last(node, dim)
        bias, _, weight = g.args(node)[:3]
        return self.again(node, {weight: self.weight(weight, 1, kept), **self._bias(bias, kept)})

    def _matmul(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        first, weight = g.args(node)[:2]
        if dim == g.value(node).dim() - 2 and first.op == "get_attr":  # a weight, times what is transposed
            return self.again(node, {first: self.weight(first, -2, kept)})
        _check_last(node, dim)
        if weight.op != "get_attr" and not g.is_op(weight, *ax.PERMUTATIONS):
            raise CannotCutError("multiplies two results")
        return self.again(node, {weight: self.of(weight, -1, kept)})

    def _quantized_linear(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        _check_last(node, dim)
        args = g.op_args(node)
        rows = int(g.shape(args["weight"])[0])
        parts = {args["weight"]: self.weight(args["weight"], 0, kept), **self._bias(args["bias"], kept)}
        for name in ("weight_scale", "zero_point"):
            if args[name] is not None:
                parts[args[name]] = self.scale(args[name], args["weight"], 0, rows, kept)
        return self.again(node, parts)

    def scale(self, scale: fx.Node, weight: fx.Node, dim: int, size: int, kept: Ranges) -> fx.Node:
        """The scales of a part of a weight.

        Args:
            scale: one for all places along the dimension, one for each, or one for each block.
            weight: float8, whose blocks are of 128, or integers, whose groups are as long as each other.
            dim: of the scale, where the weight's is.
            size: of the weight along it.
            kept: places of the weight.

        Raises:
            CannotCutError: a block of one scale would be cut.
        """
        if g.value(scale).dim() <= 1 or g.shape(scale)[dim] == 1:
            return scale
        count = int(g.shape(scale)[dim])
        block = BLOCK if g.value(weight).is_floating_point() and count < size else size // count
        if -(-size // block) != count:
            raise CannotCutError(f"has {count} scales for {size} elements")
        self.is_even &= size % block == 0
        return self.weight(scale, dim, _blocks(kept, block, size))

    def _by_heads(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args, parts = g.op_args(node), {}
        if dim != 2:
            raise CannotCutError("is cut within heads")
        is_attention = g.is_op(node, _ours.attention)
        if is_attention and args["attn_mask"] is not None:
            raise CannotCutError("has a mask that is not proved")
        was_strict, self.is_strict = self.is_strict, self.is_strict and not is_attention
        try:
            places = next(places for op, places in _BY_HEADS.items() if g.is_op(node, op))
            for name, at in places.items():
                if args[name] is not None:
                    group = int(g.shape(node)[2]) // int(g.shape(args[name])[at])
                    self.is_even &= group == 1 or self._is_share(kept, group)
                    parts[args[name]] = self.of(args[name], at, _shared(kept, group))
        finally:
            self.is_strict = was_strict
        made = self.again(node, parts)
        if "site_notes" in node.meta:
            made.meta["site_notes"] = node.meta["site_notes"]
        return made

    def _is_share(self, kept: Ranges, group: int) -> bool:
        """Whether each rank has so many heads that groups of them are whole, or those of one group alone."""
        count = length(kept)
        is_own = kept == ((self.rank * count, (self.rank + 1) * count),)
        return is_own and (count % group == 0 or group % count == 0)

    def _view(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        source: Any = node.args[0]
        if not g.is_tensor(source) or g.value(source).dtype != g.value(node).dtype:
            raise CannotCutError("reads numbers as others")
        new, old = g.shape(node), g.shape(source)
        at, of_source = _before_view(old, new, dim, kept)
        part = self.of(source, at, of_source)
        if part is source:
            return node
        if g.is_op(node, aten.unsqueeze, aten.squeeze, aten.flatten):
            return self.again(node, {source: part})
        if g.is_op(node, aten.unflatten):
            first = int(g.op_args(node)["dim"]) % len(old)
            sizes = list(g.op_args(node)["sizes"])
            if 0 <= dim - first < len(sizes) and sizes[dim - first] != -1:
                sizes[dim - first] = length(kept)
            return self.call(node, aten.unflatten.int, part, first, sizes)
        if not g.is_op(node, aten.view, aten.reshape, aten._unsafe_view):
            raise CannotCutError("takes its shape from elsewhere")
        sizes = list(g.args(node)[1])
        if isinstance(sizes[dim], fx.Node):
            if -1 in sizes:
                raise CannotCutError("computes the size")
            sizes[dim] = -1
        if sizes[dim] != -1:
            sizes[dim] = length(kept)
        return self.call(node, aten.reshape.default, part, sizes)

    def _permutation(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        order, source = ax.order_of(node), g.args(node)[0]
        assert order is not None
        return self.again(node, {source: self.of(source, order[dim], kept)})

    def _expansion(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        source = g.args(node)[0]
        if not g.is_op(node, aten.expand):
            raise CannotCutError("takes its shape from elsewhere")
        at = dim - g.value(node).dim() + g.value(source).dim()
        is_copied = at < 0 or g.shape(source)[at] == 1
        part = source if is_copied else self.of(source, at, kept)
        if part is source and not is_copied:
            return node
        sizes = list(g.op_args(node)["size"])
        if isinstance(sizes[dim], fx.Node):
            raise CannotCutError("computes the size")
        if sizes[dim] != -1:
            sizes[dim] = length(kept)
        return self.call(node, aten.expand.default, part, sizes)

    def _repetition(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args = g.op_args(node)
        source, repeats = args["self"], args["repeats"]
        if args["dim"] is None:
            raise CannotCutError("mixes dimensions")
        if args["dim"] % g.value(node).dim() != dim:
            return self.again(node, {source: self.of(source, dim, kept)})
        self.is_even &= self._is_share(kept, repeats)
        part = self.of(source, dim, read := _shared(kept, repeats))
        return self.call(node, aten.repeat_interleave.self_int, part, length(kept) // length(read), dim)

    def _slice(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args = g.op_args(node)
        source, at, start, step = args["self"], args["dim"] % g.value(node).dim(), args["start"], args["step"]
        if at != dim:
            return self.again(node, {source: self.of(source, dim, kept)})
        size = g.shape(source)[dim]
        if not isinstance(start, (int, type(None))) or step != 1 or not isinstance(size, int):
            raise CannotCutError("takes places that are computed, or not all of them")
        start = start or 0
        return self.of(source, dim, shifted(kept, start + size if start < 0 else start))

    def _of_split(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        split, index = g.args(node)
        if not g.is_op(split, *_SPLITS):
            raise CannotCutError("is one of several results")
        source, pieces = g.args(split)[0], g.value(split)
        at = int(g.op_args(split).get("dim", 0)) % g.value(source).dim()
        if g.is_op(split, aten.unbind):
            part = self.of(source, dim + (dim >= at), kept)
        elif at == dim:
            self.seen.add(split)
            return self.of(source, dim, shifted(kept, sum(int(each.shape[dim]) for each in pieces[:index])))
        else:
            part = self.of(source, dim, kept)
        key = (split, dim, kept)
        self.seen.add(split)
        if key not in self._made:
            self._made[key] = self.again(split, {source: part})
        made = self._made[key]
        return node if made is split else self.call(node, operator.getitem, made, index)

    def _select(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args = g.op_args(node)
        at = args["dim"] % g.value(args["self"]).dim()
        return self.again(node, {args["self"]: self.of(args["self"], dim + (dim >= at), kept)})

    def _cat(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        sources, at = list(g.args(node)[0]), int((*g.args(node)[1:], 0)[0]) % g.value(node).dim()
        if at != dim:
            return self.again(node, {each: self.of(each, dim, kept) for each in dict.fromkeys(sources)})
        pieces, runs, first = list[fx.Node](), list[bool](), 0
        for source in sources:
            end = first + int(g.shape(source)[dim])
            inside = joined((max(a, first) - first, min(b, end) - first) for a, b in kept)
            if inside:
                # Whether it is as much for each rank, one after the other.
                runs += [(self.rank * (b - a), self.size * (b - a)) == (a, end - first) for a, b in inside]
                pieces.append(self.of(source, dim, inside))
                self.seen.add(source)  # be it whole
            first = end
        if pieces == sources:
            return node
        self.is_even &= all(runs) and len(runs) == len(kept)
        if [a for a, _ in kept] != sorted(a for a, _ in kept):
            raise CannotCutError("joins parts in another order")
        return pieces[0] if len(pieces) == 1 else self.call(node, aten.cat.default, pieces, dim)

    def _norm(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args = g.op_args(node)
        if dim >= g.value(node).dim() - len(args["normalized_shape"]):
            raise CannotCutError("is a norm over what would be cut")
        return self.again(node, {args["input"]: self.of(args["input"], dim, kept)})

    def _reduction(self, node: fx.Node, dim: int, kept: Ranges) -> fx.Node:
        args = g.op_args(node)
        source, over_dims = args["self"], args.get("dim")
        rank = g.value(source).dim()
        if over_dims is None:
            raise CannotCutError("is a sum of all")
        dims = {int(each) % rank for each in ([over_dims] if isinstance(over_dims, int) else over_dims)}
        keeps = g.value(node).dim() == rank
        at = dim if keeps else [each for each in range(rank) if each not in dims][dim]
        if at in dims:
            raise CannotCutError("is a sum over what would be cut")
        return self.again(node, {source: self.of(source, at, kept)})


def _described(node: fx.Node) -> Any:
    """All of a value that the value of what is made of it depends on."""
    value = g.value(node)
    if not isinstance(value, Tensor):
        return f"{value}" if isinstance(value, SymInt) else f"@{id(value)}"
    return f"{value.dtype}{[*value.shape]}{[*value.stride()]}{value.device}"


def _shared(kept: Ranges, group: int) -> Ranges:
    """The heads that so many others read, each.

    Raises:
        CannotCutError: of those of one, a rank would get some, and with them others.
    """
    read = [head // group for start, end in kept for head in range(start, end)] if group > 1 else []
    own = list(dict.fromkeys(read))
    if len(own) > 1 and read != [head for head in own for _ in range(group)]:
        raise CannotCutError(f"has {group} heads that read one, and a rank would get some of them")
    return joined((head, head + 1) for head in own) if own else kept


def _check_last(node: fx.Node, dim: int) -> None:
    if dim != g.value(node).dim() - 1:
        raise CannotCutError("is cut among tokens")


def _blocks(kept: Ranges, block: int, size: int) -> Ranges:
    return over(
        tuple((start, end if end < size else -(-size // block) * block) for start, end in kept), block
    )


def _before_view(
    old: tuple[int | SymInt, ...], new: tuple[int | SymInt, ...], dim: int, kept: Ranges
) -> tuple[int, Ranges]:
    """The dimension and the places that a part of a view is made of.

    Raises:
        CannotCutError: they are no places along one dimension.
    """
    before, behind = _before(new, dim), _product(new[dim + 1 :])
    for at, size in enumerate(old):
        if ax.Size.of(size).constant == 1 or _before(old, at) != before:
            continue
        inner = _product(old[at + 1 :])
        # The dimension of the source begins where this one does, and holds it, or is held by it.
        inside, around = behind.over(inner), inner.over(behind)
        if inside is not None and not inside.symbols:
            return at, times(kept, inside.constant)
        if around is not None and not around.symbols:
            return at, over(kept, around.constant)
    raise CannotCutError("mixes dimensions")


def _before(sizes: tuple[int | SymInt, ...], dim: int) -> ax.Size:
    """How often the places of a dimension come again; of what is not known of its size, each time."""
    return _product(sizes[:dim]).times(ax.Size(1, ax.Size.of(sizes[dim]).symbols))


def _product(sizes: Iterable[int | SymInt]) -> ax.Size:
    total = ax.Size.of(1)
    for size in sizes:
        total = total.times(ax.Size.of(size))
    return total
