"""A folder of FlashInfer's modules that ``prebuild`` compiled."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention.capability import Phase

MANIFEST = "manifest.json"


class NeededModule(BaseModel):
    """One FlashInfer module, and what needs it."""

    model_config = ConfigDict(frozen=True)

    name: str
    provider: str
    phases: list[Phase]
    num_sites: int
    seconds: float | None = None
    """That it took to compile; None if it was not compiled, or had been before."""


class Manifest(BaseModel):
    """What a folder of prebuilt kernels holds."""

    sm: int
    """Compute capability, major and minor: 90 is 9.0."""
    flashinfer: str
    """Version of flashinfer-python, which must be the same where the folder is used."""
    nvcc: str
    """Last line of nvcc --version."""
    modules: list[NeededModule]
    notes: list[str]
    """What the config needs beside modules."""


def read_manifest(folder: Path) -> Manifest:
    """What a folder holds.

    Raises:
        ConfigError: it is not a folder that ``prebuild`` made.
    """
    try:
        return Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"{folder}: not a folder of prebuilt kernels ({' '.join(str(err).split())})."
        ) from None


def use(folder: Path, device: torch.device) -> None:
    """Let FlashInfer load its modules from a folder that ``prebuild`` made.

    Args:
        folder: it takes the place of FlashInfer's own folder of prebuilt modules.
        device: a CUDA device, of the compute capability that they are for.

    Raises:
        ConfigError: the folder is for another GPU or FlashInfer, or none that ``prebuild`` made.
    """
    problem = modules.problem()
    if problem is not None:
        raise ConfigError(f"kernel_dir: {problem}.")
    found, major_minor = read_manifest(folder), torch.cuda.get_device_capability(device)
    here = (major_minor[0] * 10 + major_minor[1], version("flashinfer-python"))
    if (found.sm, found.flashinfer) != here:
        raise ConfigError(
            f"kernel_dir: {folder} is for compute capability {found.sm} and flashinfer-python "
            f"{found.flashinfer}, here are {here[0]} and {here[1]}: prebuild again, with --sm {here[0]}."
        )
    from flashinfer.jit import env

    env.FLASHINFER_AOT_DIR = folder.resolve()
