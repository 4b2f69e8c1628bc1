"""The attention kernels against float64, every element within a bound from dtype and length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention import fa, fa2, fa3, fmha_v2, select, tile_prefill, trtllm_gen, xqa
from ad_flashinfer_pass.kernels.attention.capability import Phase
from tests.gpu.paged import DEVICE, PagedBatch, Shape, site_of

PLAIN = Shape()
DECODE = [
    *(replace(PLAIN, page_size=page) for page in (16, 32, 64, 128)),
    *(replace(PLAIN, group=group) for group in (1, 2, 5, 8, 16, 32)),
    *(replace(PLAIN, head_dim=dim, group=group) for dim, group in ((64, 2), (64, 8), (96, 4), (256, 2))),
    replace(PLAIN, dtype=torch.float16),
    replace(PLAIN, has_sinks=True),
    *(replace(PLAIN, sliding_window=window) for window in (1, 12, 32, 100)),
    replace(PLAIN, sliding_window=12, head_dim=64, group=2),
    replace(PLAIN, sliding_window=100, has_sinks=True),
    replace(PLAIN, sliding_window=100, head_dim=64, group=8, page_size=64, has_sinks=True),
]
FP8 = replace(PLAIN, kv_dtype=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.75)
DECODE_FP8 = [
    replace(FP8, k_scale=1.0, v_scale=1.0),
    *(replace(FP8, page_size=page) for page in (16, 32, 64, 128)),
    *(replace(FP8, group=group) for group in (1, 2, 5, 8, 16, 32)),
    *(replace(FP8, head_dim=dim, group=group) for dim, group in ((64, 2), (64, 8), (96, 4), (256, 2))),
    replace(FP8, dtype=torch.float16),
    replace(FP8, has_sinks=True),
    *(replace(FP8, sliding_window=window) for window in (1, 12, 100)),
    replace(FP8, sliding_window=12, head_dim=64, group=2),
    replace(FP8, sliding_window=100, head_dim=64, group=8, page_size=64, has_sinks=True),
]
PREFILL = [
    *(replace(PLAIN, page_size=page) for page in (16, 32, 64, 128)),
    *(replace(PLAIN, group=group) for group in (1, 2, 5, 8, 16, 32)),
    *(replace(PLAIN, head_dim=dim, group=2) for dim in (64, 256)),
    replace(PLAIN, has_sinks=True),
    *(replace(PLAIN, sliding_window=window) for window in (1, 12, 100)),
    replace(PLAIN, sliding_window=12, head_dim=64, group=2),
]


FA = [
    FP8,
    replace(FP8, head_dim=64, group=2),
    replace(FP8, page_size=128, group=16),
    PLAIN,
    replace(PLAIN, page_size=7),
    replace(PLAIN, head_dim=64, group=2, logit_cap=2.0),
    replace(PLAIN, head_dim=64, group=2, logit_cap=2.0, sliding_window=12),
    replace(PLAIN, head_dim=256, group=2),
    replace(PLAIN, dtype=torch.float16),
    replace(PLAIN, sliding_window=100),
]
MIXED_LENGTHS = [(0, 2), (0, 31), (0, 300), (32, 32), (63, 65), (1, 2), (500, 129)]


def edges(page: int) -> list[int]:
    """Lengths at and around what a kernel's loops divide by."""
    return [1, 2, page - 1, page, page + 1, 2 * page, 255, 256, 257, 700]


def assert_decodes(batch: PagedBatch) -> None:
    shape, n = batch.shape, len(batch.lengths)
    skip_unless_it_runs(xqa, shape, "decode")
    assert select.choose(site_of(shape), "decode", DEVICE, "test").kernel == "xqa"
    before = batch.kv_cache.clone()
    lens = batch.args["seq_len_with_cache"][:n]
    table = batch.block_table[:n]
    out = xqa.decode(batch.query, batch.kv_cache, lens, table, batch.spec)
    # On compute capability 9.x the kernel for an 8-bit cache multiplies in 8 bits.
    assert_within_bound(batch, out, shape.kv_dtype)
    assert torch.equal(batch.kv_cache.view(torch.uint8), before.view(torch.uint8))


def assert_within_bound(batch: PagedBatch, out: torch.Tensor, math_dtype: torch.dtype | None = None) -> None:
    expected, bound = batch.expected(math_dtype)
    ratio = (out.double() - expected).abs() / bound
    assert out.shape == expected.shape
    assert bool(torch.isfinite(out).all())
    print(f"worst error / bound {ratio.max().item():.2f}")
    assert ratio.max().item() <= 1.0


@pytest.mark.parametrize("shape", [*DECODE, *DECODE_FP8], ids=str)
def test_xqa_decodes_every_shape(shape: Shape) -> None:
    """Page sizes, groups, head sizes, windows and sinks, at lengths on and beside every edge."""
    assert_decodes(PagedBatch([(length - 1, 1) for length in edges(shape.page_size)], shape))


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 256])
def test_xqa_decodes_every_batch_size(batch_size: int, shape: Shape) -> None:
    """Few sequences, whose keys are split among thread blocks, and many, whose keys are not."""
    assert_decodes(PagedBatch([(37 * i % 900, 1) for i in range(batch_size)], shape))


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("length", [4096, 32768, 131072])
def test_xqa_decodes_long_contexts(length: int, shape: Shape) -> None:
    """Beside a short sequence, whose row of the table is as wide."""
    assert_decodes(PagedBatch([(length - 1, 1), (9, 1)], shape))


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("split_factor", [2, 3, 4])
def test_xqa_may_split_further(split_factor: int, shape: Shape) -> None:
    """More splits than the device has multiprocessors give the same within the bound."""
    skip_unless_it_runs(xqa, shape, "decode")
    batch = PagedBatch([(8191, 1), (30, 1), (0, 1)], shape)
    lens, table = batch.args["seq_len_with_cache"][:3], batch.block_table[:3]
    args = (batch.query, batch.kv_cache, lens, table, batch.spec)
    assert_within_bound(batch, xqa.decode(*args, split_factor=split_factor), shape.kv_dtype)


def test_xqa_ignores_what_its_workspace_held() -> None:
    """Scratch memory full of NaN changes nothing, and the semaphores are zero after each call."""
    workspace = workspaces.get(xqa.Workspace, torch.device("cuda", torch.cuda.current_device()))
    for seed in range(3):
        workspace.scratch.view(torch.float32).fill_(float("nan"))
        assert_decodes(PagedBatch([(3000, 1), (5, 1)], PLAIN, seed))
        assert not workspace.semaphores.any()


def test_xqa_gives_the_same_bits_every_time() -> None:
    """The order of the sums does not depend on which thread block is first."""
    skip_unless_it_runs(xqa, PLAIN, "decode")
    batch = PagedBatch([(5000, 1), (70, 1), (0, 1)], PLAIN)
    args = (batch.kv_cache, batch.args["seq_len_with_cache"][:3], batch.block_table[:3], batch.spec)
    first = xqa.decode(batch.query, *args)
    for _ in range(20):
        assert torch.equal(xqa.decode(batch.query, *args), first)


def spread(batch: PagedBatch) -> None:
    """Let the pages of three layers alternate in memory, the batch's being those of the second."""
    memory = batch.random(batch.kv_cache.shape[0], 3, *batch.kv_cache.shape[1:])
    memory[:, 1] = batch.kv_cache
    batch.kv_cache = memory[:, 1]


def test_xqa_reads_a_strided_pool() -> None:
    """The pages of several layers may alternate in memory."""
    skip_unless_it_runs(xqa, PLAIN, "decode")
    batch = PagedBatch([(n, 1) for n in (0, 31, 32, 700)], PLAIN)
    spread(batch)
    lens, table = batch.args["seq_len_with_cache"][:4], batch.block_table[:4]
    out = xqa.decode(batch.query, batch.kv_cache, lens, table, batch.spec)
    assert_within_bound(batch, out)


@pytest.mark.parametrize(
    ("shape", "new"),
    [
        (PLAIN, [4, 4, 4, 4]),
        (FP8, [4, 4, 4, 4]),
        (PLAIN, [2, 4, 3, 2]),
        (FP8, [2, 4, 3, 2]),
        (PLAIN, [8, 2, 5, 7]),
        (replace(PLAIN, sliding_window=12), [8, 2, 5, 7]),
        (replace(PLAIN, head_dim=64, group=2), [8, 2, 5, 7]),
        (replace(PLAIN, group=8), [8, 8, 8, 8]),
        (replace(PLAIN, group=8), [8, 2, 5, 7]),
        (replace(FP8, group=8), [8, 2, 5, 7]),
        (replace(FP8, group=8), [8, 8, 8, 8]),
    ],
    ids=str,
)
def test_xqa_extends(shape: Shape, new: list[int]) -> None:
    """A few tokens of each sequence, equally many or not, on pasts at and beside the edges of pages."""
    if reason := xqa.EXTEND_SINCE.lacking():
        pytest.skip(reason)
    for pasts in ([32, 31, 33, 1], [700, 64, 5, 4000]):
        batch = PagedBatch(list(zip(pasts, new, strict=True)), shape)
        n = len(new)
        bounds, lens = batch.args["cu_seqlen"][: n + 1], batch.args["seq_len_with_cache"][:n]
        args = (batch.query, batch.kv_cache, bounds, lens, batch.block_table[:n], batch.spec)
        with skipped_if_not_built():
            out = xqa.extend(*args, max_len=max(new))
        # Only uniform extends of many rows are multiplied in 8 bits.
        in_8_bits = shape.kv_dtype if len(set(new)) == 1 and max(new) * shape.group > 32 else None
        assert_within_bound(batch, out, in_8_bits)


@contextmanager
def skipped_if_not_built() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:
        if "FLASHINFER_DISABLE_JIT" not in str(err):
            raise
        pytest.skip("its FlashInfer module is not prebuilt, and FLASHINFER_DISABLE_JIT is set")


@pytest.mark.parametrize("shape", PREFILL, ids=str)
def test_fmha_v2_prefills_every_shape(shape: Shape) -> None:
    """Fresh sequences and chunks with a past in one batch, at lengths on and beside every edge."""
    choice = select.choose(site_of(shape), "prefill", DEVICE, "test")
    if choice.kernel != "fmha_v2":
        pytest.skip(choice.reason)
    page = shape.page_size
    fresh = [(0, n) for n in (2, page, page + 1, 64, 65, 300)]
    for lengths in (
        fresh,
        [*fresh[:3], (page, page), (63, 65), (1, 2), (500, 129)],
        [(0, 200)],
        [(0, 64)] * 3,
    ):
        batch = PagedBatch(lengths, shape, seed=len(lengths))
        assert_within_bound(batch, prefilled(fmha_v2, batch))


@pytest.mark.parametrize(
    "provider", [fmha_v2, fa3, tile_prefill, fa2], ids=lambda module: module.CAPABILITY.name
)
def test_prefill_reads_a_strided_pool(provider: Any) -> None:
    """The pages of several layers may alternate in memory, as in the pool of TensorRT-LLM."""
    skip_unless_it_runs(provider, PLAIN, "prefill")
    batch = PagedBatch(MIXED_LENGTHS, PLAIN)
    spread(batch)
    assert_within_bound(batch, prefilled(provider, batch))


@pytest.mark.parametrize(
    "provider", [fmha_v2, fa3, tile_prefill, fa2], ids=lambda module: module.CAPABILITY.name
)
@pytest.mark.parametrize("length", [4096, 32768, 131072])
def test_prefills_long_contexts(length: int, provider: Any) -> None:
    """A prompt's last chunk and a few tokens on a long past, beside a short prompt."""
    skip_unless_it_runs(provider, PLAIN, "prefill")
    batch = PagedBatch([(0, 70), (length - 50, 50), (length - 3, 3)], PLAIN)
    assert_within_bound(batch, prefilled(provider, batch))


@pytest.mark.parametrize("provider", [fmha_v2, fa3, fa2], ids=lambda module: module.CAPABILITY.name)
def test_prefill_ignores_what_its_workspace_held(provider: Any) -> None:
    """Scratch memory full of NaN changes nothing."""
    skip_unless_it_runs(provider, PLAIN, "prefill")
    for seed in range(3):
        batch = PagedBatch([(0, 300), (3000, 5), (64, 64)], PLAIN, seed)
        device = torch.device("cuda", torch.cuda.current_device())
        is_fmha = provider is fmha_v2
        scratch = workspaces.get(fmha_v2._workspace, device) if is_fmha else fa_scratch(device)
        scratch.view(torch.float32).fill_(float("nan"))
        assert_within_bound(batch, prefilled(provider, batch))


def fa_scratch(device: torch.device) -> torch.Tensor:
    """Of FA2 and FA3, without plans."""
    eager = workspaces.get(fa._Eager, device)
    eager.planned.clear()
    return eager.scratch


def prefilled(provider: Any, batch: PagedBatch) -> torch.Tensor:
    n = len(batch.lengths)
    bounds, lens = batch.args["cu_seqlen"][: n + 1], batch.args["seq_len_with_cache"][:n]
    args = (batch.query, batch.kv_cache, bounds, lens, batch.block_table[:n], batch.spec)
    return provider.prefill(*args)


def skip_unless_it_runs(provider: Any, shape: Shape, phase: Phase) -> None:
    refusals = provider.CAPABILITY.refusals(site_of(shape), phase, DEVICE)
    if refusals:
        pytest.skip(", ".join(refusals))


@pytest.mark.parametrize(
    "provider", [fa2, fa3, tile_prefill, trtllm_gen], ids=lambda module: module.CAPABILITY.name
)
@pytest.mark.parametrize("shape", FA, ids=str)
def test_others_prefill_every_shape(shape: Shape, provider: Any) -> None:
    """Fresh sequences and chunks with a past, over caches of 8 bits and under logit caps too."""
    skip_unless_it_runs(provider, shape, "prefill")
    # A step of one length, of few sequences, of more query tiles than multiprocessors, and of a long past.
    for lengths in (
        MIXED_LENGTHS,
        [(0, 200)],
        [(0, 64)] * 3,
        [(0, 3000)] * 2 + [(4000, 700)] * 2,
        [(16000, 3)],
    ):
        batch = PagedBatch(lengths, shape, seed=len(lengths))
        assert_within_bound(batch, prefilled(provider, batch))


@pytest.mark.parametrize("provider", [fa2, trtllm_gen], ids=lambda module: module.CAPABILITY.name)
@pytest.mark.parametrize("shape", FA, ids=str)
def test_others_decode_every_shape(shape: Shape, provider: Any) -> None:
    """Lengths on and beside every edge, few sequences, whose keys are split, and many."""
    skip_unless_it_runs(provider, shape, "decode")
    for lengths in ([length - 1 for length in edges(shape.page_size)], [9000, 3], list(range(0, 640, 5))):
        batch = PagedBatch([(length, 1) for length in lengths], shape)
        n = len(lengths)
        lens, table = batch.args["seq_len_with_cache"][:n], batch.block_table[:n]
        out = provider.decode(batch.query, batch.kv_cache, lens, table, batch.spec)
        assert_within_bound(batch, out)


def test_fa2_plans_once_a_step_and_anew_for_the_next() -> None:
    """Layers of one step share a plan; a step whose table lies elsewhere gets its own."""
    skip_unless_it_runs(fa2, PLAIN, "decode")
    for seed in range(4):
        batch = PagedBatch([(100 * seed + 7, 1), (40, 1)], PLAIN, seed)
        args = (batch.args["seq_len_with_cache"][:2], batch.block_table[:2], batch.spec)
        for _ in range(2):
            assert_within_bound(batch, fa2.decode(batch.query, batch.kv_cache, *args))
            batch.query, batch.kv_cache = (
                batch.random(*batch.query.shape),
                batch.random(*batch.kv_cache.shape),
            )
