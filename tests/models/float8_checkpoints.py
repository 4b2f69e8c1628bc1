"""Checkpoints of float8 linears by the public layouts of the three formats, and models of what they state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import architectures

LARGEST = 448.0
Tensors = dict[str, Tensor]


class Format(NamedTuple):
    """A way to store a checkpoint."""

    settings: dict[str, Any]
    """Of config.json, under quantization_config."""
    weights: str
    activation: str
    scale: str = "weight_scale"
    file: dict[str, Any] | None = None
    """What stands in hf_quant_config.json."""


def _compressed_tensors(weights: str, activation: str) -> Format:
    """As llm-compressor writes it."""
    numbers = {"num_bits": 8, "type": "float", "symmetric": True, "observer": "minmax", "group_size": None}
    inputs = {**numbers, "strategy": activation, "dynamic": activation != "tensor", "observer": None}
    if weights == "block":
        numbers = {**numbers, "block_structure": [128, 128]}
        inputs |= {"strategy": "group", "group_size": 128}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": weights, "dynamic": False},
        "input_activations": None if activation == "none" else inputs,
        "output_activations": None,
        "format": "float-quantized",
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {
            **{"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
            **{"actorder": None, "block_structure": None, "group_size": None, "observer": "static_minmax"},
        },
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }
    return Format(settings, weights, activation)


_MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
_NUMBERS = {"dynamic": False, "num_bits": 8, "type": "float"}
FORMATS = {
    "modelopt": Format(
        {}, "tensor", "tensor", file={"producer": {"name": "modelopt"}, "quantization": _MODELOPT}
    ),
    "modelopt_config": Format(
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "config_groups": {
                "group_0": {"weights": _NUMBERS, "input_activations": _NUMBERS, "targets": ["Linear"]}
            },
            "ignore": ["lm_head"],
        },
        "tensor",
        "tensor",
        file={"producer": {"name": "modelopt"}, "quantization": _MODELOPT},
    ),
    "compressed_static": _compressed_tensors("tensor", "tensor"),
    "compressed_dynamic": _compressed_tensors("channel", "token"),
    "compressed_weights": _compressed_tensors("channel", "none"),
    "compressed_block": _compressed_tensors("block", "block"),
    "block": Format(
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.norm"],
        },
        "block",
        "block",
        "weight_scale_inv",
    ),
}


def scale_of(weight: Tensor, weights: str) -> Tensor:
    """float32: the largest magnitude of what shares a scale / 448."""
    if weights == "tensor":
        return (weight.abs().max() / LARGEST).reshape(1)
    if weights == "channel":
        return weight.abs().amax(1, keepdim=True) / LARGEST
    rows = [part.split(128, 1) for part in weight.split(128, 0)]
    return torch.stack([torch.stack([block.abs().max() for block in row]) for row in rows]) / LARGEST


def expanded(scale: Tensor, shape: torch.Size) -> Tensor:
    """A scale for each element."""
    if scale.numel() == 1 or tuple(scale.shape) == (shape[0], 1):
        return scale.expand(shape)
    return torch.cat(
        [
            torch.cat([value.expand(len(rows), len(columns)) for value, columns in _pairs(row, shape[1])], 1)
            for row, rows in _pairs(scale, shape[0])
        ]
    )


def _pairs(values: Tensor, size: int) -> Any:
    return zip(values, torch.arange(size).split(128), strict=True)


def small_config(
    hidden_size: int = 160, intermediate_size: int = 200, num_attention_heads: int = 5
) -> transformers.PretrainedConfig:
    """Biases, a tied head, and sizes of which by default none is a multiple of a block."""
    return transformers.Qwen2Config(
        vocab_size=128,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def write(
    directory: Path,
    form: Format,
    edit: Callable[[Tensors], Any] | None = None,
    config: transformers.PretrainedConfig | None = None,
    **settings: Any,
) -> Path:
    """A checkpoint, its tensors changed by ``edit`` and its settings by the rest."""
    architectures.random_model(config or small_config()).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [
        name for name in tensors if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
    ]:
        base, weight = name.removesuffix(".weight"), tensors[name]
        scale = scale_of(weight, form.weights)
        tensors[name] = (weight / expanded(scale, weight.shape)).to(torch.float8_e4m3fn)
        tensors[f"{base}.{form.scale}"] = scale.reshape(()) if form.file else scale
        if form.activation == "tensor":
            tensors[f"{base}.input_scale"] = torch.tensor(9.0 / LARGEST).reshape([] if form.file else [1])
    if edit is not None:
        edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    said = {**json.loads(file.read_text())}
    if form.settings or settings:
        said["quantization_config"] = {**form.settings, **settings}
    file.write_text(json.dumps(said))
    if form.file:
        (directory / "hf_quant_config.json").write_text(json.dumps(form.file))
    return directory


def dequantized(tensors: Tensors, base: str, form: Format) -> Tensor:
    """float32: a weight times its scales."""
    weight = tensors[f"{base}.weight"].float()
    return weight * expanded(tensors[f"{base}.{form.scale}"], weight.shape)


class Stated(nn.Module):
    """What a format states of a linear: activations rounded in at least float32, sums in float64."""

    def __init__(self, base: str, tensors: Tensors, form: Format, bias: Tensor | None) -> None:
        super().__init__()
        weight, scale = tensors[f"{base}.weight"].double(), tensors[f"{base}.{form.scale}"].double()
        self.weight = weight * expanded(scale, weight.shape)
        self.input_scale = tensors.get(f"{base}.input_scale")
        self.activation, self.bias = form.activation, bias

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = exact.split(128, -1) if self.activation == "block" else [exact]
        rounded = torch.cat([self.rounded(group) for group in groups], -1)
        out = rounded @ self.weight.T
        return (out if self.bias is None else out + self.bias.double()).to(x.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        if self.activation == "none":
            return x.double()
        scale = x.abs().amax(-1, keepdim=True) / LARGEST if self.input_scale is None else self.input_scale
        return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).double() * scale.double()


class StatedExperts(nn.Module):
    """Experts of which each is three linears and silu, one token after the other."""

    def __init__(self, base: str, number: int, tensors: Tensors, form: Format) -> None:
        super().__init__()
        names = ("gate_proj", "up_proj", "down_proj")
        self.experts = nn.ModuleList(
            nn.ModuleList(Stated(f"{base}.{expert}.{name}", tensors, form, None) for name in names)
            for expert in range(number)
        )

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for x, chosen, factors in zip(hidden_states, index.tolist(), weights, strict=True):
            parts = []
            for expert, factor in zip(chosen, factors, strict=True):
                gate, up, down = self.experts[expert]
                parts.append(down(nn.functional.silu(gate(x)) * up(x)) * factor)
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


def stated_model(
    directory: Path, form: Format, config: transformers.PretrainedConfig | None = None
) -> nn.Module:
    """The model of transformers that computes what a checkpoint states, in float32 but for the linears."""
    tensors = load_file(directory / "model.safetensors")
    model = architectures.random_model(config or small_config())
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float32}, strict=False
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.{form.scale}" in tensors:
            model.set_submodule(name, Stated(name, tensors, form, module.bias))
        elif f"{name}.0.up_proj.{form.scale}" in tensors:
            model.set_submodule(name, StatedExperts(name, module.num_experts, tensors, form))
    return model


def dequantized_model(directory: Path, form: Format) -> nn.Module:
    """The model of transformers with the weights times their scales."""
    tensors = load_file(directory / "model.safetensors")
    model = architectures.random_model(small_config())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.{form.scale}" in tensors:
            module.weight.data = dequantized(tensors, name, form)
    return model
