"""Looking at what the pass did: the functions of the commands, under their names, which return typed data.

from ad_flashinfer_pass import AutoDeployConfig, inspection

found = inspection.lint(AutoDeployConfig(model="demo"), sm=90)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ad_flashinfer_pass.explain import explain
    from ad_flashinfer_pass.inspection.capture_lint import lint
    from ad_flashinfer_pass.inspection.graph_diff import diff
    from ad_flashinfer_pass.inspection.graph_dump import dump
    from ad_flashinfer_pass.inspection.html_report import report
    from ad_flashinfer_pass.inspection.memory_plan import plan
    from ad_flashinfer_pass.inspection.numerics import check

__all__ = ["check", "diff", "dump", "explain", "lint", "plan", "report"]

_HOME = {
    "check": "inspection.numerics",
    "diff": "inspection.graph_diff",
    "dump": "inspection.graph_dump",
    "explain": "explain",
    "lint": "inspection.capture_lint",
    "plan": "inspection.memory_plan",
    "report": "inspection.html_report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ad_flashinfer_pass.{_HOME[name]}"), name)
