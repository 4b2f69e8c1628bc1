"""Small random models of real architectures, and what transformers and the engine generate with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams

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

_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 12,
    "layer_types": _SLIDING_AND_FULL,
    "tie_word_embeddings": False,  # tied, its large embeddings repeat the last token for ever
}


def _config(name: str, **changes: Any) -> Callable[..., transformers.PretrainedConfig]:
    def config(num_layers: int = 3) -> transformers.PretrainedConfig:
        fields = {**_COMMON, **changes, "num_hidden_layers": num_layers}
        of_layers = {name: value[:num_layers] for name, value in fields.items() if isinstance(value, list)}
        return getattr(transformers, name)(**{**fields, **of_layers})

    return config


CONFIGS: dict[str, Callable[..., transformers.PretrainedConfig]] = {
    "llama_gqa4": _config("LlamaConfig", num_key_value_heads=1),
    "llama_mha": _config("LlamaConfig", num_key_value_heads=4),
    "qwen2": _config("Qwen2Config"),
    "qwen3": _config("Qwen3Config", head_dim=32),
    "mistral": _config("MistralConfig", sliding_window=12),
    "phi3": _config("Phi3Config"),
    "gemma2": _config("Gemma2Config", **_GEMMA),
    "gemma3_text": _config("Gemma3TextConfig", **_GEMMA),
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
    "smollm3": _config("SmolLM3Config", no_rope_layers=[1, 0, 1]),
    "mixtral": _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
}


_SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}

# Sizes by field, for the fields that a family has. Windows and chunks are shorter than any test's context.
_SMALL: dict[str, Any] = {
    **_COMMON,
    "max_position_embeddings": 256,
    "head_dim": 32,
    "is_decoder": True,
    "tie_word_embeddings": False,  # tied, a model of random weights repeats its last token
    "initializer_std": 0.3,
    "init_std": 0.3,
    **dict.fromkeys(("ffn_dim", "dff", "dim_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim"), 128),
    "hidden_size_global": 64,
    **dict.fromkeys(
        ("dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 128
    ),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 32),
    # latent attention and its indexers
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    # windows and chunks
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "local_attention"), 12),
    **dict.fromkeys(("attention_chunk_size", "attention_window_size"), 12),
    "use_sliding_window": True,
    "max_window_layers": 1,
    # recurrent layers
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    "mamba_d_ssm": 128,
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    # embeddings of each layer
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}

# A vision tower that no test looks at.
_VISION: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_global_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size"), 32),
    **{"out_hidden_size": 64, "image_size": 28, "patch_size": 14},
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 32),
}

# What the table above gets wrong, by family.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
            "full_attention": None,
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 4.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_lora_rank": 8, "o_groups": 2, "n_routed_experts": 8},
    "dots1": {"head_dim": 32, "n_shared_experts": 1},
    "dots3_note_text": {
        "per_layer_config": {
            2: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "kv_lora_rank": 8,
                "head_dim": 16,
                "qk_nope_head_dim": 8,
            }
        }
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "layer_types": [*_SLIDING_AND_FULL[:2], *_SLIDING_AND_FULL],
        "intermediate_size": [128] * 5,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 64}, 3: {"head_dim": 64}}, **_SHARED_KV},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 64}, 3: {"head_dim": 64}}, **_SHARED_KV},
    "gptj": {"rotary_dim": 8},
    "helium": {"head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    # Each cycle runs all layers again: many of them make of a rounding difference another token.
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 1, "H_cycles": 2, "L_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "full_attn_idxs": [1],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "num_layers": 1},
    "mamba2": {"num_heads": 4},
    "ministral": {"head_dim": 32, "layer_types": _SLIDING_AND_FULL},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"]},
    # Its mask has no window but transformers' cache for it has: generate and forward differ beyond it.
    "moshi": {"sliding_window": 256},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def minor_version() -> str:
    """Of transformers: 5.24 of 5.24.1."""
    return ".".join(transformers.__version__.split(".")[:2])


def small_config(model_type: str, *, fewest_layers: int = 3, **changes: Any) -> transformers.PretrainedConfig:
    """The config of a family with small sizes and, of its layers, the first of each kind.

    Args:
        model_type: as in transformers' configs.
        fewest_layers: if there are fewer kinds.
        changes: fields that win over all others.

    Raises:
        ValueError: the config refuses the sizes.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = _small_fields(config_class(), fewest_layers)
    return config_class(**{**fields, **_OVERRIDES.get(model_type, {}), **changes})


def small_vision_config(model_type: str) -> transformers.PretrainedConfig:
    """The config of a vision-language family with a small text stack and the least vision tower."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    fields = _small_fields(default, fewest_layers=2)
    fields["vision_config"] = {k: _VISION.get(k, v) for k, v in fields["vision_config"].items()}
    if model_type.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        fields["text_config"]["rope_parameters"] = rope
    for name in vars(default):
        if name.endswith(("_token_id", "_token_index")):
            fields[name] = 127
    return config_class(**fields)


def _small_fields(default: transformers.PretrainedConfig, fewest_layers: int = 3) -> dict[str, Any]:
    fields = default.to_dict()
    aliases = default.attribute_map
    small = {aliases.get(name, name): size for name, size in _SMALL.items()}
    small = {name: size for name, size in small.items() if name in fields}
    if fields.get("head_dim") is None or "qk_rope_head_dim" in fields:
        small.pop("head_dim", None)  # computed from other fields
    if "qk_rope_head_dim" in fields and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention expands to all heads
    num_layers = getattr(default, "num_hidden_layers", 0)
    layers = _layers_of_each_kind(fields, num_layers, fewest_layers)
    if num_layers:
        small[aliases.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    for name, values in fields.items():
        if isinstance(values, list) and len(values) == num_layers > len(layers):
            small[name] = [values[layer] for layer in layers]
        elif isinstance(values, float) and ("dropout" in name or name.endswith("pdrop")):
            small[name] = 0.0
    if "sliding_window" in fields and set(small.get("layer_types", ())) == {"full_attention"}:
        small["layer_types"][1] = "sliding_attention"
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            small[name] = {**part.to_dict(), **_small_fields(part, fewest_layers)}
            small[name].update({"head_dim": 16} if "head_dim" in small[name] else {})
    return small


def _layers_of_each_kind(fields: dict[str, Any], num_layers: int, fewest: int) -> list[int]:
    """Indices of layers, in order, with at least one of each kind of the lists that have a value a layer."""
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == num_layers > 4]
    kinds = [str([values[layer] for values in lists]) for layer in range(num_layers)]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:4]
    rest = [layer for layer in range(num_layers) if layer not in chosen]
    return sorted(chosen + rest[: max(0, fewest - len(chosen))])


def random_model(
    config: transformers.PretrainedConfig,
    attn_implementation: str | None = None,
    auto: Any = transformers.AutoModelForCausalLM,
    seed: int = 0,
) -> transformers.PreTrainedModel:
    """The model of a config, by ``auto``, with random weights, norms and biases included; fp32, eval.

    Raises:
        ValueError: transformers has no such attention for this model.
    """
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif not parameter.std() > 0.1:  # by an initialisation of the model's own; NaN if it has none
                parameter.normal_(std=_COMMON["initializer_range"])
    model.generation_config.eos_token_id = None
    return model


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Prompts of token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def prompts_with_one_end(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random prompts whose last token is the same, so that only attention tells those of one length apart."""
    return [[*prompt[:-1], 2] for prompt in random_prompts(lengths, vocab_size)]


def generated_by_transformers(
    model: nn.Module, prompts: Sequence[Sequence[int]], num_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy continuations from transformers' own generate with these options, each prompt by itself."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            **options,
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def generated_by_engine(
    model: CachedModel, prompts: Sequence[Sequence[int]], num_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy continuations from the engine; half of the prompts join in the middle of the others.

    Args:
        model: from the pass.
        prompts: token ids.
        num_new_tokens: of each prompt.
        options: arguments of the engine.

    Raises:
        RuntimeError: the engine ended a request with an error.
    """
    engine = Engine(model, **options)
    params = SamplingParams(max_new_tokens=num_new_tokens, ignore_eos=True)
    tokens: dict[int, list[int]] = {}
    half = -(-len(prompts) // 2)
    ids = [engine.add_request(prompt, params) for prompt in prompts[:half]]
    for _ in range(3):
        engine.step()
    ids += [engine.add_request(prompt, params) for prompt in prompts[half:]]
    while engine.has_work:
        for output in engine.step():
            if output.completion is None:
                continue
            if output.completion.error is not None:
                raise RuntimeError(output.completion.error)
            tokens[output.request_id] = output.completion.token_ids
    return [tokens[request_id] for request_id in ids]
