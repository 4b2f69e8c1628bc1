"""Choosing decode kernels by measured times, with the clock replaced by a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels import measure
from ad_flashinfer_pass.kernels.attention import reference, select
from ad_flashinfer_pass.kernels.attention.capability import Capability, Phase, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.attention.tune import Decode
from ad_flashinfer_pass.kernels.kernel_plan import Kernel, KernelPlan

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


def test_a_plan_names_a_kernel_for_each_batch_size() -> None:
    """What a plan writes, the op reads; sizes that it does not name run the default."""
    calls: list[tuple[str, int | None]] = []

    def provider(name: str) -> Provider:
        def decode(
            query: Tensor, kv: Tensor, lens: Tensor, table: Tensor, spec: Any, *options: int
        ) -> Tensor:
            calls.append((name, options[0] if options else None))
            return query

        return Provider(capability=Capability(name=name), decode=decode)

    plan = str(KernelPlan(Kernel("second"), {8: Kernel("first", (4,)), 1: Kernel("first")}))
    assert plan == "second 1=first 8=first/4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "PROVIDERS", {name: provider(name) for name in ("first", "second")})
        for batch in (1, 8, 2):
            lens, info = torch.ones(batch, dtype=torch.int32), torch.zeros(12, dtype=torch.int32)
            info[4:6] = batch
            metadata = (info, torch.arange(batch + 1), lens, torch.zeros(batch, 1, dtype=torch.int32))
            args = (torch.zeros(batch, 1, 4, 8), torch.zeros(1, 2, 4, 8, 8), *metadata, 1.0, 8)
            ops.cached_attention(*args, decode_kernel=plan)
    assert calls == [("first", None), ("first", 4), ("second", None)]


def test_the_fastest_over_all_lengths_wins() -> None:
    """Times count relative to the best at their length, or the long ones alone would decide."""
    assert measure.fastest({"a": [10.0, 100.0], "b": [5.0, 110.0]}, "a") == "b"
    assert measure.fastest({"a": [10.0, 100.0], "b": [9.5, 150.0]}, "a") == "a"


def test_the_default_stays_unless_it_is_clearly_slower() -> None:
    """A difference within the noise changes nothing."""
    assert measure.fastest({"a": [10.0], "b": [9.9]}, "a") == "a"
    assert measure.fastest({"a": [10.0], "b": [9.0]}, "a") == "b"


def test_measures_once_and_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each candidate is timed at each length over every pool; the second time the file answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    ran: list[tuple[str, tuple[int, ...], int]] = []

    def provider(name: str) -> Provider:
        def decode(
            query: Tensor, pool: Tensor, lens: Tensor, table: Tensor, spec: AttentionSpec, splits: int = 1
        ) -> Tensor:
            out = reference.decode(query, pool, lens, table, spec)
            ran.append((name, tuple(out.shape), splits))
            return out

        return Provider(
            capability=Capability(name=name, phases=DECODE_ONLY),
            decode=decode,
            options=lambda site, batch, device: [2] if name == "ours" else [],
        )

    def cold_microseconds(launches: Sequence[object], device: torch.device) -> float:
        assert len(launches) == 3
        for launch in launches:
            launch()  # type: ignore[operator]
        name, shape, splits = ran[-1]
        return {("first", 1): 10.0, ("ours", 1): 12.0, ("ours", 2): 8.0 if shape[0] == 1 else 11.0}[
            name, splits
        ]

    monkeypatch.setattr(select, "PROVIDERS", {"first": provider("first"), "ours": provider("ours")})
    monkeypatch.setattr(measure, "cold_microseconds", cold_microseconds)
    pools = [torch.zeros(6, 2, 2, 8, 16) for _ in range(3)]
    plans, notes = measure.tune(Decode(SITE, pools, 8), [1, 4])
    assert plans == {SITE: "first 1=ours/2"}
    assert len(notes) == 2
    assert "first 10.0/10.0, ours 8.0/8.0 us at 32/64 tokens" in notes[0]
    ran.clear()
    assert measure.tune(Decode(SITE, pools, 8), [1, 4]) == (plans, notes)
    assert not ran


def test_verification_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are timed, stand in the plan, and reach the kernel in a step of that size alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    ran: list[tuple[int, int, int]] = []

    def verify(
        query: Tensor, pool: Tensor, *rest: Any, max_len: int
    ) -> Tensor:  # cu_seqlen, lengths, pages, spec, and perhaps splits
        ran.append((len(query), max_len, rest[4] if len(rest) > 4 else 1))
        return query

    ours = Provider(
        capability=Capability(name="ours", phases=DECODE_ONLY),
        verify=verify,
        options=lambda site, batch, device: [7],
        verify_options=lambda site, batch, device: [2],
    )

    def cold_microseconds(launches: Sequence[object], device: torch.device) -> float:
        for launch in launches:
            launch()  # type: ignore[operator]
        num_tokens, _, splits = ran[-1]
        return 8.0 if (splits == 2) == (num_tokens == 4) else 10.0

    monkeypatch.setattr(select, "PROVIDERS", {"ours": ours})
    monkeypatch.setattr(measure, "cold_microseconds", cold_microseconds)
    plans, _ = measure.tune(Decode(SITE, [torch.zeros(6, 2, 2, 8, 16)], 8, num_drafts=3), [1, 4])
    assert plans == {SITE: "ours 1=ours/2"}
    assert {(num_tokens, max_len) for num_tokens, max_len, _ in ran} == {(4, 4), (16, 4)}
    for size, splits in ((1, 2), (4, 1)):
        extend = select.extender("ours", plans[SITE], size)
        assert extend is not None
        extend(torch.zeros(4 * size, 4, 16), *(torch.zeros(0),) * 5, max_len=4)
        assert ran[-1] == (4 * size, 4, splits)
