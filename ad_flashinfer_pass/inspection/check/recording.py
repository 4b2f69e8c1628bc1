"""Runs the steps of a check through a cached graph, node by node, and keeps what its sites saw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.fx.node import map_arg

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.weights import experts_of
from ad_flashinfer_pass.inspection.check.steps import Step
from ad_flashinfer_pass.ops import STATES
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo


@dataclass
class SiteValues:
    """What is recorded of an attention, or of an op with a state: rows in the order of the steps."""

    node: fx.Node
    """In the source graph."""
    cached: fx.Node
    values: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def rows(self) -> dict[str, Tensor]:
        """[tokens, ...] of each argument that is by token, and of the result, ``out``."""
        return {name: torch.cat(values) for name, values in self.values.items()}


@dataclass
class Routing:
    """What is recorded of the experts of a layer: the choice of each token, in the order of the steps."""

    node: fx.Node
    """In the source graph."""
    index: str
    """Name of the node that chooses, in the source graph."""
    cached_index: str
    chosen: list[Tensor] = field(default_factory=list)
    """[tokens, k] of each step."""


class CachedGraph:
    """A cached graph with pools of its own, zeroed."""

    def __init__(self, gm: fx.GraphModule, info: SequenceInfo, caches: Mapping[str, Tensor]) -> None:
        self.gm, self._info = gm, info
        self._caches = {name: torch.zeros_like(cache) for name, cache in caches.items()}

    def run(self, step: Step, interpreter: fx.Interpreter) -> Tensor:
        """One step; returns float32 logits [sequences, vocab]."""
        self._info.nest_sequences(step.sequences, pad_to=step.bucket)
        inputs = {**self._info.named_args(), **self._caches}
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        logits: Tensor = interpreter.run(*(inputs[node.name] for node in placeholders))[0]
        return logits[: len(step.sequences)].float()


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the results of some nodes, by name."""

    def __init__(self, gm: fx.GraphModule, wanted: Iterable[str]) -> None:
        super().__init__(gm)
        self._wanted = set(wanted)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As in the base class."""
        result = super().run_node(n)
        if n.name in self._wanted:
            self.kept[n.name] = result
        return result


class ArgumentRecorder(fx.Interpreter):
    """Runs a graph and keeps the arguments of one node as they are when it runs, and its result."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        super().__init__(gm)
        self._node = node
        self.arguments: dict[str, Any] = {}
        self.result = torch.empty(0)

    def run_node(self, n: fx.Node) -> Any:
        """As in the base class."""
        if n is self._node:
            args = map_arg(g.op_args(n), lambda source: self.env[source])
            self.arguments = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()
            }
        result = super().run_node(n)
        if n is self._node:
            self.result = result
        return result


def sites_of(source: fx.GraphModule, cached: fx.GraphModule) -> list[SiteValues]:
    """The attention sites of a dense graph, and then its ops with a state, each with what replaced it."""
    ours = torch.ops.ad_flashinfer
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for replaced in ({ours.attention: ours.cached_attention}, STATES):
        dense = [node for node in source.graph.nodes if g.is_op(node, *replaced)]
        inserted = [node for node in cached.graph.nodes if g.is_op(node, *replaced.values())]
        pairs += zip(dense, inserted, strict=True)
    return [SiteValues(*pair) for pair in pairs]


def routings_of(source: fx.GraphModule, cached: fx.GraphModule) -> list[Routing]:
    """The experts of a dense graph, each with those of the cached one."""
    pairs = zip(*(experts_of(gm) for gm in (source, cached)), strict=True)
    return [Routing(a, *(g.op_args(node)["top_k_index"].name for node in (a, b))) for a, b in pairs]


def record(
    cached: CachedGraph,
    steps: Sequence[Step],
    sites: Sequence[SiteValues],
    routings: Sequence[Routing] = (),
    on_step: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Run the steps, fill in the sites and the routings, and return each step's logits."""
    present = {node.name for node in cached.gm.graph.nodes}
    parts = [_operands(site.node) for site in sites]
    wanted = {site.cached.name for site in sites} | {each.cached_index for each in routings}
    for operands in parts:
        wanted |= {name for node in operands.values() for name in _needed(node, present)}
    logits = []
    for done, step in enumerate(steps):
        on_step(done)
        recorder = Recorder(cached.gm, wanted)
        logits.append(cached.run(step, recorder))
        rows = step.rows()
        for each in routings:
            each.chosen.append(recorder.kept[each.cached_index][rows])
        for site, operands in zip(sites, parts, strict=True):
            found = {name: _resolve(node, recorder.kept, present) for name, node in operands.items()}
            found["out"] = recorder.kept[site.cached.name]
            for name, value in found.items():
                site.values[name].append(value.flatten(0, 1)[rows])
    return logits


def _operands(node: fx.Node) -> dict[str, fx.Node]:
    """The arguments that are by token."""
    tensors = {name: arg for name, arg in g.op_args(node).items() if g.is_tensor(arg)}
    by_token = {
        name: g.value(arg).dim() > 2 and isinstance(g.shape(arg)[1], SymInt) for name, arg in tensors.items()
    }
    return {name: arg for name, arg in tensors.items() if by_token[name]}


def _needed(node: fx.Node, present: set[str]) -> set[str]:
    """The nodes of the cached graph from which a node of the source graph can be computed."""
    if node.name in present:
        return {node.name}
    return {name for source in node.all_input_nodes for name in _needed(source, present)}


def _resolve(node: fx.Node, kept: dict[str, Any], present: set[str]) -> Any:
    """The value of a node of the source graph: as the cached graph computed it, or from what it computed."""
    if node.name in present:
        return kept[node.name]
    assert callable(node.target)
    args = map_arg(node.args, lambda source: _resolve(source, kept, present))
    kwargs = map_arg(node.kwargs, lambda source: _resolve(source, kept, present))
    return node.target(*args, **kwargs)
