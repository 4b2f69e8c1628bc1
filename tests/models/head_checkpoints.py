"""Checkpoints of heads in their public layouts, with random weights, and what the heads compute by them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.runtime.drafts.head import DraftHead
from tests import architectures

VOCAB, DRAFT_VOCAB, WIDTH = 128, 96, 64
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 16

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""What a head computes of tokens [n] and hidden states [n, d], those of a sequence from its first on: logits
in the vocabulary of the model [n, vocab], and its own hidden states [n, d]."""


def guessed_anew(head: DraftHead, model: nn.Module, tokens: list[int], count: int) -> list[int]:
    """What a head guesses after these tokens, by its own modules, without a cache."""
    found: list[Tensor] = []
    hook = head.body.get_submodule(head.own).register_forward_hook(
        lambda _, given, result: found.append(result)
    )
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    places = {"model.embed_tokens": 0, "model.norm": -1}
    with torch.no_grad():
        given = model(ids, output_hidden_states=True).hidden_states
        read = [given[places[p] if p in places else 1 + int(p.rpartition(".")[2])] for p in head.reads]
        states = torch.cat(read, -1)[:, :-1]
        states = states if head.project is None else head.project(states)
        following = ids[:, 1:]
        for _ in range(count):
            positions = torch.arange(following.shape[1], device=ids.device)[None]
            logits = head.body(torch.cat([head.embed(following), states], -1), positions)
            guess = logits[:, -1:].argmax(-1)
            guess = guess if head.token_ids is None else head.token_ids[guess]
            following = torch.cat([following, guess], 1)
            states = torch.cat([states, found[-1][:, -1:]], 1)
    hook.remove()
    return following[0, -count:].tolist()


@dataclass
class Written:
    """A model, a head for it in a folder, and what is right."""

    model: nn.Module
    folder: Path
    hidden: Callable[[Any], Tensor]
    """What the head reads, [n, d], of the model's ``hidden_states``."""
    step: Step

    def guesses(self, tokens: list[int], count: int) -> list[int]:
        """What the head guesses after these tokens: all of it computed anew, without a cache."""
        ids = torch.tensor(tokens)
        with torch.no_grad():
            states = self.hidden(self.model(ids[None], output_hidden_states=True).hidden_states)[:-1]
            following = ids[1:]
            for _ in range(count):
                logits, own = self.step(following, states)
                following = torch.cat([following, logits[-1:].argmax(-1)])
                states = torch.cat([states, own[-1:]])
        return following[-count:].tolist()


def eagle3_tensors(num_read: int = 3, own_embeddings: bool = False) -> dict[str, Tensor]:
    """The tensors of an EAGLE-3 head, as SpecForge names them."""
    torch.manual_seed(3)
    shapes = {
        "midlayer.self_attn.q_proj.weight": (_HEADS * _HEAD_DIM, 2 * WIDTH),
        "midlayer.self_attn.k_proj.weight": (_KV_HEADS * _HEAD_DIM, 2 * WIDTH),
        "midlayer.self_attn.v_proj.weight": (_KV_HEADS * _HEAD_DIM, 2 * WIDTH),
        "midlayer.self_attn.o_proj.weight": (WIDTH, _HEADS * _HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": (2 * WIDTH, WIDTH),
        "midlayer.mlp.up_proj.weight": (2 * WIDTH, WIDTH),
        "midlayer.mlp.down_proj.weight": (WIDTH, 2 * WIDTH),
        "fc.weight": (WIDTH, num_read * WIDTH),
        "lm_head.weight": (DRAFT_VOCAB, WIDTH),
    }
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": 1 + 0.2 * torch.randn(WIDTH) for name in norms}
    chosen = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    tensors["d2t"] = chosen - torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, chosen, True)
    if own_embeddings:
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, WIDTH)
    return tensors


def eagle3_config(**changes: Any) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        **changes,
    }


def write_eagle3(folder: Path, *, own_embeddings: bool = False, reads: list[int] | None = None) -> Written:
    """An EAGLE-3 head for a Llama of six layers.

    Args:
        folder: for the head.
        own_embeddings: whether it has some.
        reads: layers whose results it reads, as eagle_config says; None: says nothing.
    """
    model: Any = architectures.random_model(architectures.CONFIGS["llama_gqa4"](num_layers=6), "eager")
    tensors = eagle3_tensors(3 if reads is None else len(reads), own_embeddings)
    given = {} if reads is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": reads}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(eagle3_config(**given)))
    embeddings = tensors.get("embed_tokens.weight", model.get_input_embeddings().weight)
    indices = [2, 3, 3] if reads is None else [index + 1 for index in reads]

    def hidden(states: Any) -> Tensor:
        return torch.cat([states[index][0] for index in indices], -1) @ tensors["fc.weight"].T

    def step(ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        logits, own = _eagle3(tensors, embeddings[ids], states)
        scattered = torch.full((len(ids), VOCAB), -torch.inf)
        return scattered.index_copy(1, torch.arange(DRAFT_VOCAB) + tensors["d2t"], logits), own

    return Written(model, folder, hidden, step)


def _eagle3(tensors: dict[str, Tensor], embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as its paper's code computes it, written down once more."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (WIDTH,), tensors[f"{name}.weight"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"midlayer.{name}.weight"].T

    def rotated(x: Tensor) -> Tensor:
        half = _HEAD_DIM // 2
        angles = torch.arange(len(embeds))[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    both = torch.cat([norm(embeds, "midlayer.input_layernorm"), norm(hidden, "midlayer.hidden_norm")], -1)
    q, k, v = (
        linear(both, f"self_attn.{name}_proj").unflatten(-1, (-1, _HEAD_DIM)).transpose(0, 1)
        for name in ("q", "k", "v")
    )
    seen = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
    hidden = hidden + linear(seen.transpose(0, 1).flatten(1), "self_attn.o_proj")
    x = norm(hidden, "midlayer.post_attention_layernorm")
    hidden = hidden + linear(F.silu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj"), "mlp.down_proj")
    return norm(hidden, "norm") @ tensors["lm_head.weight"].T, hidden


def write_mtp(folder: Path, config: Any) -> Written:
    """A model with an MTP layer, in one checkpoint.

    Args:
        folder: for the checkpoint.
        config: of the model. Of Qwen3.5 the layer has neither embeddings nor a head, of others it has both.
    """
    is_qwen = config.model_type.startswith("qwen3_5")
    model = architectures.random_model(config)
    kinds = {"layer_types": ["full_attention"], "first_k_dense_replace": 0}
    one: Any = {key: value for key, value in kinds.items() if hasattr(config, key)}
    layer: Any = architectures.random_model(
        type(config).from_dict({**config.to_dict(), **one, "num_hidden_layers": 1}), seed=7
    )
    model.save_pretrained(folder)
    layer.save_pretrained(folder / "layer")
    torch.manual_seed(5)
    d = config.hidden_size
    enorm, hnorm = (type(model.model.norm)(d, eps=config.rms_norm_eps) for _ in range(2))
    norms = {"enorm": enorm, "hnorm": hnorm}
    for each in norms.values():
        each.weight.data += 0.2 * torch.randn(d)
    project = torch.randn(d, 2 * d) * 0.2
    place = "mtp." if is_qwen else f"model.layers.{config.num_hidden_layers}."
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in load_file(folder / "layer" / "model.safetensors").items():
        inner = name.removeprefix("model.layers.0.")
        if inner != name:
            tensors[f"{place}{'layers.0.' if is_qwen else ''}{inner}"] = tensor
        elif name == "model.norm.weight":
            tensors[f"{place}{'norm' if is_qwen else 'shared_head.norm'}.weight"] = tensor
        elif not is_qwen:
            tensors[place + name.replace("lm_head", "shared_head.head").removeprefix("model.")] = tensor
    named = (
        ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc") if is_qwen else ("enorm", "hnorm", "eh_proj")
    )
    for name, weight in zip(named, (enorm.weight, hnorm.weight, project), strict=True):
        tensors[f"{place}{name}.weight"] = weight.detach().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if is_qwen:
        layer.model.embed_tokens, layer.lm_head = model.model.embed_tokens, model.lm_head

    def step(ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        embeds = enorm(layer.model.embed_tokens(ids))
        joined = torch.cat([embeds, hnorm(states)], -1) @ project.T
        result = layer.model(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0]
        return layer.lm_head(result), result

    # As transformers loads it, for which the layer is no part of the model.
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Written(loaded, folder, lambda states: states[-1][0], step)
