"""One GPU a process, and the current one."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass import pipeline
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.kernels import modules


def test_flashinfers_kernels_serve_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their modules are prepared for the device that they are loaded on; a second one is refused by name."""
    monkeypatch.setattr(modules, "_device", None)
    for _ in range(2):
        modules.claim(torch.device("cuda", 1))
    with pytest.raises(KernelError, match=r"serve cuda:1 in this process and cannot serve cuda:0 too"):
        modules.claim(torch.device("cuda", 0))


def test_the_device_of_a_config_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, events and graphs are made there; without an index the current one is meant."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(pipeline, "SequenceInfo", lambda **options: None)
    for device in ("cpu", "cuda", "cuda:1"):
        pipeline.context(AutoDeployConfig(device=device))
    assert chosen == [torch.device("cuda:1")]
