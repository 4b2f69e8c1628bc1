"""The examples of the documentation run, and print text."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends import registry

from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
ARGUMENTS = {
    "torch_compile.py": ["--compile-backend", "torch-simple", "--max-new-tokens", "12"],
    "export.py": [],
}
TEXT = {
    "torch_compile.py": "Once upon a time, there was a little girl",
    "export.py": ", there was a little girl",
}


def test_every_example_is_known() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_generates_text(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts that the demo model is known to write."""
    torch._dynamo.reset()
    if "flashinfer_trtllm" not in torch._dynamo.list_backends():  # the package is not installed
        registry.register_backend(flashinfer_trtllm, name="flashinfer_trtllm")
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert TEXT[name] in capsys.readouterr().out
