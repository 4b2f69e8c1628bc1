"""Parts of nodes: which heads others read, and what is alike on all ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass.graph.parts import CannotCutError, Parts, _shared


@pytest.mark.parametrize(
    ("kept", "group", "read"),
    [
        (((2, 4),), 1, ((2, 4),)),
        (((2, 4),), 2, ((1, 2),)),
        (((1, 2),), 2, ((0, 1),)),
        (((4, 8),), 2, ((2, 4),)),
        (((2, 4),), 3, None),  # one of the first head's, one of the second's
        (((3, 4), (0, 1)), 2, None),  # of both of them some
    ],
)
def test_heads_that_are_read(
    kept: tuple[tuple[int, int], ...], group: int, read: tuple[tuple[int, int], ...] | None
) -> None:
    """Whole groups of readers, or some of one."""
    if read is not None:
        assert _shared(kept, group) == read
        return
    with pytest.raises(CannotCutError, match=f"has {group} heads that read one"):
        _shared(kept, group)


class Beside(nn.Module):
    """The results of linears, joined."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(2, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], -1)


@pytest.mark.parametrize("widths", [(4, 4), (4, 8), (8, 4, 4), (2, 6, 4)])
def test_what_is_said_to_be_alike_on_all_ranks_is(widths: tuple[int, ...]) -> None:
    """Every share of every run of what is joined, one for each rank or for several."""
    graph = torch.export.export(Beside(widths), (torch.ones(3, 2),)).module()
    (joined,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    num_alike = 0
    for size, several, count in itertools.product((2, 4), (1, 2), (1, 2, 3, 4)):
        for first in range(sum(widths) - size // several * count + 1):
            ranks = [Parts(graph, rank, size) for rank in range(size)]
            for parts in ranks:
                start = first + parts.rank // several * count
                parts.strictly(joined, -1, ((start, start + count),))
            if any(parts.is_even for parts in ranks):
                num_alike += 1
                assert all(parts.seen == ranks[0].seen for parts in ranks)
    assert num_alike >= len(set(widths))


class Squeezed(nn.Module):
    """The heads of a linear, with every dimension of size one taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (4, 2)).squeeze()


def test_a_part_has_the_rank_of_the_whole() -> None:
    """One head is a dimension of size one, which the squeeze would take: it is cut behind that."""
    x = torch.ones(3, 2)
    graph = torch.export.export(Squeezed(), (x,)).module()
    whole = graph(x)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.default)
    with pytest.raises(CannotCutError, match="loses a dimension of size one"):
        Parts(graph, 0, 4).strictly(node, 1, ((1, 2),))
    graph.graph.output_node().replace_input_with(node, Parts(graph, 0, 4).of(node, 1, ((1, 2),)))
    graph.recompile()
    torch.testing.assert_close(graph(x), whole[:, 1:2])


class Repeated(nn.Module):
    """Four heads of a linear, each some times."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.linear, self.repeats = nn.Linear(2, 8), repeats

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (4, 2)).repeat_interleave(self.repeats, dim=1)


@pytest.mark.parametrize(
    ("repeats", "size", "is_cut"),
    [(1, 2, True), (2, 2, True), (2, 4, True), (2, 8, True), (3, 12, True), (3, 3, False), (3, 6, False)],
)
def test_parts_of_what_is_repeated(repeats: int, size: int, is_cut: bool) -> None:
    """Whole heads each repeated, or some of the repetitions of one; of several heads some cannot be cut."""
    torch.manual_seed(0)
    graph = torch.export.export(Repeated(repeats), (x := torch.randn(3, 2),)).module()
    whole, count = graph(x), 4 * repeats // size
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.repeat_interleave.self_int)
    parts, kept = Parts(graph, 1, size), ((count, 2 * count),)
    if not is_cut:
        with pytest.raises(CannotCutError, match="has 3 heads that read one"):
            parts.strictly(node, 1, kept)
        return
    graph.graph.output_node().replace_input_with(node, parts.strictly(node, 1, kept))
    graph.recompile()
    torch.testing.assert_close(graph(x), whole[:, count : 2 * count])
    assert parts.is_even
