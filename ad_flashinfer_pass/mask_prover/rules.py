"""What each op does to an entry of a mask: one rule an op.

A rule takes the op at an index of its result and gives bounds on the entry there. It may be loose, but
never wrong. An op that stands in no rule is refused by the prover, so this file is all that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.mask_prover.forms import NOTHING, UNIT, UNKNOWN, Array, Form, between, number, variable
from ad_flashinfer_pass.mask_prover.reading import ONE, RULES, ZERO, Call, Index, negated

aten = torch.ops.aten
Rule = Callable[[Call], Form]


def _rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of ops, by their names in ``aten``."""

    def enter(rule: Rule) -> Rule:
        for name in names:
            RULES[getattr(aten, name)] = rule
        return rule

    return enter


# Arithmetic


def _arithmetic(name: str, compute: Callable[[Call, Form, Form], Form]) -> None:
    def rule(call: Call) -> Form:
        if call.dtype == torch.bool:
            raise call.reading.program.unknown(call.node, "on truth values")
        a, b = call.operands()
        alpha = call.args.get("alpha", 1)
        if alpha != 1:
            factor = call.form("alpha")
            a, b = (a, call.reading.product(b, factor)) if name != "rsub" else (call.reading.product(a, factor), b)
        return call.store(compute(call, a, b))

    RULES[getattr(aten, name)] = rule


_arithmetic("add", lambda call, a, b: call.reading.cells.plus(a, b))
_arithmetic("sub", lambda call, a, b: call.reading.cells.plus(a, -b))
_arithmetic("rsub", lambda call, a, b: call.reading.cells.plus(b, -a))
_arithmetic("floor_divide", lambda call, a, b: call.reading.floor_divide(a, b))
_arithmetic("remainder", lambda call, a, b: call.reading.remainder(a, b))
_arithmetic("maximum", lambda call, a, b: call.reading.choose(call.reading.le(a, b), b, a))
_arithmetic("minimum", lambda call, a, b: call.reading.choose(call.reading.le(a, b), a, b))


@_rule("mul")
def _mul(call: Call) -> Form:
    return call.store(call.reading.product(*call.operands()))


@_rule("div", "true_divide")
def _div(call: Call) -> Form:
    a, b = call.operands()
    mode = call.args.get("rounding_mode")
    if mode == "floor":
        return call.store(call.reading.floor_divide(a, b))
    quotient = call.reading.quotient(a, b)
    if mode == "trunc":
        quotient = call.monotone(quotient, np.trunc, UNIT)
    return call.store(quotient)


@_rule("pow")
def _pow(call: Call) -> Form:
    exponent = call.args["exponent"]
    if exponent != 2:
        raise call.reading.program.unknown(call.node)
    base = call.form("self", call.dtype)
    return call.store(call.reading.product(base, base))


@_rule("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Form:
    form = call.form("self", call.dtype)
    if call.args.get("min") is not None:
        least = call.form("min", call.dtype)
        form = call.reading.choose(call.reading.le(least, form), form, least)
    if call.args.get("max") is not None:
        most = call.form("max", call.dtype)
        form = call.reading.choose(call.reading.le(form, most), form, most)
    return form


@_rule("neg")
def _neg(call: Call) -> Form:
    return call.store(-call.form("self"))


@_rule("abs")
def _abs(call: Call) -> Form:
    form = call.form("self")
    return call.store(call.reading.choose(call.reading.le(ZERO, form), form, -form))


@_rule("sign", "sgn")
def _sign(call: Call) -> Form:
    form = call.form("self")
    above, below = call.reading.le(ZERO, form, strict=True), call.reading.le(form, ZERO, strict=True)
    return call.reading.choose(above, ONE, call.reading.choose(below, -ONE, ZERO))


@_rule("relu")
def _relu(call: Call) -> Form:
    form = call.form("self")
    return call.reading.choose(call.reading.le(ZERO, form), form, ZERO)


_RISING: dict[str, tuple[Callable[[Array], Array], Array]] = {
    "log": (np.log, NOTHING),
    "log2": (np.log2, NOTHING),
    "log1p": (np.log1p, NOTHING),
    "exp": (np.exp, NOTHING),
    "exp2": (np.exp2, NOTHING),
    "sqrt": (np.sqrt, NOTHING),
    "floor": (np.floor, UNIT),
    "ceil": (np.ceil, UNIT),
    "trunc": (np.trunc, UNIT),
    "round": (np.round, UNIT),
}


@_rule(*_RISING)
def _rising(call: Call) -> Form:
    function, grain = _RISING[call.node.target.overloadpacket.__name__]  # type: ignore[union-attr]
    if call.args.get("decimals"):
        raise call.reading.program.unknown(call.node)
    form = call.monotone(call.form("self", call.dtype), function, grain)
    if grain is UNIT:
        return form
    # Libraries differ in the last digits of these functions, but not at the ends 0 and -inf.
    wider = np.where(np.isfinite(form.lo), np.abs(form.lo) * 1e-5, 0), np.where(
        np.isfinite(form.hi), np.abs(form.hi) * 1e-5, 0
    )
    return call.store(between(form.lo - wider[0], form.hi + wider[1]))


# Comparisons and logic


def _comparison(name: str, compare: Callable[[Call, Form, Form], Form]) -> None:
    RULES[getattr(aten, name)] = lambda call: compare(call, *call.operands())


_comparison("le", lambda call, a, b: call.reading.le(a, b))
_comparison("lt", lambda call, a, b: call.reading.le(a, b, strict=True))
_comparison("ge", lambda call, a, b: call.reading.le(b, a))
_comparison("gt", lambda call, a, b: call.reading.le(b, a, strict=True))
_comparison("eq", lambda call, a, b: call.reading.eq(a, b))
_comparison("ne", lambda call, a, b: negated(call.reading.eq(a, b)))


def _logic(names: Sequence[str], compute: Callable[[Call, Form, Form], Form]) -> None:
    def rule(call: Call) -> Form:
        if call.dtype != torch.bool:
            raise call.reading.program.unknown(call.node, "on integers")
        return compute(call, call.form("self", torch.bool), call.form("other", torch.bool))

    for name in names:
        RULES[getattr(aten, name)] = rule


def _xor(call: Call, a: Form, b: Form) -> Form:
    return call.reading.choose(a, negated(b), b)


_logic(("__and__", "bitwise_and", "logical_and"), lambda call, a, b: call.reading.both(a, b))
_logic(
    ("__or__", "bitwise_or", "logical_or"),
    lambda call, a, b: negated(call.reading.both(negated(a), negated(b))),
)
_logic(("__xor__", "bitwise_xor", "logical_xor"), _xor)


@_rule("bitwise_not", "logical_not")
def _not(call: Call) -> Form:
    if call.dtype != torch.bool:
        raise call.reading.program.unknown(call.node, "on integers")
    return negated(call.form("self", torch.bool))


@_rule("isinf")
def _isinf(call: Call) -> Form:
    form = call.form("self")
    high, low = call.reading.le(number(np.inf), form), call.reading.le(form, number(-np.inf))
    return negated(call.reading.both(negated(high), negated(low)))


@_rule("where")
def _where(call: Call) -> Form:
    condition = call.form("condition", torch.bool)
    return call.reading.choose(condition, call.form("self", call.dtype), call.form("other", call.dtype))


@_rule("masked_fill")
def _masked_fill(call: Call) -> Form:
    hidden = call.form("mask", torch.bool)
    return call.reading.choose(hidden, call.form("value", call.dtype), call.form("self"))


# Copies and casts


@_rule("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy", "positive")
@_rule("dropout", "alias_copy", "detach_copy")
def _same(call: Call) -> Form:
    return call.at("input" if "input" in call.args else "self", call.index)


@_rule("to", "_to_copy", "type_as")
def _to(call: Call) -> Form:
    return call.form("self", call.dtype)


RULES[torch.ops.prims.convert_element_type] = lambda call: call.form("a", call.dtype)


@_rule("copy")
def _copy(call: Call) -> Form:
    return call.form("src", call.dtype)


@_rule("fill")
def _fill(call: Call) -> Form:
    return call.form("value", call.dtype)


# New tensors


@_rule("full", "full_like", "new_full")
def _full(call: Call) -> Form:
    return call.form("fill_value", call.dtype)


@_rule("scalar_tensor")
def _scalar_tensor(call: Call) -> Form:
    return call.form("s", call.dtype)


@_rule("ones", "ones_like", "new_ones")
def _ones(call: Call) -> Form:
    return ONE


@_rule("zeros", "zeros_like", "new_zeros")
def _zeros(call: Call) -> Form:
    return ZERO


@_rule("empty", "empty_like", "new_empty")
def _empty(call: Call) -> Form:
    return UNKNOWN


@_rule("arange")
def _arange(call: Call) -> Form:
    reading, args = call.reading, call.args
    start, step = reading.size(args.get("start", 0)), reading.size(args.get("step", 1))
    return call.store(start + reading.product(call.index[0], step))


@_rule("eye")
def _eye(call: Call) -> Form:
    return call.reading.eq(call.index[0], call.index[1])


# Views


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy", "view_as", "reshape_as")
@_rule("unsqueeze", "squeeze", "unsqueeze_copy", "squeeze_copy")
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


def _unflattened(call: Call, places: list[tuple[Any, Form]], sizes: list[Any]) -> list[Form]:
    flat = ZERO
    for size, place in places:
        flat = (flat if flat is ZERO else call.reading.product(flat, call.reading.size(size))) + place
    index = []
    for size in reversed(sizes[1:]):
        index.append(call.reading.remainder(flat, call.reading.size(size)))
        flat = call.reading.floor_divide(flat, call.reading.size(size))
    return [flat, *reversed(index)] if sizes else []


@_rule("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(call: Call) -> Form:
    return call.form("self")


@_rule("permute", "permute_copy")
def _permute(call: Call) -> Form:
    return _ordered(call, call.args["dims"])


@_rule("transpose", "transpose_copy")
def _transpose(call: Call) -> Form:
    order = list(range(len(call.index)))
    a, b = call.dim("dim0"), call.dim("dim1")
    order[a], order[b] = b, a
    return _ordered(call, order)


@_rule("t", "t_copy", "numpy_T")
def _t(call: Call) -> Form:
    return _ordered(call, list(reversed(range(len(call.index)))))


def _ordered(call: Call, order: Sequence[int]) -> Form:
    """Dimension d of the result is dimension order[d] of the argument."""
    rank = len(order)
    return call.at("self", tuple(call.index[[d % rank for d in order].index(dim)] for dim in range(rank)))


@_rule("select", "select_copy")
def _select(call: Call) -> Form:
    dim = call.dim()
    place = _from_start(call, call.reading.size(call.args["index"]), dim)
    return call.at("self", (*call.index[:dim], place, *call.index[dim:]))


@_rule("slice", "slice_copy")
def _slice(call: Call) -> Form:
    dim = call.dim()
    step = call.reading.size(call.args["step"])
    return call.at("self", call.moved(dim, _start(call, dim) + call.reading.product(call.index[dim], step)))


@_rule("narrow")
def _narrow(call: Call) -> Form:
    dim = call.dim()
    return call.at("self", call.moved(dim, _start(call, dim) + call.index[dim]))


def _start(call: Call, dim: int) -> Form:
    start = call.args["start"]
    if start is None or (isinstance(start, int) and start == 0):
        return ZERO
    place = _from_start(call, call.reading.size(start), dim)
    return call.reading.choose(call.reading.le(place, ZERO), ZERO, place)


def _from_start(call: Call, place: Form, dim: int) -> Form:
    """A place that may be counted from the end."""
    if call.reading.cells.limits(place)[0].min() >= 0:
        return place
    is_negative = call.reading.le(place, ZERO, strict=True)
    return call.reading.choose(is_negative, place + call.size(dim), place)


@_rule("flip")
def _flip(call: Call) -> Form:
    index = call.index
    for dim in call.args["dims"]:
        dim %= len(index)
        index = (*index[:dim], call.size(dim) - ONE - index[dim], *index[dim + 1 :])
    return call.at("self", index)


@_rule("repeat")
def _repeat(call: Call) -> Form:
    old = call.shape()
    index = call.index[len(call.index) - len(old) :]
    repeats = call.args["repeats"][len(call.index) - len(old) :]
    places = [
        place if isinstance(times, int) and times == 1 else call.reading.remainder(place, call.reading.size(size))
        for place, times, size in zip(index, repeats, old, strict=True)
    ]
    return call.at("self", tuple(places))


# Joining and writing into


@_rule("cat", "concat")
def _cat(call: Call) -> Form:
    return _joined(call, call.args["tensors"], call.args["dim"] % len(call.index), call.index)


@_rule("stack")
def _stack(call: Call) -> Form:
    dim = call.args["dim"] % len(call.index)
    index = (*call.index[:dim], *call.index[dim + 1 :])
    parts = [
        call.reading.at(part, index) if g.value(part).dtype == call.dtype else None for part in call.args["tensors"]
    ]
    return _chosen_part(call, call.index[dim], parts)


def _chosen_part(call: Call, place: Form, parts: list[Form | None]) -> Form:
    if None in parts:
        raise call.reading.program.unknown(call.node, "on tensors of several dtypes")
    *_, form = parts
    for number_of, part in reversed(list(enumerate(parts[:-1]))):
        form = call.reading.choose(call.reading.le(place, number(float(number_of))), part, form)  # type: ignore[arg-type]
    assert form is not None
    return form


def _joined(call: Call, parts: Sequence[fx.Node], dim: int, index: Index) -> Form:
    """The entry at ``index`` of tensors that follow each other in one dimension."""
    reading, (part, *rest) = call.reading, parts
    if g.value(part).dtype != g.value(parts[-1]).dtype:
        raise reading.program.unknown(call.node, "on tensors of several dtypes")
    if not rest:
        return reading.at(part, index)
    end = reading.size(reading.program.shape(part)[dim])
    is_here = reading.le(index[dim], end, strict=True)
    later = (*index[:dim], index[dim] - end, *index[dim + 1 :])
    if is_here.hi.max() <= 0:
        return _joined(call, rest, dim, later)
    if is_here.lo.min() >= 1:
        return reading.at(part, index)
    return reading.choose(is_here, reading.at(part, index), _joined(call, rest, dim, later))


@_rule("constant_pad_nd", "pad")
def _pad(call: Call) -> Form:
    if call.args.get("mode", "constant") != "constant":
        raise call.reading.program.unknown(call.node, f"in mode {call.args['mode']!r}")
    value, index, inside = call.args.get("value") or 0, call.index, ONE
    widths = call.args["pad"]
    for dim, before in zip(reversed(range(len(index))), widths[::2], strict=False):
        place = index[dim] - call.reading.size(before)
        index = (*index[:dim], place, *index[dim + 1 :])
        inside = call.reading.both(inside, call.reading.le(ZERO, place))
        inside = call.reading.both(inside, call.reading.le(place, call.size(dim), strict=True))
    filler = call.store(call.reading.size(value))
    return call.reading.choose(inside, call.at("self", index), filler)


@_rule("slice_scatter")
def _slice_scatter(call: Call) -> Form:
    reading, dim = call.reading, call.dim()
    if call.args["step"] != 1:
        raise reading.program.unknown(call.node, "with a step")
    place = call.index[dim] - _start(call, dim)
    inside = reading.both(reading.le(ZERO, place), reading.le(place, call.size(dim, "src"), strict=True))
    return reading.choose(inside, call.at("src", call.moved(dim, place)), call.at("self", call.index))


@_rule("select_scatter")
def _select_scatter(call: Call) -> Form:
    reading, dim = call.reading, call.dim()
    here = reading.eq(call.index[dim], _from_start(call, reading.size(call.args["index"]), dim))
    written = call.at("src", (*call.index[:dim], *call.index[dim + 1 :]))
    return reading.choose(here, written, call.at("self", call.index))


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
    if any(node is not None and not _is_integer(node) for node in indices):
        raise call.reading.program.unknown(call.node, "with truth values")
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


def _is_integer(node: fx.Node) -> bool:
    dtype = g.value(node).dtype
    return not dtype.is_floating_point and dtype not in (torch.bool, torch.uint8)


@_rule("index_select")
def _index_select(call: Call) -> Form:
    dim = call.dim()
    return call.at("self", call.moved(dim, call.reading.at(call.args["index"], (call.index[dim],))))


@_rule("gather")
def _gather(call: Call) -> Form:
    return call.at("self", call.moved(call.dim(), call.at("index", call.index)))


@_rule("embedding")
def _embedding(call: Call) -> Form:
    return call.at("weight", (call.at("indices", call.index[:-1]), call.index[-1]))


# Over a whole dimension


@_rule("cumsum")
def _cumsum(call: Call) -> Form:
    """The first entry, and as often one of the later ones as there are."""
    reading, dim = call.reading, call.dim()
    steps = call.index[dim]
    first = call.at("self", call.moved(dim, ZERO))
    later = call.at("self", call.moved(dim, reading.new_index(1.0, reading.cells.limits(steps)[1])))
    _check_whole(call, first, later)
    return call.store(first + reading.product(steps, between(*reading.cells.limits(later), later.grain)))


@_rule("diff")
def _diff(call: Call) -> Form:
    dim = call.dim()
    if call.args["n"] != 1:
        raise call.reading.program.unknown(call.node, "of higher order")
    if call.dtype == torch.bool:
        raise call.reading.program.unknown(call.node, "on truth values")
    parts = [call.args[name] for name in ("prepend", "self", "append") if call.args[name] is not None]
    below = _joined(call, parts, dim, call.index)
    above = _joined(call, parts, dim, call.moved(dim, call.index[dim] + ONE))
    return call.store(call.reading.cells.plus(above, -below))


def _anywhere(call: Call) -> tuple[Form, Form]:
    """Bounds on all entries that a reduction reads, and the entry at the query."""
    reading, source = call.reading, call.args["self"]
    shape = call.shape()
    dims = call.args.get("dim")
    dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % len(shape) for dim in dims}
    kept = iter(call.index)
    running, witness = [], []
    for dim, size in enumerate(shape):
        if dim not in reduced:
            running.append(next(kept))
            witness.append(running[-1])
            continue
        if call.args.get("keepdim"):
            next(kept)
        last = reading.cells.limits(reading.size(size))[1] - 1
        running.append(reading.new_index(0.0, last))
        # Every query is an index of a dimension of tokens.
        witness.append(variable("q") if reading.program.symbols.get(size) == "size" else ZERO)
    entry, seen = reading.at(source, tuple(running)), reading.at(source, tuple(witness))
    if call.dtype == torch.bool:
        dtype = g.value(source).dtype
        return call.cast(entry, dtype, torch.bool), call.cast(seen, dtype, torch.bool)
    return entry, seen


@_rule("any", "amax")
def _any(call: Call) -> Form:
    entries, witness = (call.reading.cells.limits(form) for form in _anywhere(call))
    return between(np.maximum(entries[0], witness[0]), entries[1], UNIT if call.dtype == torch.bool else NOTHING)


@_rule("all", "amin")
def _all(call: Call) -> Form:
    entries, witness = (call.reading.cells.limits(form) for form in _anywhere(call))
    return between(entries[0], np.minimum(entries[1], witness[1]), UNIT if call.dtype == torch.bool else NOTHING)


@_rule("sum")
def _sum(call: Call) -> Form:
    entry, _ = _anywhere(call)
    _check_whole(call, entry)
    count = ONE
    dims = call.args.get("dim")
    for dim in range(len(call.shape())) if dims is None else dims:
        count = call.reading.product(count, call.size(dim))
    return call.store(call.reading.product(count, between(*call.reading.cells.limits(entry), entry.grain)))


def _check_whole(call: Call, *forms: Form) -> None:
    """Sums are only known exactly: of integers, in whatever format."""
    if not all(form.is_integer for form in forms):
        raise call.reading.program.unknown(call.node, "on fractions")
