"""One rank's part of the model, where ``world_size`` ranks compute it together.

Before: o = linear(f(linear(x, w_1, b_1)), w_2, b_2)       f works element by element, or head by head
After:  o = all_reduce(linear(f(linear(x, w_1[part], b_1[part])), w_2[:, part], b_2))    b_2 on one rank

Attention keeps the heads of the rank, with the KV heads that they read; ``experts`` keep the rank's columns
of each expert; the linear that makes the logits keeps its rows, and ``all_gather`` puts them together.

Legal because a sum over columns is the sum of the sums over their parts, and ``graph.parts`` shows, node by
node, that nothing between the two linears mixes columns of different ranks, and that all ranks split the same
linears. It reads the graph alone: what transformers' ``base_model_tp_plan`` splits is found there, and what
it does not name, too. What cannot be shown stays whole on each rank, which is right as well, and is told.
Only the order of the sums changes, and where a row of activations is rounded by its own largest magnitude,
each rank takes that of its columns.

Weights that were not read yet (``ctx.stored``) are read here: of each the part that the rank needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.parts import BLOCK, CannotCutError, Part, Parts, Ranges, over, times
from ad_flashinfer_pass.graph.weights import experts_of
from ad_flashinfer_pass.records import Skip, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten
_ours = torch.ops.ad_flashinfer
_LINEARS = (aten.linear.default, aten.addmm.default, _ours.quantized_linear.default)
_Made = TypeVar("_Made")


@register("shard")
def shard(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Keep this rank's part.

    Raises:
        UnsupportedError: the ranks cannot have equal parts of an attention's heads; names it.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("shard")
    if ctx.config.world_size == 1:
        report.notes.append("one rank computes all")
        if ctx.stored is not None:
            _keep_parts(model, {}, ctx)
        return model, report
    sharder = _Sharder(model, ctx.rank, ctx.config.world_size)
    sharder.split_attention()
    sharder.split_experts()
    sharder.split_linears()
    ctx.are_logits_alike = sharder.split_head()
    sharder.join_sums()
    # q, k and v have one convolution before them, and one state.
    sharder.parts.join(_ours.causal_conv1d)
    g.finish(model)
    report.skipped = sharder.left_whole()
    sums = model.graph.find_nodes(op="call_function", target=_ours.all_reduce.default)
    report.num_matches = len(sums)
    report.notes += [f"rank {ctx.rank} of {ctx.config.world_size}: {len(sums)} all_reduce", *sharder.notes]
    _keep_parts(model, sharder.parts.weights, ctx)
    return model, report


class _Sharder:
    """The edits of one graph."""

    def __init__(self, gm: fx.GraphModule, rank: int, size: int) -> None:
        self.gm, self.rank, self.size = gm, rank, size
        self.parts = Parts(gm, rank, size)
        self.notes: dict[str, None] = {}
        self._nodes = set(gm.graph.nodes)
        self._attentions = dict.fromkeys(
            gm.graph.find_nodes(op="call_function", target=_ours.attention.default)
        )
        self._weights: dict[fx.Node, tuple[str, str]] = {}
        """What reads large weights: where it is, and why it is whole, if it is."""
        for node in gm.graph.nodes:
            if g.is_op(node, *_LINEARS) or g.is_op(node, _ours.experts, _ours.quantized_experts):
                self._weights[node] = g.where(node), "nothing splits what it reads or what it makes"

    def split_attention(self) -> None:
        """Let each attention compute this rank's heads.

        Raises:
            UnsupportedError: the ranks cannot have equal parts of its heads.
        """
        for node in self._attentions:
            heads, kv_heads = (int(g.shape(g.op_args(node)[name])[2]) for name in ("query", "key"))
            try:
                if kv_heads % self.size and self.size % kv_heads:
                    raise CannotCutError("would have more KV heads on one rank than on another")
                self.parts.strictly(node, 2, self._share(heads))
            except CannotCutError:
                raise UnsupportedError(
                    f"{g.where(node)}: {self.size} ranks cannot have equal parts of this attention's {heads} "
                    f"heads and {kv_heads} of K and V: set a world_size (--tp) that divides {heads}, and "
                    f"that divides {kv_heads} or is a multiple of it.",
                    node=node,
                ) from None
            if kv_heads < self.size:
                self.notes[f"each of {kv_heads} KV heads is on {self.size // kv_heads} ranks"] = None

    def split_experts(self) -> None:
        """Let each of the experts have this rank's columns between its projections."""
        for node in experts_of(self.gm):
            try:
                self._reduce(node, self._on_all(partial(self._part_of_experts, node)))
            except CannotCutError as reason:
                self._weights[node] = g.where(node), reason.told

    def split_linears(self) -> None:
        """Split each linear by columns whose columns are made by linears, or by heads, that can be split.

        Of two linears, one behind the other, both by columns cannot be: that goes first which splits more.
        """
        found = list[tuple[int, dict[fx.Node, fx.Node], set[fx.Node]]]()
        for node in [node for node in self._weights if g.is_op(node, *_LINEARS)]:
            try:
                made = self._on_all(partial(self._addends, node))
            except CannotCutError as reason:
                self._weights[node] = g.where(node), reason.told
                continue
            seen = set(self.parts.seen)
            size = sum(
                g.value(_operands(g.op_args(each))[1]).numel()
                for each in made.keys() | seen
                if g.is_op(each, *_LINEARS)
            )
            found.append((size, made, seen))
        sums, cut = set[fx.Node](), set[fx.Node]()
        for _, made, seen in sorted(found, key=lambda each: -each[0]):
            if not made.keys() & (sums | cut) and not seen & sums:
                sums |= made.keys()
                cut |= seen
                for node, part in made.items():
                    self._reduce(node, part)
            else:
                for node in made.keys() - sums - cut:
                    self._weights[node] = g.where(node), "another linear is split in its place"
        alive = set(g.ancestors(self.gm.graph.output_node(), lambda node: False))
        for node in self._attentions:
            if node in alive:  # something reads all heads
                self._put_together(node)

    def split_head(self) -> bool:
        """Let the linear that makes the logits have this rank's part of the vocabulary, if it can."""
        node: Any = g.args(self.gm.graph.output_node())[0]
        while not g.is_op(node, *_LINEARS):
            if len(node.all_input_nodes) != 1 or not (g.is_pointwise(node) or g.is_op(node, aten.to)):
                return False
            node = node.all_input_nodes[0]
        size = int(g.shape(node)[-1])
        width = -(-size // self.size)
        if width * (self.size - 1) >= size:
            return False

        def rows() -> fx.Node:
            kept = ((self.rank * width, min(size, (self.rank + 1) * width)),)
            return self.parts.strictly(node, -1, kept)

        try:
            part = self._on_all(rows)
        except CannotCutError as reason:
            self._weights[node] = g.where(node), reason.told
            return False
        self._replace(node, self.parts.call(part, _ours.all_gather.default, part, size))
        return True

    def join_sums(self) -> None:
        """all_reduce(a) + all_reduce(b) -> all_reduce(a + b)."""
        for node in list(self.gm.graph.nodes):
            if not g.is_op(node, aten.add.Tensor) or len(g.args(node)) != 2 or node.kwargs:
                continue
            sums = [_sum_of(operand) for operand in g.args(node)]
            if None in sums or g.args(node)[0] is g.args(node)[1]:
                continue
            for each in sums:
                assert each is not None
                self._replace(each, g.args(each)[0])
            reduced = self.parts.call(node, _ours.all_reduce.default, node)
            for user in [user for user in node.users if user is not reduced]:
                user.replace_input_with(node, reduced)

    def left_whole(self) -> list[Skip]:
        """What reads large weights and is the same on each rank; routers are small."""
        alive = set(self.gm.graph.nodes)
        return [
            Skip(where, f"whole on each rank: {why}")
            for node, (where, why) in self._weights.items()
            if node in alive
        ]

    def _on_all(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` gives for this rank, if it gives the like for all: a sum is one of each.

        Raises:
            CannotCutError: for one of them it cannot be made, or is made of other nodes.
        """
        made = make()
        if self.parts.is_even:
            return made
        own, parts, seen = self.rank, self.parts, list[set[fx.Node]]()
        try:
            for rank in range(self.size):
                self.rank, self.parts = rank, Parts(self.gm, rank, self.size)
                make()
                seen.append(self.parts.seen)
        finally:
            self.rank, self.parts = own, parts
        if any(each != seen[0] for each in seen):
            raise CannotCutError("reads columns that other ranks have from elsewhere")
        return made

    def _share(self, size: int) -> Ranges:
        """This rank's places of so many.

        Raises:
            CannotCutError: the ranks cannot have as many each.
        """
        if size % self.size:
            raise CannotCutError(f"has {size} columns, which {self.size} ranks cannot share")
        count = size // self.size
        return ((self.rank * count, (self.rank + 1) * count),)

    def _addends(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """What a linear adds to a sum, and what others do that read the same columns."""
        seen = self.parts.seen
        seen.clear()
        made = {node: self._addend(node)}
        while not seen & self._attentions.keys() and (others := self._outside(made)):
            # Else what makes the columns would be computed twice, in part and whole.
            for other in others:
                if not g.is_op(other, *_LINEARS):
                    raise CannotCutError("reads all of what would be cut", other)
                made[other] = self._addend(other)
        return made

    def _outside(self, made: Collection[fx.Node]) -> set[fx.Node]:
        """What reads all of something of which a part was made, behind views, in the graph as it was."""
        seen, found = self.parts.seen, set[fx.Node]()
        stack = [user for each in seen if each.op == "call_function" for user in each.users]
        while stack:
            each = stack.pop()
            if each in seen or each in made or each not in self._nodes:
                continue
            if g.is_op(each, *ax.VIEWS, *ax.PERMUTATIONS):
                stack += each.users
            else:
                found.add(each)
        return found

    def _addend(self, node: fx.Node) -> fx.Node:
        args = g.op_args(node)
        x, weight, bias = _operands(args)
        if weight.op != "get_attr":
            raise CannotCutError("has a weight that is computed")
        size = int(g.shape(x)[-1])
        kept = self._share(size)
        part = self.parts.strictly(x, -1, kept)
        added = {} if bias is None else {bias: self._on_first_rank(bias)}
        if "x" not in args:
            columns = self.parts.weight(weight, 0 if "mat1" in args else 1, kept)
            return self.parts.again(node, {x: part, weight: columns, **added})
        assert callable(node.target)
        return self.parts.call(node, node.target, *self._quantized(args, part, kept, size, *added.values()))

    def _quantized(
        self, args: Mapping[str, Any], x: fx.Node, kept: Ranges, size: int, bias: fx.Node | None = None
    ) -> tuple[Any, ...]:
        weight = args["weight"]
        packed = size // int(g.shape(weight)[1])  # two numbers in a byte
        self._check_rounding(args["activation"], kept)
        scale, zero = (
            None if args[name] is None else self.parts.scale(args[name], weight, 1, size, kept)
            for name in ("weight_scale", "zero_point")
        )
        part = self.parts.weight(weight, 1, over(kept, packed))
        return x, part, scale, args["input_scale"], bias, args["activation"], zero

    def _check_rounding(self, how: str, kept: Ranges) -> None:
        if how == "block":
            over(kept, BLOCK)
        elif how == "token":
            self.notes["activations are rounded by the largest magnitude of a rank's part of a row"] = None

    def _part_of_experts(self, node: fx.Node) -> fx.Node:
        args = g.op_args(node)
        rows, columns = (2, 1) if args["is_transposed"] else (1, 2)
        is_packed = g.value(args["down_proj"]).dtype == torch.uint8
        size = int(g.shape(args["down_proj"])[columns]) * (2 if is_packed else 1)
        kept = self._share(size)
        self._check_rounding(args.get("input_quantization", "none"), kept)
        both = kept
        if args["has_gate"] and args["up_proj"] is None:
            both = (
                (*kept, *((a + size, b + size) for a, b in kept))
                if args["is_concatenated"]
                else times(kept, 2)
            )
        new: dict[str, Any] = {}
        for name, wanted in (("gate_up", both), ("up", kept)):
            count = size * (2 if wanted is not kept else 1)
            for part in ("proj", "bias", "scale", "zero_point"):
                if (whole := args.get(f"{name}_{part}")) is None:
                    continue
                dim = rows if part == "proj" else 1
                new[f"{name}_{part}"] = (
                    self.parts.weight(whole, dim, wanted)
                    if part in ("proj", "bias")
                    else self.parts.scale(whole, args[f"{name}_proj"], 1, count, wanted)
                )
        new["down_proj"] = self.parts.weight(args["down_proj"], columns, over(kept, 2) if is_packed else kept)
        for name in ("down_scale", "down_zero_point"):
            if args.get(name) is not None:
                new[name] = self.parts.scale(args[name], args["down_proj"], 2, size, kept)
        if args["down_bias"] is not None:
            new["down_bias"] = self._on_first_rank(args["down_bias"])
        replaced = {args[name]: part for name, part in new.items()}
        return self.parts.again(node, replaced)

    def _on_first_rank(self, bias: fx.Node) -> fx.Node:
        """A bias, which only one rank adds to the sum.

        Raises:
            CannotCutError: it is computed, and what is computed of zeros need not be zero.
        """
        if bias.op != "get_attr":
            raise CannotCutError("adds what is computed")
        return bias if self.rank == 0 else self.parts.weight(bias, 0, ())

    def _reduce(self, node: fx.Node, part: fx.Node) -> None:
        self._replace(node, self.parts.call(part, _ours.all_reduce.default, part))

    def _put_together(self, node: fx.Node) -> None:
        part = self.parts.of(node, 2, self._share(int(g.shape(node)[2])))
        flat = self.parts.call(part, aten.flatten.using_ints, part, 2, 3)
        joined = self.parts.call(flat, _ours.all_gather.default, flat, int(g.shape(flat)[-1]) * self.size)
        self._replace(node, self.parts.call(joined, aten.unflatten.int, joined, 2, [*g.shape(node)[2:]]))

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)


def _operands(args: Mapping[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """What a linear multiplies, its weight and its bias."""
    if "mat1" in args:
        return args["mat1"], args["mat2"], args["self"]
    return args["x"] if "x" in args else args["input"], args["weight"], args["bias"]


def _sum_of(node: Any) -> fx.Node | None:
    """The all_reduce that a node is a view of, if nothing else reads either."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if g.is_op(node, _ours.all_reduce):
            return node
        if not g.is_op(node, *ax.VIEWS):
            return None
        node = g.args(node)[0]
    return None


def _keep_parts(gm: fx.GraphModule, parts: Mapping[str, Part], ctx: TransformContext) -> None:
    """Give the graph this rank's parts of its weights, on the device, and let the rest go."""
    g.delete_unread(gm)
    whole: dict[Tensor, Tensor] = {}
    named = {str(node.target): g.attribute(node) for node in gm.graph.find_nodes(op="get_attr")}
    for name, tensor in sorted(named.items(), key=lambda each: each[0] in parts):
        part = parts.get(name, Part(tensor, 0, None))
        stored = part.whole
        if isinstance(stored, FakeTensor) and ctx.stored is not None:
            stored = ctx.stored[stored]
        if part.kept is None:
            whole[part.whole] = made = stored.to(ctx.device) if stored is not part.whole else tensor
        elif (own := whole.get(part.whole)) is not None and part.is_run and part.dim == 0:
            made = part.cut(own)  # as of embeddings that make the logits, too
        else:
            made = part.cut(stored)
            if ctx.stored is not None and made.device != ctx.device:
                made = made.to(ctx.device).contiguous()
            else:
                made = made.clone(memory_format=torch.contiguous_format)
        if made is not tensor:
            owner, _, leaf = name.rpartition(".")
            keeper = gm.get_submodule(owner)
            delattr(keeper, leaf)
            kind = (
                nn.Parameter(made.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else made
            )
            g.register_tensor(keeper, leaf, kind)
    gm.recompile()
