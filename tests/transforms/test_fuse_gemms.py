"""``fuse_gemms``: fewer linears, the same results, and no weight twice in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext
from tests.transforms.small_models import (
    HEAD_DIM,
    HEADS,
    Float8Linear,
    SmallModel,
    assert_computes,
    aten,
    context,
    exported,
    find,
    run,
    sdpa,
)

WIDTH = HEADS * HEAD_DIM


class Gated(nn.Module):
    """Two projections with and two without bias, and one whose weight is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.left, self.right = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        hidden = F.silu(self.gate(x)) * self.up(x) + self.left(x).tanh() * self.right(x)
        return x + self.down(hidden) + self.tied(x) + F.linear(self.tied(x), self.tied.weight)


def rows_at_once(layer: object, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
    """SDPA of queries that were viewed over rows: legal for a tensor without gaps only."""
    b, n, s, d = q.shape
    flat = q.transpose(1, 2).reshape(b * s, n * d)
    return sdpa(layer, flat.view(b, s, n, d).transpose(1, 2), k, v, position_ids)  # type: ignore[arg-type]


def gpu_context() -> TransformContext:
    ctx = context()
    ctx.target = torch.device("cuda")
    return ctx


def test_a_cpu_keeps_them_apart() -> None:
    ctx = context()
    _, reports = run(exported(SmallModel(sdpa), "match_attention", ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == 0


def test_linears_of_one_input_are_one_linear() -> None:
    model, ctx = SmallModel(sdpa, sdpa), gpu_context()
    gm, reports = run(exported(model, "match_attention", ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == 2
    assert len(find(gm, aten.linear)) == 2 * 2 + 1  # q-k-v and output of two layers, lm_head
    assert_computes(gm, model)


def test_weights_may_be_of_no_module() -> None:
    """As those of a model that is written with parameters of its own, or was traced elsewhere."""

    def mix(model: SmallModel, x: Tensor, position_ids: Tensor) -> Tensor:
        left, right = (F.linear(x, model.get_parameter(name)) for name in ("left", "right"))
        return left * right

    model = SmallModel(mix=mix)
    for name in ("left", "right"):
        setattr(model, name, nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False))
    ctx = gpu_context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == 1
    assert_computes(gm, model, 1e-4)


def test_one_copy_of_each_weight_is_left() -> None:
    model, ctx = SmallModel(sdpa), gpu_context()
    before = exported(model, ctx=ctx)
    gm, _ = run(before, ctx, "fuse_gemms")
    assert sum(p.numel() for p in gm.parameters()) <= sum(p.numel() for p in model.parameters())
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert not any(name.endswith(("query.weight", "key.weight", "value.weight")) for name in names)
    assert "layers_0_query_key_value_weight" in {name.removeprefix("model_") for name in names}


def test_with_and_without_bias_are_fused_apart_and_tied_weights_stay() -> None:
    model = SmallModel(mix=lambda m, x, p: m.parts["gated"](x), gated=Gated())
    ctx = gpu_context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    report = reports["fuse_gemms"]
    assert report.num_matches == 2
    assert all("tied" in skip.reason for skip in report.skipped)
    assert report.skipped
    assert_computes(gm, model)


def test_views_across_rows_become_reshapes() -> None:
    model, ctx = SmallModel(rows_at_once), gpu_context()
    gm, _ = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    fused = next(node for node in find(gm, aten.linear) if len(node.users) == 3)
    assert not any(g.is_op(user, aten.view) for part in fused.users for user in part.users)
    assert_computes(gm, model)


def test_nothing_to_fuse_changes_nothing() -> None:
    model, ctx = SmallModel(mix=lambda m, x, p: torch.tanh(x)), gpu_context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == 0
    assert_computes(gm, model)


def test_the_parameters_of_the_source_become_views_of_the_fused_ones() -> None:
    """It computes what it did, no weight is in memory twice, and a second fusion copies nothing."""
    model = SmallModel(sdpa, sdpa)
    tokens, positions = torch.randint(0, 9, (2, 5)), torch.arange(5).repeat(2, 1)
    before = model(tokens, positions)
    fused = []
    for _ in range(2):
        ctx = gpu_context()
        gm, _ = run(exported(model, "match_attention", ctx=ctx), ctx, "fuse_gemms")
        assert_computes(gm, model)
        fused.append([p for name, p in gm.named_parameters() if "_weight" in name])
        assert len(fused[-1]) == 2
    torch.testing.assert_close(model(tokens, positions), before, rtol=0, atol=0)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parts in zip(*fused, strict=True):
        assert {p.untyped_storage().data_ptr() for p in parts} <= storages


class Float8Gate(nn.Module):
    """Two linears in float8 that read the same tensor."""

    def __init__(self, scaling: str, activation: str = "token", rows: int = 256, scale: float = 0.01) -> None:
        super().__init__()
        self.left = Float8Linear(256, WIDTH, activation, scaling)
        self.right = Float8Linear(rows, WIDTH, activation, scaling, scale)
        self.down = nn.Linear(256 + rows, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        return x + self.down(torch.cat([self.left(x), self.right(x).tanh()], -1)) / 64


@pytest.mark.parametrize(
    ("part", "num_fused"),
    [
        (Float8Gate("tensor"), 1),
        (Float8Gate("row", rows=40), 1),
        (Float8Gate("block", "block"), 1),
        (Float8Gate("tensor", "tensor"), 1),
        # One would be quantized by the other's scale.
        (Float8Gate("tensor", "tensor", scale=0.02), 0),
        # Its rows would begin within a block of the other.
        (Float8Gate("block", "block", rows=168), 0),
    ],
    ids=["tensors", "rows", "blocks", "static", "other_static", "cut_block"],
)
def test_float8_linears_keep_their_scales(part: Float8Gate, num_fused: int) -> None:
    model = SmallModel(mix=lambda m, x, p: m.parts["gate"](x), gate=part)
    ctx = gpu_context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == num_fused
    assert len(find(gm, torch.ops.ad_flashinfer.quantized_linear)) == 2 - num_fused
    assert_computes(gm, model)


class FourBits(nn.Module):
    """A linear of 4 bits in groups of 16."""

    def __init__(self, rows: int, has_zero_point: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randint(256, (rows, WIDTH // 2)).to(torch.uint8), requires_grad=False
        )
        self.scale = nn.Parameter(torch.rand(rows, WIDTH // 16) / 64)
        zero = torch.randint(16, (rows, WIDTH // 16)).to(torch.uint8) if has_zero_point else None
        self.zero = None if zero is None else nn.Parameter(zero, requires_grad=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., WIDTH] -> [..., rows]."""
        args = (x, self.weight, self.scale, None, None, "none", self.zero)
        out: Tensor = torch.ops.ad_flashinfer.quantized_linear(*args)
        return out


@pytest.mark.parametrize(
    ("has_zero_points", "num_fused"), [((True, True), 1), ((False, False), 1), ((True, False), 0)]
)
def test_linears_of_4_bits_keep_scales_and_zero_points(
    has_zero_points: tuple[bool, bool], num_fused: int
) -> None:
    part = Float8Gate("tensor")
    part.left, part.right = (FourBits(256, has) for has in has_zero_points)  # type: ignore[assignment]
    model = SmallModel(mix=lambda m, x, p: m.parts["gate"](x), gate=part)
    ctx = gpu_context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "fuse_gemms")
    assert reports["fuse_gemms"].num_matches == num_fused
    assert_computes(gm, model)
