"""``tune_experts``: weights laid out by rows, routing by our kernel, and the same result."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from ad_flashinfer_pass.config import AutoDeployConfig, CompileBackend, TransformConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.transforms import tune_experts
from tests import architectures
from tests.transforms.small_models import find

tune = pytest.importorskip("ad_flashinfer_pass.kernels.experts.tune", reason="triton is not installed")
EXPERTS = torch.ops.ad_flashinfer.experts


def model_of(family: str, dtype: torch.dtype = torch.bfloat16, fewest_layers: int = 1) -> Any:
    config = architectures.small_config(family, fewest_layers=fewest_layers)
    model: nn.Module = architectures.random_model(config)
    return model.to(dtype=dtype)


def tuned(
    model: nn.Module, *, keeps_strides: bool = False, compile_backend: CompileBackend = "torch-simple"
) -> tuple[fx.GraphModule, fx.GraphModule, TransformReport]:
    """A copy of the graph before, and the graph after, as on a GPU."""
    config = AutoDeployConfig(
        max_batch_size=2, max_seq_len=64, cuda_graph_token_buckets=[], compile_backend=compile_backend
    )
    ctx, pipeline = context(config), Pipeline.of(config)
    before, _ = pipeline.before("tune_experts").run(model, ctx)
    assert isinstance(before, fx.GraphModule)
    copy = deepcopy(before)
    ctx.device = torch.device("cuda")  # only asked for its kind: the weights are here
    ctx.keeps_strides = keeps_strides
    after, (report,) = pipeline.since("tune_experts").upto("tune_experts").run(before, ctx)
    assert isinstance(after, fx.GraphModule)
    return copy, after, report


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "dbrx"])
def test_the_result_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which a GPU would leave alone, so that nothing but the layout can differ."""
    monkeypatch.setattr(tune_experts, "_FLOATS", (torch.float32,))
    before, after, report = tuned(model_of(family, torch.float32, 2 if family == "deepseek_v3" else 1))
    assert report.num_matches + len(report.skipped) == len(find(after, EXPERTS)) > 0
    for node in find(after, EXPERTS):
        args = g.op_args(node)
        assert args["plan"] == ("torch" if family == "dbrx" else "triton")
        if family != "dbrx":  # its weights are views, of which one lies transposed
            assert _row_strides(node) == {1}
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, 9)
    wanted, found = before(ids, positions), after(ids, positions)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _row_strides(node: fx.Node) -> set[int]:
    """Of the weights that are there, and of what the graph says of them."""
    args = g.op_args(node)
    weights = [args[name] for name in tune_experts._PROJECTIONS if args[name] is not None]
    tensors = [tensor for weight in weights for tensor in (g.attribute(weight), g.value(weight))]
    return {tensor.stride(-2 if args["is_transposed"] else -1) for tensor in tensors}


def test_the_parameters_themselves_are_laid_out() -> None:
    """So that no weight is in memory twice, however long the module lives that was transformed."""
    model = model_of("gpt_oss")
    weights = [layer.mlp.experts.down_proj for layer in model.model.layers]
    wanted = [weight.clone() for weight in weights]
    _, after, _ = tuned(model)
    kept = {weight.data_ptr() for weight in after.parameters()}
    for weight, old in zip(weights, wanted, strict=True):
        assert weight.stride(-2) == 1
        assert torch.equal(weight, old)
        assert weight.data_ptr() in kept


def test_two_layers_may_share_their_experts() -> None:
    model = model_of("gpt_oss", fewest_layers=3)
    first, second, *_ = model.model.layers
    second.mlp.experts = first.mlp.experts
    before, after, report = tuned(model)
    assert report.num_matches == len(find(after, EXPERTS)) == 3
    assert all(_row_strides(node) == {1} for node in find(after, EXPERTS))
    sizes = [sum(weight.nbytes for weight in gm.parameters()) for gm in (before, after)]
    assert sizes[0] == sizes[1]


def test_weights_whose_strides_others_rely_on_stay_as_they_lie() -> None:
    """As under torch.compile, where Dynamo would compile anew for other strides."""
    model = model_of("gpt_oss")
    _, after, report = tuned(model, keeps_strides=True)
    assert model.model.layers[0].mlp.experts.down_proj.is_contiguous()
    assert {skip.reason for skip in report.skipped} == {"its weights lie transposed: by torch's kernels"}
    assert {g.op_args(node)["plan"] for node in find(after, EXPERTS)} == {"torch"}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_was_measured_stands_in_the_nodes(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """For each size that is captured, over the model's own weights, however they lie."""
    config = architectures.small_config(family, fewest_layers=1)
    launched: list[str] = []

    def microseconds(launches: list[Any]) -> float:
        (name,) = launches[0].args
        launched.append(name)
        return 1.0 if name == "torch" else 2.0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tune, "microseconds", microseconds)
    _, after, report = tuned(model_of(family), compile_backend="torch-opt")
    assert {g.op_args(node)["plan"] for node in find(after, EXPERTS)} == {"triton 1=torch 2=torch"}
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    sizes = f"2 of 4 experts {width} x {config.hidden_size} torch.bfloat16"
    assert [note.partition(": ")[0] for note in report.notes] == [f"{n} tokens, {sizes}" for n in (1, 2)]
    assert len(launched) > 4


def test_it_may_stand_before_the_proof_of_packing() -> None:
    """Which takes our top-k for what it is: token by token."""
    config = AutoDeployConfig(
        max_batch_size=2, max_seq_len=64, transforms={"tune_experts": TransformConfig(stage="export")}
    )
    ctx, pipeline = context(config), Pipeline.of(config)
    model, _ = pipeline.before("tune_experts").run(model_of("qwen3_moe"), ctx)
    ctx.device = torch.device("cuda")
    model, _ = tune_experts.tune_experts(model, ctx)
    ctx.device = torch.device("cpu")
    _, reports = pipeline.since("tune_experts").upto("check_packing").without("tune_experts").run(model, ctx)
    assert reports[-1].name == "check_packing"


def test_float32_is_left_to_torch() -> None:
    _, after, report = tuned(model_of("qwen3_moe", torch.float32, fewest_layers=3))
    assert report.num_matches == 0
    assert [skip.reason for skip in report.skipped] == [
        "its experts are torch.float32: by torch's kernels"
    ] * 3
    assert {g.op_args(node)["plan"] for node in find(after, EXPERTS)} == {"torch"}
