"""``tune_experts``: weights laid out by rows, routing by our kernel, and the same result."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import fx, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.transforms import tune_experts
from tests import architectures
from tests.transforms.small_models import find

pytest.importorskip("triton", reason="triton is not installed")
EXPERTS = torch.ops.ad_flashinfer.experts


def tuned(family: str, dtype: torch.dtype) -> tuple[fx.GraphModule, fx.GraphModule, TransformReport]:
    """A graph before and after, as on a GPU whose steps are not captured."""
    model: nn.Module = architectures.random_model(architectures.small_config(family))
    model = model.to(dtype=dtype)
    config = AutoDeployConfig(device="cpu", max_batch_size=2, max_seq_len=64, compile_backend="torch-simple")
    ctx, pipeline = context(config), Pipeline.of(config)
    before, _ = pipeline.before("tune_experts").run(model, ctx)
    assert isinstance(before, fx.GraphModule)
    ctx.device = torch.device("cuda")  # only asked for its kind: the weights are here
    after, (report,) = pipeline.since("tune_experts").upto("tune_experts").run(deepcopy(before), ctx)
    assert isinstance(after, fx.GraphModule)
    return before, after, report


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "dbrx"])
def test_the_result_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which a GPU would leave alone, so that nothing but the layout can differ."""
    monkeypatch.setattr(tune_experts, "_FLOATS", (torch.float32,))
    before, after, report = tuned(family, torch.float32)
    assert report.num_matches == len(find(after, EXPERTS)) > 0
    for node in find(after, EXPERTS):
        args = g.op_args(node)
        assert (args["kernel"], args["is_transposed"], args["is_concatenated"]) == ("triton", False, True)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, 9)
    wanted, found = before(ids, positions), after(ids, positions)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_copy_of_the_weights_is_kept() -> None:
    before, after, _ = tuned("gpt_oss", torch.bfloat16)
    sizes = [sum(weight.nbytes for weight in gm.parameters()) for gm in (before, after)]
    assert sizes[0] == sizes[1]


def test_routing_runs_our_kernel() -> None:
    _, after, _ = tuned("qwen3_moe", torch.bfloat16)
    assert not find(after, torch.ops.aten.topk)
    assert len(find(after, torch.ops.ad_flashinfer.top_k)) == len(find(after, EXPERTS))


def test_float32_is_left_to_torch() -> None:
    _, after, report = tuned("qwen3_moe", torch.float32)
    assert report.num_matches == 0
    assert [skip.reason for skip in report.skipped] == [
        "its experts are torch.float32: by torch's kernels"
    ] * 3
    assert {g.op_args(node)["kernel"] for node in find(after, EXPERTS)} == {"torch"}
