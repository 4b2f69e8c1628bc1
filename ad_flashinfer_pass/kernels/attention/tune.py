"""Decode kernels chosen by measurement, for each batch size that is captured.

For each distinct kind of attention site, every provider that can decode it in a captured graph runs over the
model's own caches, in a graph, one cache after the other as a decode step does: what fits in the L2 cache
here fits there, too. They are timed at two lengths, and the one with the smallest sum of times relative to
the fastest is kept. The times are remembered on disk, by GPU, versions and what was timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import measure
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site, ledger
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

_MIN_GAIN = 0.98
"""What replaces the provider that stands first must take less than this share of its time."""
_LENGTH = 1024
"""Tokens of the shorter of the two lengths."""
_UNTIMED = frozenset({"fa2", "reference"})
"""``fa2`` plans on the host before each replay, which a graph's own time does not show."""


def kind_of(site: Site) -> Site:
    """The site less what a kernel's time does not depend on."""
    return replace(site, scale=1.0, k_scale=1.0, v_scale=1.0, shares_kv=False)


def tune_decode(
    site: Site,
    pools: Sequence[Tensor],
    batch_sizes: Sequence[int],
    max_blocks_per_seq: int,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, list[str]]:
    """Choose for one kind of site and every batch size.

    Args:
        site: what the kernels must do; see ``kind_of``.
        pools: the caches of the model's sites of this kind, on one CUDA device; read only.
        batch_sizes: the numbers of sequences that will be captured.
        max_blocks_per_seq: width of the block table.
        on_progress: called with (done, all).

    Returns:
        The choice, in the form that ``select.decoder`` takes, and a line for each batch size with the times.
    """
    device = pools[0].device
    default = select.choose(site, "decode", device, "tune_attention").kernel
    tokens = max_blocks_per_seq * site.page_size
    lengths = sorted({min(_LENGTH, tokens), max(1, tokens // 2)})
    known, notes, by_batch = measure.read_choices(), [], {}
    for index, batch in enumerate(batch_sizes):
        kernels = _candidates(site, batch, device)
        if kernels in ([], [default]):
            notes.append(f"decode of {batch}: {default}, with no other to compare")
            continue
        key = _key(site, batch, lengths, len(pools), kernels, device)
        if key not in known:
            with torch.cuda.device_of(pools[0]):
                launches = _Launches(site, batch, max_blocks_per_seq, pools)
                known[key] = {name: [launches.microseconds(name, n) for n in lengths] for name in kernels}
        best = fastest(known[key], default)
        if best != default:
            by_batch[batch] = best
        notes.append(f"decode of {batch}: {best} ({_listed(known[key], lengths)})")
        on_progress(index + 1, len(batch_sizes))
    measure.write_choices(known)
    return select.decode_choice(default, by_batch), notes


def fastest(times: Mapping[str, Sequence[float]], default: str) -> str:
    """The kernel with the smallest sum of its times relative to the best at each length.

    Args:
        times: microseconds at each length, by kernel.
        default: what is kept if nothing is clearly faster.
    """
    floors = [min(column) for column in zip(*times.values(), strict=True)]
    score = {name: sum(t / f for t, f in zip(row, floors, strict=True)) for name, row in times.items()}
    best = min(score, key=lambda name: score[name])
    return default if default in score and score[best] > _MIN_GAIN * score[default] else best


def timed_providers(site: Site, device: torch.device, sm: int | None = None) -> list[str]:
    """The providers that are timed for a site, in their order; ``sm`` as in ``select.choose``."""
    capabilities = {name: module.CAPABILITY for name, module in select.PROVIDERS.items()}
    return [
        name
        for name, capability in capabilities.items()
        if name not in _UNTIMED
        and "decode" not in capability.host_phases
        and not capability.refusals(site, "decode", device, sm)
    ]


def _candidates(site: Site, batch: int, device: torch.device) -> list[str]:
    """The kernels worth timing, in the order of the providers."""
    found = []
    for name in timed_providers(site, device):
        module = select.provider(name)
        found.append(name)
        if hasattr(module, "decode_options"):
            found += [f"{name}/{option}" for option in module.decode_options(site, batch, device)]
    return found


class _Launches:
    """A batch of sequences of equal length, their pages scattered over the pools."""

    def __init__(self, site: Site, batch: int, max_blocks_per_seq: int, pools: Sequence[Tensor]) -> None:
        self.site, self.pools, self.batch = site, pools, batch
        device = pools[0].device
        generator = torch.Generator(device).manual_seed(0)
        self.query = torch.randn(
            (batch, site.num_heads, site.head_dim), generator=generator, device=device
        ).to(site.dtype)
        # Page 0 belongs to nobody. If the pools have fewer pages than this needs, some are read twice.
        pages = torch.randperm(pools[0].shape[0] - 1, generator=generator, device=device) + 1
        wanted = batch * max_blocks_per_seq
        self.pages = pages.repeat(-(-wanted // len(pages)))[:wanted].to(torch.int32)
        self.width = max_blocks_per_seq
        self.spec = AttentionSpec(
            site.head_dim**-0.5,
            site.sliding_window,
            site.logit_cap,
            site.chunk,
            v_head_dim=site.v_head_dim,
            sinks=torch.zeros(site.num_heads, device=device) if site.has_sinks else None,
            alibi_slopes=torch.zeros(site.num_heads, device=device) if site.has_alibi else None,
        )

    def microseconds(self, kernel: str, length: int) -> float:
        """Time of one site's launch."""
        used = -(-length // self.site.page_size)
        table = self.pages.new_zeros((self.batch, self.width))
        table[:, :used] = self.pages[: self.batch * used].view(self.batch, used)
        lengths = torch.full((self.batch,), length, dtype=torch.int32, device=table.device)
        decode = select.decoder(kernel, self.batch)
        rest = (lengths, table, self.spec)
        return measure.microseconds([partial(decode, self.query, pool, *rest) for pool in self.pools])


def _key(
    site: Site, batch: int, lengths: list[int], num_pools: int, kernels: list[str], device: torch.device
) -> str:
    """What a measurement depends on."""
    try:
        flashinfer = version("flashinfer-python")
    except PackageNotFoundError:
        flashinfer = "none"
    items = ", ".join(f"{name} {value}" for name, value in ledger(site).items())
    return (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__} flashinfer {flashinfer}: decode of "
        f"{batch} sequences of {lengths} tokens, {num_pools} caches, {items}, by {' '.join(kernels)}"
    )


def _listed(times: dict[str, Any], lengths: list[int]) -> str:
    best: dict[str, list[float]] = {}
    for name, row in times.items():
        provider = name.partition("/")[0]
        best[provider] = [min(pair) for pair in zip(row, best.get(provider, row), strict=True)]
    shown = [f"{name} {'/'.join(f'{t:.1f}' for t in row)}" for name, row in best.items()]
    return f"{', '.join(shown)} us at {'/'.join(map(str, lengths))} tokens"
