"""What the documents say of the code is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_page_of_keys_is_what_the_script_writes() -> None:
    """Whoever changes a key or its docstring runs ``python docs/generate.py``."""
    script = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert script["updated"]() == (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
