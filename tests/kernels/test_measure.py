"""``kernels.measure``: what is kept of measurements, and for how long one believes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.kernels import measure
from ad_flashinfer_pass.kernels.measure import Measured, tune


class Counted:
    """A subject of two kinds, of which one runs best by ``fast``."""

    kinds = ("a", "b")
    default = "slow"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.measured: list[int] = []

    def alike(self, size: int) -> int:
        return size

    def key(self, size: int) -> str:
        return f"{size} tokens"

    def candidates(self, size: int) -> list[str]:
        return ["slow", "fast/2"]

    def measure(self, size: int, kernels: list[str]) -> Measured:
        self.measured.append(size)
        return Measured(["fast/2", "slow"], [f"{size}: fast"])


PLANS = {"a": "slow 1=fast/2 8=fast/2", "b": "slow"}, ["1: fast", "8: fast"]


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def tuned() -> list[int]:
    """The sizes that had to be measured."""
    subject: Any = Counted()
    assert tune(subject, [1, 8]) == PLANS
    return subject.measured


def test_what_was_found_is_remembered() -> None:
    assert [tuned(), tuned()] == [[1, 8], []]


def test_sizes_that_are_alike_share_what_was_measured_for_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Counted, "alike", lambda self, size: size > 1)
    subject: Any = Counted()
    found, done = [], []
    for _ in range(2):
        found.append(tune(subject, [8, 1, 4, 2], lambda *progress: done.append(progress)))
    assert subject.measured == [1, 8], "and nothing the second time"
    assert found == [({"a": "slow 1=fast/2 2=fast/2 4=fast/2 8=fast/2", "b": "slow"}, PLANS[1])] * 2
    assert done == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize(
    "entry",
    [
        None,
        7,
        "slow",
        [],
        {"kernels": ["fast/2", "slow"]},
        [["fast/2"], ["a kind too few"]],
        [["fast/2", "gone"], ["a kernel of another version"]],
        [[["fast/2"], {}], ["no texts"]],
        ["xy", "ab"],
        [["fast/2", "slow"]],
    ],
    ids=json.dumps,
)
def test_an_entry_that_says_something_else_is_measured_again(entry: object) -> None:
    tuned()
    known = measure.read_choices()
    measure.write_choices({next(iter(known)): entry})
    assert [tuned(), tuned()] == [[1], []]


def test_what_another_process_found_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(subject: Counted, size: int, kernels: list[str]) -> Measured:
        measure.write_choices({f"of another {size}": [["slow"], []]})
        return Measured(["fast/2", "slow"], [f"{size}: fast"])

    monkeypatch.setattr(Counted, "measure", measured)
    tuned()
    assert [key[:10] for key in measure.read_choices()] == ["of another", "of another", *["a GPU, tor"] * 2]


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":', b"\xff\xfe", b"null"])
def test_a_damaged_file_is_written_anew(content: bytes) -> None:
    file = measure.cache_file()
    assert file is not None
    file.write_bytes(content)
    assert [tuned(), tuned()] == [[1, 8], []]


def test_a_home_that_cannot_be_written_to_is_measured_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [tuned(), tuned()] == [[1, 8], [1, 8]]
