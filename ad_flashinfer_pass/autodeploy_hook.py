"""Import hook: the AutoDeploy plugin follows AutoDeploy into every process.

AutoDeploy finds no plugins by itself, and its executor runs in spawned processes. So the package installs a
.pth file, which Python reads at every start; it does nothing unless ``FLASHINFER_TRTLLM_AUTODEPLOY=1`` is in
the environment, which workers, ``trtllm-serve`` and ``trtllm-bench`` inherit.
"""

from __future__ import annotations

import importlib
import importlib.abc
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

VARIABLE = "FLASHINFER_TRTLLM_AUTODEPLOY"
PTH = "ad_flashinfer_pass_autodeploy.pth"
PACKAGES = ("tensorrt_llm._torch.auto_deploy", "llmc")  # in TensorRT-LLM, and on its own
PLUGIN = "ad_flashinfer_pass.autodeploy"


def install() -> None:
    """Import the plugin as soon as AutoDeploy is imported, or now if it is; called from the .pth file."""
    is_on = os.environ.get(VARIABLE, "").lower() not in ("", "0", "false", "off", "no")
    if not is_on or any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    if any(name in sys.modules for name in PACKAGES):
        importlib.import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, Finder())


class Finder(importlib.abc.MetaPathFinder):
    """Finds AutoDeploy by the other finders, and has the plugin imported when its package is complete."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if name not in PACKAGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for s in (f.find_spec(name, path, target) for f in others) if s is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(PLUGIN)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
