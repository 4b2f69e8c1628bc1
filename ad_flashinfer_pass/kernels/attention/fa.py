"""The plans of FlashInfer's FA2 and FA3 kernels, for the providers ``fa2`` and ``fa3``.

They are made on the host from the lengths of a step, so that each step waits for the device once:

- Eagerly, the first layer of a step plans for all like it. A step is known by its block table, which must be
  a new tensor in every step; holding it keeps its address from being used again.
- In a CUDA graph, the plan lies in buffers at fixed addresses. The graph's ``GraphState`` keeps the plans of
  a capture and renews them before each replay; only decode can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention.capability import Phase, Site
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.modules import has, target

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec

Backend = Literal["fa2", "fa3"]

WORKSPACE_BYTES = 384 * 2**20
"""For partial results of split sequences; as much as vLLM 0.24 gives these kernels."""


class _Shape(NamedTuple):
    """What the plans and the module of one attention depend on."""

    backend: Backend
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    sliding_window: int | None
    logit_cap: float | None


@cache
def _module(shape: _Shape, target: str | None) -> JitSpec:
    from flashinfer.jit.attention import modules as jit

    # From 0.7.0 on FlashInfer's wrapper loads a module of its own for fa2, though its name is private.
    has_own = shape.backend == "fa2" and has("0.7.0")
    make = jit._gen_batch_prefill_primary_module if has_own else jit.gen_batch_prefill_module
    return make(
        shape.backend,
        shape.dtype,
        shape.kv_dtype,
        shape.dtype,
        torch.int32,
        shape.head_dim,
        shape.head_dim,
        0,  # no positional encoding
        shape.sliding_window is not None,
        shape.logit_cap is not None,
        False,  # products of Q and K are summed in float32
    )


def modules(backend: Backend, site: Site, compute_major: int) -> list[JitSpec]:
    """The FlashInfer modules that run a site."""
    sizes = (site.num_heads, site.num_kv_heads, site.head_dim, site.page_size)
    options = (site.scale, site.sliding_window, site.logit_cap)
    return [_module(_Shape(backend, *sizes, site.dtype, site.kv_dtype, *options), target())]


class _Eager:
    """Scratch memory of a device, for one stream at a time, and the plans of steps that are not captured."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.planned: dict[tuple[Phase, _Shape], _Planned] = {}


class _Planned:
    """FlashInfer's wrapper for one attention, and what it was planned for.

    Args:
        shape: of the attention.
        device: CUDA device.
        graph: sequences, and pages at most, of a graph, whose plans keep their addresses; else None.
    """

    def __init__(self, shape: _Shape, device: torch.device, graph: tuple[int, int] | None = None) -> None:
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        self._shape = shape
        self._block_table: Tensor | None = None
        options: dict[str, Any] = {}
        if graph is not None:
            batch, num_pages = graph
            sizes = {"qo_indptr": batch + 1, "paged_kv_indptr": batch + 1, "paged_kv_indices": num_pages}
            sizes["paged_kv_last_page_len"] = batch
            options = {
                f"{name}_buf": torch.zeros(size, dtype=torch.int32, device=device)
                for name, size in sizes.items()
            }
        self.wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspaces.get(_Eager, device).scratch,
            "HND",
            use_cuda_graph=graph is not None,
            backend=shape.backend,
            **options,
        )

    def plan_step(self, bounds: Tensor | None, lens: Tensor, block_table: Tensor) -> None:
        """Plan for a step, unless that was done: it is known by the address of its block table.

        Raises:
            KernelError: the step is being captured, and nothing would renew the plan.
        """
        if block_table.is_cuda and torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"{self._shape.backend} plans each step on the host, and this one is being captured: use a "
                "cache of the model's dtype with fmha_v2 built (ad-flashinfer-pass prebuild), which needs no "
                "plan, or compile_backend: torch-simple."
            )
        if self._block_table is not None and self._block_table.data_ptr() == block_table.data_ptr():
            return
        self._block_table = block_table
        on_host = lens.tolist()
        page_size, width = self._shape.page_size, block_table.shape[1]
        used = [row * width + i for row, n in enumerate(on_host) for i in range(-(-n // page_size))]
        indices = torch.tensor(used, dtype=torch.int32, device=block_table.device)
        pages = block_table.reshape(-1).index_select(0, indices)
        self.plan(range(len(on_host) + 1) if bounds is None else bounds.tolist(), on_host, pages)

    def plan(self, bounds: Sequence[int], lens: Sequence[int], pages: Tensor) -> None:
        """Plan for sequences.

        Args:
            bounds: prefix sums of the new tokens.
            lens: cached and new tokens of each sequence.
            pages: int32, on the device, page ids of all sequences, concatenated; what is beyond is not read.
        """
        shape = self._shape
        kv_bounds = [0, *accumulate(-(-n // shape.page_size) for n in lens)]
        self.wrapper.plan(
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor(kv_bounds, dtype=torch.int32),
            pages[: kv_bounds[-1]],
            torch.tensor([(n - 1) % shape.page_size + 1 for n in lens], dtype=torch.int32),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=True,
            sm_scale=shape.scale,
            window_left=-1 if shape.sliding_window is None else shape.sliding_window - 1,
            logits_soft_cap=shape.logit_cap,
            q_data_type=shape.dtype,
            kv_data_type=shape.kv_dtype,
        )

    def renew(self, lens: Sequence[int], bounds: Sequence[int], cache_loc: Tensor) -> None:
        """Plan a captured decode step anew, from the lengths and the ``cu_num_pages`` of its sequences."""
        page_size = self._shape.page_size
        used = []
        for (first, end), n in zip(pairwise(bounds), lens, strict=True):
            # A sequence may have more pages than it uses; a padding row has none and is on page 0.
            has_pages = first < end
            used += [(first + i if has_pages else 0, has_pages) for i in range(-(-n // page_size))]
        index, is_owned = torch.tensor(used, dtype=torch.int32, device=cache_loc.device).unbind(1)
        self.plan(range(len(lens) + 1), lens, cache_loc.index_select(0, index) * is_owned)

    def run(self, query: Tensor, kv_cache: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend as planned."""
        return self.wrapper.run(
            query.contiguous(),
            kv_cache,
            k_scale=spec.k_scale,
            v_scale=spec.v_scale,
            out=torch.empty_like(query, memory_format=torch.contiguous_format),
            enable_pdl=False,
        )


class GraphPlans:
    """The plans that a captured decode step reads; renewed before each replay."""

    def __init__(self) -> None:
        self.planned: dict[_Shape, _Planned] = {}
        self.batch = 0

    def before_replay(self, inputs: Mapping[str, Tensor]) -> None:
        """Plan for the lengths and pages of the next replay; waits for the device."""
        # Reading the lengths waits for the device, so that the last plan's copies from its staging are done.
        lens = inputs["seq_len_with_cache"][: self.batch].tolist()
        bounds = inputs["cu_num_pages"][: self.batch + 1].tolist()
        for planned in self.planned.values():
            planned.renew(lens, bounds, inputs["cache_loc"])


def _planned(phase: Phase, shape: _Shape, device: torch.device) -> _Planned:
    """The plan of steps that are not captured."""
    planned = workspaces.get(_Eager, device).planned
    if (phase, shape) not in planned:
        planned[phase, shape] = _Planned(shape, device)
    return planned[phase, shape]


def prefill(
    backend: Backend,
    query: Tensor,
    kv_cache: Tensor,
    cu_seqlen: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``; the first call of a step waits for the device."""
    planned = _planned("prefill", _shape(backend, query, kv_cache, spec), query.device)
    planned.plan_step(cu_seqlen, seq_len_with_cache, block_table)
    return planned.run(query, kv_cache, spec)


def decode(
    backend: Backend,
    query: Tensor,
    kv_cache: Tensor,
    seq_len_with_cache: Tensor,
    block_table: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """See ``attention.provider``; if not captured, the first call of a step waits for the device."""
    shape = _shape(backend, query, kv_cache, spec)
    plans = workspaces.of_graph(GraphPlans)
    if plans is None:
        planned = _planned("decode", shape, query.device)
        planned.plan_step(None, seq_len_with_cache, block_table)
        return planned.run(query, kv_cache, spec)
    if shape not in plans.planned:
        batch = plans.batch = query.shape[0]
        planned = plans.planned[shape] = _Planned(shape, query.device, (batch, block_table.numel()))
        planned.plan_step(None, seq_len_with_cache, block_table)
    return plans.planned[shape].run(query, kv_cache, spec)


def _shape(backend: Backend, query: Tensor, kv_cache: Tensor, spec: AttentionSpec) -> _Shape:
    _, num_heads, head_dim = query.shape
    num_kv_heads, page_size = kv_cache.shape[2:4]
    options = (spec.scale, spec.sliding_window, spec.logit_cap)
    sizes = (num_heads, num_kv_heads, head_dim, page_size)
    return _Shape(backend, *sizes, query.dtype, kv_cache.dtype, *options)
