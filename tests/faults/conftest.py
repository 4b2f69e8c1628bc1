from __future__ import annotations

import io
import sys

import pytest

from ad_flashinfer_pass import build
from tests.fake_llm import FakeBuild
from tests.faults.harness import Runner


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    """The command, with a model that continues a prompt with itself."""
    monkeypatch.setattr(build, "build_model", FakeBuild())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return Runner(capsys)
