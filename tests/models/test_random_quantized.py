"""Random weights in the form that a checkpoint's files say, which need no weights' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.quantized.modules import QuantizedLinear
from ad_flashinfer_pass.models.weightless import load_weightless
from tests import architectures

FLOAT8, BYTES = torch.float8_e4m3fn, torch.uint8
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(form: str, **group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], **group}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


CONFIGS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "modelopt": ("llama", {"quant_method": "modelopt", "quant_algo": "FP8"}, FLOAT8),
    "static": ("llama", compressed("float-quantized", weights=STATIC, input_activations=STATIC), FLOAT8),
    "block": (
        "qwen3_moe",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        FLOAT8,
    ),
    "integers": ("llama", compressed("pack-quantized", weights=INTEGERS), BYTES),
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4"}, BYTES),
}


@pytest.mark.parametrize(("family", "settings", "dtype"), CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_a_model_of_that_size(
    family: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """As large as of plain random weights, within a factor; the same parameters as without weights."""
    architectures.small_config(family, vocab_size=64).save_pretrained(tmp_path)
    config = AutoDeployConfig(model=str(tmp_path), skip_loading_weights=True, dtype="float32")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        plain = load_model(config).module(ids).logits.std()
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
        quantized = load_model(config).module
        found = quantized(ids).logits.std()
    assert dtype in {parameter.dtype for parameter in quantized.parameters()}
    assert plain / 4 < found < 4 * plain
    weightless, _ = load_weightless(config)
    assert {n: (p.shape, p.dtype) for n, p in weightless.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in quantized.named_parameters()
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("family", "settings", "sizes", "number"),
    [
        ("llama", GPTQ, {"intermediate_size": 128}, 6),
        ("qwen2_moe", {**GPTQ, "group_size": 32}, {}, 21),
        ("gpt_oss", {"quant_method": "mxfp4"}, {"intermediate_size": 72}, 0),
    ],
)
def test_what_no_checkpoint_has_stays_plain(
    family: str, settings: dict[str, Any], sizes: dict[str, Any], number: int, tmp_path: Path
) -> None:
    """Rows that no group divides, and one row alone of those that are packed by eight."""
    architectures.small_config(family, **sizes).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    config = AutoDeployConfig(model=str(tmp_path), skip_loading_weights=True, dtype="float32")
    module = load_model(config).module
    with torch.inference_mode():
        assert module(torch.arange(12)[None]).logits.isfinite().all()
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == number
