"""What must be set before any test runs, or imports torch or Triton."""

from __future__ import annotations

import gc
import os
from functools import wraps

# The tensors of the tests are so small that a second thread only costs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when torch is imported. In a small graph with sizes that vary, an entry costs more than it saves.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

# No test sees what another left; those of what is kept between processes have a folder of their own.
os.environ["XDG_CACHE_HOME"] = os.devnull

import pytest
import torch

from ad_flashinfer_pass import config

# Read when Triton is imported, for its own functions, and when one of our kernels is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Where there is a GPU, the tests of it say so.
config._default_device = wraps(config._default_device)(lambda: "cpu")

# An export makes objects by the hundred thousand and drops few of them before its end.
gc.set_threshold(200_000)

# Longest first: a worker that takes one of these last leaves the other with nothing to do.
_LONG = "end_to_end architectures quantized_weights backend generate exported debugging_stories".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules of few and long tests."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in _LONG)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again."""
    gc.freeze()
