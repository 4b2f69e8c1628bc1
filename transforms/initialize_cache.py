"""Plans the pools and allocates them.

Tokens planned: max_tokens of kv_cache_config, else max_batch_size * max_seq_len, at most what fits in
free_gpu_memory_fraction of the free memory of the device. Each pool gets that many pages and page 0, which is
scratch: padding rows read and write it, and no sequence owns it.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.registry import TransformContext, TransformReport, register


@register("initialize_cache")
def initialize_cache(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Allocate every declared cache.

    Raises:
        CapacityError: not even one page a layer fits.
    """
    report = TransformReport("initialize_cache", num_matches=len(ctx.resources))
    config, info = ctx.config.kv_cache_config, ctx.sequence_info
    page_bytes = sum(resource.bytes_per_page for resource in ctx.resources)
    per_seq = info.max_blocks_per_seq
    wanted = info.max_batch_size * per_seq
    if config.max_tokens is not None:
        wanted = min(wanted, -(-config.max_tokens // info.tokens_per_block))
    free = int(free_bytes(ctx.device) * config.free_gpu_memory_fraction)
    fitting = free // page_bytes - 1
    if fitting < 1:
        raise CapacityError(
            f"the KV cache needs at least {2 * page_bytes} bytes, {free} are free on {ctx.device} "
            f"(free_gpu_memory_fraction={config.free_gpu_memory_fraction}). Free memory or lower "
            "tokens_per_block."
        )
    pages = min(wanted, fitting)
    ctx.num_pages = pages + 1
    for resource in ctx.resources:
        ctx.caches[resource.name] = resource.allocate(ctx.num_pages, ctx.device)
    report.notes.append(
        f"{pages} pages of {info.tokens_per_block} tokens: {pages * info.tokens_per_block} tokens, "
        f"{ctx.num_pages * page_bytes / 2**20:.1f} MiB in {len(ctx.resources)} pools, "
        f"{page_bytes // info.tokens_per_block} bytes a token"
    )
    if pages < wanted:
        report.notes.append(f"memory limits it: {wanted} pages were wanted")
    return model, report


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
