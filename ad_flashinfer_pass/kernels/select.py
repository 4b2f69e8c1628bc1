"""Which provider runs a site: the no-drop ledger.

A provider is a module with a ``CAPABILITY`` and the functions ``append`` and ``attend``. A site goes to
the first provider, in the order of ``PROVIDERS``, whose declaration covers every item of the site; if
none does, the pass stops and says which item each of them lacks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import reference
from ad_flashinfer_pass.kernels.capability import Site

PROVIDERS: dict[str, ModuleType] = {module.CAPABILITY.name: module for module in (reference,)}


def provider(name: str) -> Any:
    """The provider module of that name."""
    return PROVIDERS[name]


def choose(site: Site, device: torch.device, where: str) -> tuple[str, str]:
    """Name of the provider for a site, and the reason.

    Args:
        site: what must be honoured.
        device: where the graph runs.
        where: the site's node and source line, for the error.

    Raises:
        UnsupportedError: no provider covers the site; says which items each one lacks.
    """
    lacking: list[str] = []
    for name, module in PROVIDERS.items():
        refusals = [
            f"{phase}: {text}"
            for phase in ("prefill", "decode")
            for text in module.CAPABILITY.refusals(site, phase, device)
        ]
        if not refusals:
            reason = "covers every item of the site"
            return name, f"{reason}; not {'; not '.join(lacking)}" if lacking else reason
        lacking.append(f"{name}: {', '.join(refusals)}")
    raise UnsupportedError(
        f"{where}: no kernel does all that this attention needs on {device} ({'; '.join(lacking)}). "
        "Change kv_cache_config (dtype, tokens_per_block), or run on device: cpu, whose reference "
        "kernels do all of it."
    )
