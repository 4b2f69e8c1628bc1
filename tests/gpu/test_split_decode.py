"""Our Triton decode kernel against float64 and beside XQA, every element within a bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ad_flashinfer_pass.kernels import workspaces
from ad_flashinfer_pass.kernels.attention import split_decode
from tests.gpu.paged import DEVICE, PagedBatch, site_of
from tests.gpu.test_conformance import DECODE, DECODE_FP8, FP8, PLAIN, Shape, assert_within_bound, edges

CAPPED = [
    replace(shape, logit_cap=2.0, sliding_window=window) for shape in (PLAIN, FP8) for window in (None, 100)
]


def assert_decodes(batch: PagedBatch, splits: int | None = None) -> None:
    shape, n = batch.shape, len(batch.lengths)
    assert not split_decode.CAPABILITY.refusals(site_of(shape), "decode", DEVICE)
    before = batch.kv_cache.clone()
    lens, table = batch.args["seq_len_with_cache"][:n], batch.block_table[:n]
    args = (batch.query, batch.kv_cache, lens, table, batch.spec)
    out = split_decode.decode(*args, splits=splits)
    assert_within_bound(batch, out)
    assert torch.equal(batch.kv_cache.view(torch.uint8), before.view(torch.uint8))
    for _ in range(5):
        assert torch.equal(split_decode.decode(*args, splits=splits), out)


@pytest.mark.parametrize("shape", [*DECODE, *DECODE_FP8, *CAPPED], ids=str)
def test_decodes_every_shape(shape: Shape) -> None:
    """Page sizes, groups, head sizes, windows, caps and sinks, at lengths on and beside every edge."""
    assert_decodes(PagedBatch([(length - 1, 1) for length in edges(shape.page_size)], shape))


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 256])
def test_decodes_every_batch_size(batch_size: int, shape: Shape) -> None:
    """Few sequences, whose keys are split, and many, whose keys are not."""
    assert_decodes(PagedBatch([(37 * i % 900, 1) for i in range(batch_size)], shape))


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("length", [4096, 131072])
def test_decodes_long_contexts(length: int, shape: Shape) -> None:
    """Beside a short sequence, whose row of the table is as wide."""
    assert_decodes(PagedBatch([(length - 1, 1), (9, 1)], shape))


def test_ignores_what_its_workspace_held() -> None:
    """Scratch memory full of NaN changes nothing, and the arrivals are zero after each call."""
    space = workspaces.get(split_decode._workspace, torch.device("cuda", torch.cuda.current_device()))
    for _ in range(3):
        space.sums.fill_(float("nan"))
        space.stats.fill_(float("nan"))
        assert_decodes(PagedBatch([(8191, 1), (30, 1), (0, 1)], PLAIN))
        assert not space.arrivals.any()


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 5, 32])
def test_may_split_otherwise(splits: int, shape: Shape) -> None:
    """Any number of splits gives the same within the bound."""
    assert_decodes(PagedBatch([(8191, 1), (30, 1), (0, 1)], shape), splits)
