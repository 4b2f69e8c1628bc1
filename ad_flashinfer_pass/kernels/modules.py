"""FlashInfer's compiled modules: whether one can be loaded or compiled here.

FlashInfer compiles a module, with nvcc, at the first call that needs it; a provider's ``modules(site, ...)``
names those of a site, so that they can be asked for before, or built elsewhere.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from ad_flashinfer_pass.errors import KernelError

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

OLDEST_FLASHINFER = "0.6.11"
"""The first with all that is called here; what came later, the providers declare as ``Since``."""


@cache
def installed(package: str = "flashinfer-python") -> Version | None:
    """The version of a package, None if it is not installed."""
    try:
        return Version(version(package))
    except PackageNotFoundError:
        return None


def problem() -> str | None:
    """Why FlashInfer cannot be used at all; None if it can."""
    found = installed()
    if found is None:
        return "flashinfer-python is not installed"
    if found < Version(OLDEST_FLASHINFER):
        return f"flashinfer-python {found} is installed, {OLDEST_FLASHINFER} or newer is needed"
    return None


def remedy(since: str = OLDEST_FLASHINFER) -> str:
    """How to get a version of FlashInfer; the one that TensorRT-LLM pins is not to be replaced."""
    if (trtllm := installed("tensorrt-llm")) is not None:
        return (
            f"leave it, tensorrt-llm {trtllm} pins it; or install a tensorrt-llm that pins {since} or newer"
        )
    return f"pip install 'flashinfer-python>={since}'"


def has(since: str) -> bool:
    """Whether FlashInfer is here in this version or a newer one."""
    found = installed()
    return found is not None and found >= Version(since)


def target() -> str | None:
    """What FlashInfer is told to compile for; None: for the GPUs that are here. Its modules hold it."""
    return os.environ.get("FLASHINFER_CUDA_ARCH_LIST")


_device: torch.device | None = None


def claim(device: torch.device) -> None:
    """Take FlashInfer's XQA and FMHA v2 for a device, for as long as the process lives.

    When such a module is loaded it prepares itself for the current device, and for no other.

    Raises:
        KernelError: they were taken for another device.
    """
    global _device
    if _device is None:
        _device = device
    elif device != _device:
        raise KernelError(
            f"FlashInfer's TRT-LLM kernels serve {_device} in this process and cannot serve {device} too: "
            "use one process a GPU."
        )


def nvcc() -> str | None:
    """Path of the compiler, looked for where FlashInfer looks for it; None if there is none."""
    if given := os.environ.get("FLASHINFER_NVCC"):
        return given
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    paths = [Path(home, "bin", "nvcc") for home in homes if home]
    return next((str(path) for path in paths if path.exists()), shutil.which("nvcc"))


def lacking(spec: JitSpec, *, compiles: bool = True) -> str | None:
    """Why a module can be neither loaded nor compiled here; None if it can.

    Args:
        spec: the module.
        compiles: False if it takes too long to be compiled by the first call that needs it.
    """
    if spec.is_aot:
        return None
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        return "its FlashInfer module is not prebuilt, and FLASHINFER_DISABLE_JIT is set"
    if nvcc() is None:
        return "its FlashInfer module is not prebuilt, and there is no nvcc to build it"
    return None if compiles or spec.is_compiled else "its FlashInfer module is not built"
