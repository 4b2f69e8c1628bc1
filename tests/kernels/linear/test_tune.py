"""Kernels of linears chosen by times, which are given here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan
from ad_flashinfer_pass.kernels.linear import tune as of_linears
from ad_flashinfer_pass.kernels.linear.small_gemm import Config, all_candidates
from ad_flashinfer_pass.kernels.linear.tune import Linear, Linears
from ad_flashinfer_pass.kernels.measure import tune

FIRST, SECOND, SLOW, *_ = all_candidates(8)
WIDE, TALL = torch.zeros(4096, 1024, dtype=torch.bfloat16), torch.zeros(1024, 4096, dtype=torch.bfloat16)


class Clock:
    """Stands for ``microseconds``: torch takes 20 us, candidates more, but for those that are named."""

    def __init__(self, alone: dict[Config, float], after_another: dict[Config, float]) -> None:
        self.alone, self.after_another = alone, after_another
        self.calls = 0

    def __call__(self, launches: Sequence[Callable[[], object]]) -> float:
        self.calls += 1
        shapes = {self._weight(launch).shape for launch in launches}
        known = self.alone if len(shapes) == 1 else self.after_another
        return sum(self._time(launch, known) for launch in launches) / len(launches)

    @staticmethod
    def _weight(launch: Callable[[], object]) -> Tensor:
        assert isinstance(launch, partial)
        weight = launch.args[1]
        assert isinstance(weight, Tensor)
        return weight

    @staticmethod
    def _time(launch: Callable[[], object], known: dict[Config, float]) -> float:
        assert isinstance(launch, partial)
        config = next((arg for arg in launch.args if isinstance(arg, Config)), None)
        return 20.0 if config is None else known.get(config, 40.0)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Clock], Callable[..., object]]:
    """Tunes by a clock, over two kinds of linears in turn, and gives the choice for 8 tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def run(clock: Clock) -> Callable[..., object]:
        monkeypatch.setattr(of_linears, "microseconds", clock)
        pair = [
            Linear(weight, weight.dtype, None, *around)
            for weight, *around in ((WIDE, True, False, False), (TALL, False, True, False))
        ]
        plans, notes = tune(Linears(pair * 8), [8, 512])
        assert len(notes) == 3, "none for 512 tokens"

        def chosen(weight: Tensor, *around: bool) -> Config | None:
            kind = Linear(weight, weight.dtype, None, *around).kind
            name, options = KernelPlan.parse(plans[kind]).at(8)
            return Config(*options) if name == "small_gemm" else None

        return chosen

    return run


def test_the_fastest_alone_is_kept(tuned: Callable[[Clock], Callable[..., object]]) -> None:
    """And torch's where nothing is faster; a second run reads what the first one found."""
    times = {FIRST: 10.0, SECOND: 12.0}
    chosen = tuned(Clock(times, times))
    assert chosen(WIDE, True, False, False) == chosen(TALL, False, True, False) == FIRST
    again = Clock({}, {})
    assert tuned(again)(WIDE, True, False, False) == FIRST
    assert again.calls == 0


def test_numbers_of_tokens_that_are_padded_alike_are_timed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    clock = Clock({FIRST: 10.0}, {FIRST: 10.0})
    monkeypatch.setattr(of_linears, "microseconds", clock)
    linears = Linears([Linear(WIDE, WIDE.dtype, None, False, False, False)])
    plans, notes = tune(linears, [1, 2, 4, 8, 16, 32, 64, 128])
    assert [note.partition(":")[0] for note in notes[::2]] == [f"{n} tokens" for n in (1, 16, 32, 64)]
    plan = KernelPlan.parse(plans[linears.kinds[0]])
    assert {plan.at(size) for size in (2, 4, 8, 16)} == {Kernel("small_gemm", FIRST)}
    calls = clock.calls
    assert tune(linears, [1, 2, 4, 8, 16, 32, 64, 128]) == (plans, notes)
    assert clock.calls == calls, "nothing is timed by a second start"


def test_torch_is_kept_where_nothing_is_faster(tuned: Callable[[Clock], Callable[..., object]]) -> None:
    """A gain below what noise makes is none."""
    assert tuned(Clock({FIRST: 19.9}, {FIRST: 19.9}))(WIDE, True, False, False) is None


def test_what_is_faster_among_the_others_replaces_it(
    tuned: Callable[[Clock], Callable[..., object]],
) -> None:
    """Only what is nearly as fast alone is tried."""
    alone = {FIRST: 10.0, SECOND: 12.0, SLOW: 19.0}
    chosen = tuned(Clock(alone, {FIRST: 11.0, SECOND: 10.5, SLOW: 1.0}))
    assert chosen(WIDE, True, False, False) == chosen(TALL, False, True, False) == SECOND
