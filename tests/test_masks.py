"""The mask prover: right or a refusal that teaches, on random, adversarial and real masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ad_flashinfer_pass import masks
from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.mask_prover import rules
from ad_flashinfer_pass.mask_prover.forms import Cells, Form, variable
from ad_flashinfer_pass.mask_prover.program import MaskProgram
from ad_flashinfer_pass.mask_prover.reading import RULES, Reading
from tests.mask_programs import MIN, inputs, traced

assert rules.__doc__  # importing it fills RULES
aten = torch.ops.aten
NUM = torch.arange(100)
Function = Callable[[Tensor, Tensor], Tensor]

reproducible = settings(derandomize=True, deadline=None, database=None)


class Mask(torch.nn.Module):
    """A module that computes a mask, with tensors of its own."""

    def __init__(self, function: Callable[[Any, Tensor, Tensor], Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The mask; a copy, because export inlines what is only an input."""
        return self.function(self, input_ids, position_ids).clone()


def index(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key indices, [s, 1] and [s]."""
    k = torch.arange(ids.shape[1])
    return k[:, None], k


def causal(ids: Tensor, _: Tensor) -> Tensor:
    q, k = index(ids)
    return k <= q


def additive(visible: Tensor, hidden: float = MIN) -> Tensor:
    return torch.where(visible, 0.0, hidden)


def proved(function: Function, max_seq_len: int) -> masks.Certificate:
    return masks.prove(traced(function)[0], max_seq_len)


def refused(function: Function, max_seq_len: int) -> str:
    with pytest.raises(MaskError) as caught:
        proved(function, max_seq_len)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Arithmetic


def regions(rng: np.random.Generator, size: int, count: int = 40) -> Cells:
    """Random cells of a mask, about half of them single queries and keys."""
    lo = rng.integers(0, size, (4, count))
    width = rng.integers(0, size, (4, count)) * (rng.random((4, count)) < 0.5)
    lo[2] = rng.integers(-size, size, count)
    lo[3] += 1
    hi = np.minimum(lo + width, size - 1)
    hi[2], hi[3] = lo[2] + rng.integers(0, 2 * size, count), np.minimum(lo[3] + width[3], size)
    other = {"p": (np.zeros(1), np.zeros(1)), "b": (np.zeros(1), np.full(1, 2.0))}
    other["rows"] = (np.ones(1), np.full(1, 3.0))
    return Cells(lo, hi, np.zeros(count, dtype=np.int64), other).tightened()


def points(cells: Cells, at: int) -> list[tuple[int, int, int]]:
    """All (query, key, size) of one cell."""
    ranges = (range(cells.lo[axis, at], cells.hi[axis, at] + 1) for axis in (0, 1, 3))
    return [
        (q, k, s)
        for q, k, s in itertools.product(*ranges)
        if max(q, k) < s and cells.lo[2, at] <= q - k <= cells.hi[2, at]
    ]


@reproducible
@given(st.integers(0, 2**32), st.lists(st.integers(-3, 3), min_size=3, max_size=3))
def test_limits_hold_every_value_of_a_linear_form(seed: int, factors: list[int]) -> None:
    """Limits of a*q + b*k + c*s over a cell contain its value at each of the cell's points."""
    cells = regions(np.random.default_rng(seed), 6)
    terms = {name: np.array([float(f)]) for name, f in zip("qks", factors, strict=True) if f}
    lo, hi = cells.limits(Form(np.zeros(1), np.zeros(1), terms))

    lo, hi = np.broadcast_to(lo, len(cells)), np.broadcast_to(hi, len(cells))
    for at in range(len(cells)):
        values = [np.dot(factors, point) for point in points(cells, at)]
        assert lo[at] <= min(values)
        assert max(values) <= hi[at]


@reproducible
@given(st.integers(0, 2**32))
def test_split_cells_have_the_same_points(seed: int) -> None:
    """Splitting a cell loses no point, adds none, and leaves no cell empty."""
    rng = np.random.default_rng(seed)
    cells = regions(rng, 6)
    axis = rng.integers(0, 4, len(cells))
    everywhere = np.arange(len(cells))
    at = rng.integers(cells.lo[axis, everywhere], cells.hi[axis, everywhere] + 2)

    parts = cells.split(axis, at)

    assert sorted(p for n in range(len(cells)) for p in points(cells, n)) == sorted(
        p for n in range(len(parts)) for p in points(parts, n)
    )
    assert all(points(parts, n) for n in range(len(parts)))


# Rules


def ints(ids: Tensor) -> Tensor:
    """int64 [s, s] that depends on query and key."""
    q, k = index(ids)
    return q * 3 - k * 2


def floats(ids: Tensor) -> Tensor:
    """float32 [s, s] that is not exact."""
    return ints(ids) * 0.3


def positions(ids: Tensor, p: Tensor) -> Tensor:
    return p[:, None, None, :] + torch.zeros(ids.shape[1], 1, dtype=torch.int64)


TABLE = torch.randint(-9, 9, (40, 40), generator=torch.Generator().manual_seed(0))

# A program for each rule; together they must use all of them.
OPS: dict[str, Function] = {
    "add": lambda i, p: torch.add(ints(i), index(i)[1], alpha=2) + 1.5,
    "sub_rsub": lambda i, p: torch.rsub(ints(i), 7, alpha=3) - index(i)[0],
    "mul": lambda i, p: ints(i) * index(i)[1] * -2,
    "neg_abs": lambda i, p: (-ints(i)).abs(),
    "div": lambda i, p: ints(i) / 7,
    "div_floor": lambda i, p: torch.div(ints(i), 3, rounding_mode="floor"),
    "div_trunc": lambda i, p: torch.div(ints(i), 3, rounding_mode="trunc"),
    "floor_divide": lambda i, p: (ints(i) + 40) // 4 - index(i)[1] // 2,
    "remainder": lambda i, p: ints(i) % 5 + (index(i)[0] * 6) % 3,
    "pow": lambda i, p: ints(i) ** 2,
    "extremes": lambda i, p: torch.maximum(index(i)[0], index(i)[1]) - torch.minimum(ints(i), index(i)[1]),
    "clamp": lambda i, p: ints(i).clamp(-2, 4) + ints(i).clamp_min(1) + ints(i).clamp_max(3),
    "rising": lambda i, p: (floats(i) + 30).log() + floats(i).exp2() + (floats(i) + 30).sqrt().log2(),
    "exp": lambda i, p: floats(i).exp(),
    "log_of_less": lambda i, p: floats(i).log(),
    "rounded": lambda i, p: floats(i).floor() + floats(i).ceil() + floats(i).trunc(),
    "compare": lambda i, p: (floats(i) <= 1) & (ints(i) < 5) | (ints(i) >= 9) ^ (floats(i) > 7),
    "equal": lambda i, p: (ints(i) == 2) | (index(i)[1] != index(i)[0]),
    "logical": lambda i, p: torch.logical_xor(
        torch.logical_and(ints(i) > 0, ints(i) < 4), torch.logical_or(ints(i) > 6, ints(i).logical_not())
    ),
    "isinf": lambda i, p: additive(ints(i) > 0, float("-inf")).isinf(),
    "where": lambda i, p: torch.where(ints(i) > 1, floats(i), 3),
    "masked_fill": lambda i, p: floats(i).masked_fill(ints(i) > 1, -9),
    "casts": lambda i, p: floats(i).to(torch.int32).bool().float() + floats(i).type_as(ints(i)),
    "bfloat16": lambda i, p: (floats(i) * 17).bfloat16().float(),
    "float16": lambda i, p: (ints(i) * 3000).half().float(),
    "copies": lambda i, p: ints(i).clone().contiguous().detach(),
    "dropout": lambda i, p: torch.dropout(floats(i), 0.5, False),
    "full": lambda i, p: torch.full((i.shape[1], i.shape[1]), i.shape[1] * 2) + ints(i).new_full((), 3),
    "likes": lambda i, p: torch.ones_like(ints(i)) + torch.zeros_like(ints(i)) + torch.full_like(ints(i), 4),
    "news": lambda i, p: floats(i).new_ones(i.shape[1], 1) + floats(i).new_zeros(()) + torch.ones(i.shape[1]),
    "zeros": lambda i, p: torch.zeros(i.shape[1], i.shape[1]) + torch.scalar_tensor(3.5),
    "empty": lambda i, p: torch.where(
        torch.ones(i.shape[1], dtype=torch.bool), ints(i), torch.empty(i.shape[1], dtype=torch.int64)
    ),
    "eye": lambda i, p: torch.eye(i.shape[1]),
    "arange": lambda i, p: torch.arange(3, i.shape[1] * 2 + 3, 2) - torch.arange(i.shape[1], 0, -1)[:, None],
    "views": lambda i, p: ints(i).unsqueeze(0).view(1, -1, i.shape[1]).squeeze(0).reshape(i.shape[1], -1),
    "flatten": lambda i, p: (positions(i, p)[:, :1, :1].expand(-1, 2, -1, -1).flatten(0, 1) * 2).unflatten(
        0, (-1, 2)
    ),
    "expand": lambda i, p: (
        index(i)[1].expand(i.shape[1], -1).expand_as(ints(i)).broadcast_to(i.shape[1], i.shape[1])
    ),
    "permute": lambda i, p: ints(i)[None].permute(0, 2, 1)[0].t() + ints(i).transpose(0, 1).mT,
    "select": lambda i, p: ints(i)[-1] + ints(i)[:, 0, None] + ints(i).select(1, i.shape[1] - 1)[:, None],
    "slices": lambda i, p: torch.cat([ints(i), ints(i)])[i.shape[1] :] + torch.cat([ints(i)] * 2, 1)[:, ::2],
    "slice_back": lambda i, p: torch.cat([ints(i), ints(i) + 50], 1)[:, -i.shape[1] :],
    "slice_clamped": lambda i, p: (torch.arange(i.shape[1] + 3)[-99:] + index(i)[0])[:, : i.shape[1]],
    "narrow": lambda i, p: torch.cat([ints(i), ints(i)]).narrow(0, 2, i.shape[1]),
    "flip": lambda i, p: ints(i).flip(0) - ints(i).flip(1),
    "repeat": lambda i, p: (
        positions(i, p)[:, :, :1] + torch.arange(4).view(1, 2, 2, 1).repeat(1, 1, 3, 1)[:, :, 1:2]
    ),
    "repeat_interleave": lambda i, p: NUM[:3].repeat_interleave(2)[:, None, None] + ints(i),
    "head_interleave": lambda i, p: (p[:1, :1] + NUM[:3]).repeat_interleave(2, 1)[0, :, None, None] + ints(i),
    "cat": lambda i, p: torch.cat([ints(i)[:, :1] * 5, ints(i), ints(i)[:, -1:]], 1)[:, : i.shape[1]],
    "stack": lambda i, p: torch.stack([ints(i), ints(i) * 2, -ints(i)]),
    "pad": lambda i, p: torch.nn.functional.pad(ints(i), (2, 0, 1, 0), value=5)[: i.shape[1], : i.shape[1]],
    "slice_scatter": lambda i, p: ints(i).slice_scatter(ints(i)[1:] * 9, 0, 1),
    "select_scatter": lambda i, p: ints(i).select_scatter(ints(i)[0] * 9, 1, -1),
    "triangles": lambda i, p: ints(i).tril(1) + ints(i).triu(-1),
    "index": lambda i, p: TABLE[p[:, None, :, None], p[:, None, None, :]] + TABLE[NUM[:3, None, None], -1],
    "index_apart": lambda i, p: TABLE.view(40, 4, 10)[index(i)[1], :, index(i)[1] % 9].t()[:3, None],
    "index_select": lambda i, p: TABLE.index_select(0, index(i)[1]).index_select(1, index(i)[1] + 2),
    "gather": lambda i, p: ints(i).gather(1, (ints(i) + 60) % (index(i)[0] + 1)),
    "embedding": lambda i, p: torch.embedding(TABLE[:, :2].float(), ints(i) % 7)[..., 1],
    "table_of_lines": lambda i, p: (NUM[: i.shape[1]] * 0.7)[None] + ints(i) * 2,
    "cumsum": lambda i, p: ints(i).cumsum(0) + (ints(i) > 1).cumsum(-1),
    "diff": lambda i, p: ints(i).diff(dim=-1, prepend=ints(i)[:, :1] - 1),
    "any": lambda i, p: (ints(i) > 3).any(-1, keepdim=True) & ~(ints(i) > 1).any(0) | (ints(i) == 0).any(),
    "all": lambda i, p: (ints(i) > 3).all(-1, keepdim=True) | (ints(i) > -9).all(0),
    "extreme": lambda i, p: ints(i).amax(-1, keepdim=True) - ints(i).amin(0),
    "sum": lambda i, p: (
        ints(i).sum(-1, keepdim=True)
        + (ints(i) > 2).sum((0, 1))
        + torch.ones(i.shape[1], dtype=torch.int64).sum()
    ),
    "sizes": lambda i, p: (
        torch.full((), max(3, 9 - 1)) + torch.full((1, 1), i.shape[1] // 2 + i.shape[1] * 3)
    ),
    "positions": lambda i, p: positions(i, p) * 2 - p[:1, :1],
}
# These become other ops before a graph is made, or stand for their views in functional graphs.
SYNONYMS = "clip true_divide concat pad reshape _unsafe_view view_as reshape_as numpy_T flatten"


@pytest.fixture(scope="module")
def programs() -> dict[str, MaskProgram]:
    """All of OPS, traced once."""
    nodes = dict(zip(OPS, traced(*OPS.values()), strict=True))
    return {name: MaskProgram(node) for name, node in nodes.items()}


def reading_of(program: MaskProgram, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on the mask in each cell, for the first head."""
    with np.errstate(all="ignore"):
        reading = Reading(program, {}, cells)
        lo, hi = reading.cells.limits(reading.mask(variable("q"), variable("k")))
    return np.broadcast_to(lo, len(cells)), np.broadcast_to(hi, len(cells))


@pytest.mark.parametrize("name", OPS)
def test_rule_bounds_what_the_op_computes(name: str, programs: dict[str, MaskProgram]) -> None:
    """What a rule says of a region contains every value there, and is exact at single places."""
    function, program = OPS[name], programs[name]
    results = {s: function(*inputs(3, s)) for s in range(3, 10)}
    cells = regions(np.random.default_rng(0), 9, count=120)
    cells = cells.take(cells.lo[3] >= 3)
    lo, hi = reading_of(program, cells)

    for at in range(len(cells)):
        for q, k, s in points(cells, at):
            result = results[s].double()
            result = result.reshape((1,) * (4 - result.dim()) + result.shape)
            values = result[:, 0, q % result.shape[2], k % result.shape[3]]
            values = values[~values.isnan()]
            assert bool(((lo[at] <= values) & (values <= hi[at])).all()), (q, k, s, values, lo[at], hi[at])
    is_point = (cells.lo == cells.hi).all(0)
    inexact = ("rising", "exp", "log_of_less", "empty", "gather", "any", "all", "extreme", "cumsum", "sum")
    if name not in inexact and program.nodes:
        assert (lo == hi)[is_point].all()


def test_every_rule_is_tested(programs: dict[str, MaskProgram]) -> None:
    """No rule stands without a program above that uses it."""
    used = {
        getattr(node.target, "overloadpacket", None)
        for program in programs.values()
        for node in program.nodes
        if node not in program.constants
    }
    names = {str(packet).removeprefix("aten.") for packet in RULES if packet not in used}

    untested = {name for name in names if not name.endswith("_copy")} - set(SYNONYMS.split())

    assert untested == set()
