"""Import hook: the AutoDeploy plugin follows AutoDeploy into every process.

AutoDeploy finds no plugins by itself, and its executor runs in spawned processes that import nothing of the
user's. So the package installs ``ad_flashinfer_pass_autodeploy.pth``, which Python reads at every start; it
does nothing unless ``FLASHINFER_TRTLLM_AUTODEPLOY=1`` is in the environment, which spawned workers,
``trtllm-serve`` and ``trtllm-bench`` inherit. The plugin is imported right after AutoDeploy, and only then.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

VARIABLE = "FLASHINFER_TRTLLM_AUTODEPLOY"
PTH = "ad_flashinfer_pass_autodeploy.pth"
PACKAGES = ("tensorrt_llm._torch.auto_deploy", "llmc")
"""Of AutoDeploy: in TensorRT-LLM, and on its own."""

_PLUGIN = "ad_flashinfer_pass.autodeploy"


def enabled() -> bool:
    """Whether the environment asks for the plugin."""
    return os.environ.get(VARIABLE, "").lower() not in ("", "0", "false", "off", "no")


def install() -> None:
    """Import the plugin as soon as AutoDeploy is imported; called from the .pth file.

    A process that has imported AutoDeploy already imports the plugin at once.
    """
    if not enabled() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if any(name in sys.modules for name in PACKAGES):
        importlib.import_module(_PLUGIN)
        return
    sys.meta_path.insert(0, _Finder())


def status() -> list[str]:
    """For ``doctor``: whether the hook is installed, and whether it is on."""
    path = next((Path(entry) / PTH for entry in sys.path if (Path(entry) / PTH).is_file()), None)
    on = any(isinstance(finder, _Finder) for finder in sys.meta_path) or _PLUGIN in sys.modules
    return [
        f"AutoDeploy import hook: {path or 'not installed; install this package with pip'}",
        f"{VARIABLE}: {os.environ.get(VARIABLE) or 'not set'}; in this process the plugin is "
        + ("imported" if _PLUGIN in sys.modules else "imported with AutoDeploy" if on else "not active"),
    ]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds AutoDeploy by the other finders, and has the plugin imported when its package is complete."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PACKAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for s in (f.find_spec(name, path, target) for f in others) if s is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_PLUGIN)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_data, is_package and what else the loader has
