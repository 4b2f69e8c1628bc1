"""Kernels of experts by measurement: what is timed, and that the fastest is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.experts import tune
from ad_flashinfer_pass.kernels.experts.tune import ExpertsLayers

OPTIONS = {"activation": "silu", "in_float32": False, "is_transposed": False}


def layers(num_layers: int = 2) -> ExpertsLayers:
    weights = {"gate_up_proj": torch.zeros(16, 8, 6), "down_proj": torch.zeros(16, 6, 4)}
    return ExpertsLayers([(2, torch.float32, weights, OPTIONS)] * num_layers)


def test_layers_that_are_alike_are_one_kind() -> None:
    (kind,) = layers().kinds
    assert str(kind) == "2 of 16 experts 4 x 6 torch.float32"
    assert layers().key(3) == f"3 tokens, 2 x {kind}"


@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_the_default_is_the_first_candidate(tokens: int) -> None:
    """So that what is named by measurement is what ran without, unless another was faster."""
    names = layers().candidates(tokens)
    assert names[0] == "triton"
    assert "torch" in names
    assert any(name.startswith("gemv") for name in names) == (tokens == 1)


@pytest.mark.parametrize(
    ("quantization", "name"), [("none", "grouped"), ("token", "grouped_w8a8"), ("block", "grouped_w8a8")]
)
def test_activations_are_quantized_where_the_checkpoint_does(quantization: str, name: str) -> None:
    """But for the few tokens of gemv, which reads float8 weights as fast beside activations of 16 bits."""
    weights = {"gate_up_proj": torch.zeros(16, 8, 6), "down_proj": torch.zeros(16, 6, 4)}
    weights = {key: weight.to(torch.float8_e4m3fn) for key, weight in weights.items()}
    scales = {"gate_up_scale": torch.ones(16, 1, 1), "down_scale": torch.ones(16, 1, 1)}
    options = {**OPTIONS, "input_quantization": quantization}
    subject = ExpertsLayers([(2, torch.bfloat16, {**weights, **scales}, options)])
    (kind,) = subject.kinds
    assert (f"activations {quantization}" in str(kind)) == (quantization != "none")
    assert {each.split("/")[0] for each in subject.candidates(64)} == {"triton", name}
    assert "gemv" in {each.split("/")[0] for each in subject.candidates(1)}


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def microseconds(launches: list[Any]) -> float:
        (name,) = launches[0].args
        return 1.0 if name == "torch" else 2.0

    monkeypatch.setattr(tune, "microseconds", microseconds)
    subject = layers()
    found = subject.measure(1, subject.candidates(1))
    assert found.kernels == ["torch"]
    assert found.notes[0].startswith("1 tokens, 2 of 16 experts 4 x 6 torch.float32: torch (triton 2.0, ")
