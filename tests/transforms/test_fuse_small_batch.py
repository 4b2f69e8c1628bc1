"""``fuse_small_batch``: what a linear takes in, what it leaves, and that the result is the same."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ad_flashinfer_pass import registry
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline, context, transform_module
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.transforms.fuse_small_batch import with_fused_linears
from tests import architectures
from tests.transforms.small_models import Float8Linear, SmallModel, exported, find
from tests.transforms.small_models import context as small_context
from tests.transforms.small_models import run as run_transforms

rms_norm = F.rms_norm
LINEAR = torch.ops.ad_flashinfer.linear
WIDTH = 32


class Gated(nn.Module):
    """RMSNorm, gate and up, down, with a residual."""

    def __init__(self, norm_is_read: bool = False, gate_is_read: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.gate, self.up = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(48, WIDTH)
        self.norm_is_read, self.gate_is_read = norm_is_read, gate_is_read
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        wide = x.float()
        normed = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        gate = self.gate(normed)
        out = x + self.down(F.silu(gate) * self.up(normed))
        if self.norm_is_read:
            out = out + normed
        return out + gate.mean(-1, keepdim=True) if self.gate_is_read else out


def fused(part: Gated) -> tuple[fx.GraphModule, list[dict[str, object]]]:
    model = SmallModel(mix=lambda m, x, p: m.parts["gated"](x), gated=part).to(torch.bfloat16)
    ctx = small_context()
    ctx.target = torch.device("cuda")  # a CPU fuses nothing
    gm, _ = run_transforms(exported(model, ctx=ctx), ctx, "fuse_gemms")
    inputs = torch.randint(29, (2, 7)), torch.arange(7).repeat(2, 1)
    before = gm(*inputs)
    small, *_ = with_fused_linears(gm)
    # The roundings of bfloat16 between the fused kernels are gone.
    torch.testing.assert_close(small(*inputs), before, atol=0.06, rtol=0.02)
    return small, [g.op_args(node) for node in find(small, LINEAR)]


def test_norm_swiglu_and_residual_are_taken_in() -> None:
    gm, (gate_up, down, lm_head) = fused(Gated())
    assert gate_up["norm"] is not None
    assert gate_up["eps"] == 1e-5
    assert gate_up["gated"]
    assert down["residual"] is not None
    assert down["bias"] is not None
    assert lm_head["norm"] is lm_head["residual"] is None
    assert not find(gm, torch.ops.aten.silu, torch.ops.aten.rsqrt, torch.ops.aten.linear)


class Float8Gated(Gated):
    """The same in float8."""

    def __init__(self, scaling: str, activation: str) -> None:
        super().__init__()
        for name, rows, depth in (("gate", 48, WIDTH), ("up", 48, WIDTH), ("down", WIDTH, 48)):
            setattr(self, name, Float8Linear(rows, depth, activation, scaling))


@pytest.mark.parametrize("activation", ["none", "tensor", "token"])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_float8_linears_take_in_the_same(scaling: str, activation: str) -> None:
    _, (gate_up, down, lm_head) = fused(Float8Gated(scaling, activation))
    assert gate_up["norm"] is not None
    assert gate_up["gated"]
    assert down["residual"] is not None
    assert gate_up["activation"] == down["activation"] == activation
    assert (gate_up["input_scale"] is not None) == (activation == "tensor")
    assert lm_head["weight_scale"] is None


class Halves(Gated):
    """Gate and up as halves of one linear, whose blocks have scales; 48 rows are no whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = (
            Float8Linear(96, 256, "block", "block"),
            nn.Linear(48, WIDTH).requires_grad_(False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        gate, up = self.both(x.repeat(1, 1, 8)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up).to(x.dtype)


def test_halves_whose_scales_share_a_block_are_not_gated() -> None:
    _, (both, *_) = fused(Halves())
    assert both["weight_scale"] is not None
    assert not both["gated"]


@pytest.mark.parametrize("change", ["eps_times_alpha", "one_number", "every_second"])
def test_what_only_looks_like_a_part_stays(change: str) -> None:
    model = SmallModel(mix=lambda m, x, p: m.parts["gated"](x), gated=Gated()).to(torch.bfloat16)
    ctx = small_context()
    ctx.target = torch.device("cuda")  # a CPU fuses nothing
    gm, _ = run_transforms(exported(model, ctx=ctx), ctx, "fuse_gemms")
    if change == "eps_times_alpha":
        add = g.args(find(gm, torch.ops.aten.rsqrt)[0])[0]
        add.kwargs = {"alpha": 1000.0}
    elif change == "one_number":
        (scale,) = (n for n in gm.graph.find_nodes(op="get_attr") if str(n.target).endswith("scale"))
        owner, _, leaf = str(scale.target).rpartition(".")
        setattr(gm.get_submodule(owner), leaf, nn.Parameter(torch.full((1,), 0.5, dtype=torch.bfloat16)))
        scale.meta["val"] = g.value(scale)[:1]
    else:
        for part in find(gm, torch.ops.aten.slice)[:2]:
            part.args = (*part.args, 2)
    small, *_ = with_fused_linears(gm)
    first, *_ = (g.op_args(node) for node in find(small, LINEAR))
    assert first["gated"] if change != "every_second" else not first["gated"]
    assert (first["norm"] is None) == (change != "every_second")


def test_each_model_keeps_the_kernels_that_were_measured_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The choice stands in the nodes of a graph, so that a second one in the same process changes nothing."""
    pytest.importorskip("triton", reason="triton is not installed")
    from ad_flashinfer_pass.kernels.linear import tune
    from ad_flashinfer_pass.kernels.linear.by_torch import by_torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    plans = []
    for folder, us_of_ours in (("first", 10.0), ("second", 30.0)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        monkeypatch.setattr(
            tune,
            "microseconds",
            lambda launches, us=us_of_ours: 20.0 if launches[0].func is by_torch else us,
        )
        ctx = small_context(compile_backend="torch-opt", max_batch_size=2)
        ctx.target = torch.device("cuda")  # a CPU fuses nothing
        model = SmallModel(mix=lambda m, x, p: m.parts["gated"](x), gated=Gated()).to(torch.bfloat16)
        gm, _ = run_transforms(exported(model, ctx=ctx), ctx, "fuse_gemms")
        ctx.device = torch.device("cuda")  # only asked for its kind: the weights are here
        run_transforms(gm, ctx, "fuse_small_batch")
        assert ctx.small_batch_model is not None
        plans.append([g.op_args(node)["plan"] for node in find(ctx.small_batch_model, LINEAR)])
    first, second = plans
    assert all(plan.startswith("torch 1=small_gemm/1/") for plan in first), first
    assert set(second) == {"torch"}


def test_what_something_else_reads_stays() -> None:
    _, (gate_up, *_) = fused(Gated(norm_is_read=True))
    assert gate_up["norm"] is None
    assert gate_up["gated"]
    _, (gate_up, *_) = fused(Gated(gate_is_read=True))
    assert gate_up["norm"] is not None
    assert not gate_up["gated"]


@pytest.mark.parametrize("name", ["llama_gqa4", "qwen2", "gemma2"])
def test_logits_of_real_models(name: str) -> None:
    """No further from the model in float32 than before; Gemma's norm is another, and is left alone."""
    model: nn.Module = architectures.random_model(architectures.CONFIGS[name](), "eager")
    model = model.to(torch.bfloat16)
    tokens = list(range(20))
    with torch.no_grad():
        exact = deepcopy(model).float()(torch.tensor([tokens])).logits[0, -1]
    ctx = context(AutoDeployConfig(max_batch_size=2, max_seq_len=64))
    gm, _ = Pipeline.of(ctx.config).without("compile_model", "fuse_small_batch").run(model, ctx)
    assert isinstance(gm, fx.GraphModule)
    ctx.target = torch.device("cuda")  # a CPU fuses nothing
    gm, _ = run_transforms(gm, ctx, "fuse_gemms")

    def error(graph: fx.GraphModule) -> float:
        ctx.sequence_info.nest_sequences([SequenceStep(tokens, 0, [1]), SequenceStep([5, 6], 0, [2])])
        logits = graph(**ctx.sequence_info.named_args(), **ctx.caches)[0, 0]
        return float((logits.float() - exact).norm() / exact.norm())

    small, count, skipped = with_fused_linears(gm)
    assert count == 4 * 3 + 1
    assert not skipped
    parts = [g.op_args(node) for node in find(small, LINEAR)]
    assert sum(part["norm"] is not None for part in parts) == (0 if name == "gemma2" else 2 * 3)
    assert sum(part["residual"] is not None for part in parts) == (0 if name == "gemma2" else 2 * 3)
    assert sum(part["gated"] for part in parts) == (0 if name == "gemma2" else 3)
    assert 0 < error(small) < 1.2 * error(gm) < 0.1


def test_steps_go_to_the_graph_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both graphs, steps of few and of many tokens give what one graph gives."""
    model: nn.Module = architectures.random_model(architectures.CONFIGS["llama_gqa4"](num_layers=2), "sdpa")
    model = model.to(torch.bfloat16)
    config = AutoDeployConfig(max_batch_size=4, max_seq_len=128)
    one = transform_module(model, config)[0]
    ctx = context(config)
    both, _ = Pipeline.of(ctx.config).without("compile_model", "fuse_small_batch").run(model, ctx)
    assert isinstance(both, fx.GraphModule)
    ctx.small_batch_model = with_fused_linears(both)[0]
    calls: list[int] = []

    def counted(x: Tensor, *args: Any) -> Tensor:
        calls.append(len(x))
        return rms_norm(x, *args)

    monkeypatch.setattr(F, "rms_norm", counted)
    compiled, _ = registry.get("compile_model")(both, ctx)
    for count in (1, 5, 64, 65, 90):
        step = [SequenceStep(list(range(1, count + 1)), 0, [1, 2, 3][: 1 + (count - 1) // 32])]
        ctx.sequence_info.nest_sequences(step)
        found = compiled(**ctx.sequence_info.named_args(), **ctx.caches)[0]
        expected = one.step(step)
        assert (found - expected).norm() < 0.1 * expected.norm()
    assert set(calls) == {1, 5, 64}
