"""Checkpoints of 4-bit weights by the public layouts of their formats, and their plain weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Integers(NamedTuple):
    """A way to store linears of 4-bit integers."""

    settings: dict[str, Any]
    group: int | None
    has_zero_point: bool
    pack: Callable[[Tensor, Tensor, Tensor], Tensors]
    """Of numbers [rows, depth] and zero points [rows, groups] of 0 to 15, and scales: tensors by the ends of
    their names."""


def packed(numbers: Tensor) -> Tensor:
    """Eight in a word along the last dimension, the first in the lowest bits; what is missing is 0."""
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % 8)).unflatten(-1, (-1, 8)).long()
    return (numbers << 4 * torch.arange(8)).sum(-1).to(torch.int32)


def _compressed(numbers: Tensor, zero: Tensor, scale: Tensor) -> Tensors:
    """compressed_tensors/compressors/pack_quantized: rows along the row, zero points along the column."""
    return {
        "weight_packed": packed(numbers),
        "weight_scale": scale,
        "weight_shape": torch.tensor(numbers.shape),
        "weight_zero_point": packed(zero.T).T,
    }


def _symmetric(numbers: Tensor, zero: Tensor, scale: Tensor) -> Tensors:
    return {k: v for k, v in _compressed(numbers, zero, scale).items() if k != "weight_zero_point"}


def _awq(numbers: Tensor, zero: Tensor, scale: Tensor) -> Tensors:
    """awq/modules/linear/gemm.py: WQLinear_GEMM.from_linear."""
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    found = {"scales": scale.T.half()}
    for name, values in (("qweight", numbers.T), ("qzeros", zero.T)):
        words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int32)
        for column in range(words.shape[1]):
            for place in range(8):
                words[:, column] |= values[:, column * 8 + order_map[place]] << (place * 4)
        found[name] = words
    return found


def _gptq(numbers: Tensor, zero: Tensor, scale: Tensor, less: int = 1) -> Tensors:
    """auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py: QuantLinear.pack."""
    depth = numbers.shape[1]
    return {
        "qweight": packed(numbers).T,
        "qzeros": packed(zero.T - less),
        "scales": scale.T.half(),
        "g_idx": torch.tensor([i * scale.shape[1] // depth for i in range(depth)], dtype=torch.int32),
    }


def _packed_settings(group: int | None, symmetric: bool) -> dict[str, Any]:
    """As llm-compressor writes them."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "version": "0.9.4",
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
INTEGERS = {
    "packed": Integers(_packed_settings(32, True), 32, False, _symmetric),
    "packed_channel": Integers(_packed_settings(None, True), None, False, _symmetric),
    "packed_zero": Integers(_packed_settings(32, False), 32, True, _compressed),
    "awq": Integers({**_AWQ, "modules_to_not_convert": None}, 32, True, _awq),
    "gptq": Integers({**_GPTQ, "checkpoint_format": "gptq", "damp_percent": 0.1}, 32, True, _gptq),
    "gptq_v2": Integers({**_GPTQ, "checkpoint_format": "gptq_v2"}, 32, True, partial(_gptq, less=0)),
    "gptq_sym": Integers({**_GPTQ, "sym": True}, 32, False, _gptq),
    "gptq_channel": Integers({**_GPTQ, "group_size": -1, "desc_act": True}, None, True, _gptq),
}


def llama() -> transformers.PretrainedConfig:
    """Of sizes that are multiples of a group."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    return architectures.small_config("llama", initializer_range=0.2, tie_word_embeddings=True, **sizes)


def write_integers(
    directory: Path,
    form: Integers,
    edit: Callable[[Tensors], Any] | None = None,
    config: transformers.PretrainedConfig | None = None,
    **settings: Any,
) -> Path:
    """A llama whose linears are random integers; beside it ``plain.pt``, the weights that they stand for."""
    architectures.random_model(config or llama()).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    plain = dict(tensors)
    for seed, name in enumerate([name for name in tensors if name.endswith("_proj.weight")]):
        rows, depth = tensors.pop(name).shape
        groups = depth // (form.group or depth)
        numbers, base = drawn(rows, depth, seed=seed), name.removesuffix("weight")
        zero = (
            drawn(rows, groups, low=1, seed=seed + 99)
            if form.has_zero_point
            else torch.full((rows, groups), 8)
        )
        scale = drawn(rows, groups, low=64, high=256, seed=seed).float() / 2**12  # exact in float16
        tensors |= {base + end: tensor for end, tensor in form.pack(numbers, zero.int(), scale).items()}
        spread = (tensor.repeat_interleave(depth // groups, 1) for tensor in (zero, scale))
        plain[name] = (numbers - next(spread)) * next(spread)
    torch.save(plain, directory / "plain.pt")
    return save(directory, tensors, edit, {**form.settings, **settings})


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_FP4 = {"num_bits": 4, "type": "float", "group_size": 16}
_FP4_GROUP = {**_FP4, "strategy": "tensor_group", "symmetric": True}
NVFP4: dict[str, dict[str, Any]] = {
    "nvfp4_modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {
                "weights": {**_FP4, "dynamic": False},
                "input_activations": {**_FP4, "dynamic": False},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.35.0"},
    },
    "nvfp4_compressed": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_FP4_GROUP, "dynamic": False},
                "input_activations": {**_FP4_GROUP, "dynamic": "local"},
            }
        },
        "ignore": ["lm_head"],
    },
}


def write_nvfp4(directory: Path, name: str) -> Path:
    """A llama of random numbers; beside it ``plain.pt``, the weights that they stand for."""
    architectures.random_model(llama()).save_pretrained(directory)
    tensors, plain = load_file(directory / "model.safetensors"), {}
    for seed, key in enumerate([key for key in tensors if key.endswith("_proj.weight")]):
        rows, depth = tensors.pop(key).shape
        codes, base = drawn(rows, depth, seed=seed), key.removesuffix("weight")
        scale = drawn(rows, depth // 16, low=1, high=9, seed=seed).float()
        scale[0] = 0  # a group of zeros
        bytes_ = (codes[:, ::2] + 16 * codes[:, 1::2]).byte()
        stored = scale.to(torch.float8_e4m3fn)
        if name == "nvfp4_modelopt":
            own = {
                "weight": bytes_,
                "weight_scale_2": torch.tensor(2.0**-6),
                "input_scale": torch.tensor(0.1),
            }
        else:
            own = {"weight_packed": bytes_, "weight_global_scale": torch.tensor([2.0**6])}
            own["input_global_scale"] = torch.tensor([3.0])
        tensors |= {base + end: tensor for end, tensor in (own | {"weight_scale": stored}).items()}
        plain[key] = _E2M1[codes] * (scale * 2**-6).repeat_interleave(16, 1)
    torch.save(plain, directory / "plain.pt")
    return save(directory, tensors, None, NVFP4[name])


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
