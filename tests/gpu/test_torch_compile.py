"""torch.compile(backend="flashinfer_trtllm") on a GPU, by each compile backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from ad_flashinfer_pass import CacheSession, restore, to_program, transform
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, compared, config_of
from tests import architectures
from tests.torch_compile import scenarios
from tests.torch_compile.test_generate import NUM_NEW_TOKENS, generate, logits_of
from tests.torch_compile.test_generate import PROMPTS as PROMPTS_OF_LLAMA


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", [*scenarios.CAPTURED, "inductor", "torch-simple"])
def test_a_llama_in_float32_generates_the_tokens_of_transformers(backend: str) -> None:
    scenarios.check_llama(backend, "cuda")


@pytest.mark.parametrize("backend", scenarios.CAPTURED)
def test_a_model_written_by_hand_in_float32(backend: str) -> None:
    scenarios.check_by_hand(backend, "cuda")


def test_captured_models_share_a_session() -> None:
    scenarios.check_two_models("torch-cudagraph", "cuda")


def test_a_program_that_was_saved_is_captured(tmp_path: Path) -> None:
    """Transformed, saved and loaded; the tokens are those of transformers."""
    model, expected = scenarios.llama()
    settings: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 64, "device": "cuda"}
    inputs = [x.cuda() for x in (torch.zeros((2, 13), dtype=torch.int64), torch.arange(13).repeat(2, 1))]
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"input_ids": dynamic, "position_ids": dynamic, "use_cache": None}
    with torch.no_grad():
        given = dict(zip(shapes, [*inputs, False], strict=True))
        program = torch.export.export(model.cuda(), (), given, dynamic_shapes=shapes, strict=False)
    torch.export.save(to_program(transform(program, **settings)), tmp_path / "cached.pt2")
    loaded = torch.export.load(tmp_path / "cached.pt2")
    for backend in scenarios.CAPTURED:
        cached = restore(loaded, **settings, compile_backend=backend)
        assert architectures.generated_by_engine(cached, PROMPTS_OF_LLAMA, NUM_NEW_TOKENS) == expected
        print(backend, cached.num_replays, cached.eager_steps)
        assert cached.num_replays > 0


@pytest.mark.parametrize("backend", [*scenarios.CAPTURED, "inductor"])
def test_a_llama_in_bfloat16_generates_the_tokens_of_transformers(backend: str) -> None:
    """By TRT-LLM's kernels. A token may differ where the best two logits are within their rounding.

    Inductor keeps float32 between fused ops where the model itself rounds, so more fall the other way.
    """
    model: nn.Module = architectures.random_model(config_of("llama_gqa4"))
    model = model.to(device="cuda", dtype=torch.bfloat16)
    session = CacheSession(max_batch_size=8, max_seq_len=128, device="cuda")
    sizes = {"cuda_graph_batch_sizes": [8]} if backend in scenarios.CAPTURED else {}
    logits = logits_of(model, session, backend, **sizes)
    found = compared(model, generate(logits, session, PROMPTS, NEW_TOKENS))
    print(found["num_different"], "of", found["num_tokens"], "tokens,", session.eager_steps)
    assert found["largest_share"] <= 2.0
    assert found["num_different"] <= found["num_tokens"] // 10
    if sizes:
        assert session.num_replays == NEW_TOKENS - 1
        assert all(reason.startswith("prefill") for reason in session.eager_steps)
