"""Captured decode steps through torch.compile, on a CPU, where a replay runs the graph again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_flashinfer_pass import registry
from ad_flashinfer_pass.errors import SessionError, UnsupportedError
from ad_flashinfer_pass.registry import TransformContext, TransformReport
from ad_flashinfer_pass.transforms import compile_model, fuse_rope_append, fuse_small_batch
from tests.torch_compile import scenarios, small_models

Result = tuple[nn.Module, TransformReport]


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets torch-opt be captured here, and lists the transforms that need a GPU as they run."""
    torch._dynamo.reset()
    names: list[str] = []
    transforms = {name: registry.get(name) for name in ("tune_attention", "compile_model")}

    def tune_attention(model: nn.Module, ctx: TransformContext) -> Result:
        op = torch.ops.ad_flashinfer.cached_attention.default
        assert isinstance(model, torch.fx.GraphModule)
        num_sites = len(model.graph.find_nodes(op="call_function", target=op))
        assert num_sites == len(ctx.sites) == len(ctx.caches) > 0
        names.append("tune_attention")
        return transforms["tune_attention"](model, ctx)

    def fuse_rotations(model: nn.Module, ctx: TransformContext) -> Result:
        assert isinstance(model, torch.fx.GraphModule)
        num_matches, skipped = fuse_rope_append.fuse(model)
        names.append(f"fuse_rope_append: {num_matches} of {num_matches + len(skipped)}")
        return model, TransformReport("fuse_rope_append", num_matches, skipped)

    def fuse_linears(model: nn.Module, ctx: TransformContext) -> Result:
        assert isinstance(model, torch.fx.GraphModule)
        ctx.small_batch_model, num_matches, _ = fuse_small_batch.with_fused_linears(model)
        names.append("fuse_small_batch")
        return model, TransformReport("fuse_small_batch", num_matches)

    def capture(model: nn.Module, ctx: TransformContext) -> Result:
        compiled, report = transforms["compile_model"](model, ctx)
        names.append("compile_model")
        return compile_model._captured(compiled, ctx, report), report

    for name, transform in (
        ("fuse_rope_append", fuse_rotations),
        ("tune_attention", tune_attention),
        ("fuse_small_batch", fuse_linears),
        ("compile_model", capture),
    ):
        monkeypatch.setitem(registry._TRANSFORMS, name, transform)
    return names


@pytest.fixture
def _op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, which takes seconds."""
    monkeypatch.setattr(compile_model, "compile_pieces", lambda model: (model, []))


def test_decode_steps_of_a_llama_are_replays(seen: list[str]) -> None:
    scenarios.check_llama("torch-opt", "cpu")
    assert seen == ["fuse_rope_append: 1 of 1", "tune_attention", "fuse_small_batch", "compile_model"]


@pytest.mark.usefixtures("_op_by_op")
def test_weights_that_moved_are_not_read_where_they_were() -> None:
    """Weights written in place are used; a parameter with other memory is refused, and named."""
    model, of = small_models.Net(1), scenarios.session_on("cpu")
    call = small_models.compiled(model, of, compile_backend="torch-opt")
    small_models.generate(of, call, num_new_tokens=2)
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})
    assert small_models.generate(of, call) == small_models.expected(model)
    model.head.weight.data = model.head.weight * 0.5
    with pytest.raises(SessionError, match=r"head\.weight is elsewhere in memory .* torch\._dynamo\.reset"):
        small_models.generate(of, call)
    torch._dynamo.reset()
    assert small_models.generate(of, call) == small_models.expected(model)


@pytest.mark.usefixtures("_op_by_op")
def test_captured_models_share_a_session() -> None:
    scenarios.check_two_models("torch-opt", "cpu")


@pytest.mark.usefixtures("_op_by_op")
def test_a_session_may_say_what_transforms_do() -> None:
    """Those of the stage compile too: a decode kernel that is pinned, and one that a CPU has not."""
    model = small_models.Net(1)
    of = small_models.session(transforms={"tune_attention": {"decode": "reference"}})
    assert small_models.generate(of, small_models.compiled(model, of, compile_backend="torch-opt")) == (
        small_models.expected(model)
    )
    of = small_models.session(transforms={"tune_attention": {"decode": "xqa"}})
    with pytest.raises(UnsupportedError, match=r"transforms\.tune_attention\.decode is xqa, which cannot"):
        small_models.generate(of, small_models.compiled(model, of, compile_backend="torch-opt"))
    assert (of.lengths, of.num_free_pages) == ({}, 16)
