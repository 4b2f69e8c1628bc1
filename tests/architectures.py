"""Small random models of real architectures, and what transformers' own generate makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

# Weights this large give attention that matters: with the usual 0.02 every query sees an average.
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]


def _config(name: str, **changes: Any) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, name)(**{**_COMMON, **changes})


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama_gqa4": _config("LlamaConfig", num_key_value_heads=1),
    "llama_mha": _config("LlamaConfig", num_key_value_heads=4),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=32),
    "mistral": _config("MistralConfig", sliding_window=12),
    "phi3": _config("Phi3Config"),
    "gemma2": _config("Gemma2Config", head_dim=16, sliding_window=12, layer_types=_SLIDING_AND_FULL),
    "gemma3_text": _config("Gemma3TextConfig", head_dim=16, sliding_window=12, layer_types=_SLIDING_AND_FULL),
    "granite": _config(
        "GraniteConfig",
        attention_multiplier=0.1,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    ),
    "olmo2": _config("Olmo2Config"),
    "stablelm": _config("StableLmConfig", partial_rotary_factor=0.5),
    "gpt_neox": _config("GPTNeoXConfig"),
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 1, 0]),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
}


def random_model(config: transformers.PretrainedConfig, attn_implementation: str | None = None) -> nn.Module:
    """The causal LM of a config with random weights, norms and biases included; seed 0, fp32, eval.

    Raises:
        ValueError: transformers has no such attention for this model.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = None
    return model


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Prompts of token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def generated_by_transformers(
    model: nn.Module, prompts: Sequence[Sequence[int]], num_new_tokens: int
) -> list[list[int]]:
    """Greedy continuations from transformers' own generate, each prompt by itself."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
