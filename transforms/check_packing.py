"""Proves that sequences may share one batch: that [b, s] may become [1, total_tokens].

That is right only if everything outside attention works token by token. So the two axes of the tokens, batch
and place, are followed from the inputs through every node: each op has a rule that says which axes its result
has, given those of its operands, and refuses to reduce, shift, sort, index, contract or pair up an axis of
tokens, to make one of a ramp or a table, or to bring two different ones together. At each attention the axes
of query, key and value must be batch, tokens, heads and head size. An op without a rule is refused, unless
its contract is that it works token by token (``ops.TOKEN_BY_TOKEN``).

Nothing is run: what holds here holds for every number of tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn

from ad_flashinfer_pass.errors import PackingError
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Axis, Dims, Size
from ad_flashinfer_pass.ops import STATES, TOKEN_BY_TOKEN
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
_BY_PLACE = "numbers the tokens by their place in the batch; the model must take positions from position_ids"


class _Mixes(Exception):
    """What an op does to tokens, as the end of a sentence that begins with its name."""


@register("check_packing")
def check_packing(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Check every node between the tokens and the logits.

    Raises:
        PackingError: names the first op that mixes tokens, and its line.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("check_packing")
    reader = _Reader(model)
    for node in model.graph.nodes:
        try:
            report.num_matches += reader.read(node)
        except _Mixes as reason:
            raise PackingError(
                f"{g.where(node)}: {_name(node)} {reason}, {_way_out(node)}", node=node
            ) from None
    return model, report


def _way_out(node: fx.Node) -> str:
    """What a refusal means for the user."""
    refusal = "so sequences cannot share a batch. "
    if g.is_op(node, *_CONVOLUTIONS):
        return refusal + (
            "A convolution reads a token's neighbours: let the model call one that keeps them for each "
            "sequence, ad_flashinfer.causal_conv1d; within ad_flashinfer_pass.states.as_ops(model) an "
            "export of transformers' models does."
        )
    if _namespace(node) not in _KNOWN:
        return refusal + (
            "If the op works token by token, say so: ad_flashinfer_pass.ops.TOKEN_BY_TOKEN.add("
            f"torch.ops.{_namespace(node)}.{_name(node).rpartition('.')[2]})."
        )
    if _name(node) in _DISPATCH:
        return refusal + _TO_EXPERTS
    return refusal + (
        "Only models that work token by token outside attention can be served from a packed batch."
    )


_TO_EXPERTS = (
    "If this sends tokens to experts, let transformers call them through one op: "
    'model.set_experts_implementation("ad_flashinfer").'
)
_KNOWN = ("aten", "prims", "higher_order", "ad_flashinfer", "")


def _namespace(node: fx.Node) -> str:
    return node.target.namespace if isinstance(node.target, torch._ops.OpOverload) else ""


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet or getattr(node.target, "__name__", node.target)).removeprefix("aten.")


class _Reader:
    """The axes of every tensor of a graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        tokens = g.token_input(gm)
        assert tokens is not None
        sizes = [size for size in g.shape(tokens)[:2] if isinstance(size, SymInt)]
        self.tokens = {str(size): Axis(Size.of(size)) for size in sizes}
        """Batch and place by the symbols of their sizes; a graph of one row has no batch."""
        self.batch, self.place = (self.sized(size) for size in g.shape(tokens)[:2])
        self._same: set[Axis] = set()
        """Axes along which all elements are equal: what was expanded or filled."""
        self._dims: dict[fx.Node, Dims | list[Dims]] = {}

    def read(self, node: fx.Node) -> bool:
        """Find the axes of a node; says whether it has to do with tokens.

        Raises:
            _Mixes: the node does something else than work token by token.
        """
        if node.op == "placeholder" and g.is_tensor(node):
            self._dims[node] = tuple(self.sized(size) for size in g.shape(node))
        elif node.op == "output":
            self._check_logits(node)
        elif node.op == "call_function" and self._has_tokens(node):
            if not g.tensors(node):
                return _check_scalar(node)
            found = self._result(node)
            self._dims[node] = found
            for dims, tensor in zip(
                found if isinstance(found, list) else [found], g.tensors(node), strict=True
            ):
                self._check(dims, tensor, node)
            _check_numbers(node)
            return True
        return False

    def of(self, node: fx.Node) -> Dims:
        """Axes of a tensor; new ones for a constant."""
        if node not in self._dims:
            self._dims[node] = ax.of_shape(g.shape(node))
        found = self._dims[node]
        assert isinstance(found, tuple), node.format_node()
        return ax.whole(found)

    def sized(self, size: int | SymInt) -> tuple[Axis, ...]:
        """A dimension of an input, or of a tensor that is made of one value."""
        known = self.tokens.get(str(size))
        return (known,) if known is not None else ax.of_shape((size,))[0]

    def is_of_tokens(self, dim: Iterable[Axis]) -> bool:
        """Whether the length of a dimension depends on the number of tokens."""
        return any(axis.is_dynamic for axis in dim)

    def uniform(self, size: int | SymInt) -> tuple[Axis, ...]:
        """A new dimension along which all elements are equal; no op but a write could change that."""
        (dim,) = ax.of_shape((size,))
        self._note_same(dim)
        return dim

    def _note_same(self, axes: Iterable[Axis]) -> None:
        # Of those of tokens alone: a norm or a part that is replaced makes a difference along others.
        self._same.update(axis for axis in axes if axis.is_dynamic)

    def joined(self, operands: Sequence[Dims]) -> Dims:
        """Axes of what is broadcast together.

        Raises:
            _Mixes: tokens would meet others.
        """
        rank = max(map(len, operands), default=0)
        padded = [((),) * (rank - len(dims)) + dims for dims in operands]
        return tuple(self.one_of([dims[at] for dims in padded]) for at in range(rank))

    def one_of(self, dims: Iterable[tuple[Axis, ...]]) -> tuple[Axis, ...]:
        """The axes of a dimension that several tensors have.

        Raises:
            _Mixes: they are not the same tokens.
        """
        dims = [dim for dim in dims if dim]
        vary = [dim for dim in dims if not self._same.issuperset(dim)]
        if len({self._signature(dim) for dim in vary}) > 1:
            raise _Mixes("brings different tokens together")
        return (vary or dims or [()])[0]

    def _signature(self, dim: tuple[Axis, ...]) -> tuple[object, ...]:
        """Equal for dimensions with the same tokens at the same places; other axes count by their size."""
        parts: list[object] = []
        between = Size.of(1)
        for axis in dim:
            if axis.is_dynamic:
                parts += [str(between), axis]
                between = Size.of(1)
            else:
                between = between.times(axis.size)
        return (*parts, str(between)) if parts else ()

    def refuse_tokens(self, dims: Iterable[tuple[Axis, ...]], what: str) -> None:
        """Raise _Mixes if one of these dimensions has tokens."""
        if any(map(self.is_of_tokens, dims)):
            raise _Mixes(what)

    def _has_tokens(self, node: fx.Node) -> bool:
        tensors = g.tensors(node) + [t for source in node.all_input_nodes for t in g.tensors(source)]
        return any(isinstance(size, SymInt) for tensor in tensors for size in tensor.shape) or (
            bool(g.tensors(node)) and any(isinstance(g.value(n), SymInt) for n in node.all_input_nodes)
        )

    def _result(self, node: fx.Node) -> Dims | list[Dims]:
        if node.target is operator.getitem:
            pieces = self._dims[g.args(node)[0]]
            return pieces[g.args(node)[1]] if isinstance(pieces, list) else pieces
        packet = getattr(node.target, "overloadpacket", None)
        # First, since min and max of two tensors have the name of the reductions.
        rule = _pointwise if g.is_pointwise(node) else _RULES.get(packet)
        if rule is None and packet in TOKEN_BY_TOKEN:
            rule = _by_contract
        if rule is None:
            raise _Mixes("is not known to work token by token")
        return rule(self, node, g.op_args(node))

    def _check(self, dims: Dims, tensor: Tensor, node: fx.Node) -> None:
        """That the axes found are those of a tensor whose tokens are still apart."""
        for axis in self.tokens.values():
            if axis.parts() != (axis,):
                raise _Mixes("cuts the tokens into blocks")
        for axis in list(self._same):
            self._note_same(axis.parts())
        found = ax.flat(dims)
        if any(found.count(axis) > 1 for axis in found if axis.is_dynamic):
            raise _Mixes(f"makes a tensor over pairs of tokens {tuple(tensor.shape)}")
        unknown = [a for a in found if a.is_dynamic and a not in self._same and a not in self.tokens.values()]
        if unknown:
            sources = [source for source in node.all_input_nodes if g.is_tensor(source)]
            of_tokens = any(self.is_of_tokens(ax.flat(self.of(source))) for source in sources)
            raise _Mixes("works along the tokens" if of_tokens else _BY_PLACE)
        sizes = [ax.size_of(dim) for dim in ax.whole(dims)]
        if sizes != [Size.of(size) for size in tensor.shape]:
            raise _Mixes(f"has a result of shape {tuple(tensor.shape)}, which its rule does not explain")

    def _check_logits(self, output: fx.Node) -> None:
        """The first output is by batch and token, so that its rows are those of the tokens."""
        result: Any = g.args(output)[0]
        result = result[0] if isinstance(result, (tuple, list)) and result else result
        if self.batch and g.is_tensor(result) and g.value(result).dim() == 3:
            self.check_layout(result, "the logits")

    def check_layout(self, node: fx.Node, what: str) -> None:
        """That a tensor is [batch, tokens, ...] with the tokens in no other dimension.

        Raises:
            _Mixes: it is not.
        """
        batch, place, *rest = self.of(node)
        for found, wanted in ((batch, self.batch), (place, self.place)):
            if found != wanted and not self._same.issuperset(found):
                raise _Mixes(f"takes {what} of shape {tuple(g.shape(node))}, which is not by batch and token")
        self.refuse_tokens(rest, f"takes {what} of shape {tuple(g.shape(node))} with tokens among the heads")


def _check_scalar(node: fx.Node) -> bool:
    """That a node without tensors reads nothing of them but their sizes.

    Raises:
        _Mixes: it reads what they hold.
    """
    if (
        g.value(node) is not None
        and not g.is_op(node, *_SIZE_OPS)
        and any(map(g.tensors, node.all_input_nodes))
    ):
        raise _Mixes("reads what tokens hold on the host")
    return False


_SIZE_OPS = (aten.sym_size, aten.sym_numel, aten.sym_stride, aten.sym_storage_offset)


def _check_numbers(node: fx.Node) -> None:
    """Numbers that a node takes beside tensors are no numbers of tokens, but where they are sizes.

    Raises:
        _Mixes: it computes with one, or makes one of what tokens hold.
    """
    if node.target is operator.getitem:
        return
    for name, arg in g.op_args(node).items():
        parts = arg if isinstance(arg, (tuple, list)) else [arg]
        numbers = [p for p in parts if isinstance(p, fx.Node) and not g.tensors(p)]
        counts = [p for p in numbers if isinstance(g.value(p), (SymInt, SymFloat, SymBool))]
        if counts and name not in _SIZES and not _sizes_of_slice(node, name):
            raise _Mixes("computes with the number of tokens")


# Names of arguments that only say how large a result is.
_SIZES = ("size", "shape", "sizes", "repeats", "output_size")


def _sizes_of_slice(node: fx.Node, name: str) -> bool:
    """Whether this is the end of a slice that takes a dimension to its end."""
    is_whole = g.is_op(node, aten.slice, aten.slice_scatter) and name == "end"
    return is_whole and g.same_shape(g.shape(node), g.shape(g.args(node)[0]))


# A rule gives the axes of the result, one entry a tensor if there are several, or raises _Mixes.
_Rule = Callable[[_Reader, fx.Node, dict[str, Any]], "Dims | list[Dims]"]


def _first(args: dict[str, Any]) -> fx.Node:
    """The tensor that an op is about."""
    return next(arg for arg in args.values() if g.is_tensor(arg))


def _operands(args: dict[str, Any]) -> list[fx.Node]:
    parts = [p for arg in args.values() for p in (arg if isinstance(arg, (tuple, list)) else [arg])]
    return [part for part in parts if g.is_tensor(part)]


def _each(node: fx.Node, dims: Dims) -> Dims | list[Dims]:
    """The same axes for each result of an op."""
    return [dims] * len(g.tensors(node)) if isinstance(g.value(node), (tuple, list)) else dims


def _pointwise(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims | list[Dims]:
    return _each(node, reader.joined([reader.of(operand) for operand in _operands(args)]))


def _kept(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    return reader.of(_first(args))


def _dropout(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    if args["train"] and args["p"]:
        raise _Mixes("drops numbers at random, as in training; call model.eval() before the export")
    return reader.of(_first(args))


def _view(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Every axis keeps its place in the order of the elements."""
    source = _first(args)
    if g.is_op(node, aten.squeeze):
        _, chosen = _chosen(reader, args)  # which is dropped where there is one token, and not elsewhere
        reader.refuse_tokens(chosen, "works along the tokens")
    if any(isinstance(size, int) and size == 0 for size in g.shape(node)):
        return _fill(reader, node, args)  # nothing is in it, so that nothing differs
    found = ax.regrouped(reader.of(source), g.shape(node))
    if found is None:
        raise _Mixes(f"moves tokens: {tuple(g.shape(source))} is read as {tuple(g.shape(node))}")
    return found


def _permutation(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    order, dims = ax.order_of(node), reader.of(_first(args))
    assert order is not None
    return tuple(dims[at] for at in order)


def _expansion(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    source = _first(args)
    old, new = g.shape(source), g.shape(node)
    sizes = (*(1 for _ in new[len(old) :]), *old)
    dims = ((),) * (len(new) - len(old)) + reader.of(source)
    return tuple(
        dim if g.same_size(before, size) else reader.uniform(size)
        for dim, before, size in zip(dims, sizes, new, strict=True)
    )


def _fill(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    return tuple(reader.uniform(size) for size in g.shape(node))


def _chosen(reader: _Reader, args: dict[str, Any]) -> tuple[list[int], list[tuple[Axis, ...]]]:
    """The dimensions that an op works along, all if it names none, and their axes."""
    dims = reader.of(_first(args))
    given = args.get("dim", args.get("dims", args.get("axis")))
    if given is None or given == []:
        given = range(len(dims))
    at = sorted({int(d) % max(len(dims), 1) for d in ([given] if isinstance(given, int) else given)})
    return at, [dims[d] for d in at if dims]


def _along(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims | list[Dims]:
    """Reductions, softmax, sorting, cutting, shifting: not along a dimension of tokens."""
    at, chosen = _chosen(reader, args)
    for where, dim in zip(at, chosen, strict=False):
        reader.refuse_tokens([dim], f"works along the tokens (dimension {where})")
    dims = reader.of(_first(args))

    def result(tensor: Tensor) -> Dims:
        if tensor.dim() == len(dims):
            new = ax.of_shape(tensor.shape)
            return tuple(new[d] if d in at else dim for d, dim in enumerate(dims))
        return tuple(dim for d, dim in enumerate(dims) if d not in at)

    found = [result(tensor) for tensor in g.tensors(node)]
    return found if isinstance(g.value(node), (tuple, list)) else found[0]


def _cat(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    filled = [operand for operand in args["tensors"] if 0 not in g.shape(operand)]
    if len(filled) == 1:  # as a cache that has nothing yet makes it
        return reader.of(filled[0])
    return _in_a_row(reader, node, filled, args["dim"])


def _diff(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    return _in_a_row(reader, node, _operands(args), args["dim"])


def _in_a_row(reader: _Reader, node: fx.Node, tensors: Sequence[fx.Node], dim: int) -> Dims:
    """Tensors with the same tokens, one after the other along a dimension that has none."""
    dim %= g.value(node).dim()
    operands = [reader.of(tensor) for tensor in tensors]
    reader.refuse_tokens([dims[dim] for dims in operands], f"works along the tokens (dimension {dim})")
    found = reader.joined([(*dims[:dim], (), *dims[dim + 1 :]) for dims in operands])
    return (*found[:dim], *ax.of_shape(g.shape(node)[dim : dim + 1]), *found[dim + 1 :])


def _stack(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    found = reader.joined([reader.of(operand) for operand in args["tensors"]])
    dim = args["dim"] % g.value(node).dim()
    return (*found[:dim], *ax.of_shape((len(args["tensors"]),)), *found[dim:])


def _repeat(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Copies of the whole, counted from the last dimension: which copy it is stands outside of each axis."""
    source, times, new = _first(args), args["repeats"], g.shape(node)
    dims = ((),) * (len(times) - g.value(source).dim()) + reader.of(source)
    found = []
    for dim, n, size in zip(dims, times, new, strict=True):
        if isinstance(n, int):
            found.append((*ax.of_shape((n,))[0], *dim))
        elif dim:
            raise _Mixes("makes as many copies as there are tokens")
        else:
            found.append(reader.uniform(size))
    return tuple(found)


def _repeat_interleave(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Copies of each element: which copy it is stands inside of its axis."""
    times, dim, dims = args.get("repeats"), args.get("dim"), reader.of(_first(args))
    if not isinstance(times, int) or dim is None:
        raise _Mixes("makes as many copies as a tensor says, or of all tokens in one dimension")
    dim %= len(dims)
    return (*dims[:dim], (*dims[dim], *ax.of_shape((times,))[0]), *dims[dim + 1 :])


def _last_dims(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims | list[Dims]:
    """Normalisation over the last dimensions."""
    count, dims = len(args["normalized_shape"]), reader.of(_first(args))
    reader.refuse_tokens(dims[len(dims) - count :], "normalises over tokens")
    if not isinstance(g.value(node), (tuple, list)):
        return dims
    moments = dims[: len(dims) - count] + ((),) * count  # mean and deviation
    return [dims, *[moments] * (len(g.tensors(node)) - 1)]


def _batch_norm(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims | list[Dims]:
    """With the moments of training, it is a factor and a term for each channel."""
    if args.get("training"):
        raise _Mixes("normalises over tokens, as in training; call model.eval() before the export")
    dims = reader.of(args["input"])
    reader.refuse_tokens(dims[1:2], "takes tokens for channels")
    if not isinstance(g.value(node), (tuple, list)):
        return dims
    return [dims, *(ax.of_shape(tensor.shape) for tensor in g.tensors(node)[1:])]


def _convolution(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """With a kernel of one token it is a linear layer over the channels."""
    weight, dims = args["weight"], reader.of(args["input"])
    kernel = g.shape(weight)[2:]
    reader.refuse_tokens(ax.whole(reader.of(weight)), "has a kernel made of tokens")
    reader.refuse_tokens(dims[1:2], "takes tokens for channels")
    plain = not args.get("transposed") and args.get("padding") in ("valid", "same", [0] * len(kernel), [0])
    if any(size != 1 for size in kernel) or not plain or any(step != 1 for step in args["stride"]):
        size = "x".join(map(str, kernel))
        raise _Mixes(f"reads a token's neighbours (a kernel of {size})")
    return (dims[0], *ax.of_shape(g.shape(node)[1:2]), *dims[2:])


def _product(reader: _Reader, left: Dims, right: Dims) -> Dims:
    """Axes of a matrix product."""
    reader.refuse_tokens([left[-1], right[-2 if len(right) > 1 else -1]], "sums over tokens")
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    return (*reader.joined([left[:-2], right[:-2]]), *rows, *columns)


def _contraction(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Matrix products, with a tensor added or not."""
    tensors = [reader.of(operand) for operand in _operands(args)]
    if g.is_op(node, aten.linear):
        weight = tensors[1]
        found = _product(reader, tensors[0], weight[::-1])
        return reader.joined([found, *tensors[2:]])
    found = _product(reader, *tensors[-2:])
    return reader.joined([*tensors[:-2], found])


def _einsum(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """The summed letters must not count tokens."""
    inputs, _, output = args["equation"].replace(" ", "").partition("->")
    if not output or "." in args["equation"]:
        raise _Mixes("has an equation that is not written out")
    letters: dict[str, list[tuple[Axis, ...]]] = {}
    for names, operand in zip(inputs.split(","), args["tensors"], strict=True):
        for name, dim in zip(names, reader.of(operand), strict=True):
            letters.setdefault(name, []).append(dim)
    for name, dims in letters.items():
        if name not in output:
            reader.refuse_tokens(dims, "sums over tokens")
    return tuple(reader.one_of(letters[name]) for name in output)


def _embedding(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """A table is read at the tokens' values: the table itself must not be made of tokens."""
    table = reader.of(args["weight"])
    reader.refuse_tokens(table, "looks tokens up by index")
    return (*reader.of(args["indices"]), *table[1:])


def _index(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Axes of ``x[indices]``: those of the indices in place of those that they look up."""
    dims, indices = reader.of(args["self"]), list(args["indices"])
    at = [d for d, index in enumerate(indices) if index is not None]
    if any(g.value(indices[d]).dtype in (torch.bool, torch.uint8) for d in at):
        raise _Mixes("picks as many elements as a tensor says")
    reader.refuse_tokens([dims[d] for d in at], "looks tokens up by index")
    found = reader.joined([reader.of(indices[d]) for d in at])
    if at == [0] and args["self"].op == "get_attr" and len(dims) == 3 and reader.is_of_tokens(found[-1]):
        weight = args["self"]
        raise PackingError(
            f"{g.where(node)}: index copies a matrix of {weight.target} {list(g.shape(weight))} for each "
            f"token, which no memory holds for long prompts. {_TO_EXPERTS}",
            node=node,
        )
    rest = [dim for d, dim in enumerate(dims) if d not in at]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return (*rest[:first], *found, *rest[first:])


def _index_put(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Elements of each token are replaced, at places that are the same for all tokens."""
    for index in args["indices"]:
        if index is not None:
            reader.refuse_tokens(reader.of(index), "writes to places that tokens choose")
    at = [d for d, index in enumerate(args["indices"]) if index is not None]
    region = reader.joined([_index(reader, node, args), reader.of(args["values"])])
    own = reader.of(args["self"])
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    width = len(region) - (len(own) - len(at))
    rest = [*region[:first], *region[first + width :]]
    return tuple(dim if d in at else rest.pop(0) for d, dim in enumerate(own))


def _index_select(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    at, chosen = _chosen(reader, args)
    reader.refuse_tokens(chosen, "looks tokens up by index")
    dims = list(reader.of(args["self"]))
    dims[at[0]] = (reader.of(args["index"]) or ((),))[0]
    return tuple(dims)


def _gather(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Each token reads from its own row; where it looks, places are those of the index."""
    own, index = (reader.of(operand) for operand in _operands(args))
    if args["dim"] is None:
        raise _Mixes("reads from all dimensions as if they were one")
    dim = args["dim"] % len(own)
    reader.refuse_tokens([own[dim]], f"works along the tokens (dimension {dim})")
    rest = [(*dims[:dim], (), *dims[dim + 1 :]) for dims in (own, index)]
    if not g.is_op(node, aten.take_along_dim):  # which broadcasts, and this takes the first rows
        for ours, theirs in zip(*rest, strict=True):
            reader.refuse_tokens([ours] if not theirs else [], "reads from the first token alone")
    found = reader.joined(rest)
    found = (*found[:dim], index[dim], *found[dim + 1 :])
    return tuple(
        new if reader.is_of_tokens(new) else kept
        for new, kept in zip(found, ax.of_shape(g.shape(node)), strict=True)
    )


def _scatter(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Each token writes to its own row: all dimensions but one are those of all operands."""
    operands = [reader.of(operand) for operand in _operands(args)]
    dim = args["dim"] % len(operands[0])
    reader.refuse_tokens([dims[dim] for dims in operands], f"works along the tokens (dimension {dim})")
    others = [(*dims[:dim], (), *dims[dim + 1 :]) for dims in operands]
    for own, index in zip(others[0], others[1], strict=True):  # one row does not stand for every token
        reader.refuse_tokens([own] if not index else [], "writes to the first token alone")
    found = reader.joined(others)
    return tuple(
        new if reader.is_of_tokens(new) else own
        for new, own in zip(found, ax.of_shape(g.shape(node)), strict=True)
    )


def _scattered(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """A part of a tensor is replaced: not of a dimension of tokens."""
    own, part = reader.of(args["self"]), reader.of(args["src"])
    dim = args["dim"] % len(own)
    reader.refuse_tokens([own[dim]], f"works along the tokens (dimension {dim})")
    part = (*part[:dim], (), *part[dim + (len(part) == len(own)) :])
    found = reader.joined([(*own[:dim], (), *own[dim + 1 :]), part])
    return (*found[:dim], own[dim], *found[dim + 1 :])


def _padding(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Constant padding, given from the last dimension on."""
    dims, new = reader.of(_first(args)), ax.of_shape(g.shape(node))
    padded = {len(dims) - 1 - at // 2 for at, amount in enumerate(args["pad"]) if amount != 0}
    reader.refuse_tokens([dims[d] for d in padded], "pads along the tokens")
    return tuple(new[d] if d in padded else dim for d, dim in enumerate(dims))


def _with_one_more(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """A new last dimension."""
    return (*reader.of(_first(args)), *ax.of_shape(g.shape(node)[-1:]))


def _with_one_less(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Without the last dimension, which has two numbers."""
    *dims, last = reader.of(_first(args))
    reader.refuse_tokens([last], "works along the tokens")
    return tuple(dims)


def _by_place(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """A ramp over the tokens takes the place of position_ids."""
    raise _Mixes(_BY_PLACE)


def _attention(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """The one place where tokens meet: [batch, tokens, heads, head size], each of them."""
    for name in ("query", "key", "value"):
        reader.check_layout(args[name], f"a {name}")
    return (reader.batch, reader.place, *ax.of_shape(g.shape(node)[2:]))


def _state(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims:
    """Tokens meet in a state of their sequence: [batch, tokens, ...], beside weights without tokens."""
    for name, operand in args.items():
        if not g.is_tensor(operand):
            continue
        if reader.is_of_tokens(ax.flat(reader.of(operand))):
            reader.check_layout(operand, name)
    return (reader.batch, reader.place, *ax.of_shape(g.shape(node)[2:]))


def _by_contract(reader: _Reader, node: fx.Node, args: dict[str, Any]) -> Dims | list[Dims]:
    """Along all dimensions but the last, an element of the result is computed from that of each operand."""
    operands = [reader.of(operand) for operand in _operands(args)]
    operands = [dims for dims in operands if reader.is_of_tokens(ax.flat(dims))]
    reader.refuse_tokens([dims[-1] for dims in operands], "is given tokens in its last dimension")
    rows = reader.joined([dims[:-1] for dims in operands])
    found = [(*rows, *ax.of_shape(tensor.shape[-1:])) for tensor in g.tensors(node)]
    return found if isinstance(g.value(node), (tuple, list)) else found[0]


def _table(rule: _Rule, names: str) -> dict[Any, _Rule]:
    return {getattr(aten, name): rule for name in names.split() if hasattr(aten, name)}


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(ax.VIEWS, _view),
    **dict.fromkeys(ax.PERMUTATIONS, _permutation),
    **dict.fromkeys(ax.EXPANSIONS, _expansion),
    **_table(
        _kept,
        "contiguous clone to _to_copy type_as detach alias lift_fresh_copy real imag",
    ),
    **_table(
        _fill,
        "zeros ones full empty new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
        "empty_like empty_permuted scalar_tensor fill zero",
    ),
    **_table(
        _along,
        "mean sum amax amin aminmax max min prod var std var_mean std_mean softmax _softmax "
        "log_softmax _log_softmax logsumexp cumsum cumprod topk sort argsort argmax argmin any all "
        "norm linalg_vector_norm slice select chunk split split_with_sizes unbind narrow flip roll "
        "glu unsafe_split",
    ),
    **_table(_pointwise, "where masked_fill complex polar"),
    **_table(_cat, "cat concat concatenate"),
    **_table(_diff, "diff"),
    **_table(_stack, "stack"),
    **_table(_repeat, "repeat"),
    **_table(_repeat_interleave, "repeat_interleave"),
    **_table(_last_dims, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    **_table(_dropout, "dropout"),
    **_table(_batch_norm, "batch_norm _native_batch_norm_legit_no_training"),
    **_table(_convolution, "conv1d conv2d convolution"),
    **_table(_contraction, "linear matmul mm bmm addmm baddbmm"),
    **_table(_einsum, "einsum"),
    **_table(_embedding, "embedding"),
    **_table(_index, "index"),
    **_table(_index_put, "index_put"),
    **_table(_index_select, "index_select"),
    **_table(_gather, "gather take_along_dim"),
    **_table(_scatter, "scatter scatter_add scatter_reduce"),
    **_table(_scattered, "slice_scatter select_scatter"),
    **_table(_padding, "constant_pad_nd pad"),
    **_table(_with_one_more, "one_hot view_as_real"),
    **_table(_with_one_less, "view_as_complex"),
    **_table(_by_place, "arange linspace tril triu eye"),
    torch.ops.ad_flashinfer.attention: _attention,
    **dict.fromkeys(STATES, _state),
    torch.ops.ad_flashinfer.sequence_length: _kept,
}
_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.convolution, aten.conv_transpose1d, aten.unfold, aten.im2col)
# How tokens are sent to experts and back.
_DISPATCH = frozenset(
    "index_put index_add index_copy scatter scatter_add gather histc bincount nonzero _grouped_mm "
    "transformers.grouped_mm_fallback sort argsort index index_select".split()
)
