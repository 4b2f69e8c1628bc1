"""TensorRT-LLM's generated kernels through FlashInfer: decode and prefill on compute capability 10.x.

**Not run on hardware by this package**: written from FlashInfer 0.7.2's signatures and documents, and tested
against its Python wrapper with the kernel itself replaced.

They need no plan: lengths and pages are read on the device. FlashInfer loads a binary for each variant at its
first call, from NVIDIA's server or from a flashinfer-cubin of its own version, so that every variant must
have been called once before a graph is captured. Which variant it is depends on the batch size and on upper
bounds of the lengths, which a decode graph fixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Capability, Since, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec


def modules(site: Site, compute_major: int) -> list[JitSpec]:
    """None that can be asked for: the binaries are fetched, not compiled."""
    return []


BINARIES = (
    "`flashinfer install-cubin-wheel` takes flashinfer-cubin of the same version from FlashInfer's releases "
    "on GitHub (those on PyPI end at 0.6.13), `flashinfer download-cubin` the binaries alone"
)
"""How the binaries get onto a machine before the first call."""
_WORKSPACE_BYTES = 2**28
_COUNTER_BYTES = 2**22
"""4 for each sequence and query head of a step, or multiprocessor if there are more."""
CAPABILITY = Capability(
    name="trtllm_gen",
    workspace_bytes=_WORKSPACE_BYTES + _COUNTER_BYTES,
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({10}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    # Prefill over an 8-bit cache is for an 8-bit query.
    kv_dtypes={"decode": frozenset({torch.float8_e4m3fn}), "prefill": frozenset()},
    page_sizes=frozenset({16, 32, 64, 128}),
    head_dims=frozenset({64, 128, 256}),
    max_group=64,
    logit_cap=False,
    chunk=False,
    alibi=False,
    mixed_head_dims=False,
    modules=modules,
    since=(Since("0.6.15", "counters that its caller keeps, so that a graph may"),),
)


def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Scratch memory, and counters that are zero before and after each launch; for one stream at a time."""
    sizes = (_WORKSPACE_BYTES, _COUNTER_BYTES)
    scratch, counters = (torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes)
    return scratch, counters


@contextmanager
def _explained(phase: str) -> Iterator[None]:
    """Say what a failure of FlashInfer here means."""
    try:
        yield
    except (RuntimeError, AssertionError, OSError) as err:
        raise KernelError(
            f"kernel trtllm_gen, {phase}: FlashInfer failed with {type(err).__name__}: {err}. Its binaries "
            f"come over the network at the first call, or before it: {BINARIES}. This package has not been "
            "run on this kind of GPU."
        ) from err


def prefill(
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``.

    Raises:
        KernelError: FlashInfer has no binary for this, or cannot fetch it.
    """
    from flashinfer.prefill import trtllm_batch_context_with_kv_cache

    scratch, counters = workspaces.get(_workspace, query.device)
    max_kv_len = block_table.shape[1] * kv_cache.shape[3]
    query = query.contiguous()
    out = torch.empty_like(query)
    with _explained("prefill"):
        trtllm_batch_context_with_kv_cache(
            query,
            kv_cache,
            scratch,
            block_table,
            seq_len_with_cache,
            min(query.shape[0], max_kv_len),
            max_kv_len,
            float(spec.scale * spec.k_scale),
            float(spec.v_scale),
            seq_len_with_cache.shape[0],
            cu_seqlen,
            F.pad(seq_len_with_cache.cumsum(0, dtype=torch.int32), (1, 0)),
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            out=out,
            kv_layout="HND",
            enable_pdl=False,
            sinks=None if spec.sinks is None else spec.sinks.float(),
            multi_ctas_kv_counter_buffer=counters,
        )
    return out


def decode(
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``.

    Raises:
        KernelError: FlashInfer has no binary for this, or cannot fetch it.
    """
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    scratch, counters = workspaces.get(_workspace, query.device)
    query = query.contiguous()
    out = torch.empty_like(query)
    with _explained("decode"):
        trtllm_batch_decode_with_kv_cache(
            query,
            kv_cache,
            scratch,
            block_table,
            seq_len_with_cache,
            block_table.shape[1] * kv_cache.shape[3],
            float(spec.scale * spec.k_scale),
            float(spec.v_scale),
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            out=out,
            sinks=None if spec.sinks is None else spec.sinks.float(),
            kv_layout="HND",
            enable_pdl=False,
            backend="trtllm-gen",
            multi_ctas_kv_counter_buffer=counters,
        )
    return out


PROVIDER = Provider(
    capability=CAPABILITY,
    prefill=prefill,
    decode=decode,
    without_modules=f"binaries that are fetched, not compiled: {BINARIES}",
)
