"""``functionalize``: every write in place becomes a value, and the graph computes what the model does."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ad_flashinfer_pass import transform
from ad_flashinfer_pass.errors import ExportError
from ad_flashinfer_pass.graph import edit as g
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import (
    HEAD_DIM,
    HEADS,
    Attend,
    Layer,
    Mix,
    SmallModel,
    assert_computes,
    context,
    run,
    sdpa,
    tokens,
)

WIDTH = HEADS * HEAD_DIM


def whole(x: Tensor) -> Tensor:
    x = x.clone()
    x *= 2
    x.add_(1).relu_()
    return x


def part(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., :8] = x[..., :8] * 3
    x[..., 3].mul_(0.5)
    x[..., -4:].zero_()
    return x


def views_made_before(x: Tensor) -> Tensor:
    """A view shows what was written through the whole, and the whole what was written through a view."""
    x = x.clone()
    heads, first = x.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2), x[..., 0]
    x.mul_(2)
    heads[:, 1] += 1
    return x + first[..., None] + heads.transpose(1, 2).flatten(2)


def pieces(x: Tensor) -> Tensor:
    left, right = x.clone().chunk(2, -1)
    right.copy_(left)
    left.fill_(2.0)
    one, *_ = right.unbind(-1)
    one.neg_()
    return torch.cat((left, right), -1)


def of_another_dtype(x: Tensor) -> Tensor:
    half = x.half()
    half += x
    half[..., 0].copy_(x[..., 1])
    return half.float()


def row_from_another(x: Tensor) -> Tensor:
    """What was copied from is not what was copied to."""
    source = x + 1
    target = torch.empty_like(x)
    target.copy_(source)
    target.mul_(3)
    target[..., 1:2].copy_(torch.ones(()))
    return target + source


def written_twice(x: Tensor) -> Tensor:
    """A view stays a view after the first write through it."""
    x = x.clone()
    first = x[..., :8]
    first.mul_(2)
    first.add_(1)
    x.mul_(3)
    first.neg_()
    return x + first.sum(-1, keepdim=True)


def pieces_by_turns(x: Tensor) -> Tensor:
    x = x.clone()
    left, right = x.chunk(2, -1)
    left.mul_(2)
    right.add_(left)
    left.add_(right)
    return x


def turned_in_place(x: Tensor) -> Tensor:
    """The shape is changed in place, not what is in it."""
    x = x.clone()
    first = x[..., :8]
    first.unsqueeze_(0)
    first.mul_(2)
    x.transpose_(1, 2)
    x.add_(1)
    return x.transpose_(1, 2)


def whole_dimensions_first(x: Tensor) -> Tensor:
    heads = x.clone().unflatten(-1, (HEADS, HEAD_DIM))
    heads[:, :, 0].zero_()
    heads[:, :, 1] += heads[:, :, 2]
    return heads.flatten(2)


MIXES = [
    whole,
    part,
    views_made_before,
    pieces,
    of_another_dtype,
    row_from_another,
    written_twice,
    pieces_by_turns,
    turned_in_place,
    whole_dimensions_first,
]


@pytest.mark.parametrize("mix", MIXES, ids=[mix.__name__ for mix in MIXES])
def test_writes_become_values(mix: object) -> None:
    """No op that writes is left, and every shape of batch gives the logits of the model."""
    model = SmallModel(mix=_mix(mix))
    gm, reports = run(model, context(), "export_model", "functionalize")
    assert reports["functionalize"].num_matches > 0
    assert not [n for n in gm.graph.nodes if n.op == "call_function" and g.mutates_input(n)]
    assert_computes(gm, model)


def _mix(function: object) -> Mix:
    assert callable(function)
    return lambda model, x, p: function(x)


def query_times_a_number(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q *= 0.35
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)


def query_turned_in_part(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k = q.contiguous(), k.contiguous()
    for x in (q, k):
        angle = p[:, None, :, None] * 0.3
        x[..., :4] = x[..., :4] * angle.cos() + x[..., :4].flip(-1) * angle.sin()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("attend", [query_times_a_number, query_turned_in_part])
def test_operands_that_were_written_are_read_as_written(attend: Attend) -> None:
    """A factor is applied once, and a rotation is not lost, when they are written into query and key."""
    model = SmallModel(attend, attend).eval()
    assert_serves_like(cached(model), model)


@pytest.mark.parametrize("attend", [query_times_a_number, query_turned_in_part])
def test_so_they_are_in_a_program_of_the_users(attend: Attend) -> None:
    """torch.export keeps what is written in place as it is, until it is asked to decompose."""
    model = SmallModel(attend, attend).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, tokens(2, 13), dynamic_shapes=(dynamic,) * 2, strict=False)
    assert_serves_like(transform(program, context().config), model)


def test_writes_that_outlive_a_step_are_refused() -> None:
    """A buffer that forward changes would carry from one request to the next."""

    def count(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        model.parts["counter"].calls.add_(1)  # type: ignore[operator]
        return x * model.parts["counter"].calls  # type: ignore[operator]

    counter = nn.Module()
    counter.register_buffer("calls", torch.zeros(()))
    with pytest.raises(ExportError, match=r"writes to the weight or buffer .*calls, which would carry over"):
        run(SmallModel(sdpa, mix=count, counter=counter), context(), "export_model", "functionalize")


def test_a_buffer_that_is_written_by_another_name_is_refused() -> None:
    """A graph can have a node for each access of a buffer: what one writes, another reads a step later."""
    gm, _ = run(SmallModel(sdpa), context(), "export_model")
    calls = torch.zeros(())
    gm.register_buffer("calls", calls)
    output = gm.graph.output_node()
    logits = output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        read, written = gm.graph.get_attr("calls"), gm.graph.get_attr("calls")
        for node in (read, written):
            node.meta["val"] = g.fake_mode(gm).from_tensor(calls)  # type: ignore[union-attr]
        total = g.call_op(gm.graph, torch.ops.aten.add.Tensor, logits, read)
        g.call_op(gm.graph, torch.ops.aten.add_.Tensor, written, 1.0)
    output.replace_input_with(logits, total)
    with pytest.raises(ExportError, match=r"writes to the weight or buffer calls, which would carry over"):
        run(gm, context(), "functionalize")


def test_a_graph_without_writes_is_left_alone() -> None:
    """Nothing is matched, and the module is the same."""
    gm, _ = run(SmallModel(sdpa), context(), "export_model")
    before = [node.name for node in gm.graph.nodes]
    after, reports = run(gm, context(), "functionalize")
    assert after is gm
    assert [node.name for node in after.graph.nodes] == before
    assert reports["functionalize"].num_matches == 0


def random_program(seed: int) -> Callable[[Tensor], Tensor]:
    """Views of views of one tensor, and writes to any of them, in random order."""

    def view(rng: random.Random, x: Tensor) -> Tensor:
        dim = rng.randrange(x.dim())
        size = x.shape[dim]
        start = rng.randrange(size)
        end = rng.randrange(start, size) + 1
        choices: list[Callable[[], Tensor]] = [
            lambda: x.select(dim, start) if x.dim() > 1 else x,
            lambda: x.narrow(dim, start, end - start),
            lambda: x[(slice(None),) * dim + (slice(start, end, rng.choice((1, 2, 3))),)],
            lambda: x.transpose(dim, rng.randrange(x.dim())),
            lambda: rng.choice(x.split(rng.randint(1, size), dim)),
            lambda: rng.choice(x.chunk(rng.randint(1, 3), dim)),
            lambda: rng.choice(x.unbind(dim)) if x.dim() > 1 else x,
            lambda: x.unsqueeze(dim) if x.dim() < 5 else x.squeeze(),
            lambda: x.detach(),
            lambda: x.flatten(),
            lambda: x.unflatten(dim, (2, -1)) if size % 2 == 0 and x.dim() < 5 else x.contiguous(),
            lambda: x.view(*x.shape[:-2], -1) if x.dim() > 1 and x.is_contiguous() else x,
        ]
        return rng.choice(choices)()

    def write(rng: random.Random, x: Tensor, other: Tensor) -> None:
        factor = float(rng.randint(2, 5))
        choices: list[Callable[[], object]] = [
            lambda: x.mul_(factor),
            lambda: x.add_(other.clone() if other.shape == x.shape else other.sum()),
            lambda: x.copy_(other.mean() if other.shape != x.shape else other * 2),
            lambda: x.fill_(factor),
            lambda: x.sin_().sub_(0.5),
            lambda: x.masked_fill_(x > 0.5, -factor),
            lambda: x[..., :1].neg_(),
        ]
        rng.choice(choices)()

    def program(x: Tensor) -> Tensor:
        rng = random.Random(seed)
        base = x.clone()
        alive, result = [base, base + 1], torch.zeros(())
        for _ in range(rng.randint(4, 14)):
            if rng.random() < 0.5:
                alive.append(view(rng, rng.choice(alive)))
            else:
                write(rng, rng.choice(alive), rng.choice(alive))
            result = result * 0.5 + rng.choice(alive).sum() if rng.random() < 0.2 else result
        ramps = [torch.arange(1.0, tensor.numel() + 1) for tensor in alive]
        return result + sum((t.flatten() * ramp).cos().sum() for t, ramp in zip(alive, ramps, strict=True))

    return program


def test_random_programs() -> None:
    """Of random views and writes, none is wrong, and few are refused."""
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    count, refused = int(os.environ.get("AD_FUZZ_PROGRAMS", "100")), 0
    for seed in range(count):
        program = random_program(seed)
        gm = make_fx(program, tracing_mode="fake")(x)
        try:
            gm, _ = run(gm, context(), "functionalize")
        except ExportError:
            refused += 1
            continue
        assert not any(map(g.mutates_input, gm.graph.nodes))
        torch.testing.assert_close(
            gm(x), program(x), atol=1e-4, rtol=1e-4, msg=f"program {seed}: {{}}".format
        )
    assert refused < count / 4
