"""The ranks of a model as threads of one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.collectives import in_threads
from ad_flashinfer_pass.pipeline import Pipeline
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.transforms.small_models import context


class Together:
    """A model of several ranks.

    Args:
        module: whole, with its weights.
        size: number of ranks.
        config: keys of the config.
    """

    def __init__(self, module: nn.Module, size: int, **config: object) -> None:
        ctx = context(**config)
        gm, _ = Pipeline.of(ctx.config).before("shard").run(module, ctx)
        assert isinstance(gm, fx.GraphModule)
        self.ranks: list[CachedModel] = []
        self.reports: list[TransformReport] = []
        """Of ``shard``, by rank."""
        for rank in range(size):
            ctx = context(**config, world_size=size)
            ctx.rank = rank
            made, reports = Pipeline.of(ctx.config).since("shard").run(g.copied(gm), ctx)
            self.ranks.append(CachedModel(made, ctx.caches, ctx.sequence_info, ctx.vocab_size, ctx.weights))
            self.reports.append(reports[0])
            self.are_logits_alike = ctx.are_logits_alike
        first, *others = [_collectives(rank.module) for rank in self.ranks]
        assert all(other == first for other in others)  # else they would wait for each other for ever

    def step(self, sequences: Sequence[SequenceStep]) -> Tensor:
        """The logits, which all ranks have alike."""
        first, *others = in_threads([partial(rank.step, sequences) for rank in self.ranks])
        assert all(torch.equal(first, other) for other in others)
        return first

    @property
    def graph(self) -> fx.GraphModule:
        """That of the first rank."""
        module = self.ranks[0].module
        assert isinstance(module, fx.GraphModule)
        return module

    def sizes(self, name: str) -> list[tuple[int, ...]]:
        """Shapes of the weights of the first rank whose names have that in them."""
        return [tuple(p.shape) for found, p in self.graph.named_parameters() if name in found]


def _collectives(module: nn.Module) -> list[str]:
    """What a rank asks of the others, in order."""
    assert isinstance(module, fx.GraphModule)
    ours = torch.ops.ad_flashinfer
    nodes = [node for node in module.graph.nodes if g.is_op(node, ours.all_reduce, ours.all_gather)]
    return [f"{node.target} {tuple(g.shape(node))}" for node in nodes]
