"""TensorRT-LLM's XQA kernel through FlashInfer: decode on compute capability 9.x and 12.x.

It needs no plan: lengths and pages are read on the device, so a captured call stays valid when they change.
What is fixed at capture is the batch size and the width of the block table, which decide how the keys are
split among thread blocks and with it the order of the sums.

An 8-bit cache has its own kernel on compute capability 9.x, which rounds the query and the softmax weights to
8 bits as well.

FlashInfer compiles a module at the first call for a combination of dtypes, page size, head size, group and
windowed or not: every combination must have been called once before a graph is captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Capability, Since, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.modules import claim

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec


def _module(site: Site, *extend: int) -> JitSpec:
    from flashinfer.jit.xqa import gen_xqa_module

    group, is_windowed = site.num_heads // site.num_kv_heads, site.sliding_window is not None
    kind = (site.dtype, site.kv_dtype, site.page_size, site.head_dim, group, is_windowed)
    return gen_xqa_module(*kind, site.dtype, *extend)


def modules(site: Site, compute_major: int) -> list[JitSpec]:
    """The FlashInfer modules that run a site."""
    return [_module(site)]


def extend_modules(site: Site, max_len: int) -> list[JitSpec]:
    """Those of ``extend``: for sequences of ``max_len`` tokens each, and for others."""
    found = [_module(site, max_len, is_ragged) for is_ragged in (False, True)]
    return list({module.name: module for module in found}.values())  # one may serve both


def _is_hopper_fp8(site: Site, compute_major: int) -> bool:
    return compute_major == 9 and site.kv_dtype == torch.float8_e4m3fn


MAX_EXTEND = 32
EXTEND_SINCE = Since("0.6.17", "extends whose thread blocks do not overwrite each other's result")
_SEMAPHORES = 2**21
_SCRATCH_BYTES = 2**24
CAPABILITY = Capability(
    name="xqa",
    workspace_bytes=4 * _SEMAPHORES + _SCRATCH_BYTES,
    phases=frozenset({"decode"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 12}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    kv_dtypes={"decode": frozenset({torch.float8_e4m3fn})},
    page_sizes=frozenset({16, 32, 64, 128}),
    head_dims=frozenset(range(16, 257, 16)),
    max_group_elements=8192,
    logit_cap=False,
    chunk=False,
    alibi=False,
    mixed_head_dims=False,
    modules=modules,
    since=(
        # Before, each thread block wrote its part of a split row to where the last one writes the result, and
        # a late one could overwrite it (flashinfer-ai/flashinfer#4161). The 8-bit kernel of 9.x never did.
        Since(
            "0.6.17",
            "decode whose thread blocks do not overwrite each other's result",
            lambda site, compute_major: not _is_hopper_fp8(site, compute_major),
        ),
        # Before, it read beyond the last head's sink.
        Since(
            "0.6.18",
            "sinks over an 8-bit cache, read within their bounds",
            lambda site, compute_major: site.has_sinks and _is_hopper_fp8(site, compute_major),
        ),
    ),
    run_on=frozenset({90}),
)


def _options(site: Site, batch: int, device: torch.device) -> list[int]:
    """Splits beyond the default, which help few sequences."""
    return [2, 3] if batch * site.num_kv_heads <= 256 else []


class Workspace:
    """What the kernel writes beside its result, on one device; for one stream at a time.

    The semaphores are zero before and after every launch. They are not shared with any other kernel, and
    never grow, so that a captured graph may keep their address.
    """

    def __init__(self, device: torch.device) -> None:
        claim(device)
        self.semaphores = torch.zeros(_SEMAPHORES, dtype=torch.int32, device=device)
        self.scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        # It decides how the keys are split: the same for every call.
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    split_factor: int = 1,
) -> Tensor:
    """See ``attention.provider``; every length must be at least 1, or the row is NaN.

    Args:
        split_factor: the keys of a sequence are split as if the device had this many times its
            multiprocessors, 1 to 4. More splits help long contexts of few sequences; they change the order of
            the sums.
    """
    query = query.contiguous()
    out = torch.empty_like(query)
    rows = (query[:, None], out[:, None])
    _launch(*rows, kv_cache, seq_len_with_cache, block_table, spec, split_factor=split_factor)
    return out


def extend(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    *,
    max_len: int,
) -> Tensor:
    """A few new tokens of each sequence, such as drafts: ``prefill`` of short sequences, without a plan.

    A module of FlashInfer is for one ``max_len``. If all sequences have that many tokens, which is known from
    the number of tokens, they are taken as uniform, else their bounds are read on the device.

    Args:
        query: [tokens, num_heads, head_dim].
        cu_seqlen: int32 [batch + 1].
        max_len: new tokens of one sequence, at most; 2 to 32. More than that in a sequence is garbage.
    """
    assert 2 <= max_len <= MAX_EXTEND, f"max_len must lie within 2..{MAX_EXTEND}, got {max_len}"
    query = query.contiguous()
    out = torch.empty_like(query)
    batch, num_tokens = seq_len_with_cache.shape[0], query.shape[0]
    masks = workspaces.get(_causal_masks, query.device)
    place = (kv_cache, seq_len_with_cache, block_table, spec)
    if num_tokens == batch * max_len:
        rows = [x.view(batch, 1, max_len, *x.shape[1:]) for x in (query, out)]
        mask = masks[:max_len].expand(batch, max_len, 1).contiguous().view(torch.uint16)
        _launch(rows[0], rows[1], *place, q_seq_len=max_len, mask=mask)
    else:
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=query.device)
        row = torch.searchsorted(cu_seqlen[1:], tokens, right=True)
        mask = masks[tokens - cu_seqlen[row]].view(torch.uint16)
        _launch(query, out, *place, q_seq_len=max_len, mask=mask, q_cu_seq_lens=cu_seqlen)
    return out


def _causal_masks(device: torch.device) -> Tensor:
    """int32 [32, 1]: in row i the bits of tokens 0 to i, which the token i of an extend may see."""
    bits = (2 << torch.arange(MAX_EXTEND, dtype=torch.int64)) - 1
    return bits.to(torch.int32)[:, None].to(device)


def _launch(
    query: Tensor,
    out: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
    *,
    split_factor: int = 1,
    **options: Any,
) -> None:
    from flashinfer.xqa import xqa

    num_heads, head_dim = query.shape[-2:]
    num_kv_heads, page_size = kv_cache.shape[2:4]
    ours = workspaces.get(Workspace, query.device)
    # A thread block takes 32 rows of (query token, head of a group); each leaves two sums and a result a row.
    tiles = -(-options.get("q_seq_len", 1) * (num_heads // num_kv_heads) // 32)
    tile_bytes = 32 * (2 * 4 + 2 * max(64, 1 << (head_dim - 1).bit_length()))
    assert seq_len_with_cache.shape[0] * num_kv_heads * tiles <= _SEMAPHORES
    assert split_factor * ours.num_processors * tiles * tile_bytes <= _SCRATCH_BYTES, (
        "too little scratch memory"
    )
    xqa(
        query,
        kv_cache[:, 0],
        kv_cache[:, 1],
        block_table,
        seq_len_with_cache[:, None],
        out,
        ours.scratch,
        ours.semaphores,
        num_kv_heads,
        page_size,
        sinks=None if spec.sinks is None else spec.sinks.float().view(num_kv_heads, -1),
        # The kernel multiplies the logits by q_scale * kv_scale / sqrt(head_dim) and the result by kv_scale.
        q_scale=float(spec.scale * head_dim**0.5 * spec.k_scale / spec.v_scale),
        kv_scale=float(spec.v_scale),
        sliding_win_size=spec.sliding_window or 0,
        kv_layout="HND",
        sm_count=ours.num_processors * split_factor,
        # With programmatic dependent launch it would read lengths and pages before they are written.
        enable_pdl=False,
        **options,
    )


PROVIDER = Provider(
    capability=CAPABILITY,
    decode=decode,
    extend=extend,
    verify=extend,
    verifies_sinks=False,
    options=_options,
    extend_modules=extend_modules,
    extend_since=EXTEND_SINCE,
)
