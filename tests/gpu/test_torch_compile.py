"""torch.compile(backend="flashinfer_trtllm") on a GPU, by each compile backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_flashinfer_pass import CacheSession
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, compared, config_of
from tests import architectures
from tests.torch_compile import scenarios
from tests.torch_compile.test_generate import generate, logits_of


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
