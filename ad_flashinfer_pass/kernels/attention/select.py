"""Which provider runs a site, phase by phase: the no-drop ledger.

A provider is a module with a ``CAPABILITY`` and, for the phases that it declares, the functions::

    decode(query, kv_cache, seq_len_with_cache, block_table, spec)
    prefill(query, kv_cache, cu_seqlen, seq_len_with_cache, block_table, spec)

Their arguments are those of ``ops.cached_attention`` cut to the sequences of the phase, with query
[tokens, num_heads, head_dim] and ``spec.AttentionSpec`` for what the site computes; the result,
[tokens, num_heads, v_head_dim], is a new tensor. ``decode`` may take an integer more, which changes how it is
launched, not what it computes: the module gives its name as ``DECODE_OPTION``, and
``decode_options(site, batch, device)`` those worth timing. A provider may also have ``extend``, which is
``prefill`` of sequences of at most ``max_len`` tokens, and then ``extend_modules(site, max_len)`` and
``EXTEND_SINCE``, what it needs of FlashInfer.

In each phase a site goes to the first provider, in the order of ``PROVIDERS``, whose declaration
covers every item of the site; if none does, the pass stops and says which item each of them lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.kernels.attention import fa2, fa3, fmha_v2, reference, split_decode, trtllm_gen, xqa
from ad_flashinfer_pass.kernels.attention.capability import Capability, Phase, Since, Site

PROVIDERS: dict[str, ModuleType] = {
    module.CAPABILITY.name: module for module in (xqa, trtllm_gen, split_decode, fmha_v2, fa3, fa2, reference)
}


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


def provider(name: str) -> Any:
    """The provider module of that name."""
    return PROVIDERS[name]


def decode_choice(default: str, by_batch: Mapping[int, str]) -> str:
    """What ``decoder`` takes: ``xqa 1=split_decode/16 8=xqa/2``.

    Args:
        default: name of a provider.
        by_batch: for a batch size another one, with ``/option`` if it has one.
    """
    return " ".join([default, *(f"{batch}={kernel}" for batch, kernel in sorted(by_batch.items()))])


def decoder(choice: str, batch: int) -> Callable[..., Tensor]:
    """The ``decode`` of a choice, see ``decode_choice``, for that many sequences."""
    name, option = _entry(choice, batch)
    module = provider(name)
    return module.decode if option is None else partial(module.decode, **{module.DECODE_OPTION: option})


def extender(choice: str) -> Callable[..., Tensor] | None:
    """The ``extend`` of a choice, for any number of sequences; None if its provider has none here."""
    module = provider(choice.split()[0])
    since: Since | None = getattr(module, "EXTEND_SINCE", None)
    return None if since is not None and since.lacking() else getattr(module, "extend", None)


@cache
def _entry(choice: str, batch: int) -> tuple[str, int | None]:
    """Name and option of the provider for a batch size."""
    default, *others = choice.split()
    by_batch = dict(other.split("=") for other in others)
    name, _, option = by_batch.get(str(batch), default).partition("/")
    return name, int(option) if option else None


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
    for name, module in PROVIDERS.items():
        refusals = module.CAPABILITY.refusals(site, phase, device, sm)
        if not refusals:
            reason = f"covers every item of the site{_taken_for_built(module.CAPABILITY, sm)}"
            return Choice(name, f"{reason}; not {'; not '.join(lacking)}" if lacking else reason)
        lacking.append(f"{name}: {', '.join(refusals)}")
    target = device if sm is None else f"SM{sm}"
    raise UnsupportedError(
        f"{where}: no kernel does all that this attention needs for {phase} on {target} "
        f"({'; '.join(lacking)}). Change kv_cache_config (dtype, tokens_per_block), or run on device: cpu, "
        "whose reference kernels do all of it."
    )
