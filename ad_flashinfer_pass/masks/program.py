"""The part of a graph that computes an attention mask, as a program of its own.

The mask's backward slice is cut where only a shape is read, so that the program's inputs are the number
of rows, the number of tokens and the positions, and nothing else: a mask that reads anything else is
refused here. Writes in place to a tensor of the slice, also through views, belong to it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Hashable, Iterator
from functools import cached_property, reduce
from typing import Any, Literal, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymInt, Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate
from torch.utils._sympy import functions as sym

from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.graph import edit as g

aten = torch.ops.aten

Shape: TypeAlias = tuple[int | sympy.Expr, ...]
Symbol: TypeAlias = Literal["rows", "size"]

# Arguments of which only the shape and dtype are read.
_SHAPE_ARGS: dict[Any, str] = {
    **dict.fromkeys((aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty), "self"),
    **dict.fromkeys((aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like), "self"),
    **dict.fromkeys((aten.expand_as, aten.view_as, aten.reshape_as, aten.type_as, aten.to), "other"),
}
# A constant above this is not computed ahead: 2**25 float32 are 128 MiB.
_LARGEST_CONSTANT = 2**25
# Sizes at which a program is traced again; distinct, and unlike the constants of masks.
_TRACE_ROWS, _TRACE_SIZE = 3, 29


class MaskProgram:
    """A mask as a function of rows, tokens and positions."""

    def __init__(self, mask: fx.Node, where: str = "") -> None:
        """Cut the program out of the graph of ``mask``.

        Args:
            mask: the node of the mask.
            where: its place in the user's source for messages, if the graph does not say it.

        Raises:
            MaskError: the mask reads values that are neither positions nor constants, or its sizes are not
                those of the tokens.
        """
        self.mask = mask
        self.where = where or g.where(mask)
        self._order = {node: place for place, node in enumerate(mask.graph.nodes)}
        self._writes = [node for node in mask.graph.nodes if _writes(node)]
        found = self._with_writes(set(_needed(mask)))
        self.nodes = sorted(found, key=self._order.__getitem__)
        self.is_functional = not any(map(_writes, self.nodes))
        self._check_inputs()
        self.symbols = _symbols(mask.graph, self.where)
        self.args = {
            node: {name: _arg(arg) for name, arg in g.op_args(node).items()}
            for node in self.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        }
        self._shapes: dict[fx.Node, Shape] = {}
        self._single_dims: dict[fx.Node, tuple[bool, ...]] = {}
        self._compute_dtypes: dict[fx.Node, torch.dtype] = {}
        self._check_shape()

    @property
    def reads_positions(self) -> bool:
        """Whether the values of the positions matter."""
        return any(node.op == "placeholder" for node in self.nodes)

    @property
    def has_rows(self) -> bool:
        """Whether there may be several rows; a graph from torch.compile has one, of packed sequences."""
        return "rows" in self.symbols.values()

    def sizes(self) -> tuple[int, int]:
        """Fewest and most tokens for which the graph is valid, by the ranges that tracing recorded."""
        low, high = 1, 2**62
        for symbol, meaning in self.symbols.items():
            bounds = self._shape_env.var_to_range.get(symbol)
            if meaning == "size" and bounds is not None:
                low = max(low, int(bounds.lower)) if bounds.lower.is_Integer else low
                high = min(high, int(bounds.upper)) if bounds.upper.is_Integer else high
        return (1 if low <= 2 else low), high  # tracing always assumes at least 2

    @property
    def _shape_env(self) -> Any:
        return next(
            size.node.shape_env
            for node in self.mask.graph.find_nodes(op="placeholder")
            if g.is_tensor(node)
            for size in g.shape(node)
            if isinstance(size, SymInt)
        )

    def _check_shape(self) -> None:
        """A mask is [rows or 1, heads, tokens or 1, tokens or 1], or has fewer dimensions."""
        shape = (1, 1, *self.shape(self.mask))[-4:]
        heads, *tokens = shape[1:]
        if (
            g.value(self.mask).dim() < 2
            or not isinstance(heads, int)
            or not all(size == 1 or self.symbols.get(size) == "size" for size in tokens)
        ):
            raise MaskError(
                f"{self.where}: an attention mask must have the shape [tokens, tokens], "
                "[heads, tokens, tokens] or [batch, heads, tokens, tokens], with the tokens of the input, "
                f"got {self.shape(self.mask)}."
            )

    @property
    def num_heads(self) -> int:
        """Heads for which the mask differs, 1 if it has no dimension of heads."""
        heads = (1, 1, *self.shape(self.mask))[-3]
        assert isinstance(heads, int)
        return heads

    def shape(self, node: fx.Node) -> Shape:
        """Sizes of a tensor node, as numbers or expressions of sizes."""
        if node not in self._shapes:
            self._shapes[node] = tuple(map(_arg, g.shape(node)))
        return self._shapes[node]

    def single_dims(self, node: fx.Node) -> tuple[bool, ...]:
        """Which dimensions of a node have size 1 for all sizes of the input, and so broadcast."""
        if node not in self._single_dims:
            self._single_dims[node] = tuple(isinstance(size, int) and size == 1 for size in self.shape(node))
        return self._single_dims[node]

    def compute_dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype to which an op of ``self`` and ``other`` brings both."""
        if node not in self._compute_dtypes:
            args = (self.args[node][name] for name in ("self", "other"))
            a, b = (g.value(arg) if isinstance(arg, fx.Node) else _sample(arg) for arg in args)
            self._compute_dtypes[node] = torch.result_type(a, b)
        return self._compute_dtypes[node]

    def _with_writes(self, found: set[fx.Node]) -> set[fx.Node]:
        """Add the writes in place to tensors of the slice, and what they need in turn."""
        read_at = [self._order[user] for user in self.mask.users if "attention" in str(user.target)]
        first, last = min(read_at, default=len(self._order)), max(read_at, default=0)
        pending = True
        while pending:
            bases = {_base(node) for node in found}
            pending = False
            for write in self._writes:
                target = _base(write)
                if write in found or target not in bases or self._order[write] > max(first, last):
                    continue
                if self._order[write] > first:
                    raise MaskError(
                        f"{self.where}: the attention mask is changed in place by {write.name} between two "
                        "of its readers. Build each layer's mask as a tensor of its own."
                    )
                found |= set(_needed(write))
                pending = True
        return found

    def _check_inputs(self) -> None:
        for node in self.nodes:
            if node.op == "placeholder" and not _is_position(node):
                raise self._reads_tokens(node)
        for node in self.nodes:
            if _writes(node) and _base(node).op != "call_function":
                raise MaskError(
                    f"{self.where}: {node.name} changes {_base(node).target} in place, which would carry "
                    "over to the next call. Build the mask from a copy of it."
                )
            if node.op == "get_attr" and not _is_loaded(g.attribute(node)):
                raise MaskError(
                    f"{self.where}: the attention mask reads {node.target}, which holds no values. Load the "
                    "weights and buffers of the model before the pass."
                )
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_idle(node):
                raise MaskError(
                    f"{self.where}: the attention mask is random ({node.target}); export in eval mode."
                )
            if node.op != "placeholder" and node.op != "get_attr" and not _is_aten(node):
                raise self.unknown(node)

    def _reads_tokens(self, node: fx.Node) -> MaskError:
        is_learned = any(
            n.op == "get_attr" and isinstance(g.attribute(n), torch.nn.Parameter) for n in self.nodes
        )
        advice = (
            "It depends on activations of the model (learned or dynamic sparsity), which no kernel computes."
            if is_learned
            else "A padding or custom mask cannot be cached: export without it; sequences of different "
            "length need no padding here. An input of positions must be called position_ids."
        )
        return MaskError(
            f"{self.where}: the attention mask must be computed from positions and constants only, but "
            f"reads the values of the input {node.name}. {advice}"
        )

    def unknown(self, node: fx.Node, what: str = "") -> MaskError:
        """The refusal of a node whose meaning is not known."""
        return MaskError(
            f"{self.where}: the attention mask cannot be proved, because the effect of {node.target}"
            f"{what and ' ' + what} ({g.where(node)}) is not known here. Compute the mask with comparisons "
            "of index vectors, as in (k <= q) & (k > q - window)."
        )

    @cached_property
    def constants(self) -> dict[fx.Node, Tensor]:
        """Values, on the CPU, of the nodes that depend neither on sizes nor on positions."""
        values: dict[fx.Node, Tensor] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                values[node] = g.attribute(node).detach().cpu()
            elif node.op == "call_function" and self._is_constant(node, values):
                values[node] = self._call(node, values, {})
        return values

    def _is_constant(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> bool:
        shape = self.shape(node) if g.is_tensor(node) else (sympy.oo,)
        return (
            self.is_functional
            and all(isinstance(size, int) for size in shape)
            and reduce(operator.mul, shape, 1) <= _LARGEST_CONSTANT
            and all(source in values for source in node.all_input_nodes)
        )

    def run(self, rows: int | SymInt, size: int | SymInt, positions: Tensor) -> Tensor:
        """The mask itself, for int64 ``positions`` of [rows, size], on the CPU.

        Returns:
            bool or float, broadcastable to [rows, heads, size, size].

        Raises:
            MaskError: it cannot be computed for so many tokens.
        """
        symbols = {"rows": rows, "size": size}
        values: dict[fx.Node, Tensor] = {}
        try:
            with torch.no_grad():
                for node in self.nodes:
                    if node in self.constants:
                        # Writes in place must not reach the model's own buffers.
                        constant = self.constants[node]
                        values[node] = constant if self.is_functional else constant.clone()
                    elif node.op == "placeholder":
                        values[node] = positions if g.value(node).dim() > 1 else positions[0]
                    else:
                        values[node] = self._call(node, values, symbols)
        except (RuntimeError, IndexError, ValueError, TypeError) as err:
            raise MaskError(
                f"{self.where}: the attention mask cannot be computed for {rows} x {size} tokens: "
                f"{' '.join(str(err).split())[:300]}"
            ) from err
        return values[self.mask]

    def _call(self, node: fx.Node, values: dict[fx.Node, Tensor], symbols: dict[str, Any]) -> Any:
        assert callable(node.target)

        def at(arg: Any) -> Any:
            if isinstance(arg, torch.device):
                return torch.device("cpu")
            if not isinstance(arg, fx.Node):
                return arg
            if arg in values:
                return values[arg]
            if not g.is_tensor(arg):
                return self.number(g.value(arg), symbols)
            shape = [self.number(size, symbols) for size in g.shape(arg)]
            return torch.empty((), dtype=g.value(arg).dtype).expand(shape)

        return node.target(*map_aggregate(node.args, at), **map_aggregate(node.kwargs, at))

    def number(self, value: Any, symbols: dict[str, Any]) -> Any:
        """A scalar of the graph at given rows and size."""
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            leaves = {symbol: symbols[meaning] for symbol, meaning in self.symbols.items()}
            return self.evaluate(value.node.expr, leaves.__getitem__, _PYTHON)
        return value

    def evaluate(self, expr: Any, leaf: Callable[[Any], Any], algebra: dict[Any, Callable[..., Any]]) -> Any:
        """An expression of sizes in some algebra; ``leaf`` takes a symbol or a number.

        Raises:
            MaskError: the expression holds a size that is not that of the tokens, or an unknown function.
        """
        if expr.is_Symbol and expr not in self.symbols:
            raise self._strange_size(expr)
        if expr.is_Symbol or expr.is_number:
            return leaf(expr) if expr.is_Symbol else algebra["number"](expr)
        for kind, function in algebra.items():
            if not isinstance(kind, str) and isinstance(expr, kind):
                return reduce(function, (self.evaluate(arg, leaf, algebra) for arg in expr.args))
        raise self._strange_size(expr)

    def _strange_size(self, expr: Any) -> MaskError:
        return MaskError(
            f"{self.where}: the attention mask depends on the size {expr}, which does not follow from the "
            "number of tokens. Compute the mask from the shape of input_ids alone."
        )

    def functional(self) -> MaskProgram:
        """The same program traced again, without writes in place and with fewer kinds of ops."""
        low, high = self.sizes()
        size = max(low, min(_TRACE_SIZE, high))

        def mask(tokens: Tensor, position_ids: Tensor) -> Tensor:
            return self.run(tokens.shape[0], tokens.shape[1], position_ids)

        tokens = torch.zeros(_TRACE_ROWS, size, dtype=torch.int64)
        positions = torch.arange(size).repeat(_TRACE_ROWS, 1)
        trace = make_fx(
            torch.func.functionalize(mask), tracing_mode="symbolic", _allow_non_fake_inputs=True
        )  # the constants are real tensors
        traced = trace(tokens, positions)
        traced.graph.eliminate_dead_code()
        (output,) = traced.graph.output_node().all_input_nodes
        return MaskProgram(output, self.where)

    def fingerprint(self) -> Hashable:
        """Equal for programs that compute the same by the same steps, whatever their names."""
        names = {node: place for place, node in enumerate(self.nodes)}

        def plain(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return str(arg)
            return names.get(arg, str(g.shape(arg) if g.is_tensor(arg) else g.value(arg)))

        steps = []
        for node in self.nodes:
            content = str(node.target) if node.op == "call_function" else node.op
            if node.op == "get_attr":
                content = _digest(self.constants[node])
            meta = (str(tuple(g.shape(node))), g.value(node).dtype) if g.is_tensor(node) else None
            steps.append((content, str(map_aggregate((node.args, node.kwargs), plain)), meta))
        return tuple(steps)


_PYTHON: dict[Any, Callable[..., Any]] = {
    "number": lambda number: int(number) if number.is_Integer else float(number),
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sym.Max: torch.sym_max,
    sym.Min: torch.sym_min,
    sym.FloorDiv: operator.floordiv,
    sym.PythonMod: operator.mod,
    sym.Mod: operator.mod,
}


def _arg(arg: Any) -> Any:
    """An argument in which scalars of the graph are numbers or expressions."""
    if isinstance(arg, (list, tuple)):
        return [_arg(part) for part in arg]
    if isinstance(arg, fx.Node) and not g.is_tensor(arg):
        arg = g.value(arg)
    if isinstance(arg, (torch.SymInt, torch.SymFloat)):
        expr = arg.node.expr
        return int(expr) if expr.is_Integer else expr
    return arg


def _sample(scalar: float | sympy.Expr) -> float:
    """A number of the kind of a scalar."""
    is_float = isinstance(scalar, float) or (isinstance(scalar, sympy.Expr) and not scalar.is_integer)
    return 1.0 if is_float else 1


def _needed(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes whose values the node's value depends on; scalars and shapes are not followed."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        sources = list(current.all_input_nodes)
        packet = getattr(current.target, "overloadpacket", None)
        if packet in _SHAPE_ARGS:
            shape_arg = g.op_args(current).get(_SHAPE_ARGS[packet])
            sources = [source for source in sources if source is not shape_arg]
        for source in sources:
            is_scalar = isinstance(g.value(source), (int, float, torch.SymInt, torch.SymFloat))
            if source not in seen and not is_scalar:
                seen.add(source)
                stack.append(source)


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a node may share: views are followed to what they look at."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        args = g.op_args(node)
        shared = [args.get(arg.name) for arg in schema.arguments if arg.alias_info is not None]
        if not shared or not isinstance(shared[0], fx.Node):
            break
        node = shared[0]
    return node


def _symbols(graph: fx.Graph, where: str) -> dict[sympy.Symbol, Symbol]:
    """Meaning of the symbols in the shapes [rows, size, ...] of tokens (the first input) and positions."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if g.is_tensor(node)]
    inputs = [node for node in inputs if len(g.shape(node)) >= 2]
    meanings: dict[sympy.Symbol, Symbol] = {}
    for node in inputs[:1] + [node for node in inputs if _is_position(node)]:
        rows, size = map(_arg, g.shape(node)[:2])
        if isinstance(rows, sympy.Symbol):
            meanings.setdefault(rows, "rows")
        if isinstance(size, sympy.Symbol):
            meanings.setdefault(size, "size")
    if "size" not in meanings.values():
        raise MaskError(
            f"{where}: the number of tokens must be dynamic, but the graph was made for one length. "
            "Export with torch.export.Dim.DYNAMIC for the sequence dimension of input_ids and position_ids."
        )
    return meanings


def _is_position(node: fx.Node) -> bool:
    return "position" in node.name and 1 <= g.value(node).dim() <= 2


def _writes(node: fx.Node) -> bool:
    """Whether the op changes the values of an argument; ``detach_`` does not."""
    return g.mutates_input(node) and not g.is_op(node, aten.detach_)


def _is_idle(node: fx.Node) -> bool:
    """Whether a random op draws nothing: dropout in eval mode."""
    args = g.op_args(node)
    return not args.get("train", True) or args.get("p") == 0


def _is_aten(node: fx.Node) -> bool:
    """Whether a node can be run and traced again: an op, or one of its several results."""
    return isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem


def _is_loaded(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta"


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(data.tobytes()).hexdigest()}"
