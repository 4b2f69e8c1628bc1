"""What must be set before any test runs, or imports torch or Triton."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The tensors of the tests are so small that a second thread only costs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Read when torch is imported. In a small graph with sizes that vary, an entry costs more than it saves.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

# No test sees what another left; those of what is kept between processes have a folder of their own.
os.environ["XDG_CACHE_HOME"] = os.devnull

import pytest
import torch

# Read when Triton is imported, for its own functions, and when one of our kernels is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from ad_flashinfer_pass import config, export_cache

if find_spec("triton") and "TRITON_INTERPRET" in os.environ:
    from triton.runtime import interpreter

    _remapped: set[int] = set()
    _remap = interpreter._patch_lang

    def _remap_once(kernel: Any) -> Any:
        """Else all of Triton's language is looked through at each call of a function within a kernel."""
        if id(kernel.__globals__) in _remapped:
            return None  # restored by the launch, which came first
        scope = _remap(kernel)
        _remapped.add(id(kernel.__globals__))
        if scope is not None:
            restore = scope.restore

            def forget() -> None:
                restore()
                _remapped.clear()

            scope.restore = forget
        return scope

    interpreter._patch_lang = _remap_once

# Where there is a GPU, the tests of it say so.
config._default_device = wraps(config._default_device)(lambda: "cpu")

# An export makes objects by the hundred thousand and drops few of them before its end.
gc.set_threshold(200_000)

# Longest first: a worker that takes one of these last leaves the other with nothing to do.
_LONG = (
    "end_to_end architectures shard hand_written inductor ranks triton_experts quantized_weights backend "
    "cache_latent generate experts prefill prove ropes mutations tune_experts debugging_stories"
).split()

# Of these the export is the subject, or they change what it reads.
_EXPORTING = "export_model experts states mutations export_cache".split()


def _name(path: Path) -> str:
    return path.stem.removeprefix("test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules of long tests, and with those whose graphs others read."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(_name(item.path), len(_LONG)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the graph of a model is kept for every test of this run, of all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _graphs_kept(request: pytest.FixtureRequest, graphs: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if _name(request.path) not in _EXPORTING:
            patch.setattr(export_cache, "cache_folder", lambda name: graphs)
            patch.setattr(export_cache, "_MOST", 10_000)
        if _name(request.path) == "architectures":  # exports all, and keeps it for others
            patch.setattr(export_cache, "load", lambda key, owner: None)
        yield
