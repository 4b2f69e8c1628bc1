"""``torch-opt`` on the CPU: what Inductor makes of the pieces gives the same tokens, in few compilations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.inductor import Piece, compile_pieces, eager_pieces, keep_compiled
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests import architectures

PROMPTS = architectures.random_prompts((1, 2, 9, 14), vocab_size=128)
NUM_NEW_TOKENS = 16


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return architectures.random_model(architectures.CONFIGS["qwen3"](), "sdpa")


@pytest.fixture(scope="module")
def model(source: nn.Module) -> CachedModel:
    config = AutoDeployConfig(
        max_batch_size=4, max_seq_len=64, max_num_tokens=32, compile_backend="torch-opt"
    )
    return transform_module(source, config)[0]


def pieces(model: CachedModel) -> list[Piece]:
    return [module for module in model.module.modules() if isinstance(module, Piece)]


def test_equal_layers_share_a_piece(model: CachedModel) -> None:
    """Before the first attention, between two (of three layers), and after the last."""
    assert [piece.num_calls for piece in pieces(model)] == [1, 2, 1]


def test_tokens_are_those_of_transformers(source: nn.Module, model: CachedModel) -> None:
    engine = Engine(model)
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    tokens = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                tokens[output.request_id] = output.completion.token_ids
    expected = architectures.generated_by_transformers(source, PROMPTS, NUM_NEW_TOKENS)
    assert [tokens[i] for i in sorted(tokens)] == expected


def test_what_only_calls_our_kernels_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing that Inductor could fuse: sizes, views and linears of ours."""
    monkeypatch.setattr(torch, "compile", lambda *args, **options: pytest.fail("compiled"))
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 1))
    row = graph.call_function(torch.ops.aten.view.default, (x, [1, size, -1]))
    linear = torch.ops.ad_flashinfer.linear.default
    graph.output((graph.call_function(linear, (row, weight, None, None, 0.0, None, False)),))
    piece = Piece(fx.GraphModule(nn.Module(), graph), [(0, 1)], "here")
    given = torch.randn(1, 3, 2, 4), torch.randn(5, 8)
    torch.testing.assert_close(piece(*given)[0], given[0].flatten(2) @ given[1].T)


def test_what_is_compiled_is_kept_in_a_folder_of_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though torch has named its own, in /tmp; but not if the user has named one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache_dir()
    keep_compiled()
    folder = Path(cache_dir())
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled()
    assert cache_dir() == str(tmp_path / "mine")


def test_steps_of_all_sizes_share_the_variants_of_the_warm_up(model: CachedModel) -> None:
    """One token and many, and for the last piece also no, one and several rows of logits."""
    assert [piece.num_variants for piece in pieces(model)] == [2, 2, 4]


def piece_of(function: Callable[[Any], Any]) -> Piece:
    """Of [T, 4] in layer 3, which returns what the function does."""
    graph = fx.Graph()
    x = fx.Proxy(graph.placeholder("x"))
    graph.output((function(x).node,))
    piece = Piece(fx.GraphModule(nn.Module(), graph), [(0, 0)], "node add (model.py:12)")
    piece.layers.append(3)
    return piece


def breaks(x: Any) -> Any:
    x.tracer.create_proxy("call_function", torch._dynamo.graph_break, (), {})
    return x + 1


def specialises(x: Any) -> Any:
    """Right for three tokens only."""
    return x.view(3, 4) + 1


@pytest.mark.parametrize("function", [breaks, specialises])
def test_a_piece_that_torch_compile_refuses_runs_op_by_op(
    function: Callable[[Any], Any],
) -> None:
    """And is counted, with its place and what torch.compile said."""
    piece, compiled = piece_of(function), piece_of(lambda x: x * 2)
    x = torch.arange(12.0).view(3, 4)
    for _ in range(2):
        assert torch.equal(piece(x)[0], x + 1)
        assert torch.equal(compiled(x)[0], x * 2)
    found = eager_pieces(nn.Sequential(nn.ModuleList([piece, compiled])))
    assert found is not None
    assert (found.num_pieces, found.num_eager, found.most_in_a_layer) == (2, 1, 1)
    assert found.reasons["node add (model.py:12)"]
    assert str(found).startswith(
        "torch-opt: 1 of 2 pieces of a step run op by op, at most 1 a layer; node add"
    )


def test_all_pieces_of_a_model_are_compiled(model: CachedModel) -> None:
    found = eager_pieces(model.module)
    assert str(found) == "torch-opt: 0 of 4 pieces of a step run op by op, at most 0 a layer"
    assert [piece.layers for piece in pieces(model)] == [[0], [0, 1], [2]]


def test_sizes_in_a_piece_are_read_of_its_inputs(source: nn.Module) -> None:
    config = AutoDeployConfig(max_batch_size=4, max_seq_len=64, max_num_tokens=32)
    eager = transform_module(source, config)[0].module
    assert isinstance(eager, fx.GraphModule)
    flat, _ = compile_pieces(eager)
    passed = {
        type(node.meta.get("val")) for call in flat.graph.find_nodes(op="call_module") for node in call.args
    }
    assert torch.SymInt not in passed
