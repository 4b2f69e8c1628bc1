"""TensorRT-LLM's XQA kernel through FlashInfer: decode on compute capability 9.x and 12.x.

It needs no plan: lengths and pages are read on the device, so a captured call stays valid when they change.
What is fixed at capture is the batch size and the width of the block table, which decide how the keys are
split among thread blocks and with it the order of the sums.

FlashInfer compiles a module at the first call for a combination of dtypes, page size, head size, group and
windowed or not: every combination must have been called once before a graph is captured.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.capability import Capability
from ad_flashinfer_pass.kernels.reference import AttentionSpec

CAPABILITY = Capability(
    name="xqa",
    phases=frozenset({"decode"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9, 12}),
    package="flashinfer",
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    kv_dtypes=frozenset({torch.bfloat16, torch.float16}),
    converts_kv=False,
    page_sizes=frozenset({16, 32, 64, 128}),
    head_dims=frozenset(range(16, 257, 16)),
    max_group_elements=8192,
    logit_cap=False,
    chunk=False,
    alibi=False,
    mixed_head_dims=False,
)

_SEMAPHORES = 2**21
_SCRATCH_BYTES = 2**24


class Workspace:
    """What the kernel writes beside its result, on one device; for one stream at a time.

    The semaphores are zero before and after every launch. They are not shared with any other kernel, and
    never grow, so that a captured graph may keep their address.
    """

    def __init__(self, device: torch.device) -> None:
        self.semaphores = torch.zeros(_SEMAPHORES, dtype=torch.int32, device=device)
        self.scratch = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        # It decides how the keys are split: the same for every call.
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count


@cache
def workspace(device: torch.device) -> Workspace:
    """The workspace of a device, made at the first call, which must not be in a capture."""
    return Workspace(device)


def decode(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    v_head_dim: int,
    spec: AttentionSpec,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """See ``kernels.select``; every length must be at least 1, or the row is NaN."""
    from flashinfer.xqa import xqa

    batch, num_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[2:4]
    assert batch * num_kv_heads * -(-num_heads // 32) <= _SEMAPHORES
    ours = workspace(query.device)
    query = query.contiguous()
    out = torch.empty_like(query)
    xqa(
        query[:, None],
        kv_cache[:, 0],
        kv_cache[:, 1],
        block_table,
        seq_len_with_cache[:, None],
        out[:, None],
        ours.scratch,
        ours.semaphores,
        num_kv_heads,
        page_size,
        sinks=None if sinks is None else sinks.float().view(num_kv_heads, -1),
        q_scale=float(spec.scale * head_dim**0.5),
        kv_scale=1.0,
        sliding_win_size=spec.sliding_window or 0,
        kv_layout="HND",
        sm_count=ours.num_processors,
        # With programmatic dependent launch it would read lengths and pages before they are written.
        enable_pdl=False,
    )
    return out
