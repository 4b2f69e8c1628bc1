"""``Provider``: the one form of what runs attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention.capability import Capability, Since, Site

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec


def _undeclared(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("called in a phase that the provider does not declare")


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Kernels of attention: what they can do, and a function for each phase that they declare.

    The tensors are those of ``ops.cached_attention`` cut to the sequences of the phase, with query
    [tokens, num_heads, head_dim], and ``spec`` is an ``AttentionSpec``; the result, [tokens, num_heads,
    v_head_dim], is a new tensor. What a kernel keeps, ``workspaces`` has.
    """

    capability: Capability
    decode: Callable[..., Tensor] = _undeclared
    """``decode(query, kv_cache, seq_len_with_cache, block_table, spec, *options)``"""
    prefill: Callable[..., Tensor] = _undeclared
    """``prefill(query, kv_cache, cu_seqlen, seq_len_with_cache, block_table, spec)``"""
    extend: Callable[..., Tensor] | None = None
    """``prefill`` of sequences of at most ``max_len`` tokens, which is one argument more."""
    expands: bool = False
    """Whether ``prefill`` takes key_up and value_up from ``spec``, and a query that has not absorbed them."""
    verify: Callable[..., Tensor] | None = None
    """``extend`` of sequences that have ``max_len`` tokens each, of every site that it decodes; its options
    come last but for that."""
    verifies_sinks: bool = True
    """Whether those with sinks, too."""

    options: Callable[[Site, int, torch.device], Sequence[int]] = lambda site, batch, device: ()
    """Integers that ``decode`` may take, to be launched in another way, and that are worth timing."""
    verify_options: Callable[[Site, int, torch.device], Sequence[int]] = lambda site, batch, device: ()
    """Likewise of ``verify``."""
    is_timed: bool = True
    """False if the time of a captured decode does not show what it costs."""
    extend_modules: Callable[[Site, int], Sequence[JitSpec]] = lambda site, max_len: ()
    """FlashInfer's modules of ``extend``, by site and ``max_len``."""
    extend_since: Since | None = None
    """What ``extend`` and ``verify`` need of FlashInfer that the oldest one does not have."""
    without_modules: str = "no module"
    """Why ``prebuild`` finds nothing to compile, if it does not."""

    @property
    def name(self) -> str:
        """As the graph and the config have it."""
        return self.capability.name

    @property
    def since(self) -> tuple[Since, ...]:
        """All that it needs of FlashInfer."""
        return self.capability.since + ((self.extend_since,) if self.extend_since else ())
