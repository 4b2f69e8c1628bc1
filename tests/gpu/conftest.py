"""What every test here needs: a CUDA GPU and flashinfer-python."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where they cannot run."""
    lacking = [
        what
        for what, has in (
            ("a CUDA GPU", torch.cuda.is_available()),
            ("flashinfer-python", find_spec("flashinfer") is not None),
        )
        if not has
    ]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if lacking:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(lacking)}"))
