"""Rotary embeddings that change with the length of the sequence: the same tokens as transformers' generate.

Prompts below, at and beyond the length at which the frequencies change, and requests that cross it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import ConfigError, ExportError
from ad_flashinfer_pass.exported import restore, to_program
from ad_flashinfer_pass.models import ropes
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures

LIMIT = 24
NUM_NEW_TOKENS = 20
PROMPTS = architectures.random_prompts((10, LIMIT - 1, LIMIT, LIMIT + 1, 30, 3), vocab_size=128)

_FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 1.5 * i for i in range(8)],
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "factor": 8.0,
    **_FACTORS,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_SHORT: dict[str, Any] = {"max_position_embeddings": LIMIT}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3Config", {"original_max_position_embeddings": LIMIT, "rope_parameters": _LONGROPE}),
    "phi4_mini": (
        "Phi3Config",
        {
            "original_max_position_embeddings": LIMIT,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                **_LONGROPE,
                **{name: factors[:6] for name, factors in _FACTORS.items()},
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**_MLA, "num_key_value_heads": 4, "rope_parameters": _LONGROPE}),
    "llama_longrope": ("LlamaConfig", {"rope_parameters": _LONGROPE}),
    "llama_dynamic": ("LlamaConfig", {**_SHORT, "rope_parameters": _DYNAMIC}),
}


@cache
def model_of(name: str) -> nn.Module:
    config, changes = MODELS[name]
    return architectures.random_model(architectures._config(config, num_hidden_layers=2, **changes)(), "sdpa")


@cache
def expected(name: str) -> list[list[int]]:
    """Of each prompt alone, by a model that no other prompt has changed."""
    config, changes = MODELS[name]
    found = []
    for prompt in PROMPTS:
        fresh = architectures.random_model(
            architectures._config(config, num_hidden_layers=2, **changes)(), "eager"
        )
        # Phi-3's generate computes its cache anew, in old versions of transformers from the last token alone.
        options = {"use_cache": False} if name.startswith("phi") else {}
        found += architectures.generated_by_transformers(fresh, [prompt], NUM_NEW_TOKENS, **options)
    return found


@cache
def served(name: str, max_seq_len: int = 64) -> CachedModel:
    """On so few pages that some requests are preempted."""
    if name == "llama_dynamic" and max_seq_len > LIMIT and transformers.__version__ < "5.24":
        pytest.skip("one set of frequencies for all tokens")
    config = AutoDeployConfig(
        max_batch_size=8,
        max_seq_len=max_seq_len,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=8, max_tokens=8 * 17),
    )
    return transform_module(model_of(name), config)[0]


def generated(engine: Engine, prompts: list[list[int]], apart: int = 0) -> list[list[int]]:
    """Greedy tokens of prompts of which one joins every ``apart`` steps."""
    tokens: dict[int, list[int]] = {}
    waiting = list(prompts)
    step = 0
    while waiting or engine.has_work:
        while waiting and (not apart or step % apart == 0):
            engine.add_request(waiting.pop(0), SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
            if apart:
                break
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                tokens[output.request_id] = output.completion.token_ids
        step += 1
    return [tokens[request_id] for request_id in sorted(tokens)]


@pytest.mark.parametrize("name", MODELS)
def test_requests_on_both_sides_and_across_are_those_of_transformers(name: str) -> None:
    """In one batch, in chunks, with late arrivals, preemption and steps ahead."""
    model = served(name)

    assert generated(Engine(model, prefill_chunk_tokens=7), PROMPTS) == expected(name)
    for engine in (Engine(model), Engine(model, steps_ahead=2, prefill_chunk_tokens=5)):
        assert generated(engine, PROMPTS, apart=2) == expected(name)
        assert engine.metrics.num_preemptions > 0
        assert engine.metrics.pages_in_use == 0
    assert model.sequence_info.recompute_at == (LIMIT if name.startswith("phi") else None)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_where_the_length_is_never_reached(name: str) -> None:
    """The frequencies are constants then, and the graph has no input for lengths."""
    model = served(name, max_seq_len=LIMIT)
    prompts = [prompt for prompt in PROMPTS if len(prompt) < LIMIT]
    wanted = [
        tokens[: LIMIT - len(prompt)]
        for prompt, tokens in zip(PROMPTS, expected(name), strict=True)
        if len(prompt) < LIMIT
    ]

    assert generated(Engine(model), prompts) == wanted
    assert "sequence_lengths" not in model.sequence_info.named_args()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_long_prompt_do_not_depend_on_chunks(name: str) -> None:
    """Each chunk takes the frequencies of the whole prompt, also the first, which is below the limit."""
    (prompt,) = architectures.random_prompts((40,), vocab_size=128)
    with torch.no_grad():
        wanted = model_of(name)(torch.tensor([prompt])).logits[0, -1]
    model = served(name)
    for start in range(0, 40, 10):
        step = SequenceStep(prompt[start : start + 10], start, range(1, 6), first_len=40)
        found = model.step([step])[0]

    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())


def test_the_module_is_left_as_it_was() -> None:
    """Only the export sees other rotary embeddings."""
    model: Any = model_of("phi3")
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    forward = model.model.rotary_emb.forward
    with ropes.by_own_length(model, 64):
        assert model.model.rotary_emb.forward != forward

    assert model.model.rotary_emb.forward == forward
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_buffers())


def test_code_with_one_set_of_frequencies_for_all_tokens_is_refused() -> None:
    """As in transformers before 5.24; below the limit it is served."""

    class OneSet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rope_type, self.config = (
                "dynamic",
                transformers.LlamaConfig(**_SHORT, rope_parameters=_DYNAMIC),
            )
            self.original_inv_freq = self.inv_freq = torch.tensor([1.0, 0.1])

        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            """Cosine and sine."""
            freqs = (
                self.inv_freq[None, :, None].expand(position_ids.shape[0], -1, 1)
                @ position_ids[:, None].float()
            )
            return freqs.transpose(1, 2).cos(), freqs.transpose(1, 2).sin()

    with (
        pytest.raises(ExportError, match=f"et max_seq_len to {LIMIT} at most"),
        ropes.by_own_length(OneSet(), 25),
    ):
        pass
    module = OneSet()
    with ropes.by_own_length(module, LIMIT):
        assert module(torch.zeros(1), torch.tensor([[0, 2]]))[0][0, 1, 0] == pytest.approx(math.cos(2.0))


def test_a_saved_program_keeps_its_lengths_or_is_refused() -> None:
    """What recomputes sequences cannot be saved, since the file does not say so."""
    model = served("llama_dynamic")
    settings: dict[str, Any] = {"max_batch_size": 8, "max_seq_len": 64, "max_num_tokens": 64}
    again = restore(to_program(model), kv_cache_config={"tokens_per_block": 8}, **settings)

    assert generated(Engine(again), PROMPTS[:2]) == expected("llama_dynamic")[:2]
    with pytest.raises(ConfigError, match=f"et max_seq_len to {LIMIT} at most"):
        to_program(served("phi3"))
