"""Inductor on what lies between our ops.

A transformed graph is cut at the ops of ``ad_flashinfer`` that use the cache: they read lengths on the host
and write to pages, which Inductor must neither see through nor move. It is cut at experts, too, quantized or
not, which have kernels of their own and no fixed number of tokens for each of them. What lies between two
cuts, a piece, is compiled by ``torch.compile``. Its weights are its inputs, so that equal pieces, those of
equal layers, are compiled once: the compile time does not grow with the number of layers.

Tokens come as one row, [1, T], in decode steps too, which the packing proof allows. T is then the only size
that changes, and a piece is compiled twice: for any T, and for T = 1, where Inductor makes matrix-vector
products. A piece that torch.compile refuses runs op by op.
"""

from __future__ import annotations

import operator
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.files import cache_folder
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.data import layer_of

aten = torch.ops.aten

_TOKENWISE = ("input_ids", "inputs_embeds", "position_ids", "sequence_lengths")
_TOKENS, _ROWS = 48, 24
"""Tokens and logits' rows of the example: not 0 or 1, which are constants to a ShapeEnv; not equal."""
_CUTS = frozenset(
    getattr(torch.ops.ad_flashinfer, op.__name__).default
    for op in (
        ops.prepare_metadata,
        ops.append_kv,
        ops.keep_hidden_state,
        ops.rope_append,
        ops.cached_attention,
        ops.experts,
        ops.quantized_experts,
    )
) | {cached.default for cached in ops.STATES.values()}

_REFUSALS = (TorchDynamoException, FailOnRecompileLimitHit, ConstraintViolationError)


class Piece(nn.Module):
    """A compiled piece, called from each place of the graph where it occurs.

    Args:
        source: the piece as a graph of tensors.
        token_dims: (input, dimension) of each size that changes from step to step.
        where: the piece's first node, for messages.
    """

    def __init__(self, source: fx.GraphModule, token_dims: list[tuple[int, int]], where: str) -> None:
        super().__init__()
        self.where = where
        self.layers: list[int | None] = []
        """Of the places of the graph that call it."""
        self.refusal: str | None = None
        """Why it runs op by op; None: it is compiled, or has not been called."""
        self._source = source
        self._token_dims = token_dims
        self._variants: set[tuple[int, ...]] = set()
        self._compiled: Callable[..., Any] | None = None
        if any(map(_is_for_inductor, source.graph.nodes)):
            self._compiled = torch.compile(source, fullgraph=True, dynamic=False)

    @property
    def num_calls(self) -> int:
        """Places of the graph that call it."""
        return len(self.layers)

    @property
    def num_variants(self) -> int:
        """How often it was compiled."""
        return len(self._variants)

    def forward(self, *inputs: Tensor) -> Any:
        """The piece's results, a tuple of tensors."""
        if self.refusal is not None or self._compiled is None:
            return self._source(*inputs)
        # 0 and 1 are constants to Dynamo; all other sizes share a variant, once they are marked.
        variant = tuple(min(inputs[i].shape[dim], 2) for i, dim in self._token_dims)
        if variant not in self._variants:
            self._variants.add(variant)
            for (i, dim), size in zip(self._token_dims, variant, strict=True):
                if size == 2:
                    torch._dynamo.mark_dynamic(inputs[i], dim)
        try:
            return self._compiled(*inputs)
        except _REFUSALS as err:
            self.refusal = str(err).strip().partition("\n")[0]
        return self._source(*inputs)  # a piece writes to none of its inputs: nothing is done twice


def _is_for_inductor(node: fx.Node) -> bool:
    """Whether a call computes something by a kernel that is not ours."""
    if node.op != "call_function" or g.is_view(node) or g.is_op(node, aten.sym_size.int):
        return False
    return getattr(node.target, "namespace", None) != "ad_flashinfer"


@dataclass(frozen=True)
class EagerPieces:
    """Pieces of a step that torch.compile refused, so that they run op by op."""

    num_pieces: int
    """Of the step, those that are compiled included."""
    num_eager: int
    most_in_a_layer: int
    reasons: dict[str, str]
    """What torch.compile said, by the first node of the piece."""

    def __str__(self) -> str:
        reasons = "".join(f"; {where}: {reason}" for where, reason in self.reasons.items())
        return (
            f"torch-opt: {self.num_eager} of {self.num_pieces} pieces of a step run op by op, at most "
            f"{self.most_in_a_layer} a layer{reasons}"
        )


def eager_pieces(model: nn.Module) -> EagerPieces | None:
    """Those of the graph in ``model`` that has the most; None if none was cut into pieces."""
    graphs = ([child for child in each.children() if isinstance(child, Piece)] for each in model.modules())
    found = [_count(pieces) for pieces in graphs if pieces]
    return max(found, key=lambda each: each.num_eager, default=None)


def _count(pieces: list[Piece]) -> EagerPieces:
    eager = [piece for piece in pieces if piece.refusal is not None]
    layers = Counter(layer for piece in eager for layer in piece.layers)
    return EagerPieces(
        num_pieces=sum(piece.num_calls for piece in pieces),
        num_eager=sum(piece.num_calls for piece in eager),
        most_in_a_layer=max(layers.values(), default=0),
        reasons={piece.where: piece.refusal or "" for piece in eager},
    )


def keep_compiled() -> None:
    """Let Inductor keep what it compiles for other processes, in a folder that is the user's own.

    What it keeps is code. Its default is a folder of a known name in /tmp, which somebody else may have made;
    torch puts that into the environment when it is imported.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, os.path.abspath(default_cache_dir())):
        folder = cache_folder("inductor")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder or tempfile.mkdtemp())


def compile_pieces(model: fx.GraphModule) -> tuple[fx.GraphModule, list[Piece]]:
    """The same graph with its pieces compiled, each at its first call.

    Args:
        model: a graph after ``initialize_cache``; takes input_ids and position_ids, int64 [b, s], metadata
            and caches.

    Returns:
        A graph of pieces and of our ops, with the same inputs and result; and its pieces.
    """
    flat = _with_one_row(model)
    pieces: dict[str, Piece] = {}
    run: list[fx.Node] = []
    for node in list(flat.graph.nodes):
        if _belongs_in_a_piece(node):
            run.append(node)
        elif run and node.op in ("call_function", "output"):
            _replace_by_piece(flat, run, pieces)
            run = []
    flat.graph.eliminate_dead_code()
    flat.graph.lint()
    flat.recompile()
    return flat, list(pieces.values())


def _with_one_row(model: fx.GraphModule) -> fx.GraphModule:
    """A copy that works on input_ids and position_ids [1, T], with its values computed for that."""
    flat = g.copied(model)
    graph = flat.graph
    inputs = graph.find_nodes(op="placeholder")
    for node, old in zip(inputs, model.graph.find_nodes(op="placeholder"), strict=True):
        node.meta["val"] = g.value(old)
        if node.name in _TOKENWISE:
            with graph.inserting_after(inputs[-1]):
                shape = [1, -1, *g.shape(old)[2:]]
                row = graph.call_function(aten.view.default, (node, shape))
            node.replace_all_uses_with(row, delete_user_cb=lambda user, row=row: user is not row)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with enable_python_dispatcher():  # torch 2.11 cannot take the shape of a linear without
        _Values(flat, mode).propagate_dont_convert_inputs(*(_fake(node, mode) for node in inputs))
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(g.value(node), int):
            g.replace(node, g.value(node))
    return flat


class _Values(FakeTensorProp):
    """Computes the values of each node, those of equal nodes, as in equal layers, once."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, mode)
        self._known: dict[str, Any] = {}
        self._texts: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See ``fx.Interpreter``."""
        if n.op == "get_attr":
            key = _text(g.attribute(n))
        elif n.op == "call_function":
            key = f"{n.target} {map_arg((n.args, n.kwargs), lambda source: _Text(self._texts[source]))}"
        else:
            key = n.name
        if key not in self._known:
            result = super().run_node(n)
            self._known[key] = n.meta["val"] if n.op == "get_attr" else result
        elif self._known[key] is not None:
            n.meta["val"] = self._known[key]
        self._texts[n] = _text(self._known[key])
        return self._known[key]


class _Text(str):
    """What stands for a node among arguments."""

    __slots__ = ()
    __repr__ = str.__str__


def _text(value: Any) -> str:
    """All that the shapes of results depend on."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {value.shape} {value.stride()} {value.storage_offset()}"
    return f"({', '.join(map(_text, value))})" if isinstance(value, (tuple, list)) else str(value)


def _fake(node: fx.Node, mode: FakeTensorMode) -> Tensor:
    """An input of the flat graph: T tokens, any number of logits' rows, the rest as it is."""
    example = g.value(node)
    shape = {"token_gather_indices": (_ROWS,)}.get(
        node.name, (1, _TOKENS, *example.shape[2:]) if node.name in _TOKENWISE else None
    )
    # Only our ops read caches, and any number of pages; in a saved program that has none.
    sizes = [size if isinstance(size, int) else 2 for size in (example.shape if shape is None else shape)]
    dims = [DimDynamic.STATIC if shape is None or size == 1 else DimDynamic.DUCK for size in sizes]
    real = torch.empty(sizes, dtype=example.dtype, device="meta")
    fake = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dims))
    with mode:
        return torch.empty_like(fake, device=example.device)


def _belongs_in_a_piece(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target in _CUTS or isinstance(g.value(node), SymInt):
        return False
    source = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return isinstance(source, fx.Node) and source.target not in _CUTS
    is_row = node.target is aten.view.default and isinstance(source, fx.Node) and source.op == "placeholder"
    return not is_row


def _replace_by_piece(gm: fx.GraphModule, run: list[fx.Node], pieces: dict[str, Piece]) -> None:
    inside = set(run)
    results = [node for node in run if any(user not in inside for user in node.users)]
    source, inputs = _extracted(run, results)
    values = [g.value(node) for node in inputs]
    key = "\n".join([source.code, *(f"{v.dtype} {v.device} {v.shape} {v.stride()}" for v in values)])
    if key not in pieces:
        dims = [(i, d) for i, v in enumerate(values) for d, n in enumerate(v.shape) if isinstance(n, SymInt)]
        pieces[key] = Piece(source, dims, g.where(run[0]))
        gm.add_submodule(f"piece_{len(pieces) - 1}", pieces[key])
    piece = pieces[key]
    layers = (layer_of(g.module_path(node)) for node in run)
    piece.layers.append(next((layer for layer in layers if layer is not None), None))
    with gm.graph.inserting_after(run[-1]):
        call = gm.graph.call_module(f"piece_{list(pieces).index(key)}", tuple(inputs))
    for index, node in reversed(list(enumerate(results))):
        with gm.graph.inserting_after(call):
            part = gm.graph.call_function(operator.getitem, (call, index))
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        gm.graph.erase_node(node)


def _extracted(run: list[fx.Node], results: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Some nodes as a graph of their own, and the nodes that it takes as inputs, all tensors.

    Names are given by order, so that equal pieces have equal code. Sizes are read again, of a tensor that
    comes in.
    """
    inside = set(run)
    tensors: dict[fx.Node, None] = {}
    sizes: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if isinstance(g.value(node), SymInt):
            for source in node.all_input_nodes:
                visit(source)
            sizes[node] = None
        elif node not in inside:
            tensors[node] = None

    for node in run:
        for source in node.all_input_nodes:
            visit(source)
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in tensors:
        copies[node] = graph.placeholder(f"input_{len(copies)}")
    for node in [*sizes, *run]:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: copies[n])
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"value_{len(copies)}")
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(nn.Module(), graph), list(tensors)
