"""The door of torch.compile against transformers' own generate: the same greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import CacheSession
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm
from tests import architectures

NUM_NEW_TOKENS = 10
PROMPTS = architectures.random_prompts((1, 5, 14, 31), vocab_size=128)
# Like others of the list; `benchmarks/compile_backend.py --architectures` runs all.
ELSEWHERE = ("llama_mha", "qwen2", "olmo2", "stablelm")
Model = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


def session_for_tests() -> CacheSession:
    return CacheSession(max_batch_size=8, max_seq_len=64, kv_cache_config={"tokens_per_block": 16})


def logits_of(model: nn.Module, session: CacheSession, compile_backend: str, **more: Any) -> Model:
    options: dict[str, Any] = {"session": session, "compile_backend": compile_backend, **more}
    compiled = torch.compile(model, backend=flashinfer_trtllm, options=options)
    return lambda **inputs: compiled(**inputs, use_cache=False).logits


def generate(
    logits_of_batch: Model, session: CacheSession, prompts: Sequence[Sequence[int]], num_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations by a user's own loop; the session is empty afterwards."""
    steps = []
    with session.prefill(prompts) as batch:
        steps.append(batch.last_logits(logits_of_batch(**batch.inputs)).argmax(-1))
    while len(steps) < num_new_tokens:
        with session.decode(steps[-1]) as batch:
            steps.append(batch.last_logits(logits_of_batch(**batch.inputs)).argmax(-1))
    session.free()
    return torch.stack(steps, 1).tolist()


def count(session: CacheSession, what: str) -> int:
    return sum(record.what == what for record in session.compiles)


@pytest.mark.parametrize("name", [name for name in architectures.CONFIGS if name not in ELSEWHERE])
def test_generates_the_tokens_of_transformers(name: str) -> None:
    """In one ragged batch and alone, from one graph: no step is compiled anew."""
    model = architectures.random_model(architectures.CONFIGS[name](num_layers=2))
    expected = architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
    model.set_experts_implementation("ad_flashinfer")
    session = session_for_tests()
    logits = logits_of(model, session, "torch-simple")

    together = generate(logits, session, PROMPTS, NUM_NEW_TOKENS)
    alone = generate(logits, session, PROMPTS[:1], NUM_NEW_TOKENS)

    assert together == expected
    assert alone == expected[:1]
    assert count(session, "dynamo") == 1
    assert count(session, "pass") == 1
    assert session.lengths == {}


def test_inductor_compiles_once_for_one_token_and_once_for_more() -> None:
    """The default: the same tokens, with two compilations for prefill and decode of any size."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.num_hidden_layers = 1
    model = architectures.random_model(config)
    session = session_for_tests()
    logits = logits_of(model, session, "inductor")

    together = generate(logits, session, PROMPTS, NUM_NEW_TOKENS)
    alone = generate(logits, session, PROMPTS[3:4], NUM_NEW_TOKENS)

    expected = architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
    assert together == expected
    assert alone == expected[3:4]
    assert [(record.what, record.shape) for record in session.compiles if record.what == "inductor"] == [
        ("inductor", "2 tokens or more"),
        ("inductor", "1 token"),
    ]
    assert count(session, "dynamo") == 1
