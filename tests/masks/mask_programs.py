"""Mask programs for the tests of the mask prover and its benchmark: traced, random, and their true class."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import SymInt, Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass import masks

aten = torch.ops.aten
T = TypeVar("T")
Choose = Callable[[Sequence[Any]], Any]
Index = tuple[Tensor, Tensor]

MIN = torch.finfo(torch.float32).min
HEADS = 2
LARGEST = 24


def traced(*functions: Callable[[Tensor, Tensor], Tensor]) -> list[fx.Node]:
    """The nodes of ``function(input_ids, position_ids)`` in one graph with dynamic sizes."""

    def all_of(input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:
        return [function(input_ids, position_ids) for function in functions]

    gm = make_fx(all_of, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs(3, 29))
    outputs = gm.graph.output_node().args[0]
    assert isinstance(outputs, list)
    return outputs


def exported(module: torch.nn.Module) -> fx.GraphModule:
    """The graph that torch.export makes of a module of input_ids and position_ids."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, inputs(3, 29), dynamic_shapes=(dynamic, dynamic))
    gm = program.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def inputs(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids of ``rows`` sequences of ``size`` tokens."""
    return torch.zeros(rows, size, dtype=torch.int64), torch.arange(size).repeat(rows, 1)


class Value:
    """A node with operators, so that random programs read like masks."""

    def __init__(self, program: Program, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
        self.program, self.node, self.shape, self.dtype = program, node, shape, dtype

    def __add__(self, other: Any) -> Value:
        return self.program.pointwise(aten.add.Tensor, self, other)

    def __sub__(self, other: Any) -> Value:
        return self.program.pointwise(aten.sub.Tensor, self, other)

    def __mul__(self, other: Any) -> Value:
        return self.program.pointwise(aten.mul.Tensor, self, other)

    def __floordiv__(self, other: int) -> Value:
        return self.program.pointwise(aten.floor_divide.default, self, other)

    def __mod__(self, other: int) -> Value:
        return self.program.pointwise(aten.remainder.Scalar, self, other)

    def __le__(self, other: Any) -> Value:
        return self._compare("le", other)

    def __lt__(self, other: Any) -> Value:
        return self._compare("lt", other)

    def __ge__(self, other: Any) -> Value:
        return self._compare("ge", other)

    def __gt__(self, other: Any) -> Value:
        return self._compare("gt", other)

    def equals(self, other: Any) -> Value:
        """Whether both are equal, as a node."""
        return self._compare("eq", other)

    def differs(self, other: Any) -> Value:
        """Whether they are not equal, as a node."""
        return self._compare("ne", other)

    def __and__(self, other: Value) -> Value:
        return self.program.pointwise(aten.bitwise_and.Tensor, self, other)

    def __or__(self, other: Value) -> Value:
        return self.program.pointwise(aten.logical_or.default, self, other)

    def __invert__(self) -> Value:
        return self.program.call(aten.bitwise_not.default, (self,), self.shape, self.dtype)

    def to(self, dtype: torch.dtype) -> Value:
        """In another dtype."""
        return self.program.call(aten.to.dtype, (self, dtype), self.shape, dtype)

    def view(self, *shape: Any) -> Value:
        """In another shape."""
        return self.program.call(aten.view.default, (self, list(shape)), shape, self.dtype)

    def _compare(self, name: str, other: Any) -> Value:
        packet = getattr(aten, name)
        op = packet.Tensor if isinstance(other, Value) else packet.Scalar
        return self.program.pointwise(op, self, other, dtype=torch.bool)


class Program:
    """A graph under construction. Its shapes are written down, not traced: tracing takes 10 ms an op."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.buffers = torch.nn.Module()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
        ids = self.mode.from_tensor(
            torch.zeros(3, 29, dtype=torch.int64), source=ConstantSource("ids"), symbolic_context=context
        )
        self.rows, self.size = ids.shape
        self._fakes: dict[Any, Tensor] = {}
        self.input_ids = self._enter(self.graph.placeholder("input_ids"), (self.rows, self.size), torch.int64)
        self.positions = self._enter(
            self.graph.placeholder("position_ids"), (self.rows, self.size), torch.int64
        )
        self._size_nodes: dict[str, fx.Node] = {}
        for dim, size in enumerate((self.rows, self.size)):
            self._size_nodes[str(size)] = self.graph.call_function(
                aten.sym_size.int, (self.input_ids.node, dim)
            )
            self._size_nodes[str(size)].meta["val"] = size

    def call(
        self, op: Any, args: tuple[Any, ...], shape: Sequence[Any], result: torch.dtype, **kwargs: Any
    ) -> Value:
        """A node; ``result`` is its dtype."""
        plain = fx.node.map_aggregate(args, self._plain)
        return self._enter(self.graph.call_function(op, plain, kwargs), tuple(shape), result)

    def pointwise(self, op: Any, *args: Any, dtype: torch.dtype | None = None) -> Value:
        """A node of the broadcast shape."""
        values = [arg for arg in args if isinstance(arg, Value)]
        rank = max(len(value.shape) for value in values)
        padded = [(1,) * (rank - len(value.shape)) + value.shape for value in values]
        shape = tuple(
            next((size for size in sizes if not _is_one(size)), 1) for sizes in zip(*padded, strict=True)
        )
        if dtype is None:
            samples = [self._fake(arg.shape, arg.dtype) if isinstance(arg, Value) else arg for arg in args]
            dtype = torch.result_type(*samples) if len(samples) == 2 else values[0].dtype
        return self.call(op, args, shape, dtype)

    def constant(self, tensor: Tensor) -> Value:
        """A buffer."""
        name = f"constant_{len(self.buffers._buffers)}"
        self.buffers.register_buffer(name, tensor)
        return self._enter(self.graph.get_attr(name), tuple(tensor.shape), tensor.dtype)

    def arange(self) -> Value:
        """The index vector of the tokens."""
        return self.call(aten.arange.default, (self.size,), (self.size,), torch.int64)

    def finish(self, value: Value) -> tuple[fx.Node, fx.GraphModule]:
        """The mask's node, and the graph as a module."""
        self.graph.output(value.node)
        return value.node, fx.GraphModule(self.buffers, self.graph)

    def _enter(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> Value:
        node.meta["val"] = self._fake(shape, dtype)
        return Value(self, node, shape, dtype)

    def _fake(self, shape: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        key = (str(shape), dtype)
        if key not in self._fakes:
            with self.mode:
                self._fakes[key] = torch.empty(shape, dtype=dtype)
        return self._fakes[key]

    def _plain(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return arg.node
        if isinstance(arg, SymInt):
            return self._size_nodes[str(arg)]
        return arg


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


# Random masks


def random_mask(choose: Choose, largest: int = LARGEST) -> tuple[fx.Node, fx.GraphModule]:
    """A mask composed of what masks are made of, right or nearly; ``choose`` picks from a sequence.

    Returns:
        Its node, and its graph as a module of input_ids and position_ids.
    """
    program = Program()
    q, k = _index(program, choose)
    mask = _causal(program, choose, q, k, largest) if choose(range(10)) else k.equals(k)
    for _ in range(choose((0, 1, 1, 2, 3))):
        part = choose(_PARTS)(program, choose, *_index(program, choose), largest)
        mask = mask | part if choose(range(8)) == 0 else mask & part
    if choose(range(12)) == 0:
        mask = ~(~mask)
    return program.finish(_encoded(program, choose, mask, q, k))


def _index(program: Program, choose: Choose) -> tuple[Value, Value]:
    """Query and key indices, [.., size, 1] and [.., size]."""
    size = program.size
    kind = choose(("arange", "arange", "positions", "count", "gathered"))
    if kind == "positions":
        shape = (program.rows, 1, 1, size)
        keys = program.call(
            aten.unsqueeze.default, (program.positions, 1), (program.rows, 1, size), torch.int64
        )
        keys = program.call(aten.unsqueeze.default, (keys, 1), shape, torch.int64)
        queries = program.call(aten.transpose.int, (keys, 2, 3), (program.rows, 1, size, 1), torch.int64)
        return queries, keys
    index = program.arange()
    if kind == "count":
        ones = program.call(aten.ones.default, ([size],), (size,), torch.int64, dtype=torch.int64)
        index = program.call(aten.cumsum.default, (ones, 0), (size,), torch.int64) - 1
    if kind == "gathered":
        zero = program.constant(torch.zeros((), dtype=torch.int64))
        index = program.call(aten.index.Tensor, (program.positions, [zero, index]), (size,), torch.int64)
    return program.call(aten.unsqueeze.default, (index, -1), (size, 1), torch.int64), index


def _causal(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    off = choose((0, 0, 0, 0, 0, 0, 0, 1, -1, 2))
    ways: tuple[Callable[[], Value], ...] = (
        lambda: k <= q + off,
        lambda: q - k >= -off,
        lambda: k - q < 1 + off,
        lambda: ~(k > q + off),
        lambda: _triangle(program, off),
        lambda: _table(program, choose, off, largest),
    )
    return choose(ways)()


def _triangle(program: Program, off: int) -> Value:
    shape = (program.size, program.size)
    ones = program.call(aten.ones.default, (list(shape),), shape, torch.bool, dtype=torch.bool)
    return program.call(aten.tril.default, (ones, off), shape, torch.bool)


def _table(program: Program, choose: Choose, off: int, largest: int) -> Value:
    side = largest + choose((0, 3, 40))
    table = program.constant(torch.ones(side, side, dtype=torch.bool).tril(off))
    rows = program.call(aten.slice.Tensor, (table, 0, 0, program.size), (program.size, side), torch.bool)
    return program.call(
        aten.slice.Tensor, (rows, 1, 0, program.size), (program.size, program.size), torch.bool
    )


def _window(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    width = choose(range(1, largest + 2))
    return choose(
        (lambda: k > q - width, lambda: q - k < width, lambda: ~(k + width <= q), lambda: k + width > q)
    )()


def _chunk(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    size = choose(range(1, largest + 2))
    shift = choose((0, 0, 0, 0, 1))
    q, k = q + shift, k + shift
    return choose(
        (
            lambda: (q // size).equals(k // size),
            lambda: (q - q % size).equals(k - k % size),
            lambda: k >= (q // size) * size,
        )
    )()


def _prefix(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    return k < choose(range(0, largest))


def _padding(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    at = choose(range(0, largest + 1))
    return choose((lambda: k >= at, lambda: k.differs(at), lambda: q < at))()


def _documents(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    """Documents by constant; of equal length they are chunks."""
    length = choose(range(2, 9))
    cuts = [length * n for n in range(1, largest)]
    if choose(range(2)):
        cuts = sorted(choose(range(1, largest)) for _ in range(3))
    names = program.constant(torch.searchsorted(torch.tensor(cuts), torch.arange(largest + 40), right=True))
    of_q = program.call(aten.index.Tensor, (names, [q]), q.shape, torch.int64)
    of_k = program.call(aten.index.Tensor, (names, [k]), k.shape, torch.int64)
    return of_q.equals(of_k)


def _dilated(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    return ((q - k) % choose((1, 2, 3))).equals(0)


def _one_place(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    query, key = choose(range(largest)), choose(range(largest))
    return ~(q.equals(query) & k.equals(key))


def _one_row_of_batch(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    rows = program.call(aten.arange.default, (program.rows,), (program.rows,), torch.int64)
    rows = program.call(aten.unsqueeze.default, (rows, 1), (program.rows, 1), torch.int64)
    rows = program.call(aten.unsqueeze.default, (rows, 1), (program.rows, 1, 1), torch.int64)
    rows = program.call(aten.unsqueeze.default, (rows, 1), (program.rows, 1, 1, 1), torch.int64)
    return ~(rows.equals(choose((1, 2))) & k.equals(choose(range(4))))


def _one_head(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    heads = program.constant(torch.arange(HEADS)).view(HEADS, 1, 1)
    return ~(heads.equals(choose(range(HEADS))) & k.equals(choose(range(largest))))


def _by_size(program: Program, choose: Choose, q: Value, k: Value, largest: int) -> Value:
    """Something that depends on the number of tokens."""
    end = program.call(aten.full.default, ([], program.size), (), torch.int64, dtype=torch.int64)
    at = choose(range(1, largest + 2))
    return choose(
        (lambda: k < end, lambda: end.differs(at) | (k < 3), lambda: end - k <= at, lambda: q + k < end + at)
    )()


_PARTS = (
    *(_window, _chunk) * 5,
    *(_prefix, _padding, _documents, _dilated, _one_place, _one_row_of_batch, _one_head, _by_size),
)


def _encoded(program: Program, choose: Choose, mask: Value, q: Value, k: Value) -> Value:
    """As booleans, or as numbers to add, perhaps with a bias."""
    if choose(range(2)):
        return _ranked(program, choose, mask)
    dtype = choose((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    hidden = choose((float("-inf"), torch.finfo(dtype).min, -1e4, -3e4, -100.0, -1.0))
    shown = choose((0.0, 0.0, 0.0, 0.0, 2.5))
    kind = choose(("where", "product", "masked_fill"))
    if kind == "product" and hidden != float("-inf"):
        floats = (~mask).to(dtype) * hidden
    elif kind == "masked_fill":
        full = program.call(aten.full.default, ([1, 1], shown), (1, 1), dtype, dtype=dtype)
        floats = program.pointwise(aten.masked_fill.Scalar, full, ~mask, hidden, dtype=dtype)
    else:
        zero = program.constant(torch.tensor(shown, dtype=dtype))
        floats = program.pointwise(aten.where.ScalarOther, mask, zero, hidden, dtype=dtype)
    if dtype == torch.float32 and choose(range(3)) == 0:
        floats = floats + _alibi(program, choose, q, k)
    return _ranked(program, choose, floats)


def _alibi(program: Program, choose: Choose, q: Value, k: Value) -> Value:
    slopes = choose(([0.5, 0.25], [0.3, 0.7], [0.1, 0.1], [0.5, 0.0]))
    by_head = program.constant(torch.tensor(slopes)).view(HEADS, 1, 1)
    distance = choose((lambda: k - q, lambda: k, lambda: k - 7, lambda: q - k, lambda: k * k))()
    return by_head * distance.to(torch.float32)


def _ranked(program: Program, choose: Choose, mask: Value) -> Value:
    """With the tokens in both of the last dimensions, and more dimensions if it has none yet."""
    if len(mask.shape) == 4 or choose(range(2)):
        return mask
    shape = (1,) * (4 - len(mask.shape)) + mask.shape
    for _ in range(4 - len(mask.shape)):
        mask = program.call(aten.unsqueeze.default, (mask, 0), (1, *mask.shape), mask.dtype)
    assert mask.shape == shape
    return mask


# What a mask truly is


@dataclass(frozen=True)
class Truth:
    """The visibility and slopes that a closed form must have to be the mask at all sizes."""

    visible: Tensor
    slopes: Tensor


def truth(gm: fx.GraphModule, largest: int = LARGEST) -> Truth | None:
    """By running the mask at all sizes, up to 24 with 1 to 3 rows; None if it is no closed form."""
    visible, bias = _run(gm, 1, largest)
    form = _form(visible[0, 0])
    if form is None:
        return None
    slopes = torch.zeros(visible.shape[1], dtype=torch.float64)
    if largest > 1 and visible[0, 0, 1, 0]:
        slopes = -bias[0, :, 1, 0]
    for rows, size in itertools.product((1, 2, 3), range(1, largest + 1)):
        if rows > 1 and size > LARGEST and size != largest:
            continue
        seen, added = _run(gm, rows, size)
        lag = torch.arange(size)[:, None] - torch.arange(size)
        off = (added + slopes[:, None, None] * lag).abs()
        if not bool((seen == form.visible(size)).all()) or bool((off[seen] > 1e-4).any()):
            return None
    return Truth(form.visible(largest), slopes)


def _form(visible: Tensor) -> masks.MaskClass | None:
    """The closed form of a matrix.

    Its parameters can only be these: key 0 is seen by as many queries as the window or the chunk is long, and
    the first query to which its own predecessor is hidden begins a chunk.
    """
    size = visible.shape[0]
    chunks = [None, *(q for q in range(2, size) if not visible[q, q - 1])][:2]
    for window, chunk in itertools.product((None, max(1, int(visible[:, 0].sum()))), chunks):
        form = masks.MaskClass(window, chunk)
        if torch.equal(form.visible(size), visible):
            return form
    return None


def _run(gm: fx.GraphModule, rows: int, size: int) -> tuple[Tensor, Tensor]:
    mask = gm(*inputs(rows, size))
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:2], size, size)
    if mask.dtype == torch.bool:
        return mask, torch.zeros(mask.shape, dtype=torch.float64)
    bias = mask.double() - mask.double().diagonal(dim1=2, dim2=3)[..., None]
    visible = bias > masks.HIDDEN
    return visible, torch.where(visible, bias, 0.0)


def is_right(found: masks.MaskClass, wanted: Truth | None) -> bool:
    """Whether a class that was found is the true one, up to what no kernel can tell."""
    if wanted is None or not torch.equal(found.visible(len(wanted.visible)), wanted.visible):
        return False
    if not bool(wanted.visible.tril(-1).any()):
        return True  # a query that sees only itself has one logit: no slope shows
    slopes = torch.tensor(found.alibi_slopes or (0.0,), dtype=torch.float64)
    return bool(torch.isclose(slopes, wanted.slopes, rtol=1e-5, atol=1e-5).all())
