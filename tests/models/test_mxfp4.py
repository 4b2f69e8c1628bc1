"""Checkpoints of gpt-oss in MXFP4: beside transformers, which reads them as plain, or refused by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from ad_flashinfer_pass import SamplingParams, build_model
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.inspection import explain
from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized.modules import QuantizedExperts
from ad_flashinfer_pass.models.weightless import load_weightless
from tests import architectures
from tests.models.four_bit_checkpoints import Tensors, write_mxfp4
from tests.models.test_quantized_experts import by_torch_compile, config, loaded

NUM_NEW_TOKENS = 24
PROMPTS = architectures.random_prompts((1, 5, 14), vocab_size=128)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@cache
def checkpoint() -> Path:
    return write_mxfp4(Path(mkdtemp()))


@cache
def plain() -> Any:
    """By transformers alone, some versions of which leave the experts in bfloat16, which is as exact."""
    config_class: Any = vars(transformers.utils.quantization_config)["Mxfp4Config"]
    return transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=config_class(dequantize=True),
    ).float()


@cache
def plain_tokens() -> list[list[int]]:
    return architectures.generated_by_transformers(plain(), PROMPTS, NUM_NEW_TOKENS)


@torch.no_grad()
def test_computes_as_transformers_does() -> None:
    """Up to sums; blocks and scales are kept bit by bit, and as a plan without weights has them."""
    module, stored = loaded(checkpoint()), load_file(checkpoint() / "model.safetensors")
    experts = module.model.layers[1].mlp.experts
    assert [type(part) for part in module.modules()].count(QuantizedExperts) == 2
    numbers = four_bits.halves(stored[f"{GATE_UP}_blocks"].flatten(2))
    assert torch.equal(four_bits.unpack(experts.gate_up_proj), numbers)
    assert torch.equal(experts.gate_up_scale, stored[f"{GATE_UP}_scales"])
    ids = torch.tensor(PROMPTS[2:])
    torch.testing.assert_close(module(ids).logits, plain()(ids).logits, rtol=1e-4, atol=1e-3)
    planned = load_weightless(config(checkpoint()))[0].state_dict()
    held = module.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in planned.items()} == {
        k: (v.shape, v.dtype) for k, v in held.items()
    }


def test_generates_as_transformers_does() -> None:
    """Greedy tokens in a batch, by the pass."""
    llm = build_model(config(checkpoint()))
    results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    assert [list(result.token_ids) for result in results] == plain_tokens()


def test_generates_by_torch_compile() -> None:
    """Likewise where Dynamo captures the model."""
    assert by_torch_compile(loaded(checkpoint())) == plain_tokens()


def test_dequantizes() -> None:
    """Then every weight is that of transformers."""
    state = loaded(checkpoint(), dequantize=True).state_dict()
    for name, tensor in plain().state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_is_explained() -> None:
    """The bytes of one expert are those of its blocks, scales and biases."""
    found = explain(config(checkpoint()))
    size, width = 64, 96
    numbers = 2 * width * size + size * width
    assert {site.bytes_each for site in found.experts} == {
        numbers // 2 + numbers // 32 + 4 * (2 * width + size)
    }
    assert {(site.width, site.hidden, site.dtype) for site in found.experts} == {(width, size, "mxfp4")}


def change(name: str, tensor: Tensor | None) -> Any:
    """A tensor replaced, or taken away."""

    def edit(tensors: Tensors) -> None:
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor

    return edit


SCALES = torch.full((4, 192, 2), 120, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(f"{GATE_UP}_scales", None), f"'{GATE_UP}_scales' of shape [4, 192, 2] is missing"),
        (change(f"{GATE_UP}_blocks", None), f"'{GATE_UP}' of shape [4, 64, 192] is missing"),
        (
            change(f"{GATE_UP}_scales", SCALES[:, :, :1]),
            f"'{GATE_UP}_scales' must be U8 of shape [4, 192, 2], found U8 [4, 192, 1]",
        ),
        (change(f"{GATE_UP}_scales", SCALES.float()), "must be U8 of shape [4, 192, 2], found F32"),
        (change(f"{GATE_UP}_scales", SCALES + 135), "must be at most 254, since 255 is no number"),
        (change(f"{GATE_UP}_blocks", SCALES), f"'{GATE_UP}_blocks' is U8 of shape [4, 192, 2]"),
        (lambda tensors: [change(n, None)(tensors) for n in list(tensors) if "_blocks" in n], "no tensor is"),
    ],
)
def test_refuses_what_is_damaged(tmp_path: Path, edit: Any, message: str) -> None:
    """In one line that names the tensor."""
    with pytest.raises(LoadError) as caught:
        loaded(write_mxfp4(tmp_path, edit))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
