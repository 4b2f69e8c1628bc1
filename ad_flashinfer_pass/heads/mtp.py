"""MTP layers, which guess one token further: DeepSeek's and GLM's layout, and Qwen's.

A layer like those of the model, which reads the token's embedding and the model's last hidden state, each
normed, by one linear. DeepSeek and GLM number it behind the layers of the model
(``model.layers.61.{enorm,hnorm,eh_proj,shared_head,...}``); Qwen has ``mtp.{pre_fc_norm_embedding,
pre_fc_norm_hidden,fc,layers.0,norm}``. The hidden state is the one after the last norm, the model's or the
layer's own. Embeddings and lm_head are the model's where the layer has none. Of several layers the first one
guesses all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.heads.reading import Body, Target, Tensors, embedding, headers
from ad_flashinfer_pass.runtime.drafts.head import DraftHead

_DEEPSEEK = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "embed_tokens.weight": "embed_tokens.weight",
    "shared_head.norm.weight": "model.norm.weight",
    "shared_head.head.weight": "lm_head.weight",
}
_QWEN = {
    "pre_fc_norm_embedding.weight": "enorm.weight",
    "pre_fc_norm_hidden.weight": "hnorm.weight",
    "fc.weight": "eh_proj.weight",
    "norm.weight": "model.norm.weight",
    "embed_tokens.weight": "embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}


class _Join(nn.Module):
    def __init__(self, norms: tuple[nn.Module, nn.Module], eh_proj: nn.Linear) -> None:
        super().__init__()
        self.enorm, self.hnorm = norms
        self.eh_proj = eh_proj

    def forward(self, both: Tensor) -> Tensor:
        """[b, s, d] of an embedding and a hidden state, [b, s, 2 * d]."""
        embeds, hidden = both.chunk(2, dim=-1)
        result: Tensor = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1))
        return result


def load_mtp(directory: Path, model: nn.Module, dtype: torch.dtype) -> DraftHead:
    """The MTP layer of a checkpoint, on the CPU.

    Args:
        directory: of safetensors, those of the model or others.
        model: that it guesses for.
        dtype: of the layer.

    Raises:
        LoadError: a tensor is missing, of another shape or no real number, or a file is damaged.
        ConfigError: there is no MTP layer, or the model is of a kind that is not supported.
    """
    target, stored = Target.of(model), headers(directory)
    names, places = _names(directory, stored, target)
    norm, head = getattr(target.decoder, "norm", None), target.model.get_output_embeddings()
    if norm is None or head is None:
        raise ConfigError(
            f"speculative_config: {type(model).__name__} has no decoder.norm before its head, which an MTP "
            "layer reads; use another drafter."
        )
    tensors, config = Tensors(directory, stored, names, places), _config(target)
    d, vocab, norms = config.hidden_size, config.vocab_size, []
    for name in ("enorm.weight", "hnorm.weight"):
        norms.append(type(norm)(d, eps=config.rms_norm_eps))
        norms[-1].weight = nn.Parameter(tensors.take(name, (d,)).to(dtype))
    project = nn.Linear(2 * d, d, bias=False)
    project.weight = nn.Parameter(tensors.take("eh_proj.weight", (d, 2 * d)).to(dtype))
    embed: nn.Module = target.embed
    if "embed_tokens.weight" in tensors:
        weight = tensors.take("embed_tokens.weight", (vocab, d))
        embed = embedding(weight, dtype)
    layer = {name: here for name, here in names.items() if here.startswith(("model.", "lm_head."))}
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    own = Tensors(directory, stored, layer, places).model(
        kind,
        config,
        ["model.embed_tokens.weight", "lm_head.weight"],
        dtype=dtype,
        attn_implementation=target.config._attn_implementation,
    )
    if "lm_head.weight" not in tensors:
        own.lm_head = head
    own.model.embed_tokens = None
    body = Body(own, _Join((norms[0], norms[1]), project))
    return DraftHead(body, embed, [target.path_of(norm)], "model.model.norm")


def _names(
    directory: Path, stored: Mapping[str, Any], target: Target
) -> tuple[dict[str, str], dict[str, str]]:
    """What the tensors of the layer are called here, and how names begin here and there."""
    count = target.config.num_hidden_layers
    for pattern, known, inner in (
        (rf"(?:.*\.)?layers\.{count}\.", _DEEPSEEK, ""),
        (r"(?:.*\.)?mtp\.", _QWEN, "layers.0."),
    ):
        names, first = {}, ""
        for name in stored:
            match = re.match(pattern, name)
            if match is None:
                continue
            first, rest = match[0], name[match.end() :]
            if rest in known:
                names[name] = known[rest]
            elif rest.startswith(inner):
                names[name] = f"model.layers.0.{rest.removeprefix(inner)}"
        if names:
            places = {here: f"{first}{rest}" for rest, here in known.items()}
            return names, {**places, "model.layers.0.": f"{first}{inner}"}
    raise ConfigError(
        f"speculative_config: {directory} has no MTP layer, neither layers.{count} nor mtp; name the "
        "checkpoint that has it as speculative_config.model, or use another drafter."
    )


def _config(target: Target) -> Any:
    """Of a model of one layer, of the kind of the last one; attention is full."""
    config = target.config
    one = {key: value[-1:] for key, value in config.to_dict().items() if _is_by_layer(value, config)}
    if "layer_types" in one:
        one["layer_types"] = ["full_attention"]
    if hasattr(config, "first_k_dense_replace"):
        one["first_k_dense_replace"] = 0
    return type(config).from_dict(
        {**config.to_dict(), **one, "num_hidden_layers": 1, "tie_word_embeddings": False}
    )


def _is_by_layer(value: Any, config: Any) -> bool:
    return isinstance(value, list) and len(value) == config.num_hidden_layers > 1
