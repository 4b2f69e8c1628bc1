"""What a kernel provider declares, and what an attention site needs: the two sides of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import modules as flashinfer_modules

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


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
    k_scale: float = 1.0
    """What an element of K in the cache is multiplied by to give K; 1.0 unless the cache has 8 bits."""
    v_scale: float = 1.0
    """Likewise for V."""
    sliding_window: int | None = None
    logit_cap: float | None = None
    chunk: int | None = None
    has_sinks: bool = False
    has_alibi: bool = False
    shares_kv: bool = False
    """Reads a cache that another site writes."""
    is_latent: bool = False
    """V is the first part of K: one row a token in the cache, read once (``cache_latent``)."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, **items: Any) -> Site:
        """The site of a query [b, s, num_heads, head_dim], and a key and value [b, s, num_kv_heads, ...]."""
        (num_kv_heads, head_dim), v_head_dim = key.shape[2:], value.shape[3]
        sizes: Any = {"num_heads": query.shape[2], "num_kv_heads": num_kv_heads}
        return cls(dtype=query.dtype, **sizes, head_dim=head_dim, v_head_dim=v_head_dim, **items)


class Since(NamedTuple):
    """What FlashInfer has, or does right, only from a version on."""

    version: str
    what: str
    concerns: Callable[[Site, int], bool] = lambda site, compute_major: True
    """Whether a site needs it, by the compute capability's major."""

    def lacking(self) -> str | None:
        """That the FlashInfer which is installed is older; None if it is not, or if there is none."""
        found = flashinfer_modules.installed()
        if found is None or flashinfer_modules.has(self.version):
            return None
        return f"flashinfer-python {found} lacks {self.what}; {self.version} has it"


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What one provider can run. A field left at None or True sets no limit."""

    name: str
    phases: frozenset[Phase] = frozenset({"prefill", "decode"})
    device_types: frozenset[str] | None = None
    compute_majors: frozenset[int] | None = None
    """Major numbers of the CUDA compute capability; None also means no CUDA device is needed."""
    dtypes: frozenset[torch.dtype] | None = None
    kv_dtypes: Mapping[Phase, frozenset[torch.dtype]] | None = None
    """Of the cache, beside the query's own; whoever reads 8 bits applies ``k_scale`` and ``v_scale``."""
    page_sizes: frozenset[int] | None = None
    head_dims: frozenset[int] | None = None
    max_group: int | None = None
    """Query heads a KV head."""
    max_group_elements: int | None = None
    """The group, rounded up to 16 heads, times the head size, rounded up to a power of two of at least 64."""
    sliding_window: bool = True
    logit_cap: bool = True
    chunk: bool = True
    sinks: bool = True
    alibi: bool = True
    shared_kv: bool = True
    mixed_head_dims: bool = True
    """K and V of different head size."""
    is_latent: bool | None = False
    """Whether it reads caches whose V is a part of K, and these alone; None: both kinds."""
    host_phases: frozenset[Phase] = frozenset()
    """Phases in which it reads lengths on the host, so that a CUDA graph cannot hold them."""
    modules: Callable[[Site, int], Sequence[JitSpec]] | None = None
    """FlashInfer's modules that run a site, by the compute capability's major; None: FlashInfer is not used.

    Asked last, because the answer may take time.
    """
    since: tuple[Since, ...] = ()
    """What it needs of FlashInfer that the oldest one does not have."""
    workspace_bytes: int = 0
    """Device memory that it keeps beside the pools, once for all sites."""
    compiles: bool = True
    """False if its modules take too long to be compiled by the first call that needs them."""

    run_on: frozenset[int] = frozenset()
    """Compute capabilities, 90 for 9.0, on which ``tests/gpu`` passed with it."""

    def refusals(self, site: Site, phase: Phase, device: torch.device, sm: int | None = None) -> list[str]:
        """Every reason why this provider cannot run a phase of ``site``, as text; empty if it can.

        Items of the site are listed only for a phase and a device that the provider has. With ``sm``, 90 for
        compute capability 9.0, the answer is for a GPU elsewhere, and what is installed here is not asked.
        """
        kind = device.type if sm is None else "cuda"
        major = _compute_major(device) if sm is None else sm // 10
        elsewhere = _unknown({"phase": (phase, self.phases), "device": (kind, self.device_types)})
        if self.compute_majors is not None and not elsewhere:
            elsewhere = _unknown({"compute capability major": (major, self.compute_majors)})
        if elsewhere:
            return elsewhere
        refused = self._refused_items(site, phase)
        if self.modules is None or sm is not None:
            return refused
        problem = flashinfer_modules.problem()
        refused += self.too_old(site, major) if problem is None else [problem]
        if refused:
            return refused
        needed = self.modules(site, major)
        lacking = (flashinfer_modules.lacking(spec, compiles=self.compiles) for spec in needed)
        return [reason for reason in lacking if reason is not None]

    def too_old(self, site: Site, compute_major: int) -> list[str]:
        """What the FlashInfer that is installed does not have yet for ``site``."""
        needed = (since.lacking() for since in self.since if since.concerns(site, compute_major))
        return [reason for reason in needed if reason is not None]

    def _refused_items(self, site: Site, phase: Phase) -> list[str]:
        kv_dtypes = None if self.kv_dtypes is None else self.kv_dtypes.get(phase, frozenset()) | {site.dtype}
        refused = _unknown(
            {
                "dtype": (site.dtype, self.dtypes),
                "KV dtype": (site.kv_dtype, kv_dtypes),
                "page size": (site.page_size, self.page_sizes),
                "head size": (site.head_dim, self.head_dims),
            }
        )
        needs = {
            "sliding_window": site.sliding_window is not None,
            "logit_cap": site.logit_cap is not None,
            "chunk": site.chunk is not None,
            "sinks": site.has_sinks,
            "alibi": site.has_alibi,
            "shared_kv": site.shares_kv,
            "mixed_head_dims": site.head_dim != site.v_head_dim,
        }
        if self.is_latent is not None and site.is_latent != self.is_latent:
            refused.append("a latent" if site.is_latent else "no latent")
        refused += [item for item, needed in needs.items() if needed and not getattr(self, item)]
        group = site.num_heads // site.num_kv_heads
        if self.max_group is not None and group > self.max_group:
            refused.append(f"{group} query heads a KV head (at most {self.max_group})")
        tile = _round_up(group, 16) * max(64, 1 << (site.head_dim - 1).bit_length())
        if self.max_group_elements is not None and tile > self.max_group_elements:
            refused.append(f"{group} query heads a KV head of size {site.head_dim}")
        return refused


def _unknown(items: dict[str, tuple[Any, frozenset[Any] | None]]) -> list[str]:
    """Each item whose value is not among those allowed, with what is."""
    return [
        f"{item} {value} (it has {', '.join(sorted(map(str, known)))})"
        for item, (value, known) in items.items()
        if known is not None and value not in known
    ]


def _compute_major(device: torch.device) -> int:
    """Major number of the device's compute capability, 0 if it is no CUDA device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def ledger(site: Site) -> dict[str, str]:
    """The items of a site that a kernel must honour, by name; for reports."""
    return {
        field.name: str(getattr(site, field.name))
        for field in fields(site)
        if getattr(site, field.name) != field.default
    }
