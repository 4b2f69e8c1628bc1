"""FlashInfer's compiled modules: whether one can be loaded or compiled here.

FlashInfer compiles a module, with nvcc, at the first call that needs it; a provider's ``modules(site, ...)``
names those of a site, so that they can be asked for before, or built elsewhere.
"""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from ad_flashinfer_pass.errors import KernelError

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpecNvcc

OLDEST_FLASHINFER = "0.7.2"
"""Whose signatures this package calls."""


def problem() -> str | None:
    """Why FlashInfer cannot be used at all; None if it can."""
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return "flashinfer-python is not installed"
    if Version(found) < Version(OLDEST_FLASHINFER):
        return f"flashinfer-python {found} is installed, {OLDEST_FLASHINFER} or newer is needed"
    return None


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


def lacking(spec: JitSpecNvcc, *, compiles: bool = True) -> str | None:
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
