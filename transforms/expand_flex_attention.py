"""flex_attention -> the attention that it stands for, written out.

Before: out, _, _ = flex_attention(q, k, v, score_mod, (..., mask_mod), scale, ...)
After:  scores = score_mod(matmul(q, repeat(k)^T) * scale, b, h, q_idx, kv_idx)
        out = matmul(softmax(where(mask_mod(b, h, q_idx, kv_idx), scores, -inf)), repeat(v))

Legal because that is how flex_attention is defined: both functions are of one score and its indices, and
every op in them works element by element, so they may be called once with index vectors that are broadcast.
The table of blocks only says where a kernel may skip work; it is taken to agree with mask_mod, as
``create_block_mask`` makes it, and as torch's own eager flex_attention takes it. ``match_attention`` then
reads the written out form as any other, and refuses what no kernel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, fx, nn

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention


@register("expand_flex_attention")
def expand_flex_attention(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Write every flex_attention out.

    Raises:
        UnsupportedError: score_mod or mask_mod does more than arithmetic on elements, or something else than
            the result is used.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("expand_flex_attention")
    for node in model.graph.find_nodes(op="call_function", target=FLEX):
        _Expansion(model, node).run()
        report.num_matches += 1
    if report.num_matches:
        g.finish(model)
    return model, report


class _Expansion:
    """One flex_attention node on its way out of the graph."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.gm, self.graph, self.node = gm, gm.graph, node
        self.query, self.key, self.value, self.score_mod, block_mask, self.scale, _, *buffers = g.args(node)
        self.mask_mod = block_mask[-1]
        self.score_buffers, self.mask_buffers = buffers
        self._indices: dict[int, fx.Node] = {}

    def run(self) -> None:
        """Put the written out form in the node's place."""
        unused = [user for user in self.node.users if not user.users]
        for user in unused:
            self.graph.erase_node(user)
        if [user.args[1] for user in self.node.users] != [0]:
            raise self._refused("gives more than its result (the log-sum-exp, or the maximum) to the graph")
        (result,) = self.node.users
        with self.graph.inserting_before(self.node):
            out = self._written_out()
        g.replace(result, out)
        self.graph.erase_node(self.node)

    def _written_out(self) -> fx.Node:
        key, value = self._repeated(self.key), self._repeated(self.value)
        scores = self._op(aten.matmul.default, self.query, self._op(aten.transpose.int, key, 2, 3))
        scores = self._op(aten.mul.Tensor, scores, self.scale)
        scores = self._inlined("score_mod", self.score_mod, [scores], self.score_buffers)
        seen = self._inlined("mask_mod", self.mask_mod, [], self.mask_buffers)
        if g.value(seen).dim():
            scores = self._op(aten.where.ScalarOther, seen, scores, float("-inf"))
        elif not self._is_true(seen):
            raise self._refused("has a mask_mod that does not depend on the tokens")
        weights = self._op(aten.softmax.int, scores, -1, torch.float32)
        if g.value(value).dtype != torch.float32:
            weights = self._op(aten.to.dtype, weights, g.value(value).dtype)
        return self._op(aten.matmul.default, weights, value)

    def _repeated(self, node: fx.Node) -> fx.Node:
        """K or V with a head for each query head."""
        heads, kv_heads = g.shape(self.query)[1], g.shape(node)[1]
        if heads == kv_heads:
            return node
        return self._op(aten.repeat_interleave.self_int, node, heads // kv_heads, 1)

    def _is_true(self, node: fx.Node) -> bool:
        """Whether a truth value without dimensions is True, by how it is made."""
        if g.is_op(node, aten.full, aten.new_full):
            return g.op_args(node)["fill_value"] in (True, 1)
        return g.is_op(node, aten.ones, aten.new_ones) or (node.op == "get_attr" and bool(g.attribute(node)))

    def _inlined(
        self, name: str, mod: fx.Node, first: list[fx.Node], buffers: tuple[fx.Node, ...]
    ) -> fx.Node:
        """The body of score_mod or mask_mod on index vectors.

        Raises:
            UnsupportedError: an op of it does not work element by element.
        """
        body = g.attribute(mod)
        inputs = body.graph.find_nodes(op="placeholder")
        env: dict[fx.Node, Any] = dict(zip(inputs, first, strict=False))
        for place, source in enumerate(inputs[len(first) : len(first) + 4]):
            if source.users:
                env[source] = self._index(place)
        env.update(zip(inputs[len(first) + 4 :], buffers, strict=True))
        for inner in body.graph.nodes:
            if inner.op == "get_attr" and isinstance(g.attribute(inner), torch.Tensor):
                env[inner] = self._constant(inner)
            elif _is_lookup_by_dynamo(inner):
                table, *places = (env[arg] for arg in g.args(inner)[3:])
                env[inner] = self._op(aten.index.Tensor, table, places)
            elif inner.op == "call_function":
                self._check_elementwise(name, inner, env)
                args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), env.__getitem__)
                env[inner] = self._op(inner.target, *args, **kwargs)
        result = g.args(body.graph.output_node())[0]
        found: fx.Node = env[result[0] if isinstance(result, (tuple, list)) else result]
        return found

    def _check_elementwise(self, name: str, inner: fx.Node, env: dict[fx.Node, Any]) -> None:
        is_lookup = (
            g.is_op(inner, aten.index) and len(g.args(inner)[1]) == g.value(env[g.args(inner)[0]]).dim()
        )
        makes_scalar = g.is_op(inner, aten.full, aten.new_full, aten.new_ones, aten.ones, aten.scalar_tensor)
        keeps = g.is_op(
            inner, aten.clone, aten.to, aten._to_copy, aten.lift_fresh_copy, aten.alias, aten.where
        )
        if not (g.is_pointwise(inner) or is_lookup or makes_scalar or keeps):
            raise self._refused(f"has a {name} with {inner.target}, which does not work element by element")

    def _constant(self, inner: fx.Node) -> fx.Node:
        """A tensor of the body as a buffer of the graph."""
        name = f"{self.node.name}_{inner.target}".replace(".", "_")
        return g.add_attribute(self.gm, name, g.attribute(inner))

    def _index(self, place: int) -> fx.Node:
        """Indices of batch, head, query or key, int32, with the other dimensions of size one."""
        if place not in self._indices:
            source, dim = ((self.query, 0), (self.query, 1), (self.query, 2), (self.key, 2))[place]
            size: Any = g.shape(source)[dim]
            if isinstance(size, SymInt):
                size = self._op(aten.sym_size.int, source, dim)
            device = g.value(self.query).device
            index = self._op(aten.arange.default, size, dtype=torch.int32, device=device)
            shape = [1] * 4
            shape[place] = -1
            self._indices[place] = self._op(aten.view.default, index, shape)
        return self._indices[place]

    def _op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = g.call_op(self.graph, target, *args, **kwargs)
        g.copy_origin(node, self.node)
        return node

    def _refused(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{g.where(self.node)}: this flex_attention {what}.", node=self.node)


def _is_lookup_by_dynamo(node: fx.Node) -> bool:
    """Whether this is ``table[i, j]`` as Dynamo wraps it: flat_apply(spec, spec, name, table, i, j)."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.flat_apply:
        return False
    name = g.args(node)[2]
    return isinstance(name, str) and name.endswith(".ModIndex")
