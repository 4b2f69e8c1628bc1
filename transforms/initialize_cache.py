"""Plans the pools and allocates them.

Tokens planned: max_tokens of kv_cache_config, else max_batch_size * max_seq_len, at most what fits in
free_gpu_memory_fraction of the free memory of the device. Each pool gets that many pages and page 0, which is
scratch: padding rows read and write it, and no sequence owns it. Pools of states get a slot for each of
max_batch_size sequences, and slot 0, before the pages get the rest.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.kernels.collectives import least
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo


class Pages(NamedTuple):
    """Pages of each pool, the scratch page not counted."""

    wanted: int
    """For max_batch_size sequences of max_seq_len tokens, or for max_tokens if that is less."""
    fitting: int
    """In the share of the free memory."""
    bytes_per_page: int
    """Of one page in every pool."""

    @property
    def allocated(self) -> int:
        """How many are allocated."""
        return min(self.wanted, self.fitting)


@register("initialize_cache")
def initialize_cache(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Allocate every declared cache.

    Raises:
        CapacityError: not even one page a layer fits.
    """
    report = TransformReport("initialize_cache", num_matches=len(ctx.resources) + len(ctx.states))
    info = ctx.sequence_info
    pages = count_pages(ctx, free_bytes(ctx.device))
    if ctx.config.world_size > 1:  # a page is in use on all ranks or on none
        pages = pages._replace(fitting=least(pages.fitting))
    for state in ctx.states:
        ctx.caches[state.name] = state.allocate(info.num_slots, ctx.device)
    if ctx.states:
        report.notes.append(
            f"{info.max_batch_size} slots: {state_bytes(ctx) / 2**20:.1f} MiB in {len(ctx.states)} pools, "
            f"{state_bytes(ctx) // info.num_slots} bytes a sequence"
        )
    ctx.num_pages = pages.allocated + 1
    if not ctx.resources:
        return model, report
    for each in (ctx, ctx.draft) if ctx.draft is not None else (ctx,):
        each.num_pages = ctx.num_pages
        for resource in each.resources:
            each.caches[resource.name] = resource.allocate(ctx.num_pages, ctx.device)
    report.notes.append(
        f"{pages.allocated} pages of {info.tokens_per_block} tokens: "
        f"{pages.allocated * info.tokens_per_block} tokens, "
        f"{ctx.num_pages * pages.bytes_per_page / 2**20:.1f} MiB in {len(ctx.resources)} pools, "
        f"{pages.bytes_per_page // info.tokens_per_block} bytes a token"
    )
    if pages.allocated < pages.wanted:
        report.notes.append(f"memory limits it: {pages.wanted} pages were wanted")
    return model, report


def count_pages(ctx: TransformContext, free: int) -> Pages:
    """How many pages the pools get on a device with ``free`` bytes.

    Raises:
        CapacityError: not even one page a layer fits.
    """
    config, info = ctx.config.kv_cache_config, ctx.sequence_info
    resources = ctx.resources if ctx.draft is None else [*ctx.resources, *ctx.draft.resources]
    bytes_per_page = sum(resource.bytes_per_page for resource in resources)
    wanted = pages_wanted(ctx.config, info)
    share = int(free * config.free_gpu_memory_fraction)
    states = state_bytes(ctx)
    fitting = (share - states) // bytes_per_page - 1 if bytes_per_page else wanted
    if fitting < 1 or states > share:
        of_states = f", of which {states} for the states of {info.max_batch_size} sequences" if states else ""
        raise CapacityError(
            f"the KV cache needs at least {2 * bytes_per_page + states} bytes{of_states}, {share} are free "
            f"on {ctx.device} (free_gpu_memory_fraction={config.free_gpu_memory_fraction}). Free memory or "
            f"lower {'max_batch_size' if states else 'tokens_per_block'}."
        )
    return Pages(wanted, fitting, bytes_per_page)


def state_bytes(ctx: TransformContext) -> int:
    """Bytes of the pools of states."""
    return ctx.sequence_info.num_slots * sum(state.bytes_per_slot for state in ctx.states)


def pages_wanted(config: AutoDeployConfig, info: SequenceInfo) -> int:
    """Pages for max_batch_size sequences of max_seq_len tokens, or for max_tokens if that is less."""
    wanted = info.max_batch_size * -(-info.max_seq_len // info.tokens_per_block)
    max_tokens = config.kv_cache_config.max_tokens
    return wanted if max_tokens is None else min(wanted, -(-max_tokens // info.tokens_per_block))


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
