"""One run of the pass for all that ask the same of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.inspection import stages


@pytest.fixture
def one_run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., stages.Stages]:
    """``run_stages``, here and in every function of ``inspection``, run once for equal arguments."""
    runs: dict[str, stages.Stages] = {}

    def once(
        config: AutoDeployConfig,
        graph: Path | None = None,
        names: list[str] | None = None,
        on_event: Callable[[str], None] | None = None,
        *,
        sm: int | None = None,
    ) -> stages.Stages:
        key = repr((config, graph, names, sm))
        if key not in runs:
            runs[key] = stages.run_stages(config, graph, names, on_event, sm=sm)
        return runs[key]

    for name in ("diff", "dump", "explain", "lint", "plan", "report"):
        monkeypatch.setattr(import_module(f"ad_flashinfer_pass.inspection.{name}"), "run_stages", once)
    return once
