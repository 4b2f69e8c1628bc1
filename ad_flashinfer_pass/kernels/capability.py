"""What a kernel provider declares, and what an attention site needs: the two sides of the ledger."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Every semantic item of one attention site, as it stands in the graph.

    A field at its default asks nothing of a kernel.
    """

    dtype: torch.dtype
    """Of query, key and value."""
    kv_dtype: torch.dtype
    """Of the cache."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    """Tokens."""
    scale: float
    sliding_window: int | None = None
    logit_cap: float | None = None
    chunk: int | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    shares_kv: bool = False
    """Reads a cache that another site writes."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What one provider can run. A field left at None or True sets no limit."""

    name: str
    phases: frozenset[Phase] = frozenset({"prefill", "decode"})
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    kv_dtypes: frozenset[torch.dtype] | None = None
    page_sizes: frozenset[int] | None = None
    head_dims: frozenset[int] | None = None
    max_group: int | None = None
    sliding_window: bool = True
    logit_cap: bool = True
    chunk: bool = True
    sinks: bool = True
    alibi: bool = True
    shared_kv: bool = True
    mixed_head_dims: bool = True
    """K and V of different head size."""

    def refusals(self, site: Site, phase: Phase, device: torch.device) -> list[str]:
        """Every item of ``site`` that this provider cannot do, as text; empty if it can run it."""
        allowed = {
            "phase": (phase, self.phases),
            "device": (device.type, self.device_types),
            "dtype": (site.dtype, self.dtypes),
            "KV dtype": (site.kv_dtype, self.kv_dtypes),
            "page size": (site.page_size, self.page_sizes),
            "head size": (site.head_dim, self.head_dims),
        }
        refused = [
            f"{item} {value} (it has {', '.join(sorted(map(str, known)))})"
            for item, (value, known) in allowed.items()
            if known is not None and value not in known
        ]
        needs = {
            "sliding_window": site.sliding_window is not None,
            "logit_cap": site.logit_cap is not None,
            "chunk": site.chunk is not None,
            "sinks": site.has_sinks,
            "alibi": site.has_alibi,
            "shared_kv": site.shares_kv,
            "mixed_head_dims": site.head_dim != site.v_head_dim,
        }
        refused += [item for item, needed in needs.items() if needed and not getattr(self, item)]
        group = site.num_heads // site.num_kv_heads
        if self.max_group is not None and group > self.max_group:
            refused.append(f"{group} query heads a KV head (at most {self.max_group})")
        return refused


def ledger(site: Site) -> dict[str, str]:
    """The items of a site that a kernel must honour, by name; for reports."""
    return {
        field.name: str(getattr(site, field.name))
        for field in fields(site)
        if getattr(site, field.name) not in (None, False)
    }
