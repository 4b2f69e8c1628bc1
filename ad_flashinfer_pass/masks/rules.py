"""What each op does to an entry of a mask: one rule an op.

A rule takes the op at an index of its result and gives bounds on the entry there. It may be loose, but
never wrong. An op that stands in no rule is refused by the prover, so this file is all that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import fx

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.masks.forms import NOTHING, UNIT, UNKNOWN, Array, Form, between, number, variable
from ad_flashinfer_pass.masks.reading import ONE, RULES, ZERO, Call, Index, negated

aten = torch.ops.aten
Rule: TypeAlias = Callable[[Call], Form]
Binary: TypeAlias = Callable[[Call, Form, Form], Form]


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of ops, by their names in ``aten``."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            RULES[getattr(aten, name)] = rule
        return rule

    return enter


# Arithmetic


def _arithmetic(compute: Binary) -> Rule:
    def rule(call: Call) -> Form:
        if call.dtype == torch.bool:
            raise call.unknown("on truth values")
        a, b = call.operands()
        if call.args.get("alpha", 1) != 1:  # a factor of what is added or taken away
            b = call.reading.product(b, call.form("alpha"))
        return call.store(compute(call, a, b))

    return rule


_rule("add")(_arithmetic(lambda call, a, b: call.reading.cells.plus(a, b)))
_rule("sub")(_arithmetic(lambda call, a, b: call.reading.cells.plus(a, -b)))
_rule("floor_divide")(_arithmetic(lambda call, a, b: call.reading.floor_divide(a, b)))
_rule("remainder")(_arithmetic(lambda call, a, b: call.reading.remainder(a, b)))
_rule("maximum")(_arithmetic(lambda call, a, b: call.reading.choose(call.reading.le(a, b), b, a)))
_rule("minimum")(_arithmetic(lambda call, a, b: call.reading.choose(call.reading.le(a, b), a, b)))
_rule("mul")(lambda call: call.store(call.reading.product(*call.operands())))
_rule("neg")(lambda call: call.store(-call.form("self")))


@_rule("rsub")
def _rsub(call: Call) -> Form:
    a, b = call.operands()
    return call.store(call.reading.cells.plus(b, -call.reading.product(a, call.form("alpha"))))


@_rule("div")
def _div(call: Call) -> Form:
    mode = call.args.get("rounding_mode")
    if mode == "floor":
        return call.store(call.reading.floor_divide(*call.operands()))
    quotient = call.reading.quotient(*call.operands(call.dtype))
    return call.store(call.monotone(quotient, np.trunc, UNIT) if mode == "trunc" else quotient)


@_rule("pow")
def _pow(call: Call) -> Form:
    if call.args["exponent"] != 2:
        raise call.unknown()
    base = call.form("self", call.dtype)
    return call.store(call.reading.product(base, base))


@_rule("clamp", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Form:
    form = call.form("self", call.dtype)
    if call.args.get("min") is not None:
        least = call.form("min", call.dtype)
        form = call.reading.choose(call.reading.le(least, form), form, least)
    if call.args.get("max") is not None:
        most = call.form("max", call.dtype)
        form = call.reading.choose(call.reading.le(form, most), form, most)
    return form


@_rule("abs")
def _abs(call: Call) -> Form:
    form = call.form("self")
    return call.store(call.reading.choose(call.reading.le(ZERO, form), form, -form))


_RISING: dict[str, tuple[Callable[[Array], Array], Array]] = {
    "log": (np.log, NOTHING),
    "log2": (np.log2, NOTHING),
    "exp": (np.exp, NOTHING),
    "exp2": (np.exp2, NOTHING),
    "sqrt": (np.sqrt, NOTHING),
    "floor": (np.floor, UNIT),
    "ceil": (np.ceil, UNIT),
    "trunc": (np.trunc, UNIT),
}


@_rule(*_RISING)
def _rising(call: Call) -> Form:
    function, grain = _RISING[call.node.target.overloadpacket.__name__]  # type: ignore[union-attr]
    form = call.monotone(call.form("self", call.dtype), function, grain)
    if grain is UNIT:
        return form
    # Libraries differ in the last digits of these functions, but not where they are 0 or infinite.
    low, high = (np.where(np.isfinite(limit), np.abs(limit) * 1e-5, 0) for limit in (form.lo, form.hi))
    return call.store(between(form.lo - low, form.hi + high))


# Comparisons and logic


def _comparison(compare: Binary) -> Rule:
    return lambda call: compare(call, *call.operands())


_rule("le")(_comparison(lambda call, a, b: call.reading.le(a, b)))
_rule("lt")(_comparison(lambda call, a, b: call.reading.le(a, b, strict=True)))
_rule("ge")(_comparison(lambda call, a, b: call.reading.le(b, a)))
_rule("gt")(_comparison(lambda call, a, b: call.reading.le(b, a, strict=True)))
_rule("eq")(_comparison(lambda call, a, b: call.reading.eq(a, b)))
_rule("ne")(_comparison(lambda call, a, b: negated(call.reading.eq(a, b))))


def _logic(compute: Binary) -> Rule:
    def rule(call: Call) -> Form:
        if call.dtype != torch.bool:
            raise call.unknown("on integers")
        return compute(call, call.form("self", torch.bool), call.form("other", torch.bool))

    return rule


_rule("__and__", "bitwise_and", "logical_and")(_logic(lambda call, a, b: call.reading.both(a, b)))
_rule("__or__", "bitwise_or", "logical_or")(_logic(lambda call, a, b: call.reading.either(a, b)))
_rule("__xor__", "bitwise_xor", "logical_xor")(
    _logic(lambda call, a, b: call.reading.choose(a, negated(b), b))
)


@_rule("bitwise_not", "logical_not")
def _not(call: Call) -> Form:
    if call.dtype != torch.bool:
        raise call.unknown("on integers")
    return negated(call.form("self", torch.bool))


@_rule("isinf")
def _isinf(call: Call) -> Form:
    form, le = call.form("self"), call.reading.le
    return call.reading.either(le(number(np.inf), form), le(form, number(-np.inf)))


@_rule("where")
def _where(call: Call) -> Form:
    condition = call.form("condition", torch.bool)
    return call.reading.choose(condition, call.form("self", call.dtype), call.form("other", call.dtype))


@_rule("masked_fill")
def _masked_fill(call: Call) -> Form:
    hidden = call.form("mask", torch.bool)
    return call.reading.choose(hidden, call.form("value", call.dtype), call.form("self"))


# Copies and new tensors

_COPIES = "clone contiguous alias detach detach_ lift_fresh_copy"
_rule(*_COPIES.split())(lambda call: call.at("self", call.index))
_rule("dropout")(lambda call: call.at("input", call.index))
_rule("to", "_to_copy", "type_as")(lambda call: call.form("self", call.dtype))
RULES[torch.ops.prims.convert_element_type] = lambda call: call.form("a", call.dtype)
_rule("copy")(lambda call: call.form("src", call.dtype))
_rule("fill")(lambda call: call.form("value", call.dtype))
_rule("full", "full_like", "new_full")(lambda call: call.form("fill_value", call.dtype))
_rule("scalar_tensor")(lambda call: call.form("s", call.dtype))
_rule("ones", "ones_like", "new_ones")(lambda call: ONE)
_rule("zeros", "zeros_like", "new_zeros", "zero")(lambda call: ZERO)
_rule("empty", "empty_like", "new_empty")(lambda call: UNKNOWN)
_rule("eye")(lambda call: call.reading.eq(call.index[0], call.index[1]))


@_rule("arange")
def _arange(call: Call) -> Form:
    start, step = (
        call.reading.size(call.args.get(name, default)) for name, default in (("start", 0), ("step", 1))
    )
    return call.store(start + call.reading.product(call.index[0], step))


# Views


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
@_rule("unsqueeze", "squeeze")
def _view(call: Call) -> Form:
    """Dimensions are matched from both ends; those between must have known sizes, but for the first."""
    new, old = call.reading.program.shape(call.node), call.shape()
    places = [(size, place) for size, place in zip(new, call.index, strict=True) if size != 1]
    wanted = [dim for dim, size in enumerate(old) if size != 1]
    index = [ZERO] * len(old)
    while places and wanted and places[-1][0] == old[wanted[-1]]:
        index[wanted.pop()] = places.pop()[1]
    while places and wanted and places[0][0] == old[wanted[0]]:
        index[wanted.pop(0)] = places.pop(0)[1]
    for dim, place in zip(wanted, _unflattened(call, places, [old[dim] for dim in wanted]), strict=True):
        index[dim] = place
    return call.at("self", tuple(index))


def _unflattened(call: Call, places: list[tuple[Any, Form]], sizes: list[Any]) -> Iterable[Form]:
    flat = ZERO
    for size, place in places:
        flat = call.reading.product(flat, call.reading.size(size)) + place
    index = []
    for size in reversed(sizes[1:]):
        index.append(call.reading.remainder(flat, call.reading.size(size)))
        flat = call.reading.floor_divide(flat, call.reading.size(size))
    return reversed([*index, flat]) if sizes else ()


_rule("expand", "expand_as", "broadcast_to")(lambda call: call.form("self"))
_rule("permute")(lambda call: _ordered(call, call.args["dims"]))
_rule("t")(lambda call: _ordered(call, range(len(call.index))[::-1]))


@_rule("transpose")
def _transpose(call: Call) -> Form:
    order = list(range(len(call.index)))
    a, b = call.dim("dim0"), call.dim("dim1")
    order[a], order[b] = b, a
    return _ordered(call, order)


def _ordered(call: Call, order: Sequence[int]) -> Form:
    """Dimension d of the result is dimension order[d] of the argument."""
    rank = len(order)
    return call.at("self", tuple(call.index[[d % rank for d in order].index(dim)] for dim in range(rank)))


@_rule("select")
def _select(call: Call) -> Form:
    dim = call.dim()
    place = _from_start(call, call.reading.size(call.args["index"]), dim)
    return call.at("self", (*call.index[:dim], place, *call.index[dim:]))


@_rule("slice", "narrow")
def _slice(call: Call) -> Form:
    dim = call.dim()
    step = call.reading.size(call.args.get("step", 1))
    return call.at("self", call.moved(dim, _start(call, dim) + call.reading.product(call.index[dim], step)))


def _start(call: Call, dim: int) -> Form:
    if call.args["start"] is None:
        return ZERO
    place = _from_start(call, call.reading.size(call.args["start"]), dim)
    return call.reading.choose(call.reading.le(place, ZERO), ZERO, place)


def _from_start(call: Call, place: Form, dim: int) -> Form:
    """A place that may be counted from the end."""
    if call.reading.cells.limits(place)[0].min() >= 0:
        return place
    is_negative = call.reading.le(place, ZERO, strict=True)
    return call.reading.choose(is_negative, place + call.size(dim), place)


@_rule("flip")
def _flip(call: Call) -> Form:
    flipped = {dim % len(call.index) for dim in call.args["dims"]}
    return call.at(
        "self",
        tuple(call.size(dim) - ONE - at if dim in flipped else at for dim, at in enumerate(call.index)),
    )


@_rule("repeat")
def _repeat(call: Call) -> Form:
    rank = len(call.shape())
    places = [
        place if times == 1 else call.reading.remainder(place, call.size(dim))
        for dim, (place, times) in enumerate(
            zip(call.index[-rank:], call.args["repeats"][-rank:], strict=True)
        )
    ]
    return call.at("self", tuple(places))


@_rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Form:
    dim, times = call.args.get("dim"), call.args["repeats"]
    if not isinstance(times, int) or dim is None:
        raise call.unknown("by a tensor, or flattened")
    return call.at("self", call.moved(call.dim(), call.reading.floor_divide(call.index[dim], number(times))))


# Joining and writing into


@_rule("cat")
def _cat(call: Call) -> Form:
    return _joined(call, call.args["tensors"], call.args["dim"] % len(call.index), call.index)


def _joined(call: Call, parts: Sequence[fx.Node], dim: int, index: Index) -> Form:
    """The entry at ``index`` of tensors that follow each other in one dimension."""
    reading, (part, *rest) = call.reading, parts
    if g.value(part).dtype != g.value(parts[-1]).dtype or g.value(part).dim() != len(index):
        raise call.unknown("on tensors of different kinds")
    if not rest:
        return reading.at(part, index)
    end = reading.size(reading.program.shape(part)[dim])
    is_here = reading.le(index[dim], end, strict=True)
    later = (*index[:dim], index[dim] - end, *index[dim + 1 :])
    if is_here.hi.max() <= 0:
        return _joined(call, rest, dim, later)
    return reading.choose(is_here, reading.at(part, index), _joined(call, rest, dim, later))


@_rule("stack")
def _stack(call: Call) -> Form:
    dim = call.args["dim"] % len(call.index)
    index = (*call.index[:dim], *call.index[dim + 1 :])
    if any(g.value(part).dtype != call.dtype for part in call.args["tensors"]):
        raise call.unknown("on tensors of different kinds")
    *parts, form = (call.reading.at(part, index) for part in call.args["tensors"])
    for last, part in reversed(list(enumerate(parts))):
        form = call.reading.choose(call.reading.le(call.index[dim], number(last)), part, form)
    return form


@_rule("constant_pad_nd", "pad")
def _pad(call: Call) -> Form:
    if call.args.get("mode", "constant") != "constant":
        raise call.unknown(f"in mode {call.args['mode']!r}")
    index, inside = list(call.index), ONE
    for dim, before in zip(reversed(range(len(index))), call.args["pad"][::2], strict=False):
        index[dim] = index[dim] - call.reading.size(before)
        inside = call.reading.both(inside, _within(call, index[dim], call.size(dim)))
    filler = call.store(call.reading.size(call.args.get("value") or 0))
    return call.reading.choose(inside, call.at("self", tuple(index)), filler)


@_rule("slice_scatter")
def _slice_scatter(call: Call) -> Form:
    if call.args["step"] != 1:
        raise call.unknown("with a step")
    dim = call.dim()
    place = call.index[dim] - _start(call, dim)
    written = call.at("src", call.moved(dim, place))
    return call.reading.choose(
        _within(call, place, call.size(dim, "src")), written, call.at("self", call.index)
    )


@_rule("select_scatter")
def _select_scatter(call: Call) -> Form:
    dim = call.dim()
    place = _from_start(call, call.reading.size(call.args["index"]), dim)
    written = call.at("src", (*call.index[:dim], *call.index[dim + 1 :]))
    return call.reading.choose(call.reading.eq(call.index[dim], place), written, call.at("self", call.index))


def _within(call: Call, place: Form, size: Form) -> Form:
    return call.reading.both(call.reading.le(ZERO, place), call.reading.le(place, size, strict=True))


@_rule("tril")
def _tril(call: Call) -> Form:
    return _triangle(call, call.reading.le(call.index[-1] - call.index[-2], call.form("diagonal")))


@_rule("triu")
def _triu(call: Call) -> Form:
    return _triangle(call, call.reading.le(call.form("diagonal"), call.index[-1] - call.index[-2]))


def _triangle(call: Call, kept: Form) -> Form:
    return call.reading.choose(kept, call.at("self", call.index), ZERO)


# Indexing by tensors


@_rule("index")
def _index(call: Call) -> Form:
    """Indexed dimensions stand together where the first one was, or first if others lie between."""
    indices = list(call.args["indices"])
    if any(node is not None and g.value(node).dtype in (torch.bool, torch.uint8) for node in indices):
        raise call.unknown("with truth values")
    indices += [None] * (len(call.shape()) - len(indices))
    indexed = [dim for dim, node in enumerate(indices) if node is not None]
    width = max(g.value(indices[dim]).dim() for dim in indexed)
    first = indexed[0] if indexed == list(range(indexed[0], indexed[-1] + 1)) else 0
    at, others = call.index[first : first + width], iter(call.index[:first] + call.index[first + width :])
    places = [
        next(others) if node is None else _from_start(call, call.reading.at(node, at), dim)
        for dim, node in enumerate(indices)
    ]
    return call.at("self", tuple(places))


@_rule("index_select")
def _index_select(call: Call) -> Form:
    dim = call.dim()
    return call.at("self", call.moved(dim, call.at("index", (call.index[dim],))))


_rule("gather")(lambda call: call.at("self", call.moved(call.dim(), call.at("index", call.index))))
_rule("embedding")(lambda call: call.at("weight", (call.at("indices", call.index[:-1]), call.index[-1])))


# Over a whole dimension


@_rule("cumsum")
def _cumsum(call: Call) -> Form:
    """The first entry, and as often one of the later ones as there are."""
    reading, dim = call.reading, call.dim()
    steps = call.index[dim]
    first = call.at("self", call.moved(dim, ZERO))
    later = call.at("self", call.moved(dim, reading.new_index(1, reading.cells.limits(steps)[1])))
    _check_whole(call, first, later)
    return call.store(first + reading.product(steps, between(*reading.cells.limits(later), later.grain)))


@_rule("diff")
def _diff(call: Call) -> Form:
    dim = call.dim()
    if call.args["n"] != 1 or call.dtype == torch.bool:
        raise call.unknown("of higher order, or on truth values")
    parts = [call.args[name] for name in ("prepend", "self", "append") if call.args[name] is not None]
    below = _joined(call, parts, dim, call.index)
    above = _joined(call, parts, dim, call.moved(dim, call.index[dim] + ONE))
    return call.store(call.reading.cells.plus(above, -below))


def _reduced(call: Call) -> set[int]:
    """The dimensions that a reduction is over."""
    dims, rank = call.args.get("dim"), len(call.shape())
    if dims is None or dims == []:
        dims = range(rank)
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}


def _entries(call: Call) -> tuple[Form, Form]:
    """Any of the entries that a reduction reads, and the one of them at the query."""
    reduced, kept = _reduced(call), iter(call.index)
    running, witness = [], []
    for dim, size in enumerate(call.shape()):
        if dim not in reduced or call.args.get("keepdim"):
            place = next(kept)
        if dim in reduced:
            place = call.reading.new_index(0, call.reading.cells.limits(call.size(dim))[1] - 1)
        running.append(place)
        # Every query is an index of a dimension of tokens.
        is_tokens = call.reading.program.symbols.get(size) == "size"
        witness.append((variable("q") if is_tokens else ZERO) if dim in reduced else place)
    entry, seen = call.at("self", tuple(running)), call.at("self", tuple(witness))
    if call.dtype == torch.bool:
        source = g.value(call.args["self"]).dtype
        return call.cast(entry, source, torch.bool), call.cast(seen, source, torch.bool)
    return entry, seen


@_rule("any", "amax")
def _any(call: Call) -> Form:
    (lo, hi), (seen, _) = (call.reading.cells.limits(form) for form in _entries(call))
    return between(np.maximum(lo, seen), hi, UNIT if call.dtype == torch.bool else NOTHING)


@_rule("all", "amin")
def _all(call: Call) -> Form:
    (lo, hi), (_, seen) = (call.reading.cells.limits(form) for form in _entries(call))
    return between(lo, np.minimum(hi, seen), UNIT if call.dtype == torch.bool else NOTHING)


@_rule("sum")
def _sum(call: Call) -> Form:
    entry, _ = _entries(call)
    _check_whole(call, entry)
    count = ONE
    for dim in _reduced(call):
        count = call.reading.product(count, call.size(dim))
    return call.store(call.reading.product(count, between(*call.reading.cells.limits(entry), entry.grain)))


def _check_whole(call: Call, *forms: Form) -> None:
    """Sums are only known exactly: of integers, in whatever format."""
    if not all(form.is_integer for form in forms):
        raise call.unknown("on fractions")
