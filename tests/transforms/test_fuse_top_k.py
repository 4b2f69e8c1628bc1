"""``fuse_top_k``: which routers become one op, and that their numbers stay."""

from __future__ import annotations

import operator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.transforms import fuse_top_k
from tests import architectures
from tests.transforms.small_models import find

TOP_K = torch.ops.ad_flashinfer.top_k
# What stands between logits and experts, and is gone where the softmax is taken in.
AROUND = (torch.ops.aten.topk, torch.ops.aten.softmax, torch.ops.aten.sum)


def fused(model: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule, Any]:
    """A copy of the graph before, and the graph after, as on a GPU."""
    config = AutoDeployConfig(max_batch_size=2, max_seq_len=64)
    ctx, pipeline = context(config), Pipeline.of(config)
    before, _ = pipeline.before("fuse_top_k").run(model, ctx)
    assert isinstance(before, fx.GraphModule)
    copy = deepcopy(before)
    ctx.target = torch.device("cuda")
    after, report = fuse_top_k.fuse_top_k(before, ctx)
    assert isinstance(after, fx.GraphModule)
    return copy, after, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "changes", "softmax"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}, "chosen"),
        ("qwen3_moe", {"norm_topk_prob": False}, "all"),
        ("mixtral", {}, "chosen"),
        ("gpt_oss", {}, "chosen"),
        ("granitemoe", {}, "chosen"),
        ("deepseek_v3", {}, "none"),
    ],
)
def test_softmax_and_division_are_taken_in(
    family: str, changes: dict[str, Any], softmax: str, dtype: torch.dtype
) -> None:
    fewest = 2 if family == "deepseek_v3" else 1  # its first layer has no experts
    model: nn.Module = architectures.random_model(
        architectures.small_config(family, fewest_layers=fewest, **changes)
    )
    model = model.to(dtype=dtype)
    before, after, report = fused(model)
    nodes = find(after, TOP_K)
    assert report.num_matches == len(nodes) >= len(find(after, torch.ops.ad_flashinfer.experts)) > 0
    assert {g.op_args(node)["softmax"] for node in nodes} == {softmax}
    if softmax != "none":
        assert not [node for op in AROUND for node in find(after, op)]
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, 9)
    wanted, found = before(ids, positions), after(ids, positions)
    # gpt-oss rounds its softmax once in either form.
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


class Router(nn.Module):
    """Its probabilities are read twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = x.softmax(-1)
        best, index = scores.topk(2)
        return best, index, scores


def test_a_softmax_that_others_read_stays() -> None:
    program = torch.export.export(Router(), (torch.zeros(3, 8),))
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    (node,) = find(gm, torch.ops.aten.topk)
    fuse_top_k._fuse(node)
    gm.recompile()
    (node,) = find(gm, TOP_K)
    assert g.op_args(node)["softmax"] == "none"
    assert {g.args(user)[1] for user in node.users if user.target is operator.getitem} == {0, 1}
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(gm(x), Router()(x), strict=True):
        torch.testing.assert_close(found, wanted)


class Wide(nn.Module):
    """Its weights are float64, which the kernel does not compute."""

    def __init__(self, is_before: bool) -> None:
        super().__init__()
        self.is_before = is_before

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_before:
            best, index = x.topk(2)
            return best.softmax(-1, dtype=torch.float64), index
        best, index = x.softmax(-1).topk(2)
        return best / best.sum(-1, keepdim=True, dtype=torch.float64), index


@pytest.mark.parametrize("is_before", [False, True])
def test_weights_of_float64_stay(is_before: bool) -> None:
    module = Wide(is_before)
    gm = torch.export.export(module, (torch.zeros(3, 8),)).module()
    assert isinstance(gm, fx.GraphModule)
    (node,) = find(gm, torch.ops.aten.topk)
    fuse_top_k._fuse(node)
    gm.recompile()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(gm(x), module(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
