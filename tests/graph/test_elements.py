"""``trace``: each element of a token is found where it comes from, against the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ad_flashinfer_pass.graph import axes as ax
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.elements import trace

WIDTH = 24
Form = Callable[[Tensor], Tensor]


class Made(nn.Module):
    """x [b, s, WIDTH] -> [b, s, ...]."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


def heads(x: Tensor) -> Tensor:
    """[b, 4, s, 6]."""
    return x.view(*x.shape[:2], 4, 6).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    parts = heads(x).split([2, 4], -1)
    return torch.cat((parts[1], parts[0]), -1).transpose(1, 2)


def shared(x: Tensor) -> Tensor:
    own, common = x[..., :16].view(*x.shape[:2], 4, 4), x[..., 16:18].unsqueeze(2)
    return torch.cat((own, common.expand(-1, -1, 4, -1)), -1)


def cut(x: Tensor) -> Tensor:
    return torch.cat((x[..., 1::2], x.chunk(3, -1)[2], x.clone()[..., -5:]), -1)


def scattered(x: Tensor) -> Tensor:
    return torch.slice_scatter(x, x[..., 20:], -1, 3, 7)


FORMS: dict[str, Form] = {
    "joined": joined,
    "shared": shared,
    "cut": cut,
    "scattered": scattered,
    "repeated": lambda x: x[..., :6].repeat_interleave(4, -1),
    "tiled": lambda x: x.repeat(1, 1, 2),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_elements_are_where_the_numbers_say(form: Form) -> None:
    """An input whose numbers are its indices shows where each came from."""
    example, shapes = torch.zeros(2, 3, WIDTH), {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program = torch.export.export(Made(form), (example,), dynamic_shapes=shapes)
    graph = program.graph
    (source,) = (node for node in graph.nodes if node.op == "placeholder")
    result = g.args(graph.output_node())[0][0]
    tokens = ax.of_shape(g.shape(result)[:2])
    found = trace(result, tokens, lambda at: False)
    wanted = form(torch.arange(WIDTH).expand(2, 3, -1))[1, 2].flatten()
    places, numbers = torch.full_like(wanted, -1), torch.full_like(wanted, -1)
    for each in found:
        assert each.node is source
        assert each.tokens[:2] == tokens
        places[each.places], numbers[each.places] = each.places, each.flat()
    assert torch.equal(places, torch.arange(len(wanted)))
    assert torch.equal(numbers, wanted)


def test_what_computes_or_mixes_tokens_ends_a_trace() -> None:
    """A sum, and a cut through the tokens."""
    for form in (lambda x: x + 1, lambda x: torch.cat((x[:, 1:], x[:, :1]), 1)):
        shapes = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
        program = torch.export.export(Made(form), (torch.zeros(2, 3, WIDTH),), dynamic_shapes=shapes)
        result = g.args(program.graph.output_node())[0][0]
        (found,) = trace(result, ax.of_shape(g.shape(result)[:2]), lambda at: False)
        assert found.node is result
