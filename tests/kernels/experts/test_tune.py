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


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def microseconds(launches: list[Any]) -> float:
        (name,) = launches[0].args
        return 1.0 if name == "torch" else 2.0

    monkeypatch.setattr(tune, "microseconds", microseconds)
    subject = layers()
    found = subject.measure(1, subject.candidates(1))
    assert found.kernels == ["torch"]
    assert found.notes[0].startswith("1 tokens, 2 of 16 experts 4 x 6 torch.float32: torch (triton 2.0, ")
