"""What modules give is kept as the dense model gives it, in packed steps; else there is a refusal."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline
from ad_flashinfer_pass.records import TransformContext
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.transforms.small_models import SmallModel, context, sdpa, tokens

NAME = "hidden_states"


class Leaking(nn.Module):
    """Gives two tensors of tokens and features."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b, s, d], twice."""
        return torch.sin(x), torch.cos(x)


def leaking() -> SmallModel:
    """A model with one before its layer."""

    def mix(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        first, second = model.parts["leaking"](x)
        result: Tensor = first + second
        return result

    return SmallModel(sdpa, mix=mix, leaking=Leaking())


def kept(model: nn.Module, paths: Sequence[str]) -> tuple[nn.Module, TransformContext]:
    """The graph that keeps what these modules give, before it is compiled."""
    ctx = context()
    ctx.hidden_states = tuple(paths)
    return Pipeline.of(ctx.config).run(model.eval(), ctx)[0], ctx


def assert_keeps(model: SmallModel, paths: Sequence[str]) -> None:
    """For two prompts in one step, beside one another; what lies behind is left alone."""
    graph, ctx = kept(model, paths)
    given: dict[str, Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, result, path=path: given.update({path: result[0]})
        )
    wanted, steps = [], []
    for index, length in enumerate((7, 4)):
        ids, positions = tokens(1, length, index)
        model(ids, positions)
        wanted.append(torch.cat([given[path][0] for path in paths], -1))
        steps.append(SequenceStep(ids[0].tolist(), 0, [2 * index + 1, 2 * index + 2]))
    found = ctx.caches[NAME].fill_(7)
    ctx.sequence_info.nest_sequences(steps)
    with torch.inference_mode():
        graph(**ctx.sequence_info.named_args(), **ctx.caches)
    torch.testing.assert_close(found[:11], torch.cat(wanted), atol=1e-5, rtol=1e-5)
    assert bool((found[11:] == 7).all())


def test_keeps_what_layers_give() -> None:
    assert_keeps(SmallModel(sdpa, sdpa, sdpa), ["layers.0", "layers.2"])


def test_the_op_writes_its_rows_and_columns_alone() -> None:
    """And passes torch's own checks."""
    op, hidden = torch.ops.ad_flashinfer.keep_hidden_state.default, torch.randn(2, 4, 3).transpose(1, 2)
    torch.library.opcheck(op, (hidden, torch.zeros(8, 9), 5))
    found = torch.zeros(8, 9)
    op(hidden, found, 5)
    assert torch.equal(found[:6, 5:], hidden.reshape(6, 4))
    assert not found[6:].any()
    assert not found[:, :5].any()


def test_changes_nothing_where_nobody_asks() -> None:
    graph, ctx = kept(SmallModel(sdpa), [])
    assert NAME not in g.parameters(graph)
    assert NAME not in ctx.caches


@pytest.mark.parametrize(
    ("path", "found"),
    [("layers.9", "found none"), ("parts.leaking", "found node sin .* cos")],
)
def test_refuses_a_module_whose_result_is_not_shown(path: str, found: str) -> None:
    """One that is not there, and one that gives two."""
    with pytest.raises(UnsupportedError, match=f"the hidden states after {path}, .*{found}"):
        kept(leaking(), [path])
