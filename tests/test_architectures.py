"""Families beyond those of test_end_to_end: the same tokens as transformers' generate, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import AdFlashinferError, ExportError, MaskError, PackingError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from tests import architectures

NUM_NEW_TOKENS = 24
# The first two differ before their last token only.
PROMPTS = architectures.prompts_with_one_end((14, 14, 5), vocab_size=128)

SAME_TOKENS = {
    "afmoe": "window on some layers, no positions on the others, a gate on the output, experts",
    "arcee": "GQA",
    "biogpt": "learned positions, scaled embeddings",
    "codegen": "interleaved rotary on a part of the head",
    "cohere2": "interleaved rotary, window, no positions on full layers",
    "ctrl": "sinusoidal positions",
    "deepseek_v3": "MLA: K and V of different head size",
    "exaone4": "window and full layers, qk-norm",
    "falcon": "multi-query: K broadcasts",
    "gemma4_text": "layers that share the cache of another, head sizes that differ by layer",
    "glm4": "interleaved partial rotary, biases",
    "gpt2": "learned positions, one projection for q, k and v",
    "gpt_bigcode": "multi-query with one head expanded",
    "gpt_neo": "no scale, window on some layers",
    "gpt_oss": "sinks, window on some layers, experts",
    "granitemoe": "experts, and a forward that has a cache but no use_cache",
    "granitemoe_swa": "the same with a window and sinks",
    "granitemoeshared": "the same with an expert that all tokens pass",
    "gptj": "parallel residual, no sdpa",
    "llama4_text": "chunked layers, layers without rotary, temperature by position",
    "minimax_m2": "qk-norm over all heads, partial rotary, experts",
    "nemotron": "partial rotary, squared relu",
    "olmo3": "window on some layers, qk-norm over all heads",
    "opt": "learned positions with an offset",
    "persimmon": "one projection for q, k and v, qk-norm",
    "phi": "partial rotary, biases",
    "starcoder2": "biases, window",
    # With states beside the pages, or without any pages.
    "falcon_h1": "Mamba 2 beside attention in each layer",
    "jamba": "Mamba 1, attention without positions, experts",
    "kimi_linear": "Kimi's delta attention, MLA, experts",
    "lfm2": "convolutions",
    "mamba": "Mamba 1 alone: no attention",
    "mamba2": "Mamba 2 alone: no attention",
    "qwen3_next": "gated delta rule, gated attention, experts",
    "zamba": "a scan for each head, attention that several layers share",
}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Layers of Mamba 2, of attention and of experts; transformers' cached steps ignore the least time step.
    "nemotron_h_any_time_step": (
        "nemotron_h",
        {
            "time_step_min": 1e-30,
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "moe", "full_attention"],
        },
    ),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "llama4_temperature": (
        "llama4_text",
        {"floor_scale": 8, "attn_scale": 2.0, "attn_temperature_tuning": True},
    ),
    # From a position on that no step has so many tokens for.
    "llama4_late_temperature": (
        "llama4_text",
        {"floor_scale": 33, "attn_scale": 20.0, "attn_temperature_tuning": True},
    ),
}
"""Settings of a family under which its code takes another path."""


def cached_model(model: nn.Module) -> CachedModel:
    config = AutoDeployConfig(
        max_batch_size=4,
        max_seq_len=64,
        max_num_tokens=32,
        kv_cache_config=KvCacheConfig(tokens_per_block=16),
    )
    return transform_module(model, config)[0]


@pytest.mark.parametrize("name", [*SAME_TOKENS, *VARIANTS])
def test_generates_the_tokens_of_transformers(name: str) -> None:
    """A ragged batch with prefill in chunks gives the greedy tokens of each prompt alone."""
    family, changes = VARIANTS.get(name, (name, {}))
    model = architectures.random_model(architectures.small_config(family, fewest_layers=2, **changes))

    found = architectures.generated_by_engine(
        cached_model(model), PROMPTS, NUM_NEW_TOKENS, prefill_chunk_tokens=6
    )

    expected = architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
    assert found == expected
    assert expected[0] != expected[1]  # only attention tells these two apart


@pytest.mark.parametrize(
    ("family", "error", "said"),
    [
        pytest.param("minimax", PackingError, "slice", id="recurrence_written_out"),
        # Some versions of its code leave the mask out for a sequence alone: they are refused for that.
        pytest.param(
            "doge",
            (MaskError, ExportError),
            "the attention mask|another path for a size of 1",
            id="mask_from_activations",
        ),
    ],
)
def test_refuses_what_a_cache_of_keys_cannot_hold(
    family: str, error: type[AdFlashinferError] | tuple[type[AdFlashinferError], ...], said: str
) -> None:
    """A state of a layer's own, or a mask that depends on the tokens, stops the pass in one line."""
    model = architectures.random_model(architectures.small_config(family))

    with pytest.raises(error, match=said) as raised:
        cached_model(model)

    assert "\n" not in str(raised.value)
