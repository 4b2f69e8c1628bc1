"""EAGLE-3 heads, in the layout of SafeAILab's and SpecForge's checkpoints.

One Llama layer, of which q, k and v read the token's embedding and the hidden state, each normed, side by
side; fc makes the hidden state of those of three layers of the model. The head has a vocabulary of its own,
of which d2t says how far a token's number lies from that in the model's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.heads.reading import Body, Target, Tensors, embedding, headers
from ad_flashinfer_pass.models.json_file import read_json
from ad_flashinfer_pass.models.source import UNEXPECTED_VALUE
from ad_flashinfer_pass.runtime.drafts.head import DraftHead

_PLACES = {"model.layers.0.": "midlayer.", "model.": ""}
_KEY = "eagle_aux_hidden_state_layer_ids"


class _Layer(nn.Module):
    """Reads [b, s, 2 * d], gives [b, s, d]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * width, old.out_features, bias=old.bias is not None))
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """With what a layer of transformers is given."""
        embeds, hidden = hidden_states.chunk(2, dim=-1)
        both = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(hidden_states=both, **given)[0]
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class Eagle3Model(LlamaForCausalLM):
    """A Llama of one such layer; it takes inputs_embeds [b, s, 2 * d]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[0] = _Layer(config)


def load_eagle3(directory: Path, model: nn.Module, dtype: torch.dtype) -> DraftHead:
    """The head of a checkpoint, on the CPU.

    Args:
        directory: of config.json and safetensors.
        model: that it guesses for.
        dtype: of the head.

    Raises:
        LoadError: a tensor is missing, left over, of another shape or no real number, or a file is damaged.
        ConfigError: the head is of another model, or of a kind that is not supported.
    """
    target, raw = Target.of(model), read_json(directory / "config.json")
    stored, config, names = headers(directory), _config(directory, raw, target), {}
    width, vocab = target.config.hidden_size, target.config.vocab_size
    for name in stored:
        of_layer = name.removeprefix("midlayer.")
        if of_layer != name or name.startswith("layers.0."):
            names[name] = f"model.layers.0.{of_layer.removeprefix('layers.0.')}"
        elif name in ("norm.weight", "embed_tokens.weight"):
            names[name] = f"model.{name}"
        else:
            names[name] = name
    tensors = Tensors(directory, stored, names, _PLACES)
    reads, d = _reads(directory, raw, target), config.hidden_size
    project = nn.Linear(len(reads) * width, d, bias=False)
    project.weight = nn.Parameter(tensors.take("fc.weight", (d, len(reads) * width)).to(dtype))
    token_ids, draft_vocab, embed = None, config.vocab_size, target.embed
    if "d2t" in tensors or draft_vocab != vocab:
        shifts = tensors.take("d2t", (draft_vocab,), ("I64", "I32"))
        token_ids = torch.arange(draft_vocab) + shifts
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab:
            raise LoadError(
                f"{stored['d2t'].file}: tensor 'd2t' leads to tokens {int(token_ids.min())} to "
                f"{int(token_ids.max())}, of which the model has {vocab}; the head is of another model."
            )
    if "model.embed_tokens.weight" in tensors or d != width:
        embed = embedding(tensors.take("model.embed_tokens.weight", (vocab, d)), dtype)
    read = ("fc.weight", "d2t", "t2d", "embed_tokens.weight")
    layer = {there: here for there, here in names.items() if there not in read}
    body = Tensors(directory, stored, layer, _PLACES).model(
        Eagle3Model, config, ["model.embed_tokens.weight"], dtype=dtype, attn_implementation="sdpa"
    )
    return _head(body, embed, reads, project, token_ids)


def random_eagle3(config: LlamaConfig, model: nn.Module, dtype: torch.dtype) -> DraftHead:
    """A head of random weights, on the CPU, that reads the default layers of a model.

    Args:
        config: of the head's layer; its vocabulary is the head's, the first tokens of the model's.
        model: that it guesses for.
        dtype: of the head.
    """
    target = Target.of(model)
    body = Eagle3Model._from_config(config, dtype=dtype, attn_implementation="sdpa")
    reads = _reads(Path(), {}, target)
    project = nn.Linear(len(reads) * target.config.hidden_size, config.hidden_size, bias=False, dtype=dtype)
    return _head(body, target.embed, reads, project, torch.arange(config.vocab_size))


def _head(
    model: Any, embed: nn.Module, reads: list[str], project: nn.Module, token_ids: Tensor | None
) -> DraftHead:
    model.model.embed_tokens = None  # of the head's vocabulary, which is that of its results alone
    return DraftHead(Body(model), embed, reads, "model.model.layers.0", project, token_ids)


def _config(directory: Path, raw: dict[str, Any], target: Target) -> LlamaConfig:
    kind, vocab = raw.get("model_type", "llama"), raw.get("vocab_size")
    if kind != "llama" or raw.get("num_hidden_layers", 1) != 1 or raw.get("norm_before_residual"):
        raise ConfigError(
            f"speculative_config.model: {directory}: an EAGLE-3 head must be one layer of model_type llama "
            f"without norm_before_residual, got {kind!r}, {raw.get('num_hidden_layers')} layers."
        )
    if vocab != target.config.vocab_size:
        raise ConfigError(
            f"speculative_config.model: {directory}: vocab_size is {vocab}, that of the model "
            f"{target.config.vocab_size}; the head is of another model."
        )
    given = {**raw, "vocab_size": raw.get("draft_vocab_size") or vocab, "num_hidden_layers": 1}
    given = {key: value for key, value in given.items() if key not in ("dtype", "torch_dtype", "layer_types")}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # of the other vocabulary
    try:
        return LlamaConfig.from_dict({**given, **ids, "tie_word_embeddings": False})
    except UNEXPECTED_VALUE as err:
        raise LoadError(f"{directory / 'config.json'}: {' '.join(str(err).split())}") from None


def _reads(directory: Path, raw: dict[str, Any], target: Target) -> list[str]:
    """The modules whose results a head reads.

    In eagle_config layers are numbered by what they give, as SpecForge writes them; outside of it, as vLLM
    reads them, by what they take.
    """
    count = target.config.num_hidden_layers
    inner = (raw.get("eagle_config") or {}).get(_KEY)
    takes = raw.get(_KEY) or [2, count // 2, count - 3]
    if inner:
        takes = [index + 1 for index in inner]
    if not all(isinstance(index, int) and 0 <= index <= count for index in takes):
        raise ConfigError(
            f"speculative_config.model: {directory}: {_KEY} must name layers of the model, which has "
            f"{count}, got {inner or takes}."
        )
    return [f"{target.layers}.{index - 1}" if index else target.path_of(target.embed) for index in takes]
