"""TensorRT-LLM's FMHA v2 kernel through FlashInfer: prefill and chunks of it on compute capability 9.x, 12.x.

It needs no plan: lengths and pages are read on the device. FlashInfer compiles one module for all head sizes
and masks, which takes tens of processor minutes, so this provider is chosen only where that module is built.

What it does not check, and what is done here about it:

- The tensor ``seq_lens`` is never read; the lengths come from prefix sums.
- If the query has batch * max_q_len rows, all sequences are taken to be as long as the first. A captured call
  is replayed with other lengths, so max_q_len, which is only an upper bound, is kept off that.
- The window applies whenever it is shorter than max_kv_len, whatever the mask mode; one of a single token
  must be asked for by the mode.
- The pool's strides are derived from its shape. A pool that is one layer of a larger one is passed as the
  larger one's pages from its own first on, with page numbers that skip those of the other layers.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Capability, Since, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.modules import claim, target

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

_LAYOUT = "Q_PAGED_KV_HND"
_WORKSPACE_BYTES = 2**27


@cache
def _module(dtype: torch.dtype, target: str | None) -> JitSpec:
    from flashinfer.jit.attention.modules import gen_fmha_v2_module

    return gen_fmha_v2_module(_LAYOUT, dtype)


def modules(site: Site, compute_major: int) -> list[JitSpec]:
    """The FlashInfer modules that run a site."""
    return [_module(site.dtype, target())]


CAPABILITY = Capability(
    name="fmha_v2",
    workspace_bytes=_WORKSPACE_BYTES,
    phases=frozenset({"prefill"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 12}),
    dtypes=frozenset({torch.bfloat16}),
    kv_dtypes={},
    page_sizes=frozenset({16, 32, 64, 128}),
    head_dims=frozenset({64, 128, 256}),
    logit_cap=False,
    chunk=False,
    alibi=False,
    mixed_head_dims=False,
    modules=modules,
    since=(
        Since(
            "0.6.14",
            "windows on compute capability 12.x",
            lambda site, compute_major: compute_major == 12 and site.sliding_window is not None,
        ),
    ),
    run_on=frozenset({90}),
    compiles=False,
)


def _workspace(device: torch.device) -> Tensor:
    """For one stream at a time; the kernel clears what it needs cleared."""
    claim(device)
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``."""
    from flashinfer.prefill import trtllm_fmha_v2_prefill

    from ad_flashinfer_pass.kernels.cache.prepare_metadata import prefix_sums  # needs triton

    max_kv_len = block_table.shape[1] * kv_cache.shape[3]
    is_windowed = spec.sliding_window is not None and spec.sliding_window < max_kv_len
    query = query.contiguous()
    pool, pages = (kv_cache, block_table) if kv_cache.is_contiguous() else _pages(kv_cache, block_table)
    out = torch.empty_like(query)
    num_rows, batch = query.shape[0], seq_len_with_cache.shape[0]
    max_q_len = min(num_rows, max_kv_len)
    max_q_len += batch > 1 and num_rows == batch * max_q_len
    trtllm_fmha_v2_prefill(
        (query, pool),
        _LAYOUT,
        workspaces.get(_workspace, query.device),
        seq_len_with_cache,
        max_q_len,
        max(max_kv_len, max_q_len),
        float(spec.scale),
        1.0,
        batch,
        cu_seqlen,
        prefix_sums(seq_len_with_cache),
        block_tables=pages,
        out=out,
        sinks=None if spec.sinks is None else spec.sinks.float(),
        mask_mode="sliding_window" if is_windowed else "causal",
        window_left=(spec.sliding_window or 0) - 1 if is_windowed else -1,
    )
    return out


def _pages(kv_cache: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """A strided pool as a contiguous one, which has other pages between its own, and its pages' numbers."""
    size, stride = kv_cache[0].numel(), kv_cache.stride(0)
    if not kv_cache[0].is_contiguous() or stride % size:
        raise ValueError(
            f"fmha_v2 reads pools whose pages of {list(kv_cache.shape[1:])} are contiguous and whole pages "
            f"apart; this one has strides {list(kv_cache.stride())}."
        )
    step = stride // size
    shape = ((kv_cache.shape[0] - 1) * step + 1, *kv_cache.shape[1:])
    pool = kv_cache.as_strided(shape, (size, *kv_cache.stride()[1:]), kv_cache.storage_offset())
    return pool, block_table * step


PROVIDER = Provider(capability=CAPABILITY, prefill=prefill)
