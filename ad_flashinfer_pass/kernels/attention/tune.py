"""Decode kernels chosen by measurement, for each batch size that is captured; see ``kernels.measure``.

For each distinct kind of attention site, every provider that can decode it in a captured graph runs over the
model's own caches, in a graph, one cache after the other as a decode step does, and as there the L2 cache is
filled with other things between: a kernel of much code, as xqa's for drafts, takes twice the time if its code
must be read again. They are timed at two lengths, and the one with the smallest sum of times relative to the
fastest is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import measure
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site, ledger
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.kernel_plan import Kernel

_LENGTH = 1024
"""Tokens of the shorter of the two lengths."""


def kind_of(site: Site) -> Site:
    """The site less what a kernel's time does not depend on."""
    return replace(site, scale=1.0, k_scale=1.0, v_scale=1.0, shares_kv=False)


def timed_providers(site: Site, device: torch.device, sm: int | None = None) -> list[str]:
    """The providers that are timed for a site, in their order; ``sm`` as in ``select.choose``."""
    return [
        name
        for name, provider in select.PROVIDERS.items()
        if provider.is_timed
        and "decode" not in provider.capability.host_phases
        and not provider.capability.refusals(site, "decode", device, sm)
    ]


class Decode:
    """The decode steps of one kind of site: a ``Subject``, whose sizes are numbers of sequences.

    Args:
        site: what the kernels must do; see ``kind_of``.
        pools: the caches of the model's sites of this kind, on one CUDA device; read only.
        max_blocks_per_seq: width of the block table.
        num_drafts: not 0 for the steps that verify so many of each sequence.
    """

    def __init__(
        self, site: Site, pools: Sequence[Tensor], max_blocks_per_seq: int, num_drafts: int = 0
    ) -> None:
        self.kinds, self.device, self._num_drafts = [site], pools[0].device, num_drafts
        self._what = f"{num_drafts} drafts" if num_drafts else "decode"
        self.default = select.choose(site, "decode", self.device, "tune_attention").kernel
        if num_drafts:
            self.default = select.verifiers(site, num_drafts, self.device)[0]
        self._site, self._pools, self._width = site, pools, max_blocks_per_seq
        tokens = max_blocks_per_seq * site.page_size
        self._lengths = sorted({min(_LENGTH, tokens), max(1, tokens // 2)})

    def alike(self, size: int) -> int:
        """See ``Subject``; each is measured."""
        return size

    def key(self, size: int) -> str:
        """See ``Subject``."""
        items = ", ".join(f"{name} {value}" for name, value in ledger(self._site).items())
        return (
            f"{self._what} of {size} sequences of {self._lengths} tokens, none in L2, "
            f"{len(self._pools)} caches, {items}"
        )

    def candidates(self, size: int) -> list[str]:
        """The providers in their order, each with its options after it."""
        found = []
        for name in self._timed():
            provider = select.PROVIDERS[name]
            options = provider.verify_options if self._num_drafts else provider.options
            found += [name, *(f"{name}/{option}" for option in options(self._site, size, self.device))]
        return found or [self.default]

    def _timed(self) -> list[str]:
        if not self._num_drafts:
            return timed_providers(self._site, self.device)
        names = select.verifiers(self._site, self._num_drafts, self.device)
        return [name for name in names if select.PROVIDERS[name].is_timed]

    def measure(self, size: int, kernels: list[str]) -> measure.Measured:
        """Over sequences of equal length, their pages scattered over the pools."""
        site, device, blocks, new = self._site, self.device, self._width, 1 + self._num_drafts
        generator = torch.Generator(device).manual_seed(0)
        shape = (size * new, site.num_heads, site.head_dim)
        query = torch.randn(shape, generator=generator, device=device).to(site.dtype)
        # Page 0 belongs to nobody. If the pools have fewer pages than this needs, some are read twice.
        pages = torch.randperm(self._pools[0].shape[0] - 1, generator=generator, device=device) + 1
        pages = pages.repeat(-(-size * blocks // len(pages))).to(torch.int32)
        spec = AttentionSpec(
            site.head_dim**-0.5,
            site.sliding_window,
            site.logit_cap,
            site.chunk,
            v_head_dim=site.v_head_dim,
            sinks=torch.zeros(site.num_heads, device=device) if site.has_sinks else None,
            alibi_slopes=torch.zeros(site.num_heads, device=device) if site.has_alibi else None,
        )
        bounds = torch.arange(0, size * new + 1, new, dtype=torch.int32, device=device)
        times: dict[str, list[float]] = {kernel: [] for kernel in kernels}
        for length in self._lengths:
            used = -(-length // site.page_size)
            table = pages.new_zeros((size, blocks))
            table[:, :used] = pages[: size * used].view(size, used)
            rest = (torch.full((size,), length, dtype=torch.int32, device=device), table, spec)
            for kernel, row in times.items():
                name, options = Kernel.parse(kernel)
                provider = select.PROVIDERS[name]
                launches = [partial(provider.decode, query, pool, *rest, *options) for pool in self._pools]
                if self._num_drafts:
                    assert provider.verify is not None
                    verify = partial(provider.verify, max_len=new)
                    launches = [partial(verify, query, pool, bounds, *rest, *options) for pool in self._pools]
                row.append(measure.cold_microseconds(launches, device))
        best = measure.fastest(times, self.default)
        shown = f"{_listed(times)} us at {'/'.join(map(str, self._lengths))} tokens"
        return measure.Measured([best], [f"{self._what} of {size}: {best} ({shown})"])


def _listed(times: Mapping[str, list[float]]) -> str:
    """The best times of each provider."""
    best: dict[str, list[float]] = {}
    for name, row in times.items():
        provider = name.partition("/")[0]
        best[provider] = [min(pair) for pair in zip(row, best.get(provider, row), strict=True)]
    return ", ".join(f"{name} {'/'.join(f'{t:.1f}' for t in row)}" for name, row in best.items())
