"""longrope on the GPU: each sequence by its own length, one that crosses too, captured and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig, CompileBackend
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests.architectures import random_prompts

LIMIT, HEAD_DIM, VOCAB, NEW_TOKENS = 32, 64, 512, 24
PROMPTS = random_prompts((5, 20, LIMIT - 1, LIMIT + 1, 60), VOCAB)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=LIMIT,
        initializer_range=0.15,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * (HEAD_DIM // 2),
            "long_factor": [2.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
            "original_max_position_embeddings": LIMIT,
            "factor": 8.0,
        },
    )
    found: Any = transformers.AutoModelForCausalLM.from_config(config)
    return found.to("cuda").eval().requires_grad_(False)


def without_cache(model: nn.Module, prompt: list[int]) -> list[int]:
    """Greedy tokens of the module, which chooses its factors by the whole sequence each time."""
    ids = torch.tensor([prompt], device="cuda")
    for _ in range(NEW_TOKENS):
        positions = torch.arange(ids.shape[1], device="cuda")[None]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph", "torch-opt"])
def test_each_sequence_has_the_factors_of_its_own_length(model: nn.Module, backend: CompileBackend) -> None:
    """In float32, so that every token is that of the module without a cache."""
    config = AutoDeployConfig(
        device="cuda",
        compile_backend=backend,
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=128,
        cuda_graph_batch_sizes=None if backend == "torch-simple" else [1, 4, 8],
    )
    engine = Engine(transform_module(model, config)[0], steps_ahead=0 if backend == "torch-simple" else 1)
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_new_tokens=NEW_TOKENS))
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                found[output.request_id] = output.completion.token_ids
    assert [found[index] for index in sorted(found)] == [without_cache(model, prompt) for prompt in PROMPTS]
    assert engine.metrics.pages_in_use == 0
