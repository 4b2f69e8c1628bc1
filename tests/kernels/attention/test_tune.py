"""Choosing decode kernels by measured times, with the clock replaced by a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ad_flashinfer_pass.kernels import measure
from ad_flashinfer_pass.kernels.attention import reference, select, tune
from ad_flashinfer_pass.kernels.attention.capability import Capability, Phase, Site

DECODE_ONLY: frozenset[Phase] = frozenset({"decode"})
SITE = Site(
    dtype=torch.float32,
    kv_dtype=torch.float32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    v_head_dim=16,
    page_size=8,
    scale=0.25,
)


def test_a_choice_names_a_kernel_for_each_batch_size() -> None:
    """What decode_choice writes, decoder reads; sizes that it does not name run the default."""
    calls: list[tuple[str, int | None]] = []
    first = SimpleNamespace(
        decode=lambda *, splits=None: calls.append(("first", splits)), DECODE_OPTION="splits"
    )
    second = SimpleNamespace(decode=lambda: calls.append(("second", None)))
    choice = select.decode_choice("second", {8: "first/4", 1: "first"})
    assert choice == "second 1=first 8=first/4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "PROVIDERS", {"first": first, "second": second})
        for batch in (1, 8, 2):
            select.decoder(choice, batch)()
    assert calls == [("first", None), ("first", 4), ("second", None)]


def test_the_fastest_over_all_lengths_wins() -> None:
    """Times count relative to the best at their length, or the long ones alone would decide."""
    assert tune.fastest({"a": [10.0, 100.0], "b": [5.0, 110.0]}, "a") == "b"
    assert tune.fastest({"a": [10.0, 100.0], "b": [9.5, 150.0]}, "a") == "a"


def test_the_default_stays_unless_it_is_clearly_slower() -> None:
    """A difference within the noise changes nothing."""
    assert tune.fastest({"a": [10.0], "b": [9.9]}, "a") == "a"
    assert tune.fastest({"a": [10.0], "b": [9.0]}, "a") == "b"


def test_measures_once_and_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each candidate is timed at each length over every pool; the second time the file answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    ran: list[tuple[str, tuple[int, ...], int]] = []

    def provider(name: str) -> SimpleNamespace:
        def decode(query: torch.Tensor, pool: torch.Tensor, *rest: object, splits: int = 1) -> torch.Tensor:
            out = reference.decode(query, pool, *rest)  # type: ignore[arg-type]
            ran.append((name, tuple(out.shape), splits))
            return out

        return SimpleNamespace(
            CAPABILITY=Capability(name=name, phases=DECODE_ONLY),
            decode=decode,
            DECODE_OPTION="splits",
            decode_options=lambda site, batch, device: [2] if name == "ours" else [],
        )

    def microseconds(launches: Sequence[object]) -> float:
        assert len(launches) == 3
        for launch in launches:
            launch()  # type: ignore[operator]
        name, shape, splits = ran[-1]
        return {("first", 1): 10.0, ("ours", 1): 12.0, ("ours", 2): 8.0 if shape[0] == 1 else 11.0}[
            name, splits
        ]

    monkeypatch.setattr(select, "PROVIDERS", {"first": provider("first"), "ours": provider("ours")})
    monkeypatch.setattr(measure, "microseconds", microseconds)
    pools = [torch.zeros(6, 2, 2, 8, 16) for _ in range(3)]
    choice, notes = tune.tune_decode(SITE, pools, [1, 4], 8)
    assert choice == "first 1=ours/2"
    assert len(notes) == 2
    assert "first 10.0/10.0, ours 8.0/8.0 us at 32/64 tokens" in notes[0]
    ran.clear()
    assert tune.tune_decode(SITE, pools, [1, 4], 8) == (choice, notes)
    assert not ran
