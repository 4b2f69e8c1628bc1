"""The bytes of its weights that a graph reads in a step: all but those of experts that no token chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ad_flashinfer_pass.graph import edit as g

EXPERTS_WEIGHTS = ("gate_up_proj", "down_proj", "up_proj", "gate_up_bias", "down_bias")
"""Arguments of ``ops.experts``, projections before biases."""
_SCALES = (
    *("gate_up_scale", "down_scale", "up_scale"),
    *("gate_up_input_scale", "down_input_scale"),
    *("gate_up_zero_point", "down_zero_point", "up_zero_point"),
)
"""Those of ``ops.quantized_experts`` beside them."""


@dataclass(frozen=True)
class ExpertsSite:
    """The experts of one layer."""

    module: str
    """Path of the module that made them."""
    where: str
    """Node and source line."""
    num_experts: int
    top_k: int
    """Experts of a token."""
    hidden: int
    """Elements of a token."""
    width: int
    """Elements between the projections of an expert."""
    dtype: str
    """Of the weights; mxfp4 or int4 where two are in a byte."""
    bytes_each: int
    """Of one expert's weights."""
    kernel: str
    """As the node says: torch, triton, or a ``KernelPlan``."""

    def distinct(self, num_tokens: int) -> float:
        """Experts that a step of so many tokens is expected to choose, where all are as likely."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)


@dataclass(frozen=True)
class StepWeights:
    """What the steps of a graph read of its weights."""

    always: int = 0
    """Bytes that every step reads: all but experts, and tables of which it reads its tokens' rows."""
    experts: tuple[ExpertsSite, ...] = ()

    @property
    def bytes(self) -> int:
        """What is read if all experts are chosen."""
        return self.always + sum(site.num_experts * site.bytes_each for site in self.experts)

    def bytes_at(self, num_tokens: int) -> int:
        """What a step of so many tokens is expected to read, where all experts are as likely."""
        return self.always + round(sum(site.distinct(num_tokens) * site.bytes_each for site in self.experts))


def step_weights(gm: fx.GraphModule) -> StepWeights:
    """What steps read of a graph's weights; these may be on meta."""
    nodes = experts_of(gm)
    stored = [_stored(weight) for node in nodes for weight in _weights(node)]
    chosen = {id(g.attribute(weight)) for weight in stored if weight.op == "get_attr"}
    always: dict[int, int] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = g.attribute(node)
        is_table = all(g.is_op(user, torch.ops.aten.embedding) for user in node.users)
        if isinstance(tensor, Tensor) and not is_table and id(tensor) not in chosen:
            always[id(tensor)] = tensor.nbytes
    return StepWeights(sum(always.values()), tuple(map(_site, nodes)))


def experts_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The experts of a graph, quantized or not, in the order of the graph."""
    ops = torch.ops.ad_flashinfer
    return [node for node in gm.graph.nodes if g.is_op(node, ops.experts, ops.quantized_experts)]


def _site(node: fx.Node) -> ExpertsSite:
    args = g.op_args(node)
    down: Any = g.value(args["down_proj"])
    num_experts, *sizes = map(int, down.shape)
    hidden, width = reversed(sizes) if args["is_transposed"] else sizes
    dtype = str(down.dtype).removeprefix("torch.")
    if down.dtype == torch.uint8:  # two numbers in a byte
        width *= 2
        dtype = "mxfp4" if g.value(args["down_scale"]).dtype == torch.uint8 else "int4"
    parts = [g.value(weight) for weight in _weights(node)]
    return ExpertsSite(
        module=g.module_path(node),
        where=g.where(node),
        num_experts=num_experts,
        top_k=int(g.shape(args["top_k_index"])[1]),
        hidden=hidden,
        width=width,
        dtype=dtype,
        bytes_each=sum(part.nbytes for part in parts) // num_experts,
        kernel=args["plan"],
    )


def _weights(node: fx.Node) -> list[fx.Node]:
    args = g.op_args(node)
    return [args[name] for name in (*EXPERTS_WEIGHTS, *_SCALES) if args.get(name) is not None]


def _stored(node: fx.Node) -> fx.Node:
    """What a node is a view of, or the node."""
    while node.op == "call_function" and g.is_view(node):
        node = node.all_input_nodes[0]
    return node
