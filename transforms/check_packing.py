"""Proves that sequences may share one batch: that [b, s] may become [1, total_tokens].

That is right only if everything outside attention works token by token. Each node that handles tokens is
checked by a rule for its op: a dimension that counts tokens may be kept, moved, split off or merged, never
reduced, shifted, indexed or contracted; and no tensor may hold a pair of tokens.

Mixture-of-experts layers sort tokens by expert and put them back, which no such rule can follow, nor can
one follow a reshape that merges tokens with heads or experts, or look into an op that is not torch's. If the
graph has such ops, it is run, with
attention replaced by something that is token by token, on tokens in two orders and two shapes, and among
as many others as a step may hold, and must give each token the same logits each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.errors import PackingError
from ad_flashinfer_pass.registry import TransformContext, TransformReport, register

aten = torch.ops.aten
_BATCH, _SEQ = "batch", "seq"


@register("check_packing")
def check_packing(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Check every node between the tokens and the logits.

    Raises:
        PackingError: names the first op that mixes tokens, and its line.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("check_packing")
    checker = _Checker(model)
    dispatch = []
    for node in model.graph.nodes:
        if node.op != "call_function" or not checker.handles_tokens(node):
            continue
        report.num_matches += 1
        reason = checker.refuse(node)
        is_seen_by_running = _name(node) in _DISPATCH or checker.hides_order(node)
        if reason is not None and (is_seen_by_running or (_is_foreign(node) and g.has_weights(model))):
            dispatch.append(node)
        elif reason is not None:
            raise PackingError(f"{g.where(node)}: {_name(node)} {reason}, {_way_out(node)}", node=node)
    if dispatch:
        report.notes.append(_probe_dispatch(model, dispatch, ctx))
    return model, report


def _way_out(node: fx.Node) -> str:
    """What a refusal means for the user."""
    refusal = "so sequences cannot share a batch. "
    if _name(node) in _CONVOLUTIONS:
        return refusal + (
            "A convolution reads a token's neighbours: its state would have to be kept beside the KV cache, "
            "as that of every recurrent layer, which is not supported. Serve it where such states are."
        )
    if _is_foreign(node):
        return refusal + (
            "Without weights it cannot be run to see: give the model its weights; if the op works token by "
            "token, the run shows it."
        )
    return refusal + (
        "Only models that work token by token outside attention can be served from a packed batch."
    )


def _is_foreign(node: fx.Node) -> bool:
    """Whether this is an op that neither torch nor this package brought."""
    target = node.target
    known = ("aten", "prims", "higher_order", "ad_flashinfer", "_c10d_functional")
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in known


class _Checker:
    """The rules, with the symbols of this graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        sizes = g.shape(_tokens(gm))[:2]
        self._axes = {str(size): axis for size, axis in zip(sizes, (_BATCH, _SEQ), strict=True)}

    def factors(self, size: int | SymInt) -> tuple[int, tuple[str, ...]]:
        """A size as (constant, token axes in it); an unknown symbol counts as a token axis."""
        if isinstance(size, int):
            return size, ()
        expr = size.node.expr
        constant, axes = 1, []
        for factor in expr.args if expr.is_Mul else (expr,):
            if factor.is_Integer:
                constant *= int(factor)
            else:
                axes.append(self._axes.get(str(factor), str(factor)))
        return constant, tuple(sorted(axes))

    def token_dims(self, tensor: Any) -> dict[int, tuple[str, ...]]:
        """The dimensions of a tensor that count tokens, with their axes."""
        if not isinstance(tensor, Tensor):
            return {}
        found = {dim: self.factors(size)[1] for dim, size in enumerate(tensor.shape)}
        return {dim: axes for dim, axes in found.items() if axes}

    def handles_tokens(self, node: fx.Node) -> bool:
        """Whether the node reads or makes a tensor with a token dimension, or one made of their number."""
        tensors = [*_tensors(g.value(node))]
        for source in node.all_input_nodes:
            tensors += _tensors(g.value(source))
        return any(self.token_dims(tensor) for tensor in tensors) or _counts_tokens(node)

    def refuse(self, node: fx.Node) -> str | None:
        """Why the node mixes tokens, None if it does not."""
        if g.is_op(node, torch.ops.ad_flashinfer.attention) or "getitem" in _name(node):
            return None
        if _counts_tokens(node):
            return "computes with the number of tokens"
        for tensor in _tensors(g.value(node)):
            counts = Counter(axis for axes in self.token_dims(tensor).values() for axis in axes)
            if any(count > 1 for count in counts.values()):
                return f"makes a tensor over pairs of tokens {tuple(tensor.shape)}"
        # Before the rules: min and max of two tensors have the name of the reductions.
        if g.is_pointwise(node) or _name(node) in _SAFE:
            return None
        rule = _RULES.get(_name(node))
        if rule is not None:
            return rule(self, node)
        return "is not known to work token by token"

    # Each rule below returns why the node mixes tokens, or None.

    def reshape(self, node: fx.Node) -> str | None:
        """Every token axis must keep its place in memory order: the product of what is inside it."""
        if self._places(g.value(g.args(node)[0])) == self._places(g.value(node)):
            return None
        return f"moves tokens: {tuple(g.shape(g.args(node)[0]))} is read as {tuple(g.shape(node))}"

    def hides_order(self, node: fx.Node) -> bool:
        """Whether a reshape merges or splits dimensions whose order is not in their product."""
        if _RULES.get(_name(node)) is not _Checker.reshape:
            return False
        sizes = [*g.shape(g.args(node)[0]), *g.shape(node)]
        return any(axes and (constant != 1 or len(axes) > 1) for constant, axes in map(self.factors, sizes))

    def _places(self, tensor: Tensor) -> Counter[tuple[str, int, tuple[str, ...]]]:
        inside: int = 1
        axes_inside: tuple[str, ...] = ()
        places: Counter[tuple[str, int, tuple[str, ...]]] = Counter()
        for size in reversed(tensor.shape):
            constant, axes = self.factors(size)
            inside_dim = (1, inside, axes_inside)
            # A merged dimension counts batch outside and seq inside, as [b, s] lies in memory.
            for axis in sorted(axes, reverse=True):
                places[(axis, *inside_dim[1:])] += 1
                inside_dim = (1, inside_dim[1], tuple(sorted((*inside_dim[2], axis))))
            inside, axes_inside = inside * constant, inside_dim[2]
        return places

    def over_dims(self, node: fx.Node) -> str | None:
        """Reductions, softmax, sorting, slicing, concatenation: not along a token dimension."""
        args = g.op_args(node)
        sources = [n for n in node.all_input_nodes if g.is_tensor(n)]
        rank = g.value(sources[0]).dim()
        dims = args.get("dim", args.get("dims"))
        if dims is None or dims == []:
            dims = list(range(rank))
        chosen = {d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        for source in sources:
            tokens = self.token_dims(g.value(source))
            if chosen & set(tokens):
                return f"works along the tokens (dimension {min(chosen & set(tokens))})"
        # A constant table that is cut to the number of tokens is read by their place.
        if self._token_axes(node) - {axis for source in sources for axis in self._token_axes(source)}:
            return self.made_of_positions(node)
        return None

    def _token_axes(self, node: fx.Node) -> set[str]:
        tensors = _tensors(g.value(node))
        return {axis for tensor in tensors for axes in self.token_dims(tensor).values() for axis in axes}

    def stack(self, node: fx.Node) -> str | None:
        """A new dimension is made: none of the old ones is touched."""
        return None

    def repeat(self, node: fx.Node) -> str | None:
        """Copies side by side, counted from the last dimension: one of each token."""
        source, repeats = g.args(node)[:2]
        offset = len(repeats) - g.value(source).dim()
        if any(repeats[offset + dim] != 1 for dim in self.token_dims(g.value(source))):
            return "repeats the tokens"
        return None

    def last_dims(self, node: fx.Node) -> str | None:
        """Normalisation over the last dimensions."""
        count = len(g.op_args(node)["normalized_shape"])
        tensor = g.value(g.args(node)[0])
        if set(range(tensor.dim() - count, tensor.dim())) & set(self.token_dims(tensor)):
            return "normalises over tokens"
        return None

    def contraction(self, node: fx.Node) -> str | None:
        """Matrix products: the summed dimension must not count tokens."""
        args = g.op_args(node)
        left: Any = args.get("batch1", args.get("mat1", args.get("input", args.get("self"))))
        value = g.value(left)
        if value.dim() - 1 in self.token_dims(value):
            return "sums over tokens"
        return None

    def einsum(self, node: fx.Node) -> str | None:
        """The summed letters must not count tokens."""
        inputs, _, output = g.args(node)[0].replace(" ", "").partition("->")
        if not output or "." in inputs:
            return "has an equation that is not written out"
        for letters, operand in zip(inputs.split(","), g.args(node)[1], strict=True):
            for dim in self.token_dims(g.value(operand)):
                if letters[dim] not in output:
                    return "sums over tokens"
        return None

    def lookup(self, node: fx.Node) -> str | None:
        """A table is read at the tokens' values: the table itself must not be made of tokens."""
        table = g.args(node)[0]
        return "looks tokens up by index" if self.token_dims(g.value(table)) else None

    def padding(self, node: fx.Node) -> str | None:
        """Constant padding, given from the last dimension on."""
        pad = g.args(node)[1]
        rank = g.value(node).dim()
        padded = {rank - 1 - i // 2 for i, amount in enumerate(pad) if amount != 0}
        if padded & set(self.token_dims(g.value(g.args(node)[0]))):
            return "pads along the tokens"
        return None

    def index(self, node: fx.Node) -> str | None:
        """Indexing: a dimension that counts tokens must be taken whole."""
        indexed = {d for d, index in enumerate(g.args(node)[1]) if index is not None}
        if indexed & set(self.token_dims(g.value(g.args(node)[0]))):
            return "looks tokens up by index"
        return None

    def made_of_positions(self, node: fx.Node) -> str | None:
        """A ramp over the tokens takes the place of position_ids."""
        return (
            "numbers the tokens by their place in the batch; the model must take positions from position_ids"
        )


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return str(getattr(node.target, "__name__", node.target))
    name = str(packet).removeprefix("aten.")
    # In-place variants follow the same rules.
    return name.removesuffix("_") if not name.startswith("_") and name.endswith("_") else name


def _tensors(val: Any) -> list[Tensor]:
    if isinstance(val, Tensor):
        return [val]
    return [t for t in val if isinstance(t, Tensor)] if isinstance(val, (list, tuple)) else []


def _counts_tokens(node: fx.Node) -> bool:
    """Whether a value, not a size, is computed from the number of tokens."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _tensors(g.value(node)):
        return False
    if not g.is_pointwise(node) and _name(node) not in _FILLS:
        return False
    scalars = [arg for name, arg in g.op_args(node).items() if name not in ("size", "dtype")]
    return any(isinstance(arg, fx.Node) and not _tensors(g.value(arg)) for arg in scalars)


_Rule = Callable[[_Checker, fx.Node], "str | None"]


def _table(rule: _Rule, names: str) -> dict[str, _Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, _Rule] = {
    **_table(_Checker.reshape, "view view_as reshape _unsafe_view flatten unflatten"),
    **_table(
        _Checker.over_dims,
        "mean sum amax amin max min prod var std var_mean softmax _softmax log_softmax logsumexp "
        "cumsum cumprod topk sort argsort argmax argmin any all norm linalg_vector_norm slice "
        "select chunk split split_with_sizes unbind cat concat gather scatter index_select "
        "take_along_dim repeat_interleave narrow flip roll diff glu squeeze",
    ),
    **_table(_Checker.stack, "stack"),
    **_table(_Checker.repeat, "repeat"),
    **_table(_Checker.last_dims, "layer_norm native_layer_norm rms_norm"),
    **_table(_Checker.contraction, "linear matmul mm bmm addmm baddbmm"),
    **_table(_Checker.einsum, "einsum"),
    **_table(_Checker.lookup, "embedding"),
    **_table(_Checker.padding, "constant_pad_nd pad"),
    **_table(_Checker.index, "index"),
    **_table(_Checker.made_of_positions, "arange linspace tril triu eye"),
}
# Make a tensor of one value.
_FILLS = frozenset("full new_full full_like scalar_tensor fill".split())
# Keep each token where it is, whatever the shape.
_SAFE = frozenset(
    "transpose permute t numpy_T mT adjoint swapdims moveaxis "
    "unsqueeze expand expand_as contiguous clone to _to_copy "
    "type_as detach alias lift_fresh_copy empty zeros ones full new_zeros new_ones new_full "
    "new_empty empty_like zeros_like ones_like full_like empty_permuted sym_size sym_numel "
    "view_as_complex view_as_real complex polar real imag "
    "one_hot dropout copy where masked_fill movedim swapaxes".split()
)
_CONVOLUTIONS = frozenset("conv1d conv2d convolution conv_transpose1d unfold im2col".split())
# How mixture-of-experts layers send tokens to experts and back.
_DISPATCH = frozenset(
    "index_put index_add index_copy scatter_add scatter gather histc bincount _grouped_mm "
    "transformers.grouped_mm_fallback sort argsort index index_select arange repeat".split()
)


def _probe_dispatch(gm: fx.GraphModule, nodes: list[fx.Node], ctx: TransformContext) -> str:
    """Evidence that dispatch gives each token its own result.

    Raises:
        PackingError: the logits of a token depend on its place or on other tokens.
    """
    if not g.has_weights(gm):
        return f"{len(nodes)} dispatch ops not run: the model has no weights"
    if len(gm.graph.find_nodes(op="placeholder")) > 2:
        raise PackingError(
            f"{g.where(nodes[0])}: {_name(nodes[0])} and others can be checked in a graph of the whole "
            "model only, and this is a piece of one. torch.compile(..., fullgraph=True) says where it was "
            "broken."
        )
    tokens, generator = 24, torch.Generator().manual_seed(0)
    half, budget = tokens // 2, max(tokens, ctx.sequence_info.max_num_tokens)
    ids = torch.randint(0, _vocab_size(gm), (1, tokens), generator=generator).to(ctx.device)
    positions = torch.arange(tokens, device=ctx.device)[None]
    order = torch.randperm(tokens, generator=generator).to(ctx.device)
    first = positions[0, :half]
    # As many tokens as a step may hold, all alike and then mixed: a limit to what an expert takes shows.
    among = torch.cat((positions.new_zeros(1, budget - half), first[None]), 1)
    alike, mixed = ids[:, :1].repeat(1, budget), ids.repeat(1, -(-budget // tokens))[:, :budget]
    takes_rows = isinstance(g.shape(_tokens(gm))[0], SymInt)  # else it is only called with one row
    in_rows = [("the shape of the batch", ids.view(2, half), positions.view(2, half), positions[0])]
    runs = [
        ("the order of the tokens", ids[:, order], positions[:, order], order),
        *(in_rows if takes_rows else []),
        ("the other tokens", torch.cat((alike[:, half:], ids[:, :half]), 1), among, first),
        ("the other tokens", torch.cat((mixed[:, half:], ids[:, :half]), 1), among, first),
    ]
    expected = _run_local(gm, ids, positions)
    for what, run_ids, run_positions, rows in runs:
        if not _nearly_equal(_run_local(gm, run_ids, run_positions)[-len(rows) :], expected[rows]):
            raise PackingError(
                f"{g.where(nodes[0])}: with {_name(nodes[0])}{_more(len(nodes) - 1)}, a token's "
                f"logits depend on {what}, so sequences cannot share a batch."
            )
    if takes_rows:
        _probe_rows(gm, ids.view(2, half), positions[:, :half].repeat(2, 1), nodes[0])
    shapes = "2 orders and 2 shapes" if takes_rows else "2 orders"
    return f"{len(nodes)} dispatch ops run on {tokens} tokens in {shapes}, and among {budget}: same logits"


def _more(count: int) -> str:
    return f" and {count} more such op{'s' if count > 1 else ''}" if count else ""


def _probe_rows(gm: fx.GraphModule, ids: Tensor, positions: Tensor, first: fx.Node) -> None:
    """Check that the rows of query, key and value are the sequences of the batch, in order.

    Raises:
        PackingError: a sequence's query, key or value changes with another sequence's tokens.
    """
    others = torch.cat((ids[:1].flip(1), ids[1:]))
    runs = []
    with torch.no_grad():
        for tokens in (ids, others):
            recorder = _SecondRow(gm)
            recorder.run(*_inputs(gm, tokens, positions))
            runs.append(recorder.rows)
    for one, other in zip(*runs, strict=True):
        if not _nearly_equal(one, other):
            raise PackingError(
                f"{g.where(first)}: with {_name(first)} and others, the rows of query, key and value are not "
                "the sequences of the batch, so a sequence would read the cache of another."
            )


def _nearly_equal(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for rounding, which differs with the number of tokens that an expert has."""
    tolerance = 1e-4 if wanted.dtype == torch.float32 else 3e-2
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def _tokens(gm: fx.GraphModule) -> fx.Node:
    node = g.token_input(gm)
    assert node is not None
    return node


def _vocab_size(gm: fx.GraphModule) -> int:
    tables = [g.args(n)[0] for n in _tokens(gm).users if g.is_op(n, aten.embedding)]
    return int(g.shape(tables[0])[0]) if tables else 16


def _inputs(gm: fx.GraphModule, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two inputs of the graph; for inputs_embeds, a random vector for each token."""
    tokens = _tokens(gm)
    (position_ids,) = [n for n in gm.graph.find_nodes(op="placeholder") if n is not tokens]
    rows = g.shape(position_ids)[:-2]
    positions = positions.expand(*rows, *positions.shape)
    if tokens.name == "input_ids":
        return ids, positions
    width, dtype = int(g.shape(tokens)[-1]), g.value(tokens).dtype
    table = torch.randn(int(ids.max()) + 1, width, generator=torch.Generator().manual_seed(1))
    return table.to(ids.device, dtype)[ids], positions


def _run_local(gm: fx.GraphModule, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits [tokens, vocab] with each attention replaced by its own query and value."""
    with torch.no_grad():
        outputs = _LocalAttention(gm).run(*_inputs(gm, ids, positions))
        logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        return logits.flatten(0, 1)


class _SecondRow(fx.Interpreter):
    """Runs a graph and keeps the second sequence's query, key and value of each attention."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.rows: list[Tensor] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.ad_flashinfer.attention.default:
            self.rows += [tensor[1].clone() for tensor in args[:3]]
        return super().call_function(target, args, kwargs)


class _LocalAttention(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.ad_flashinfer.attention.default:
            return super().call_function(target, args, kwargs)
        query, key, value = args[:3]
        group = query.shape[2] // value.shape[2]
        local = value + key.mean(-1, keepdim=True)
        return local.repeat_interleave(group, 2) + query.mean(-1, keepdim=True)
