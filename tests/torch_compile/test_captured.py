"""Captured decode steps through torch.compile, on a CPU, where a replay runs the graph again."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass.errors import SessionError, UnsupportedError
from tests.torch_compile import scenarios, small_models
from tests.torch_compile.capture_on_cpu import capturing


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.fixture
def _op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing(monkeypatch, by_inductor=False)


def test_decode_steps_of_a_llama_are_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the graph was fused and tuned as that of the standalone path is."""
    seen = capturing(monkeypatch, by_inductor=True)
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
    with pytest.raises(SessionError, match=r"head\.weight has moved in memory .* torch\._dynamo\.reset"):
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
