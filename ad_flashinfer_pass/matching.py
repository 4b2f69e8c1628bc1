"""Reads attention out of a graph: what SDPA calls and eager matmul-softmax-matmul chains compute.

An eager chain is read backwards from its softmax. The logits are a sum and product of known parts:
a product of query and key, constant factors, one cap, additive or boolean masks, sinks. Each part is put into
the ``AttentionMatch``, or the chain is refused; no part is passed over.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass import masks
from ad_flashinfer_pass.errors import UnsupportedError

aten = torch.ops.aten

SDPA = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_attention_math,
)
SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)

_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)
_CASTS = (aten.to, aten._to_copy, aten.type_as)
_COPIES = (aten.clone, aten.contiguous, aten.lift_fresh_copy)
_RESHAPES = (
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.flatten,
    aten.unflatten,
    aten.unsqueeze,
    aten.squeeze,
)
_HEADS_FIRST = (0, 1, 2, 3)


class NotAttention(Exception):
    """Why a softmax is not the softmax of an attention."""


@dataclass(frozen=True)
class Operand:
    """Query, key or value: a 4-D node and the permutation that gives it layout bnsd."""

    node: fx.Node
    order: tuple[int, ...] = _HEADS_FIRST


@dataclass(frozen=True)
class MaskTerm:
    """One thing done to the logits: an addition, or positions hidden or shown."""

    node: fx.Node
    factor: float = 1.0
    """Of an additive term: a constant by which the logits are multiplied after the addition."""
    is_bool: bool = False
    hides: bool = False
    """Of a boolean term: True hides a key; else True shows it."""


@dataclass(kw_only=True)
class AttentionMatch:
    """One attention in its own terms."""

    form: str
    """How it stands in the graph, in words."""
    query: Operand
    key: Operand
    value: Operand
    last: fx.Node
    """Makes the result."""
    result_order: tuple[int, ...] = _HEADS_FIRST
    """Permutation of the result's layout bnsd that gives what ``last`` makes."""
    mask_terms: list[MaskTerm] = field(default_factory=list)
    is_causal: bool = False
    scale: float = 1.0
    logit_cap: float | None = None
    sinks: fx.Node | None = None


def read_sdpa(node: fx.Node) -> AttentionMatch:
    """An SDPA node, or one of the ops that it decomposes to.

    Raises:
        UnsupportedError: it does more than the attention op can express.
    """
    args = g.op_args(node)
    query, key, value = args["query"], args["key"], args["value"]
    if args.get("dropout_p"):
        raise _refuse(node, f"has dropout {args['dropout_p']}; export the model in eval mode")
    if g.value(query).dim() != 4:
        raise _refuse(
            node, f"has a query of {g.value(query).dim()} dimensions, not [batch, heads, seq, head_dim]"
        )
    if args["is_causal"] and not g.same_size(g.shape(query)[2], g.shape(key)[2]):
        raise _refuse(
            node,
            f"is_causal with {g.shape(query)[2]} queries and {g.shape(key)[2]} keys is aligned to the upper "
            "left, which no cached kernel does; the graph must hold no cache",
        )
    scale = args.get("scale")
    scale = g.shape(query)[-1] ** -0.5 if scale is None else constant(scale)
    if scale is None:
        raise _refuse(node, f"has a scale that is computed in the graph ({args['scale']})")
    mask = args.get("attn_mask", args.get("attn_bias"))
    terms = [] if mask is None else [MaskTerm(mask, is_bool=g.value(mask).dtype == torch.bool)]
    last = node
    if isinstance(g.value(node), (tuple, list)):
        used = {user.args[1]: user for user in node.users if user.target is operator.getitem and user.users}
        if set(used) != {0}:
            raise _refuse(node, "returns more than its result to the rest of the graph")
        last = used[0]
    key, value = _kv_operand(key, _HEADS_FIRST), _kv_operand(value, _HEADS_FIRST)
    _check_heads(node, key, value)
    return AttentionMatch(
        form=str(node.target).removeprefix("aten.").partition(".")[0],
        query=Operand(query),
        key=key,
        value=value,
        last=last,
        mask_terms=terms,
        is_causal=args["is_causal"],
        scale=scale,
    )


def read_eager(softmax: fx.Node) -> AttentionMatch:
    """The attention whose softmax this is.

    Raises:
        NotAttention: it is another softmax, of a router for example.
        UnsupportedError: it is attention, but does more than the attention op can express.
    """
    args = g.op_args(softmax)
    rank = g.value(softmax).dim()
    if rank not in (3, 4) or args["dim"] % rank != rank - 1:
        raise NotAttention("a softmax, but not over the keys of [batch, heads, queries, keys]")
    if not _contains_product(args["self"]):
        raise NotAttention("a softmax of something other than a query-key product")
    reader = _LogitsReader()
    reader.read(args["self"])
    value, last, order = _read_value(softmax, reader)
    assert reader.query is not None
    assert reader.key is not None
    _check_heads(last, reader.key, value)
    return AttentionMatch(
        form="product, softmax, product",
        query=reader.query,
        key=reader.key,
        value=value,
        last=last,
        result_order=order,
        mask_terms=reader.terms,
        scale=reader.scale,
        logit_cap=reader.logit_cap,
        sinks=reader.sinks,
    )


def constant(arg: Any) -> float | None:
    """The number that an argument always has; None if it depends on inputs or is learned."""
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node):
        return None
    nodes = set(g.ancestors(arg, stop=lambda n: False))
    if any(n.op == "placeholder" for n in nodes):
        return None
    attributes = [g.attribute(n) for n in nodes if n.op == "get_attr"]
    if any(isinstance(a, nn.Parameter) or a.numel() > 1 for a in attributes):
        return None
    env: dict[fx.Node, Any] = {}
    for node in arg.graph.nodes:
        if node in nodes:
            if node.op == "get_attr":
                env[node] = g.attribute(node)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
    result = env[arg]
    return float(result) if not isinstance(result, torch.Tensor) or result.numel() == 1 else None


class _LogitsReader:
    """Walks from the softmax to the query-key product and collects what is done to the logits."""

    def __init__(self) -> None:
        self.query: Operand | None = None
        self.key: Operand | None = None
        self.terms: list[MaskTerm] = []
        self.scale = 1.0
        """Of the product; until the product is reached, of everything below the current node."""
        self.logit_cap: float | None = None
        self.sinks: fx.Node | None = None
        self.num_keys: int | SymInt = 0
        """Columns that are left once that of the sinks is cut off."""

    def read(self, node: fx.Node) -> None:
        """Read on until the product.

        Raises:
            UnsupportedError: a node that is none of the known parts.
        """
        while not g.is_op(node, *_PRODUCTS):
            node = self._step(node)
        if g.is_op(node, aten.baddbmm):
            self._read_baddbmm(node)
        left, right, letters = _operands(node)
        self.query, factor_q = _unscaled(left)
        self.key, factor_k = _key_operand(right)
        self.scale *= factor_q * factor_k
        if letters is not None and letters != _HEADS_FIRST:
            raise _refuse(node, "makes logits that are not laid out [batch, heads, queries, keys]")

    def _step(self, node: fx.Node) -> fx.Node:
        """Take one node in; returns the next one towards the product."""
        if g.is_op(node, *_CASTS, *_COPIES):
            return _node(node, 0)
        if g.is_op(node, *_RESHAPES) and _keeps_rows(node):
            return _node(node, 0)
        if g.is_op(node, aten.dropout) and _is_identity_dropout(node):
            return _node(node, 0)
        if g.mutates_input(node) and len(_node(node, 0).users) > 1:
            raise _refuse(node, "changes logits in place that something else reads")
        for part in (self._cap, self._factor, self._sinks, self._row_maximum, self._mask):
            inner = part(node)
            if inner is not None:
                return inner
        raise _refuse(node, f"applies {node.target} to the logits, which no kernel does")

    def _cap(self, node: fx.Node) -> fx.Node | None:
        """C * tanh(x / c) -> x."""
        outer = _scalar_factor(node)
        tanh = _skip(outer[0], *_CASTS) if outer is not None else node
        if outer is None or not g.is_op(tanh, aten.tanh):
            return None
        inner = _scalar_factor(_skip(_node(tanh, 0), *_CASTS))
        if inner is None or abs(inner[1] * outer[1] - 1.0) > 1e-6:
            raise _refuse(node, "has a tanh in the logits that is not c * tanh(x / c)")
        if self.logit_cap is not None or self.scale != 1.0:
            raise _refuse(node, "caps the logits and scales them afterwards")
        self.logit_cap = outer[1]
        return inner[0]

    def _factor(self, node: fx.Node) -> fx.Node | None:
        found = _scalar_factor(node)
        if found is None:
            return None
        self.scale *= found[1]
        return found[0]

    def _sinks(self, node: fx.Node) -> fx.Node | None:
        """cat((logits, one column of sinks), -1) -> logits."""
        if not g.is_op(node, aten.cat):
            return None
        tensors, dim = g.args(node)[0], g.op_args(node)["dim"]
        rank = g.value(node).dim()
        if self.scale != 1.0 or self.logit_cap is not None:
            raise _refuse(node, "scales or caps its sinks together with the logits")
        if len(tensors) != 2 or dim % rank != rank - 1 or g.shape(tensors[1])[-1] != 1 or self.terms:
            raise _refuse(node, "concatenates something other than one column of sinks to the logits")
        sinks = tensors[1]
        while g.is_op(sinks, *_RESHAPES, *_CASTS, *_COPIES, aten.expand, aten.repeat_interleave):
            sinks = _node(sinks, 0)
        if g.value(sinks).dim() != 1 or g.shape(sinks)[0] != g.shape(node)[1]:
            raise _refuse(node, "has sinks that are not one value a head")
        self.sinks = sinks
        self.num_keys = g.shape(tensors[0])[-1]
        return tensors[0]

    def _row_maximum(self, node: fx.Node) -> fx.Node | None:
        """X - max(x) -> x: a softmax does not change when a constant is taken from a row."""
        if not g.is_op(node, aten.sub, aten.sub_):
            return None
        maximum = g.args(node)[1]
        if g.is_op(maximum, operator.getitem):
            maximum = _node(maximum, 0)
        same = g.is_op(maximum, aten.max, aten.amax) and _node(maximum, 0) is _node(node, 0)
        # One number a row: a maximum over the queries would move the keys against each other.
        one_a_row = g.is_tensor(g.args(node)[1]) and g.shape(g.args(node)[1])[-1:] in ((), (1,))
        return _node(node, 0) if same and one_a_row else None

    def _mask(self, node: fx.Node) -> fx.Node | None:
        """masked_fill, where or an addition -> logits."""
        found = _hidden_keys(node, self.scale)
        if found is None and g.is_op(node, aten.add, aten.add_) and g.op_args(node)["alpha"] == 1:
            a, b = g.args(node)
            sides = [(x, y) for x, y in ((a, b), (b, a)) if g.is_tensor(x) and g.is_tensor(y)]
            chosen = [(x, y) for x, y in sides if _contains_product(x) and not _contains_product(y)]
            if chosen:
                found = chosen[0][0], MaskTerm(chosen[0][1], factor=self.scale)
        if found is None:
            return None
        if self.logit_cap is not None:
            raise _refuse(node, "applies a mask before the logits are capped")
        logits, term = found
        self.terms.append(term)
        return logits

    def _read_baddbmm(self, node: fx.Node) -> None:
        """Beta * bias + alpha * product."""
        args = g.op_args(node)
        if args["beta"] != 0:
            if self.logit_cap is not None:
                raise _refuse(node, "adds a bias before the logits are capped")
            self.terms.append(MaskTerm(args["self"], factor=self.scale * args["beta"]))
        self.scale *= args["alpha"]


def _hidden_keys(node: fx.Node, factor: float) -> tuple[fx.Node, MaskTerm] | None:
    """(logits, term) if the node sets logits to what, times ``factor``, softmax takes to zero."""
    if g.is_op(node, aten.masked_fill, aten.masked_fill_):
        logits, mask, fill = g.args(node)
        return (logits, MaskTerm(mask, is_bool=True, hides=True)) if _hides(fill, factor) else None
    if g.is_op(node, aten.where) and len(node.args) == 3:
        condition, if_true, if_false = g.args(node)
        if _hides(if_false, factor) and g.is_tensor(if_true) and _contains_product(if_true):
            return if_true, MaskTerm(condition, is_bool=True)
        if _hides(if_true, factor) and g.is_tensor(if_false) and _contains_product(if_false):
            return if_false, MaskTerm(condition, is_bool=True, hides=True)
    return None


def _hides(fill: Any, factor: float) -> bool:
    if isinstance(fill, fx.Node) and g.is_op(fill, aten.full, aten.full_like, aten.scalar_tensor):
        fill = g.op_args(fill).get("fill_value", g.op_args(fill).get("s"))
    value = constant(fill)
    return value is not None and value * factor <= masks.HIDDEN


def _read_value(softmax: fx.Node, reader: _LogitsReader) -> tuple[Operand, fx.Node, tuple[int, ...]]:
    """Follow the probabilities to their product with V: V, that product, and its layout."""
    node, needs_cut = softmax, reader.sinks is not None
    while True:
        users = [u for u in node.users if not _is_row_check(u, softmax)]
        if len(users) != 1:
            raise _refuse(softmax, f"has probabilities that {len(users)} nodes read, not V alone")
        (user,) = users
        if g.is_op(user, *_PRODUCTS) and not needs_cut:
            break
        if needs_cut and g.is_op(user, aten.slice):
            start, columns = g.op_args(user)["start"], g.shape(user)[-1]
            if start not in (None, 0) or not g.same_size(columns, reader.num_keys):
                raise _refuse(user, "cuts off something other than the column of sinks")
            needs_cut = False
        elif not _passes_probabilities(user, node):
            raise _refuse(user, f"applies {user.target} to the probabilities, which no kernel does")
        node = user
    _, right, letters = _operands(user, keys_last=False)
    factors = g.args(user)[1] if g.is_op(user, aten.einsum) else g.args(user)
    if factors[0] is not node:
        raise _refuse(user, "multiplies V by the probabilities from the wrong side")
    value, factor = _unscaled(right)
    if factor != 1.0:
        value = right
    return _kv_operand(value.node, value.order), user, letters or _HEADS_FIRST


def _passes_probabilities(node: fx.Node, probabilities: fx.Node) -> bool:
    """Whether a node between softmax and V leaves the probabilities as they are."""
    if g.is_op(node, *_CASTS, *_COPIES):
        return True
    if g.is_op(node, *_RESHAPES):
        return _keeps_rows(node)
    if g.is_op(node, aten.dropout):
        return _is_identity_dropout(node)
    if g.is_op(node, aten.where) and len(node.args) == 3:
        # What SDPA decomposes to: rows without a visible key become zero. A proved mask has none.
        condition, zeros, kept = g.args(node)
        return kept is probabilities and constant_fill(zeros) == 0.0 and _is_row_check(condition, None)
    return False


def constant_fill(node: Any) -> float | None:
    """The value that fills a tensor, if it is one value."""
    if g.is_op(node, aten.full_like, aten.full, aten.scalar_tensor):
        args = g.op_args(node)
        return constant(args.get("fill_value", args.get("s")))
    return 0.0 if g.is_op(node, aten.zeros_like, aten.zeros) else constant(node)


def _is_row_check(node: fx.Node, softmax: fx.Node | None) -> bool:
    """Whether a node is the question if a row has a visible key: not(any(not(logits == -inf)))."""
    if softmax is not None:
        return g.is_op(node, aten.full_like, aten.zeros_like)
    for target in (aten.logical_not, aten.any, aten.logical_not, aten.eq):
        if not g.is_op(node, target):
            return False
        if target is aten.eq:
            return g.args(node)[1] == float("-inf")
        node = _node(node, 0)
    return False


def _operands(node: fx.Node, keys_last: bool = True) -> tuple[Operand, Operand, tuple[int, ...] | None]:
    """Left and right operand of a product, and the layout of its result where an einsum says it.

    ``keys_last``: the product is query x key and the right operand is returned as [b, n, t, d];
    else it is probabilities x value.
    """
    if g.is_op(node, aten.einsum):
        return _einsum_operands(node, keys_last)
    first = 1 if g.is_op(node, aten.baddbmm) else 0
    left, right = g.args(node)[first : first + 2]
    left, right = _heads_apart(_skip_upcasts(left)), _heads_apart(_skip_upcasts(right))
    for operand in (left, right):
        if g.value(operand).dim() != 4:
            raise _refuse(
                node, f"has an operand of shape {tuple(g.shape(operand))}, not 4-D with heads apart"
            )
    return Operand(left), Operand(right, (0, 1, 3, 2) if keys_last else _HEADS_FIRST), None


def _einsum_operands(node: fx.Node, keys_last: bool) -> tuple[Operand, Operand, tuple[int, ...]]:
    equation, operands = g.args(node)[:2]
    inputs, _, out = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != 2 or {len(x) for x in (*letters, out)} != {4} or "." in equation:
        raise _refuse(node, f"is the einsum {equation}, not a product of two 4-D tensors")
    left, right = letters
    shared = [x for x in left if x in right and x in out]
    summed = [x for x in left if x in right and x not in out]
    (rows,) = [x for x in left if x not in right] or [""]
    (columns,) = [x for x in right if x not in left] or [""]
    if len(shared) != 2 or len(summed) != 1 or not rows or not columns:
        raise _refuse(node, f"is the einsum {equation}, not one of batch, heads, queries and keys")
    if left.index(shared[0]) > left.index(shared[1]):
        shared.reverse()

    def order(names: Sequence[str], of: str) -> tuple[int, ...]:
        return tuple(of.index(name) for name in names)

    left_operand = Operand(_skip_upcasts(operands[0]), order((*shared, rows, summed[0]), left))
    inner = (columns, summed[0]) if keys_last else (summed[0], columns)
    right_operand = Operand(_skip_upcasts(operands[1]), order((*shared, *inner), right))
    result = "".join((*shared, rows, columns))
    return left_operand, right_operand, tuple(result.index(name) for name in out)


def _heads_apart(node: fx.Node) -> fx.Node:
    """[b, h, s, d], if the node is [b * h, s, d].

    That is what it was reshaped from, else what it is reshaped to; ``check_packing`` then runs the graph and
    sees whether b is the batch.
    """
    if g.value(node).dim() == 3 and g.is_op(node, *_RESHAPES):
        source = _node(node, 0)
        if g.value(source).dim() == 4 and g.same_shape(g.shape(source)[2:], g.shape(node)[1:]):
            return source
    if g.value(node).dim() == 3 and g.is_op(node, aten.transpose):
        inner = _heads_apart(_node(node, 0))
        if inner is not _node(node, 0) and {d % 3 for d in g.args(node)[1:3]} == {1, 2}:
            with node.graph.inserting_before(node):
                return g.call_op(node.graph, aten.transpose.int, inner, 2, 3)
    rows = g.shape(node)[0]
    if g.value(node).dim() == 3 and isinstance(rows, SymInt):
        heads, _ = rows.node.expr.as_coeff_Mul()
        with node.graph.inserting_after(node):
            return g.call_op(node.graph, aten.unflatten.int, node, 0, [-1, int(heads)])
    return node


def _kv_operand(node: fx.Node, order: tuple[int, ...]) -> Operand:
    """K or V as projected: without copies, upcasts and repeated heads."""
    while True:
        if g.is_op(node, *_COPIES):
            node = _node(node, 0)
        elif g.is_op(node, aten.transpose):
            a, b = (d % 4 for d in g.args(node)[1:3])
            swapped = list(range(4))
            swapped[a], swapped[b] = b, a
            node, order = _node(node, 0), tuple(swapped[d] for d in order)
        elif g.is_op(node, aten.permute):
            permutation = [d % 4 for d in g.args(node)[1]]
            node, order = _node(node, 0), tuple(permutation[d] for d in order)
        elif g.is_op(node, aten.repeat_interleave) and len(node.args) == 3:
            if g.args(node)[2] % 4 != order[1]:
                return Operand(node, order)
            node = _node(node, 0)
        elif _skip_upcasts(node) is not node:
            node = _skip_upcasts(node)
        else:
            return Operand(node, order)


def _check_heads(node: fx.Node, key: Operand, value: Operand) -> None:
    """K and V share a cache, whose heads they must both have."""
    num_heads, num_v_heads = (g.shape(x.node)[x.order[1]] for x in (key, value))
    if num_heads != num_v_heads:
        raise _refuse(node, f"has {num_heads} heads of K and {num_v_heads} of V, which share a cache")


def _key_operand(operand: Operand) -> tuple[Operand, float]:
    """K as projected, and the constant that it was multiplied by, before or after its heads were repeated."""
    factor = 1.0
    while True:
        inner, more = _unscaled(_kv_operand(operand.node, operand.order))
        factor *= more
        if inner == operand:
            return operand, factor
        operand = inner


def _unscaled(operand: Operand) -> tuple[Operand, float]:
    """The operand without copies and upcasts, and the constant that it was multiplied by."""
    node = _skip_upcasts(operand.node)
    scalar = _scalar_factor(node)
    if scalar is None:
        return Operand(node, operand.order), 1.0
    return Operand(_skip_upcasts(scalar[0]), operand.order), scalar[1]


def _scalar_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) if the node is x * c or x / c with a constant c."""
    is_product = g.is_op(node, aten.mul, aten.mul_)
    if not (is_product or g.is_op(node, aten.div, aten.div_)) or len(node.args) != 2 or node.kwargs:
        return None
    tensor, other = g.args(node)
    if not g.is_tensor(tensor):
        return None
    factor = constant(other)
    if factor is None and is_product and g.is_tensor(other):
        tensor, factor = other, constant(tensor)
    if factor is None or factor == 0:
        return None
    return tensor, factor if is_product else 1.0 / factor


def _contains_product(node: fx.Node) -> bool:
    """Whether a tensor over keys is computed from a product through tensors over the same keys."""
    keys = g.shape(node)[-1:]

    def is_other(n: fx.Node) -> bool:
        if g.is_op(n, *_PRODUCTS) or not g.is_tensor(n):
            return True
        return g.is_op(n, aten.cat) or not g.same_shape(g.shape(n)[-1:], keys)

    for found in g.ancestors(node, stop=is_other):
        if g.is_op(found, *_PRODUCTS):
            return True
        if g.is_op(found, aten.cat) and _contains_product(g.args(found)[0][0]):
            return True  # a column of sinks stands beside the logits
    return False


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a reshape leaves the last two dimensions, queries and keys, alone."""
    return g.same_shape(g.shape(node)[-2:], g.shape(_node(node, 0))[-2:])


def _is_identity_dropout(node: fx.Node) -> bool:
    args = g.op_args(node)
    if args["train"] and args["p"]:
        raise _refuse(node, "has dropout; export the model in eval mode")
    return True


def _skip(node: fx.Node, *targets: Any) -> fx.Node:
    while g.is_op(node, *targets):
        node = _node(node, 0)
    return node


def _skip_upcasts(node: fx.Node) -> fx.Node:
    """The tensor before copies and casts to float32; kernels take their inputs as projected."""
    while g.is_op(node, *_COPIES) or (g.is_op(node, *_CASTS) and g.value(node).dtype == torch.float32):
        if g.value(_node(node, 0)).dtype not in (torch.float16, torch.bfloat16, torch.float32):
            break
        node = _node(node, 0)
    return node


def _node(node: fx.Node, index: int) -> fx.Node:
    source = g.args(node)[index]
    assert isinstance(source, fx.Node), node.format_node()
    return source


def _refuse(node: fx.Node, what: str) -> UnsupportedError:
    return UnsupportedError(f"{g.where(node)}: this attention {what}.")
