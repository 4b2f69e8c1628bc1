"""Reads attention that is written out: product, softmax, product, in whatever views and order of parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.axes import Axis, Dims, Size
from ad_flashinfer_pass.matching.logits import LogitsReader
from ad_flashinfer_pass.matching.nodes import (
    CASTS,
    COPIES,
    FLOATS,
    PRODUCTS,
    constant_fill,
    contains_product,
    is_identity_dropout,
    is_over_pairs,
    reads_shape,
    refuse,
    skip,
    source_node,
)
from ad_flashinfer_pass.matching.operands import as_einsum, einsum, factors, lettered, matched, walk
from ad_flashinfer_pass.matching.parts import AttentionMatch, NotAttention, Operand, Place
from ad_flashinfer_pass.matching.sinks import log_sum_exp, sinks_by_scaling

aten = torch.ops.aten

SOFTMAX = (aten.softmax, aten._softmax, aten._safe_softmax)


def read_eager(softmax: fx.Node) -> AttentionMatch:
    """The attention whose softmax this is.

    Raises:
        NotAttention: it is another softmax, of a router for example.
        UnsupportedError: it is attention, but does more than the attention op can express.
    """
    args = g.op_args(softmax)
    shape, logits = g.shape(softmax), args["self"]
    dim = args["dim"] % max(len(shape), 1)
    if not is_over_pairs(shape, dim):
        raise NotAttention("a softmax, but not of each token's logits for the other tokens")
    if not contains_product(logits):
        raise NotAttention("a softmax of something other than a query-key product")
    dims = ax.of_shape(shape)
    reader = LogitsReader(dims, dim)
    product = reader.read(logits)
    query, key, head_dim = _query_and_key(product, reader)
    value, v_head_dim, result = _read_value(softmax, dims, dim, reader.keys)
    sinks = reader.sinks
    lse = log_sum_exp(logits, dim)
    if sinks is None and lse is not None:
        sinks, result = sinks_by_scaling(lse, (*dims[:dim], *dims[dim + 1 :]), result)
        reader.readers.append(lse)
    reader.check_readers(softmax)
    return matched(
        AttentionMatch(
            form="product, softmax, product",
            result=result,
            mask_terms=reader.terms,
            scale=reader.scale,
            logit_cap=reader.logit_cap,
            sinks=sinks,
            temperatures=reader.temperatures,
        ),
        (*dims[:dim], reader.keys, *dims[dim + 1 :]),
        reader.keys,
        (query, head_dim),
        key,
        (value, v_head_dim),
    )


def written_out_softmax(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if the node is exp(x) / sum(exp(x)) or exp(log_softmax(x)) of token pairs: softmax(x, dim)."""
    dim: Any = None
    if g.is_op(node, aten.exp) and g.is_op(node.args[0], aten.log_softmax, aten._log_softmax):
        logits, dim = g.args(source_node(node, 0))[:2]
    elif g.is_op(node, aten.div) and len(node.args) == 2 and g.is_op(node.args[1], aten.sum):
        weights, total = g.args(node)
        args = g.op_args(total)
        if args["self"] is weights and args.get("keepdim") and g.is_op(weights, aten.exp):
            logits, dims = source_node(weights, 0), args["dim"]
            dim = dims[0] if len(dims) == 1 else None
    if dim is None or not is_over_pairs(g.shape(node), dim % g.value(node).dim()):
        return None
    return logits, dim


def written_out_log_sum_exp(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim) if the node is log(sum(exp(x - m))) + m, with one m a row of pairs: logsumexp(x, dim)."""
    if not g.is_op(node, aten.add) or not all(map(g.is_tensor, g.args(node)[:2])):
        return None
    for log, shift in (g.args(node)[:2], g.args(node)[1::-1]):
        total: Any = g.args(log)[0] if g.is_op(log, aten.log) else None
        weights: Any = g.args(total)[0] if g.is_op(total, aten.sum) else None
        shifted: Any = g.args(weights)[0] if g.is_op(weights, aten.exp) else None
        if not g.is_op(shifted, aten.sub) or g.op_args(total).get("keepdim"):
            continue
        (logits, of_row), dims = g.args(shifted)[:2], g.op_args(total)["dim"]
        if len(dims or ()) != 1 or not g.is_tensor(of_row):
            continue
        rank = g.value(logits).dim()
        same = skip(shift, *ax.VIEWS) is skip(of_row, *ax.VIEWS)
        is_one = Size.of(g.shape(of_row)[dims[0] % rank]).is_one
        if same and is_one and is_over_pairs(g.shape(logits), dims[0] % rank):
            return logits, dims[0]
    return None


def _query_and_key(
    product: fx.Node, reader: LogitsReader
) -> tuple[list[Place], list[Place], tuple[Axis, ...]]:
    """Query, key, and the axes of a head; the key is the operand that has the keys.

    Raises:
        UnsupportedError: neither or both have them.
    """
    left, right, head_dim = factors(product, reader.dims)
    has_keys = [set(reader.keys) <= set(ax.flat(operand.dims)) for operand in (left, right)]
    if has_keys == [True, False]:
        left, right = right, left
    elif has_keys != [False, True]:
        raise refuse(product, f"is a product of shape {tuple(g.shape(product))} that is not of query and key")
    query, key = (walk(operand.node, operand.dims, scaled=True) for operand in (left, right))
    return query, key, head_dim


def _read_value(
    softmax: fx.Node, dims: Dims, dim: int, keys: tuple[Axis, ...]
) -> tuple[list[Place], tuple[Axis, ...], Operand]:
    """Follow the probabilities to their product with V: V, the axes of its heads, and that product.

    Args:
        softmax: makes the probabilities.
        dims: its axes.
        dim: its dimension of keys.
        keys: axes of the keys; others than in ``dims`` if a column of sinks must be cut off.
    """
    node, needs_cut = softmax, dims[dim] is not keys
    while True:
        users = [user for user in node.users if not reads_shape(user)]
        if len(users) != 1:
            raise refuse(softmax, f"has probabilities that {len(users)} nodes read, not V alone")
        (user,) = users
        if needs_cut and g.is_op(user, aten.slice):
            args = g.op_args(user)
            size = g.shape(user)[args["dim"]]
            if args["start"] not in (None, 0) or Size.of(size) != ax.size_of(keys):
                raise refuse(user, "cuts off something other than the column of sinks")
            dims, needs_cut = (
                (*dims[: args["dim"] % len(dims)], keys, *dims[args["dim"] % len(dims) + 1 :]),
                False,
            )
        elif g.is_op(user, *PRODUCTS) and not needs_cut:
            return _times_value(user, node, dims, keys)
        elif not _keeps_probabilities(user, node):
            viewed = ax.after(user, dims)
            if viewed is None:
                raise refuse(user, f"applies {user.target} to the probabilities, which no kernel does")
            dims = viewed
        node = user


def _keeps_probabilities(node: fx.Node, probabilities: fx.Node) -> bool:
    """Whether a node between softmax and V leaves the probabilities as they are, and in their place."""
    if g.is_op(node, *CASTS):
        return g.value(node).dtype in FLOATS
    if g.is_op(node, *COPIES):
        return True
    if g.is_op(node, aten.dropout):
        return is_identity_dropout(node)
    if g.is_op(node, aten.where) and len(node.args) == 3:
        # What SDPA decomposes to: rows without a visible key become zero. A proved mask has none.
        condition, zeros, kept = g.args(node)
        return kept is probabilities and constant_fill(zeros) == 0.0 and _is_row_check(condition)
    return False


def _is_row_check(node: fx.Node) -> bool:
    """Whether a node is the question if a row has a visible key: not(any(not(logits == -inf)))."""
    for target in (aten.logical_not, aten.any, aten.logical_not, aten.eq):
        if not g.is_op(node, target):
            return False
        if target is aten.eq:
            return bool(g.args(node)[1] == float("-inf"))
        node = source_node(node, 0)
    return False


def _times_value(
    product: fx.Node, probabilities: fx.Node, dims: Dims, keys: tuple[Axis, ...]
) -> tuple[list[Place], tuple[Axis, ...], Operand]:
    """V, the axes of its heads, and the product with its axes."""
    if g.is_op(product, aten.baddbmm):
        raise refuse(product, "adds a tensor to its result in one baddbmm; use bmm, and add afterwards")
    if g.is_op(product, aten.einsum):
        operands, letters, out = einsum(product)
    else:
        operands, letters, out = as_einsum(product)
    if operands.count(probabilities) != 1:
        raise refuse(product, "multiplies the probabilities by themselves")
    mine = operands.index(probabilities)
    value, (p_letters, v_letters) = operands[1 - mine], (letters[mine], letters[1 - mine])
    by_letter = dict(zip(p_letters, dims, strict=True))
    fresh = dict(zip(v_letters, ax.of_shape(g.shape(value)), strict=True))
    new = [x for x in v_letters if x not in by_letter]
    summed = ax.flat(tuple(by_letter[x] for x in p_letters if x not in out))
    if summed != ax.flat((keys,)) or len(new) != 1 or new[0] not in out:
        raise refuse(product, "multiplies the probabilities by something other than V, with a row a key")
    by_letter[new[0]] = fresh[new[0]]
    v_dims = lettered(value, v_letters, by_letter)
    result = Operand(product, tuple(by_letter[x] for x in out))
    return walk(value, v_dims), fresh[new[0]], result
