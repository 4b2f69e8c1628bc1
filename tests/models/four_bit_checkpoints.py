"""Checkpoints of 4-bit weights by the public layouts of their formats, and their plain weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import architectures

Tensors = dict[str, Tensor]


def drawn(*shape: int, low: int = 0, high: int = 16, seed: int = 0) -> Tensor:
    """Integers."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def gpt_oss() -> transformers.PretrainedConfig:
    """Of sizes that are multiples of a group."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    return architectures.small_config(
        "gpt_oss", layer_types=["sliding_attention", "full_attention"], initializer_range=0.2, **sizes
    )


def write_mxfp4(directory: Path, edit: Callable[[Tensors], Any] | None = None, **settings: Any) -> Path:
    """As openai/gpt-oss-20b is on the hub."""
    architectures.random_model(gpt_oss()).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        number, depth, rows = tensors.pop(name).shape
        seed = len(tensors)
        tensors[f"{name}_blocks"] = drawn(number, rows, depth // 32, 16, high=256, seed=seed).byte()
        tensors[f"{name}_scales"] = drawn(number, rows, depth // 32, low=121, high=126, seed=seed).byte()
    excluded = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": excluded}
    return save(directory, tensors, edit, {**said, **settings})


def save(
    directory: Path, tensors: Tensors, edit: Callable[[Tensors], Any] | None, settings: dict[str, Any]
) -> Path:
    """In place of the files of a model; ``edit`` changes the tensors before."""
    if edit is not None:
        edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    return directory
