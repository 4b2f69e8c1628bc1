"""Functions of transformers that are ops while a model is exported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import states
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import PackingError, UnsupportedError
from ad_flashinfer_pass.pipeline import transform_module
from tests import architectures
from tests.ops.test_states import CASES


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return architectures.random_model(architectures.small_config("mamba2", num_hidden_layers=1))


@pytest.mark.parametrize("name", CASES)
def test_knows_the_functions_of_this_version(name: str) -> None:
    """And that each is what the op computes: ``tests/ops/test_states.py``."""
    case = CASES[name]
    module = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    assert states._FUNCTIONS[case.function].is_code_of(getattr(module, case.function))


def globals_of(model: nn.Module) -> dict[str, Any]:
    return vars(sys.modules[type(model).__module__])


@pytest.fixture
def functions(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Of the model's file; what is there afterwards is what was there."""
    before = dict(globals_of(model))
    yield globals_of(model)
    assert globals_of(model) == before


def test_functions_are_put_back_also_after_a_failure(model: nn.Module, functions: dict[str, Any]) -> None:
    """They compute by ops within, and by themselves afterwards."""
    own = functions["mamba2_chunk_scan"]
    taken = []

    def fails() -> None:
        with states.as_ops(model):
            taken.append(functions["mamba2_chunk_scan"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert taken != [own]
    assert functions["mamba2_chunk_scan"] is own


def test_other_code_is_another_function(
    model: nn.Module, functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of that name that was not read stays as it is, and the pass refuses what it does."""

    def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor, bias: Tensor, **kwargs: Any) -> Tensor:
        return torch.conv1d(hidden_states, weight[:, None], bias, padding=3, groups=len(weight))[:, :, :-3]

    with monkeypatch.context() as patch:
        patch.setitem(functions, "causal_conv1d_fn", causal_conv1d_fn)
        with states.as_ops(model):
            assert functions["causal_conv1d_fn"] is causal_conv1d_fn
        with pytest.raises(PackingError, match=r"conv1d .*ad_flashinfer_pass\.states\.as_ops"):
            transform_module(model, AutoDeployConfig(device="cpu", max_seq_len=64))


def test_what_somebody_has_wrapped_is_another_function(
    model: nn.Module, functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it bears the name, and ``inspect`` shows the code, of what it wraps."""
    own = functions["mamba2_chunk_scan"]
    twice = wraps(own)(lambda *args, **kwargs: 2 * own(*args, **kwargs))
    for other in (twice, partial(own)):
        with monkeypatch.context() as patch:
            patch.setitem(functions, "mamba2_chunk_scan", other)
            with states.as_ops(model):
                assert functions["mamba2_chunk_scan"] is other


def test_functions_refuse_what_the_ops_do_not_have(model: nn.Module) -> None:
    """Packed sequences, a state to start from, another activation."""
    x, weight = torch.ones(1, 4, 5), torch.ones(4, 3)
    with states.as_ops(model):
        convolve = globals_of(model)["causal_conv1d_fn"]
        assert callable(convolve)
        with pytest.raises(UnsupportedError, match="seq_idx"):
            convolve(x, weight, seq_idx=torch.zeros(1, 5))
        with pytest.raises(UnsupportedError, match="'gelu'"):
            convolve(x, weight, activation="gelu")
