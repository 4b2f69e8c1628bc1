"""Random small programs: what ``check_packing`` says of the axes of a tensor holds when they are run.

A program is grown op by op; an op that is refused is taken out again. Of every tensor that is left, the part
of a sequence in a packed batch must be what the sequence gives alone, with the tokens where the axes say.
Set AD_FUZZ_PROGRAMS to try more of them.
"""

from __future__ import annotations

import itertools
import operator
import os
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.transforms import check_packing

aten = torch.ops.aten
WIDTH = 4
# Tokens of the sequences that share a batch.
LENGTHS = (3, 1, 5)


class Program:
    """A graph over x: [b, s, 4], ids: [b, s] and three constants, with the axes of each of its tensors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        graph = fx.Graph()
        graph.output(())
        self.gm = fx.GraphModule(nn.Module(), graph)
        self.gm.table = nn.Buffer(torch.randn(WIDTH, WIDTH, generator=generator))
        self.gm.row = nn.Buffer(torch.randn(WIDTH, generator=generator))
        self.gm.pair = nn.Buffer(torch.randn(2, generator=generator))
        self.graph = self.gm.graph
        self.graph.inserting_before(self.graph.output_node())
        self.env = ShapeEnv(duck_shape=False)
        mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
        )
        x = mode.from_tensor(torch.randn(7, 11, WIDTH), symbolic_context=dynamic)
        with mode:
            ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        self.nodes: list[fx.Node] = []
        for name, value in (("input_ids", ids), ("x", x)):
            node = self.graph.placeholder(name)
            node.meta["val"] = value
            self.nodes.append(node)
        self.reader = check_packing._Reader(self.gm)
        for node in self.nodes:
            self.reader.read(node)
        for name in ("table", "row", "pair"):
            node = self.graph.get_attr(name)
            node.meta["val"] = mode.from_tensor(getattr(self.gm, name), static_shapes=True)
            self.nodes.append(node)
        self.sizes = {}
        for dim in (0, 1):
            size = g.call_op(self.graph, aten.sym_size.int, self.nodes[0], dim)
            self.sizes[str(g.value(size))] = size
        self.refused = 0
        self.replacements = len(self.env.replacements)
        total = sum(LENGTHS)
        x_packed = torch.randn(1, total, WIDTH, generator=generator)
        ids_packed = torch.randint(2, (1, total), generator=generator)
        ends = list(itertools.accumulate(LENGTHS))
        spans = [(0, total), *((end - n, end) for n, end in zip(LENGTHS, ends, strict=True))]
        inputs = [(ids_packed[:, a:b], x_packed[:, a:b]) for a, b in spans]
        inputs.append((torch.cat([ids_packed[:, :3], ids_packed[:, 4:7]]), torch.randn(2, 3, WIDTH)))
        self.runs: list[dict[fx.Node, Any]] = []
        """What each node holds: of the packed batch, of each sequence, and of two sequences side by side."""
        for pair in inputs:
            values: dict[fx.Node, Any] = dict(zip(self.nodes[:2], pair, strict=True))
            values.update({node: getattr(self.gm, node.name) for node in self.nodes[2:]})
            self._compute(values)
            self.runs.append(values)

    def grow(self) -> None:
        """Add one op, if the check lets it."""
        before = list(self.graph.nodes)
        try:
            made = self._op()
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            made = []  # these operands do not fit
        good = bool(made) and all(isinstance(n, fx.Node) and self._is_good(g.value(n)) for n in made)
        good = good and len(self.env.replacements) == self.replacements
        if good:
            try:
                for values in self.runs[::-1]:
                    self._compute(values)
            except (RuntimeError, IndexError, ValueError, TypeError):
                good = False  # fake tensors take more than real ones
        if good:
            try:
                for node in self.graph.nodes:
                    if node not in before:
                        self.reader.read(node)
            except check_packing._Mixes:
                self.refused += 1
                for axis in self.reader.tokens.values():
                    axis._parts = ()
                good = False
        if good:
            self.nodes += [node for node in made if node not in self.nodes]
        else:
            for node in reversed(list(self.graph.nodes)):
                if node not in before:
                    self.graph.erase_node(node)
                    self.reader._dims.pop(node, None)
                    for values in self.runs:
                        values.pop(node, None)

    def _compute(self, values: dict[fx.Node, Any]) -> None:
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in values:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)

    @staticmethod
    def _is_good(value: object) -> bool:
        return isinstance(value, Tensor) and value.dim() < 6 and not value.is_complex()

    # Random parts of a call.

    def tensor(self, floating: bool | None = None, rank: int = 0) -> fx.Node:
        found = [
            n
            for n in self.nodes
            if g.value(n).dim() >= rank and floating in (None, g.value(n).is_floating_point())
        ]
        of_tokens = [n for n in found if any(isinstance(size, SymInt) for size in g.shape(n))]
        if of_tokens and self.rng.random() < 0.8:
            found = of_tokens
        return self.rng.choice(found[-6:] if self.rng.random() < 0.5 else found)

    def like(self, node: fx.Node) -> fx.Node:
        """A tensor that broadcasts with the node, if one is found."""
        for _ in range(20):
            other = self.tensor(g.value(node).is_floating_point())
            pairs = zip(reversed(g.shape(node)), reversed(g.shape(other)), strict=False)
            if all(str(a) == str(b) or 1 in (a, b) for a, b in pairs):
                return other
        return node

    def size(self, size: int | SymInt) -> Any:
        """A size as an argument."""
        if not isinstance(size, SymInt):
            return size
        found = ax.Size.of(size)
        result: Any = found.constant
        for name in found.symbols.elements():
            result = g.call_op(self.graph, operator.mul, result, self.sizes[name])
        return result

    def dim(self, node: fx.Node, extra: int = 0) -> int:
        rank = g.value(node).dim() + extra
        return self.rng.randrange(-rank, rank)

    def shape(self, node: fx.Node) -> list[Any]:
        """Other sizes with as many elements."""
        rng, sizes = self.rng, list(g.shape(node))
        parts: list[Any] = []
        for size in sizes:
            if isinstance(size, int) and size % 2 == 0 and rng.random() < 0.4:
                parts += [2, size // 2]
            elif isinstance(size, SymInt) and rng.random() < 0.4:
                found = ax.Size.of(size)
                parts += [s for s in (found.constant,) if s != 1]
                parts += [g.value(self.sizes[name]) for name in found.symbols.elements()]
            else:
                parts.append(size)
        if rng.random() < 0.3:
            rng.shuffle(parts)
        while len(parts) > 1 and rng.random() < 0.4:
            at = rng.randrange(len(parts) - 1)
            parts[at : at + 2] = [parts[at] * parts[at + 1]]
        if rng.random() < 0.2:
            parts.insert(rng.randrange(len(parts) + 1), 1)
        return [self.size(part) for part in parts]

    def random_size(self) -> Any:
        return self.rng.choice((1, 2, WIDTH, *self.sizes.values()))

    def index(self, limit: int | SymInt, shape_of: fx.Node | None = None) -> fx.Node:
        """An int64 tensor with values below a limit."""
        limit = limit if isinstance(limit, int) else 1
        source = self.tensor() if shape_of is None else shape_of
        if g.value(source).dtype != torch.int64:
            scaled = g.call_op(self.graph, aten.mul.Tensor, source, 3.7)
            source = g.call_op(self.graph, aten.to.dtype, scaled, torch.int64)
        return g.call_op(self.graph, aten.remainder.Scalar, source, limit)

    def filled(self) -> fx.Node:
        rng = self.rng
        node = self.tensor()
        if rng.random() < 0.4:
            sizes = [self.size(size) for size in g.shape(node)]
        else:
            sizes = [self.random_size() for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3 and len(sizes) > 1:
            sizes[:2] = (
                [g.call_op(self.graph, operator.mul, sizes[0], sizes[1])]
                if any(isinstance(s, fx.Node) for s in sizes[:2])
                else [sizes[0] * sizes[1]]
            )
        value = rng.choice((0.0, 1.0, 0.5))
        return g.call_op(self.graph, aten.full.default, sizes, value, dtype=torch.float32, device="cpu")

    def _op(self) -> list[fx.Node]:
        rng, call = self.rng, self._call
        x = self.tensor(rank=1)
        f = self.tensor(True, rank=1)
        d = self.dim(x)
        n = g.shape(x)[d]
        limit = n if isinstance(n, int) else 1
        a = rng.randrange(limit) if limit else 0
        keep = rng.random() < 0.5
        m = self.tensor(True, rank=2)

        def parted(target: Any, *args: Any) -> list[fx.Node]:
            whole = g.call_op(self.graph, target, *args)
            return [g.call_op(self.graph, operator.getitem, whole, i) for i in range(len(g.value(whole)))]

        def written(part: Any, target: Any, *args: Any) -> list[fx.Node]:
            return call(target, f, part, *args)

        fd = self.dim(f)
        fn = g.shape(f)[fd] if isinstance(g.shape(f)[fd], int) else 2

        def piece() -> fx.Node:
            """Of the size that is replaced, by a constant or by another tensor."""
            cut = g.call_op(self.graph, aten.slice.Tensor, self.like(f), fd, 0, 1)
            sizes = [self.size(s) for s in g.shape(f)]
            sizes[fd] = 1
            return g.call_op(self.graph, aten.expand.default, cut, sizes)

        def scatter_index() -> fx.Node:
            source = self.like(f) if rng.random() < 0.7 else self.tensor()
            index = self.index(fn, source)
            return g.call_op(self.graph, aten.slice.Tensor, index, fd, 0, 1) if keep else index

        row = self.nodes[3]

        def column() -> fx.Node:
            return g.call_op(self.graph, aten.unsqueeze.default, self.nodes[2], -1)

        def greater(other: fx.Node) -> fx.Node:
            return g.call_op(self.graph, aten.gt.Tensor, f, other)

        def indices(t: fx.Node) -> list[fx.Node | None]:
            """Of the first or the last dimension, and perhaps of others."""
            others = [rng.choice((None, self.index(1))) for _ in g.shape(t)[1:]]
            return [self.index(1), *others][:: rng.choice((1, -1))]

        def permuted() -> list[int]:
            return rng.sample(range(g.value(x).dim()), g.value(x).dim())

        def padded(t: fx.Node) -> list[Any]:
            return [1 if rng.random() < 0.3 else self.size(s) for s in g.shape(t)]

        def letters() -> list[fx.Node]:
            one, two = self.tensor(True, rank=1), self.tensor(True, rank=1)
            names: dict[str, str] = {}
            words: list[str] = []
            for t in (one, two)[: rng.randint(1, 2)]:
                word = ""
                for s in g.shape(t):
                    fresh = f"{s}" if rng.random() < 0.7 else f"{s}{len(words)}{len(word)}"
                    word += names.setdefault(fresh, "abcdefghijklmnop"[len(names)])
                words.append(word)
            used = sorted({c for word in words for c in word})
            out = rng.sample(used, rng.randint(1, len(used)))
            return call(aten.einsum.default, ",".join(words) + "->" + "".join(out), [one, two][: len(words)])

        choices: list[Callable[[], list[fx.Node]]] = [
            lambda: call(aten.add.Tensor, f, self.like(f)),
            lambda: call(aten.mul.Tensor, f, self.like(f)),
            lambda: call(aten.maximum.default, f, self.like(f)),
            lambda: call(aten.sin.default, f),
            lambda: call(aten.where.self, g.call_op(self.graph, aten.gt.Scalar, f, 0.1), f, self.like(f)),
            lambda: call(aten.masked_fill.Scalar, f, greater(self.like(f)), 2.0),
            lambda: call(aten.reshape.default, x, self.shape(x)),
            lambda: call(aten.reshape.default, x, self.shape(x)),
            lambda: call(aten.reshape.default, x, self.shape(x)),
            lambda: call(aten.permute.default, x, permuted()),
            lambda: call(aten.permute.default, x, permuted()),
            lambda: call(aten.transpose.int, x, d, self.dim(x)),
            lambda: call(aten.movedim.int, x, d, self.dim(x)),
            lambda: call(aten.unsqueeze.default, x, self.dim(x, 1)),
            lambda: call(aten.squeeze.dim, x, d),
            lambda: call(aten.squeeze.default, x),
            lambda: call(aten.flatten.using_ints, x, d, self.dim(x)),
            lambda: call(aten.expand.default, x, [self.random_size() if s == 1 else -1 for s in g.shape(x)]),
            lambda: call(
                aten.expand.default, x, [self.random_size(), *(self.size(s) for s in g.shape(x))]
            ),
            lambda: call(aten.expand_as.default, x, self.like(x)),
            lambda: call(aten.repeat.default, x, [self.random_size() for _ in g.shape(x)]),
            lambda: call(aten.repeat_interleave.self_int, x, 2, d),
            lambda: [self.filled()],
            lambda: [self.filled()],
            lambda: call(aten.zeros_like.default, x),
            lambda: call(aten.new_ones.default, x, padded(x)),
            lambda: call(aten.sum.dim_IntList, f, [fd], keep),
            lambda: call(aten.mean.dim, f, [fd, self.dim(f)], keep),
            lambda: call(aten.sum.default, f),
            lambda: call(aten.amax.default, f, [], keep),
            lambda: parted(rng.choice((aten.max.dim, aten.min.dim)), f, fd, keep),
            lambda: call(rng.choice((aten.softmax.int, aten.log_softmax.int)), f, fd),
            lambda: call(rng.choice((aten.cumsum.default, aten.cumprod.default)), f, fd),
            lambda: call(aten.logsumexp.default, f, [fd], keep),
            lambda: call(aten.linalg_vector_norm.default, f, 2, rng.choice((None, [fd])), keep),
            lambda: call(aten.argmax.default, f, rng.choice((None, fd)), keep),
            lambda: parted(aten.topk.default, f, 1, fd),
            lambda: parted(aten.sort.default, f, fd),
            lambda: call(aten.slice.Tensor, x, d, a, rng.choice((limit, None, -1)), rng.choice((1, 2))),
            lambda: call(aten.select.int, x, d, rng.choice((a, -1, 0))),
            lambda: parted(aten.chunk.default, x, 2, d),
            lambda: parted(aten.split.Tensor, x, rng.choice((1, 2)), d),
            lambda: parted(aten.unbind.int, x, d),
            lambda: call(aten.flip.default, x, rng.choice(([d], []))),
            lambda: call(aten.roll.default, x, [1], rng.choice(([d], []))),
            lambda: call(aten.diff.default, f, 1, fd, *rng.choice(((), (piece(),), (None, piece())))),
            lambda: call(aten.glu.default, f, fd),
            lambda: call(aten.cat.default, [f, self.like(f), f][: rng.randint(1, 3)], fd),
            lambda: call(aten.stack.default, [f, self.like(f)], self.dim(f, 1)),
            lambda: call(aten.layer_norm.default, f, [WIDTH], self.like(self.nodes[3])),
            lambda: call(aten.rms_norm.default, f, [WIDTH], self.nodes[3]),
            lambda: call(aten.batch_norm.default, m, self.nodes[3], None, self.nodes[3],
                         g.call_op(self.graph, aten.abs.default, self.nodes[3]), False, 0.1, 1.0, False),
            lambda: call(aten.linear.default, f, self.tensor(True, rank=1), rng.choice((None, row))),
            lambda: call(aten.linear.default, f, self.nodes[2], self.nodes[3]),
            lambda: call(aten.matmul.default, f, self.tensor(True, rank=1)),
            lambda: call(aten.matmul.default, f, m),
            lambda: call(aten.matmul.default, f, g.call_op(self.graph, aten.transpose.int, m, -1, -2)),
            lambda: call(aten.bmm.default, f, self.tensor(True, rank=3)),
            lambda: call(aten.addmm.default, self.like(f), m, self.tensor(True, rank=2)),
            lambda: call(aten.baddbmm.default, self.like(f), m, self.tensor(True, rank=3)),
            letters,
            letters,
            lambda: call(aten.conv1d.default, f, column()),
            lambda: call(aten.embedding.default, rng.choice((self.nodes[2], m)), self.index(2)),
            lambda: call(aten.index.Tensor, x, [None] * (d % g.value(x).dim()) + [self.index(limit)]),
            lambda: call(aten.index.Tensor, x, indices(x)),
            lambda: call(aten.index_select.default, x, d, self.index(limit)),
            lambda: call(aten.index_put.default, f, [None] * (fd % g.value(f).dim()) + [self.index(fn)],
                         self.tensor(True), keep),
            lambda: call(aten.index_put.default, f, indices(f),
                         self.tensor(True), keep),
            lambda: call(aten.gather.default, f, fd, scatter_index()),
            lambda: call(aten.take_along_dim.default, f, scatter_index(), rng.choice((fd, fd, None))),
            lambda: written(fd, aten.scatter.value, scatter_index(), 2.0),
            lambda: written(fd, aten.scatter.src, scatter_index(), self.like(f)),
            lambda: written(fd, aten.scatter_add.default, scatter_index(), self.like(f)),
            lambda: written(fd, aten.scatter_reduce.two, scatter_index(), self.like(f), "sum"),
            lambda: call(aten.slice_scatter.default, f, piece(), fd, 0, 1),
            lambda: call(aten.select_scatter.default, f,
                         g.call_op(self.graph, aten.select.int, piece(), fd, 0), fd, 0),
            lambda: call(aten.constant_pad_nd.default, f,
                         rng.choices((0, 0, 1, -1), k=2 * rng.randint(1, g.value(f).dim())), 0.5),
            lambda: call(aten.tril.default, f),
            lambda: call(aten.one_hot.default, self.index(2), 2),
        ]  # fmt: skip
        return rng.choice(choices)()

    def _call(self, target: Any, *args: Any) -> list[fx.Node]:
        return [g.call_op(self.graph, target, *args)]


def parts(program: Program, dims: ax.Dims, value: Tensor, starts: int, length: int, total: int) -> Tensor:
    """What of a packed tensor belongs to a sequence; all of it where it has no axis of tokens."""
    reader = program.reader
    place = reader.place[0]
    b, s = program.sizes
    sizes = {b: 1, s: total}
    flat, index = [], []
    for dim in dims:
        for axis in dim:
            count = axis.size.constant
            for name in axis.size.symbols.elements():
                count *= sizes[name]
            flat.append(count)
            if axis is place:
                index.append(slice(starts, starts + length))
            elif axis in reader._same:
                index.append(slice(0, 1))
            else:
                index.append(slice(None))
    return value.reshape(flat)[tuple(index)] if flat else value.reshape(())


def is_uniform(program: Program, dims: ax.Dims, value: Tensor, b: int, s: int) -> bool:
    """Whether all elements are equal along the axes of which that is said."""
    sizes = dict(zip(program.sizes, (b, s), strict=True))
    flat: list[int] = []
    same: list[int] = []
    for axis in (axis for dim in dims for axis in dim):
        count = axis.size.constant
        for name in axis.size.symbols.elements():
            count *= sizes[name]
        if axis in program.reader._same:
            same.append(len(flat))
        flat.append(count)
    value = value.reshape(flat or ())
    return all(torch.equal(value, value.narrow(dim, 0, 1).expand_as(value)) for dim in same if flat[dim])


def check(program: Program, seed: int) -> int:
    """Compare each tensor of a packed batch with those of its sequences alone."""
    total, checked = sum(LENGTHS), 0
    packed, *alone, batched = program.runs
    ends = list(itertools.accumulate(LENGTHS))
    for node in program.nodes:
        dims = program.reader.of(node)
        if not any(axis.is_dynamic for axis in ax.flat(dims)):
            continue
        where = f"program {seed}, {node.format_node()} {dims}\n{program.graph}"
        assert is_uniform(program, dims, packed[node], 1, total), where
        assert is_uniform(program, dims, batched[node], 2, 3), where
        for end, length, own in zip(ends, LENGTHS, alone, strict=True):
            wanted = parts(program, dims, own[node], 0, length, length)
            found = parts(program, dims, packed[node], end - length, length, total)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, equal_nan=True, msg=where)
        checked += 1
    return checked


def test_random_programs() -> None:
    """Of the tensors that are let through, none depends on what else is in the batch."""
    checked = refused = 0
    for seed in range(int(os.environ.get("AD_FUZZ_PROGRAMS", "20"))):
        program = Program(seed)
        for _ in range(30):
            program.grow()
        checked += check(program, seed)
        refused += program.refused
    assert checked > refused > 0
