"""FA2 and FA3 with FlashInfer's wrapper replaced by what it documents: attention over its plan's pages."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention import fa, fa2, fa3, reference
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.workspaces import GraphState

HEADS, KV_HEADS, DIM, PAGE, PAGES, WIDTH = 4, 2, 16, 8, 40, 6
SPECS = {
    "plain": AttentionSpec(0.3),
    "window": AttentionSpec(0.3, 9),
    "cap": AttentionSpec(0.3, None, 1.5),
    "fp8": AttentionSpec(0.3, None, None, None, 0.5, 2.0),
}


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper of FlashInfer 0.7.2, as its documentation has it."""

    num_plans: ClassVar[int] = 0

    def __init__(
        self, scratch: Tensor, layout: str, use_cuda_graph: bool, backend: str, **buffers: Tensor
    ) -> None:
        assert (layout, scratch.dtype, bool(buffers)) == ("HND", torch.uint8, use_cuda_graph)
        self.buffers, self.backend = buffers, backend

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        """With buffers, the batch is that of the buffers and the pages are copied to them."""
        Wrapper.num_plans += 1
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (HEADS, KV_HEADS, DIM, PAGE)
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        if self.buffers:
            assert len(qo_indptr) == len(self.buffers["qo_indptr_buf"])
            pages = self.buffers["paged_kv_indices_buf"]
            pages[: len(paged_kv_indices)] = paged_kv_indices
        else:
            pages = paged_kv_indices
        self.bounds, self.kv_bounds = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.pages, self.last, self.options = pages, paged_kv_last_page_len.tolist(), options

    def run(
        self, q: Tensor, kv_cache: Tensor, k_scale: float, v_scale: float, out: Tensor, **_: Any
    ) -> Tensor:
        """One sequence after the other, with the reference."""
        o = self.options
        window = None if o["window_left"] < 0 else o["window_left"] + 1
        spec = AttentionSpec(o["sm_scale"], window, o["logits_soft_cap"], None, k_scale, v_scale)
        assert (o["causal"], o["q_data_type"], o["kv_data_type"]) == (True, q.dtype, kv_cache.dtype)
        for row, last in enumerate(self.last):
            table = self.pages[self.kv_bounds[row] : self.kv_bounds[row + 1]][None]
            length = torch.tensor([(table.shape[1] - 1) * PAGE + last], dtype=torch.int32)
            rows = slice(self.bounds[row], self.bounds[row + 1])
            bounds = torch.tensor([0, rows.stop - rows.start])
            args = (kv_cache, bounds, length, table, spec)
            out[rows] = reference.prefill(q[rows], *args)
        return out


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A FlashInfer that has the wrapper."""
    module = ModuleType("flashinfer.prefill")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.prefill", module)
    monkeypatch.setattr(fa, "WORKSPACE_BYTES", 16)
    workspaces.release()
    Wrapper.num_plans = 0


def batch(
    spec: AttentionSpec, lengths: list[tuple[int, int]], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, cache, bounds of new tokens, lengths and block table."""
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(PAGES, 2, KV_HEADS, PAGE, DIM, generator=generator)
    cache = cache.to(torch.float8_e4m3fn if spec.k_scale != 1.0 else torch.bfloat16)
    query = torch.randn(sum(new for _, new in lengths), HEADS, DIM, generator=generator).bfloat16()
    bounds = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0).int()
    lens = torch.tensor([past + new for past, new in lengths]).int()
    table = torch.randperm(PAGES, generator=generator)[: len(lengths) * WIDTH].int().view(-1, WIDTH)
    return query, cache, bounds, lens, table


@pytest.mark.parametrize("provider", [fa2, fa3], ids=lambda module: module.CAPABILITY.name)
@pytest.mark.parametrize("name", SPECS)
def test_plans_say_what_prefill_has_to_compute(name: str, provider: ModuleType) -> None:
    """With and without a past, on and beside the edges of pages, on the kernel that was asked for."""
    spec = SPECS[name]
    query, cache, bounds, lens, table = batch(spec, [(0, 8), (0, 9), (7, 2), (16, 20)])
    args = (query, cache, bounds, lens, table, spec)
    torch.testing.assert_close(provider.prefill(*args), reference.prefill(*args))
    planned = workspaces.get(fa._Eager, query.device).planned.values()
    assert [p.wrapper.backend for p in planned] == [provider.CAPABILITY.name]


@pytest.mark.parametrize("name", SPECS)
def test_plans_say_what_decode_has_to_compute(name: str) -> None:
    """Lengths on and beside the edges of pages."""
    spec = SPECS[name]
    query, cache, _, lens, table = batch(spec, [(0, 1), (7, 1), (8, 1), (40, 1)])
    rest = (query, cache, lens, table, spec)
    torch.testing.assert_close(fa2.decode(*rest), reference.decode(*rest), atol=0.02, rtol=0.02)


def test_layers_of_a_step_share_a_plan_and_the_next_step_has_its_own() -> None:
    """As long as the block table is the same tensor; decode and prefill of a step have one each."""
    spec = SPECS["plain"]
    for step in range(3):
        query, cache, _, lens, table = batch(spec, [(3 * step, 1), (20, 1)], seed=step)
        for layer in range(2):
            rest = (query, cache.flip(0) if layer else cache, lens, table, spec)
            torch.testing.assert_close(fa2.decode(*rest), reference.decode(*rest), atol=0.02, rtol=0.02)
        assert Wrapper.num_plans == step + 1


def test_a_captured_step_is_planned_anew_before_each_replay() -> None:
    """Other lengths and pages, sequences with more pages than they use, and padding rows, which have none."""
    spec = SPECS["plain"]
    query, cache, _, lens, table = batch(spec, [(0, 1)] * 3)
    graph = GraphState()
    with graph.begin_capture():
        for _ in range(2):
            fa2.decode(query, cache, lens, table, spec)
    assert Wrapper.num_plans == 1
    for seed, lengths in enumerate(([5, 17, 9], [40, 1, 8], [33])):
        query, cache, _, _, table = batch(spec, [(0, 1)] * 3, seed)
        lens = torch.tensor([*lengths, *[1] * (3 - len(lengths))]).int()
        owned = [-(-n // PAGE) + (1 if n < 40 else 0) for n in lengths] + [0] * (3 - len(lengths))
        cache_loc = torch.cat([row[:n] for row, n in zip(table, owned, strict=True)])
        cu_num_pages = torch.tensor([0, *owned, 0]).cumsum(0).int()
        for row in range(len(lengths), 3):
            table[row] = 0
        inputs = {"cu_num_pages": cu_num_pages, "cache_loc": cache_loc}
        graph.before_replay({**inputs, "seq_len_with_cache": torch.cat([lens, lens])})
        with graph.begin_capture():  # as the graph runs: from the plans alone
            found = fa2.decode(query, cache, torch.zeros_like(lens), torch.zeros_like(table), spec)
        expected = reference.decode(query, cache, lens, table, spec)
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    assert Wrapper.num_plans == 4
