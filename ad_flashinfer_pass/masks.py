"""The mask prover: what an attention mask subgraph means, shown by running it.

A mask is a small program from the shape of the batch and the positions to visibility. It is cut out of
the graph, run on probes, and compared with closed forms; nothing is concluded from how it is written.

What is probed, and why
-----------------------
* *Every size up to 10*, with one to three sequences: off-by-ones at small sizes, and batch rows that differ.
* *Around every integer constant of the program* (window, chunk, buffer sizes: c-1, c, c+1, c+2, 2c+1):
  a comparison with c changes its value only there.
* *The longest size that fits*, min(max_seq_len, 4096) with one sequence: for a max_seq_len up to 4096 this is
  the whole mask that the model will ever use, so the class is exact there by exhaustion, not by sampling.
* *Positions that start later*: whether the mask reads absolute positions; if it does, the
  certificate says that positions must start at 0.

What is refused
---------------
A mask that reads token values, parameters or activations; that differs between heads (other than
ALiBi), between sequences of a batch, or from the closed form at any probed place; that has a constant
below max_seq_len that is too large to probe.

The certificate rests on a contract that the runtime keeps: positions are consecutive within a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.errors import MaskError

aten = torch.ops.aten

# An additive mask value at or below this takes a weight to zero: exp(-1e4) is 0 in float32, and every
# query sees itself, so the largest logit is far above it.
HIDDEN = -1e4
# Sizes above this are not run: a mask of 8200 x 8200 booleans takes 67 MB for each temporary.
_LARGEST_PROBE = 8200
_EXHAUSTIVE = 4096

_SHAPE_ONLY = (
    aten.sym_size,
    aten.new_ones,
    aten.new_zeros,
    aten.new_full,
    aten.new_empty,
    aten.ones_like,
    aten.zeros_like,
    aten.full_like,
    aten.empty_like,
)


@dataclass(frozen=True)
class MaskClass:
    """A closed form: key j is visible to query i iff j <= i, j > i - W and i // C == j // C."""

    sliding_window: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        parts = ["causal"]
        if self.sliding_window is not None:
            parts.append(f"sliding_window={self.sliding_window}")
        if self.chunk is not None:
            parts.append(f"chunk={self.chunk}")
        return " ".join(parts)

    def visible(self, size: int) -> Tensor:
        """bool [size, size], rows are queries."""
        q, k = torch.arange(size)[:, None], torch.arange(size)
        seen = k <= q
        if self.sliding_window is not None:
            seen &= k > q - self.sliding_window
        if self.chunk is not None:
            seen &= q // self.chunk == k // self.chunk
        return seen


@dataclass(frozen=True)
class Certificate:
    """What was shown about one mask."""

    mask_class: MaskClass
    probes: tuple[tuple[int, int], ...]
    """(batch, size) of every run."""
    constants: tuple[int, ...]
    """Integers in the program."""
    reads_positions: bool
    contract: str

    def __str__(self) -> str:
        largest = max(size for _, size in self.probes)
        return f"{self.mask_class}, {len(self.probes)} probes up to {largest}; {self.contract}"


def prove(mask: fx.Node, max_seq_len: int) -> Certificate:
    """Classify the mask that ``mask`` computes, for sequences of up to ``max_seq_len`` tokens.

    Raises:
        MaskError: it is none of the closed forms; names the node, its line and, where there is one, the first
            (query, key) that differs.
    """
    program = _MaskProgram(mask)
    constants = program.constants()
    sizes = list(_sizes(constants, max_seq_len, mask))
    largest = sizes[-1]
    found = _closed_form(_visible(program.run(1, largest, 0)[0], mask), mask)
    probes = [(1, largest)]
    for size in sizes:
        for batch in (1, 2, 3) if size <= 10 else (1,):
            if (batch, size) != (1, largest):
                probes.append((batch, size))
                _compare(program.run(batch, size, 0), found, mask, batch, size)
    offset = min(9, largest)
    shifted = program.reads_positions and not _agrees(program.run(2, offset, 3), found, mask, offset)
    contract = "positions are consecutive within a sequence" + (" and start at 0" if shifted else "")
    return Certificate(found, tuple(probes), constants, program.reads_positions, contract)


class _MaskProgram:
    """The mask's backward slice, cut at shapes, as a graph of its own."""

    def __init__(self, mask: fx.Node) -> None:
        self._mask = mask
        nodes = list(g.ancestors(mask, stop=lambda n: g.is_op(n, *_SHAPE_ONLY) or n.op == "placeholder"))
        sources = _shape_sources(nodes)
        self._nodes = [n for n in mask.graph.nodes if n in set(nodes) - sources]
        self._shapes = {n: g.shape(n) for n in sources}
        self._check_sources()
        self.reads_positions = any(n.op == "placeholder" for n in self._nodes)
        self._module = self._build()

    def _check_sources(self) -> None:
        for node in self._nodes:
            if node.op == "placeholder" and node.name != "position_ids":
                raise MaskError(
                    f"{g.where(self._mask)}: the attention mask is computed from the values of {node.name}; "
                    "only masks of positions can be cached. Export without a padding or custom mask."
                )
            if node.op == "get_attr" and isinstance(_attr(node), torch.nn.Parameter):
                raise MaskError(
                    f"{g.where(self._mask)}: the attention mask is computed from the parameter "
                    f"{node.target}; a learned bias over positions has no kernel."
                )

    def _build(self) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        dims = {}
        for name in ("batch", "size", "position_ids"):
            dims[name] = graph.placeholder(name)
        for node in self._shapes:
            sizes = [_dim_expression(graph, size, dims, node, self._mask) for size in self._shapes[node]]
            copies[node] = graph.call_function(torch.empty, (sizes,), {"dtype": g.value(node).dtype})
        for node in self._nodes:
            if node.op == "placeholder":
                copies[node] = dims["position_ids"]
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                _onto_cpu(copies[node])
        graph.output(copies[self._mask])
        owner = self._mask.graph.owning_module
        return fx.GraphModule(owner, graph)

    def constants(self) -> tuple[int, ...]:
        """Integers above 1 that the program mentions, buffer sizes and small buffers included."""
        found: set[int] = set()
        for node in self._nodes:
            if node.op == "get_attr":
                tensor = _attr(node)
                found.update(tensor.shape)
                if tensor.numel() <= 64:
                    found.update(int(v) for v in tensor.flatten().tolist() if abs(v) < 2**31)
            for arg in _flat_args(node):
                if isinstance(arg, (int, float)) and abs(arg) < 2**31 and float(arg).is_integer():
                    found.add(abs(int(arg)))
        return tuple(sorted(c for c in found if c > 1))

    def run(self, batch: int, size: int, start: int) -> Tensor:
        """The mask for ``batch`` sequences of ``size`` tokens whose positions begin at ``start``.

        Returns:
            bool or float [batch, heads or 1, size, size].
        """
        positions = torch.arange(start, start + size).repeat(batch, 1)
        try:
            with torch.no_grad():
                mask = self._module(batch, size, positions)
                while mask.dim() < 4:
                    mask = mask[None]
                return mask.expand(*mask.shape[:2], size, size)
        except (RuntimeError, IndexError, ValueError, TypeError) as err:
            raise MaskError(
                f"{g.where(self._mask)}: the attention mask cannot be computed for {batch} x {size} tokens: "
                f"{' '.join(str(err).split())[:300]}"
            ) from err


def _shape_sources(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes of which only the shape is read."""
    sources = set()
    for node in nodes:
        if g.is_op(node, *_SHAPE_ONLY):
            sources.update(n for n in node.all_input_nodes if g.is_tensor(n))
    used = {
        source
        for node in nodes
        if not g.is_op(node, *_SHAPE_ONLY)
        for source in node.all_input_nodes
        if g.is_tensor(source)
    }
    return sources - used


def _dim_expression(
    graph: fx.Graph, size: int | SymInt, dims: dict[str, fx.Node], node: fx.Node, mask: fx.Node
) -> Any:
    """A size in terms of the probe's batch and size."""
    if isinstance(size, int):
        return size
    ids = next(n for n in mask.graph.nodes if n.op == "placeholder" and n.name == "input_ids")
    symbols = {str(s): dims[d] for s, d in zip(g.shape(ids), ("batch", "size"), strict=True)}
    if str(size) in symbols:
        return symbols[str(size)]
    if {str(s) for s in size.node.expr.free_symbols} <= set(symbols) and size.node.expr.is_Mul:
        result: Any = 1
        for factor in size.node.expr.args:
            term = int(factor) if factor.is_Integer else symbols[str(factor)]
            result = term if result == 1 else graph.call_function(_multiply, (result, term))
        return result
    raise MaskError(
        f"{g.where(mask)}: the attention mask depends on the shape of {node.name}, whose size {size} is not "
        "that of the tokens."
    )


def _multiply(a: int, b: int) -> int:
    return a * b


def _onto_cpu(node: fx.Node) -> None:
    """Probes run on the CPU whatever the device of the graph."""
    if "device" in node.kwargs:
        node.kwargs = {**node.kwargs, "device": torch.device("cpu")}


def _attr(node: fx.Node) -> Tensor:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def _flat_args(node: fx.Node) -> Iterator[Any]:
    stack: list[Any] = [*node.args, *node.kwargs.values()]
    while stack:
        arg = stack.pop()
        if isinstance(arg, (list, tuple)):
            stack.extend(arg)
        elif not isinstance(arg, (fx.Node, bool)):
            yield arg


def _sizes(constants: tuple[int, ...], max_seq_len: int, mask: fx.Node) -> Iterator[int]:
    """Probe sizes, ascending."""
    sizes = set(range(1, 11)) | {_EXHAUSTIVE, max_seq_len}
    for constant in constants:
        if constant >= max_seq_len:
            continue
        if constant + 2 > _LARGEST_PROBE:
            raise MaskError(
                f"{g.where(mask)}: the attention mask depends on the constant {constant}, which is too large "
                f"to check (at most {_LARGEST_PROBE - 2}). Set max_seq_len to at most {constant}."
            )
        sizes |= {constant - 1, constant, constant + 1, constant + 2, 2 * constant + 1}
    top = min(max_seq_len, max(_EXHAUSTIVE, *(c + 2 for c in constants if c < max_seq_len), 1))
    yield from sorted(size for size in sizes if 1 <= size <= top)


def _visible(mask: Tensor, node: fx.Node) -> Tensor:
    """bool [size, size] of one sequence's mask, which must be the same for all heads."""
    if mask.dtype != torch.bool:
        hidden = mask <= HIDDEN
        if not bool((hidden | (mask == 0)).all()):
            value = mask[~hidden & (mask != 0)][0].item()
            raise MaskError(
                f"{g.where(node)}: the attention mask adds {value:.6g} to a logit; a bias other than 0 and "
                "-inf has no kernel here."
            )
        mask = ~hidden
    if not bool((mask == mask[:1]).all()):
        raise MaskError(f"{g.where(node)}: the attention mask differs between heads.")
    return mask[0]


def _closed_form(visible: Tensor, node: fx.Node) -> MaskClass:
    """The closed form that equals ``visible`` [size, size].

    The first visible key of each row says window and chunk; the whole matrix is then compared.
    """
    size = visible.shape[0]
    first = visible.to(torch.uint8).argmax(1).tolist()
    lag = [q - k for q, k in enumerate(first)]
    candidates = [MaskClass()]
    # A chunk begins where the first visible key jumps to the query itself.
    starts = [q for q in range(1, size) if first[q] == q and first[q - 1] < q]
    if starts and starts[0] > 1:
        candidates.append(MaskClass(chunk=starts[0]))
    widest = max(lag) + 1
    if widest < size:
        candidates.append(MaskClass(sliding_window=widest))
        if starts and starts[0] > 1:
            candidates.append(MaskClass(sliding_window=widest, chunk=starts[0]))
    matrices = [(c, c.visible(size)) for c in candidates]
    for candidate, matrix in matrices:
        if torch.equal(matrix, visible):
            return candidate
    nearest, matrix = min(matrices, key=lambda pair: int((pair[1] != visible).sum()))
    raise _disagreement(visible, matrix, nearest, node, 1, size)


def _compare(mask: Tensor, found: MaskClass, node: fx.Node, batch: int, size: int) -> None:
    expected = found.visible(size)
    for row in mask:
        visible = _visible(row, node)
        if not torch.equal(visible, expected):
            raise _disagreement(visible, expected, found, node, batch, size)


def _agrees(mask: Tensor, found: MaskClass, node: fx.Node, size: int) -> bool:
    expected = found.visible(size)
    return all(torch.equal(_visible(row, node), expected) for row in mask)


def _disagreement(
    visible: Tensor, expected: Tensor, form: MaskClass, node: fx.Node, batch: int, size: int
) -> MaskError:
    query, key = (visible != expected).nonzero()[0].tolist()
    does = "sees" if visible[query, key] else "does not see"
    return MaskError(
        f"{g.where(node)}: the attention mask is no closed form that a kernel can run: nearest is {form}, but at "
        f"batch {batch}, {size} tokens, query {query} {does} key {key}."
    )
