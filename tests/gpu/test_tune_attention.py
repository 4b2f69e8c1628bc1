"""The choice of decode kernels by measurement, on the kernels themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.tune import Decode
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.kernels.measure import tune
from tests.gpu.paged import PagedBatch, site_of
from tests.gpu.test_conformance import FP8, PLAIN, Shape, assert_within_bound


@pytest.mark.parametrize("shape", [PLAIN, FP8], ids=str)
def test_what_was_measured_decodes(shape: Shape, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XQA and our kernel are both timed, the pools stay as they were, and the choice is within the bound."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = PagedBatch([(n - 1, 1) for n in (300, 31, 32, 700)], shape)
    before = batch.kv_cache.clone()
    width = batch.block_table.shape[1]
    plans, notes = tune(Decode(site_of(shape), [batch.kv_cache] * 2, width), [1, 4])
    (plan,) = plans.values()
    assert all("xqa " in note and "split_decode " in note for note in notes), notes
    assert batch.kv_cache.float().equal(before.float())
    lens, table = batch.args["seq_len_with_cache"][:4], batch.block_table[:4]
    name, options = KernelPlan.parse(plan).at(4)
    decode = select.PROVIDERS[name].decode
    out = decode(batch.query, batch.kv_cache, lens, table, batch.spec, *options)
    assert_within_bound(batch, out, shape.kv_dtype)
