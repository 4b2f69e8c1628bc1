"""Which provider runs a site, phase by phase: the no-drop ledger.

In each phase a site goes to the first provider, in the order of ``PROVIDERS``, whose declaration
covers every item of the site; if none does, the pass stops and says which item each of them lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention import (
    fa2,
    fa3,
    fmha_v2,
    latent,
    reference,
    split_decode,
    tile_prefill,
    trtllm_gen,
    xqa,
)
from ad_flashinfer_pass.kernels.attention.capability import Capability, Phase, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan

PROVIDERS: dict[str, Provider] = {
    module.PROVIDER.name: module.PROVIDER
    for module in (xqa, trtllm_gen, split_decode, fmha_v2, fa3, tile_prefill, fa2, latent, reference)
}
"""In the order of preference; a new provider is a line here."""


class Choice(NamedTuple):
    """The provider of one phase of a site."""

    kernel: str
    reason: str
    """Why it, and why not those before it."""


def check_sm(sm: int) -> None:
    """Refuse what is no compute capability without its point, 90 for 9.0.

    Raises:
        ConfigError: says what one is.
    """
    if not 70 <= sm < 130:
        raise ConfigError(f"--sm is a compute capability without its point, 90 for 9.0, got {sm}.")


def torch_device(name: str) -> torch.device:
    """The device of a config.

    Raises:
        ConfigError: there is no such device, or no model runs on it.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: torch knows no {name[:40]!r}; for example cpu, cuda, cuda:1.") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: must be cpu, cuda or cuda:N, got {name!r}.")
    return found


def extender(decode_plan: str, verify_plan: str = "", size: int = 0) -> Callable[..., Tensor] | None:
    """What extends of so many sequences are for; None: there is nothing here.

    ``Provider.verify`` of a plan, if there is one, else ``Provider.extend`` of decode's, of which the default
    counts, because its sizes are others.
    """
    if verify_plan:
        name, options = KernelPlan.parse(verify_plan).at(size)
        verify = PROVIDERS[name].verify
        assert verify is not None
        return lambda *args, max_len: verify(*args, *options, max_len=max_len)
    provider = PROVIDERS[KernelPlan.parse(decode_plan).default.name]
    return None if _is_too_old(provider) else provider.extend


def verifiers(site: Site, num_drafts: int, device: torch.device, sm: int | None = None) -> list[str]:
    """The providers that take so many drafts of each sequence, in their order; ``sm`` as in ``choose``."""

    def is_built(provider: Provider) -> bool:
        if sm is not None:
            return True
        needed = provider.extend_modules(site, 1 + num_drafts)
        return not _is_too_old(provider) and all(modules.lacking(spec) is None for spec in needed)

    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.verify is not None
        and (provider.verifies_sinks or not site.has_sinks)
        and not provider.capability.refusals(site, "decode", device, sm)
        and is_built(provider)
    ]


def _is_too_old(provider: Provider) -> bool:
    since = provider.extend_since
    return since is not None and since.lacking() is not None


def on_host(phase: Phase, plan: str) -> list[str]:
    """The providers of a plan that read lengths on the host in a phase, which no CUDA graph can hold."""
    names = KernelPlan.parse(plan).names
    return [name for name in names if phase in PROVIDERS[name].capability.host_phases]


def _taken_for_built(capability: Capability, sm: int | None) -> str:
    """What a choice for a GPU elsewhere assumes about it."""
    if sm is None or capability.modules is None:
        return ""
    how = "" if capability.compiles else f", which only `prebuild --sm {sm}` does"
    return f", and its FlashInfer modules are taken for built there{how}"


def choose(site: Site, phase: Phase, device: torch.device, where: str, sm: int | None = None) -> Choice:
    """The provider for a phase of a site.

    Args:
        site: what must be honoured.
        phase: decode is one new token of a sequence, prefill is more than one.
        device: where the graph runs.
        where: the site's node and source line, for the error.
        sm: choose for a GPU of this compute capability, 90 for 9.0, wherever the graph is now; all that
            can be installed there is taken to be.

    Raises:
        UnsupportedError: no provider covers the site; says which items each one lacks.
    """
    lacking: list[str] = []
    for name, provider in PROVIDERS.items():
        refusals = provider.capability.refusals(site, phase, device, sm)
        if not refusals:
            reason = f"covers every item of the site{_taken_for_built(provider.capability, sm)}"
            return Choice(name, f"{reason}; not {'; not '.join(lacking)}" if lacking else reason)
        lacking.append(f"{name}: {', '.join(refusals)}")
    target = device if sm is None else f"SM{sm}"
    raise UnsupportedError(
        f"{where}: no kernel does all that this attention needs for {phase} on {target} "
        f"({'; '.join(lacking)}). Change kv_cache_config (dtype, tokens_per_block), or run on device: cpu, "
        "whose reference kernels do all of it."
    )
