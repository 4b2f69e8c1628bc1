"""``export_model``: one graph for every shape, from modules of several kinds, and errors that say why."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass.errors import ExportError
from tests import architectures
from tests.transforms.small_models import SmallModel, assert_computes, context, run, sdpa, tokens


class Returns(nn.Module):
    """A model whose result is wrapped, as those of libraries are."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.model, self.wrap = SmallModel(sdpa), wrap

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        """The logits, wrapped."""
        return self.wrap(self.model(input_ids, position_ids))


class Cached(nn.Module):
    """Takes the arguments of a transformers model; with a cache it would return something else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallModel(sdpa)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        """Logits, but only without a cache."""
        assert not use_cache
        assert position_ids is not None
        return SimpleNamespace(logits=self.model(input_ids, position_ids))


@dataclass
class OwnOutput:
    """What a model of one's own may return."""

    scores: Tensor
    loss: Tensor | None = None


class CachesByItself(nn.Module):
    """Passes use_cache, which its signature does not have, to what asks its config where it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallModel(sdpa)

    def forward(self, input_ids: Tensor, position_ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        """Logits, but only without a cache."""
        assert not kwargs.get("use_cache", True)
        out: Tensor = self.model(input_ids, position_ids)
        return out


class NoPositions(nn.Module):
    """A model that knows no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(29, 29)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.embedding(input_ids)
        return out


class DependsOnValues(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.sum() > 3:
            return super().forward(input_ids)
        return super().forward(input_ids) * 2


class FixedLength(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + torch.ones(input_ids.shape[0], 13, 29)


class LengthAsNumber(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * float(1.0 / input_ids.shape[1])


class BranchesOnOneSequence(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (2 if input_ids.shape[0] > 1 else 1)


class BranchesOnOneToken(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (2 if input_ids.shape[1] == 1 else 1)


class MasksLogits(BranchesOnOneToken):
    """Some tokens are never to be drawn."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).masked_fill(torch.arange(29) > 25, self.least)


class BranchesOnLength(NoPositions):
    def forward(self, input_ids: Tensor) -> Tensor:
        scale = 1.0 if input_ids.shape[1] <= 32 else 2.0
        return super().forward(input_ids) * scale


def test_one_graph_serves_every_shape() -> None:
    """The graph gives the model's logits for shapes other than the example's, one token included."""
    model = SmallModel(sdpa)
    gm, reports = run(model, context(), "export_model")
    assert_computes(gm, model)
    assert [node.name for node in gm.graph.find_nodes(op="placeholder")] == ["input_ids", "position_ids"]
    report = reports["export_model"]
    assert (report.num_matches, report.notes) == (1, [f"{len(gm.graph.nodes)} nodes"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x,),
        lambda x: (x, x.sum()),
        lambda x: (None, x),
        lambda x: SimpleNamespace(logits=x),
        lambda x: {"loss": None, "hidden": x.exp(), "logits": x},
        lambda x: {"scores": x, "loss": None},
        lambda x: OwnOutput(x),
    ],
    ids=["tuple", "logits_first", "loss_first", "object", "dict", "dict_of_one_tensor", "dataclass"],
)
def test_logits_are_found_in_the_result(wrap: Any) -> None:
    """What is called logits, the first of a tuple, or the only tensor is the graph's one result."""
    model = Returns(wrap)
    gm, _ = run(model, context(), "export_model")
    assert_computes(gm, model.model)


def test_a_result_without_logits_is_refused_with_what_it_has() -> None:
    """Nothing is guessed among several tensors, whatever their order."""
    model = Returns(lambda x: {"hidden": x.exp(), "scores": x})
    with pytest.raises(ExportError, match="returns a dict of hidden, scores, and which of them"):
        run(model, context(), "export_model")


def test_a_model_that_caches_by_itself_is_told_not_to() -> None:
    """Also where use_cache is among the other keywords, as in GraniteMoe of transformers 5.24."""
    model = CachesByItself()
    gm, _ = run(model, context(), "export_model")
    assert_computes(gm, model.model)


def test_models_with_a_cache_are_called_without_it() -> None:
    """A model that takes use_cache is exported without a cache, with the positions given."""
    model = Cached()
    gm, _ = run(model, context(), "export_model")
    assert_computes(gm, model.model)


def test_positions_are_passed_only_to_models_that_take_them() -> None:
    """A model without position_ids is exported; the graph has the input all the same."""
    model = NoPositions()
    gm, _ = run(model, context(), "export_model")
    ids, positions = tokens(3, 4)
    assert torch.equal(gm(ids, positions), model(ids))


def test_parameters_are_shared_not_copied() -> None:
    """The graph reads the module's own weights, so that exporting takes no memory for them."""
    model = SmallModel(sdpa)
    gm, _ = run(model, context(), "export_model")
    assert {p.data_ptr() for p in gm.parameters()} == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (DependsOnValues(), "DependsOnValues"),
        (FixedLength(), "FixedLength"),
        (LengthAsNumber(), "LengthAsNumber"),
        (BranchesOnLength(), "BranchesOnLength"),
        (BranchesOnOneSequence(), "BranchesOnOneSequence"),
        (BranchesOnOneToken(), "BranchesOnOneToken"),
        (BranchesOnOneToken().bfloat16(), "BranchesOnOneToken"),
        (MasksLogits(float("-inf")), "MasksLogits"),
        (MasksLogits(float("-inf")).bfloat16(), "MasksLogits"),
        (MasksLogits(torch.finfo(torch.float32).min), "MasksLogits"),
        (MasksLogits(float("nan")), "MasksLogits"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_model_that_needs_fixed_shapes_or_values_is_refused(model: nn.Module, named: str) -> None:
    """What cannot be one graph for all shapes is an ExportError with torch's own reason, on one line."""
    with pytest.raises(ExportError) as raised:
        run(model, context(), "export_model")
    message = str(raised.value)
    assert message.startswith(f"{named} cannot be exported with dynamic batch and sequence: ")
    assert len(message) > 100
    assert "\n" not in message


@pytest.mark.parametrize("family", ["mamba2", "qwen3_moe"])
def test_a_path_for_one_token_is_seen_beside_ops_that_round_otherwise(family: str) -> None:
    """In bfloat16 experts and states by our ops are not what transformers computes to the last bit."""

    class ForOneToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = architectures.small_config(family, num_hidden_layers=1)
            self.inner = architectures.random_model(config).bfloat16()

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids, use_cache=False).logits
            return logits * (1.1 if input_ids.shape[1] == 1 else 1)

    with pytest.raises(ExportError, match="its code takes another path for a size of 1"):
        run(ForOneToken(), context(), "export_model")


def test_a_branch_beyond_max_seq_len_does_not_matter() -> None:
    """What the model does for longer sequences than will ever be served need not be in the graph."""
    model = BranchesOnLength()
    gm, _ = run(model, context(max_seq_len=32), "export_model")
    ids, positions = tokens(2, 30)
    assert torch.equal(gm(ids, positions), model(ids))
