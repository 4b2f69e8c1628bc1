"""Kernels for a GPU that may be elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.select import Choice

if TYPE_CHECKING:
    from ad_flashinfer_pass.records import CachedSite


def check_target(config: AutoDeployConfig, sm: int | None) -> None:
    """Refuse to choose kernels for a GPU of which nothing is known.

    Raises:
        ConfigError: the device is a GPU that is not here and ``sm`` is not given, or that is none.
    """
    if sm is not None:
        select.check_sm(sm)
    select.torch_device(config.device)
    if config.device.startswith("cuda") and sm is None and not torch.cuda.is_available():
        raise ConfigError(
            f"device: got {config.device}, but no GPU is here; give its compute capability, as in --sm 90."
        )


def site_choices(site: CachedSite, config: AutoDeployConfig, sm: int | None) -> tuple[Choice, Choice]:
    """The kernels for prefill and decode of a site, on ``config.device`` or on a GPU elsewhere.

    Raises:
        UnsupportedError: no kernel covers the site.
    """
    device = torch.device(config.device)
    return (
        select.choose(site.site, "prefill", device, site.where, sm),
        select.choose(site.site, "decode", device, site.where, sm),
    )
