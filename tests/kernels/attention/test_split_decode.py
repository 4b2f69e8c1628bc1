"""Our decode kernel against float64: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels import workspaces  # noqa: E402
from ad_flashinfer_pass.kernels.attention import reference, split_decode  # noqa: E402
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec  # noqa: E402
from ad_flashinfer_pass.kernels.attention.split_decode import Config  # noqa: E402
from tests.kernels.paged_batch import EACH_FEATURE, Features, PagedBatch, Shape  # noqa: E402

HALF = Shape(dtype=torch.float16, page_size=16)  # the interpreter's bfloat16 dot is wrong
# Splits of one block and of several, more splits than blocks, blocks of several pages and of a part of one.
LAUNCHES = [(1, Config(16, 4, 2)), (3, Config(16, 4, 2)), (32, Config(32, 4, 2))]
Launch = tuple[int | None, Config | None]
LENGTHS = [1, 15, 16, 17, 70]


def attend(batch: PagedBatch, features: Features, launch: Launch) -> Tensor:
    """The new tokens of each sequence, appended by the reference and attended by the kernel."""
    shape, n, new = batch.shape, len(batch.lengths), batch.lengths[0][1]
    table, slots = batch.prepare(batch.args["position_ids"])
    new_key, new_value = (torch.stack([x[-new:] for x in tensors]) for tensors in (batch.key, batch.value))
    reference.append(new_key, new_value, slots, batch.kv_cache, shape.k_scale, shape.v_scale)
    spec = AttentionSpec(
        features.scale,
        features.sliding_window,
        features.logit_cap,
        features.chunk,
        shape.k_scale,
        shape.v_scale,
        shape.v_head_dim,
        batch.sinks.to(DEVICE) if features.has_sinks else None,
        batch.alibi_slopes.to(DEVICE) if features.has_alibi else None,
    )
    where = (batch.args["seq_len_with_cache"][:n].to(DEVICE), table[:n].to(DEVICE), spec)
    query = torch.cat(batch.query).to(DEVICE)
    pool = batch.memory.to(DEVICE)[:, shape.layers_between_pages // 2]
    how: Any = {"splits": launch[0], "config": launch[1]}
    if new == 1:
        return split_decode.decode(query, pool, *where, **how).cpu()
    bounds = batch.args["cu_seqlen"][: n + 1].to(DEVICE)
    return split_decode.verify(query, pool, bounds, *where, max_len=new, **how).cpu()


def check(
    shape: Shape, features: Features, launch: Launch, lengths: list[int] = LENGTHS, new: int = 1
) -> None:
    batch = PagedBatch([(n - 1, new) for n in lengths], shape)
    batch.round_as_cached()
    out = attend(batch, features, launch)
    # Softmax weights and result are rounded to half precision: values are of size 1.
    torch.testing.assert_close(
        out.double(), torch.cat(batch.expected(features)), atol=2e-3, rtol=0, msg=lambda text: text
    )
    assert not workspaces.get(split_decode._workspace, torch.empty(0, device=DEVICE).device).arrivals.any()


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("features", EACH_FEATURE, ids=str)
def test_drafts_with_every_feature_at_every_split(features: Features, launch: Launch) -> None:
    """Four new tokens, of which each sees those before it: some see no key of a part, nor of a block."""
    check(HALF, features, launch, [2, 13, 15, 17, 70], new=4)


@pytest.mark.parametrize("new", [2, 8])
@pytest.mark.parametrize(
    "shape",
    [
        replace(HALF, num_heads=10),
        replace(HALF, head_dim=24, v_head_dim=40, page_size=5),
        replace(HALF, kv_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=2.0),
    ],
    ids=str,
)
def test_drafts_of_other_shapes(shape: Shape, new: int) -> None:
    """Groups that are no power of two, sizes that differ, and a cache of 8 bits."""
    check(shape, Features(sliding_window=20), (None, None), new=new)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("features", EACH_FEATURE, ids=str)
def test_every_feature_at_every_split(features: Features, launch: Launch) -> None:
    """Windows and chunks that begin inside a block, caps, sinks and slopes, whole and in parts."""
    check(HALF, features, launch)


@pytest.mark.parametrize(
    "shape",
    [
        replace(HALF, page_size=32),
        replace(HALF, page_size=5),
        replace(HALF, num_heads=4, num_kv_heads=4),
        replace(HALF, num_heads=10),
        replace(HALF, num_heads=40),
        replace(HALF, head_dim=24, v_head_dim=40),
        replace(HALF, head_dim=80, v_head_dim=80),
        replace(HALF, layers_between_pages=3),
        replace(HALF, kv_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", LAUNCHES[1:2], ids=str)
def test_every_shape(shape: Shape, launch: Launch) -> None:
    """Pages larger than a block or of odd size, groups, padded head sizes, strided pools."""
    check(shape, Features(), launch)


def test_default_launch() -> None:
    """What is used without a choice: a batch whose keys are split, and one whose keys are not."""
    check(HALF, Features(), (None, None))
    check(replace(HALF, num_heads=16, num_kv_heads=16), Features(), (None, None), [3] * 4)


def test_large_queries_over_eight_bits() -> None:
    """Queries beyond float16's range, in bfloat16, are scaled into it and not lost."""
    if DEVICE.type == "cpu":
        pytest.skip("the interpreter's bfloat16 is wrong")
    check(
        replace(HALF, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn), Features(scale=1e-6), LAUNCHES[1]
    )


def test_parts_are_added_in_the_order_of_the_keys() -> None:
    """The bits do not depend on what the workspace held, nor on earlier calls."""
    batch = PagedBatch([(69, 1), (4, 1)], HALF)
    first = attend(batch, Features(), LAUNCHES[1])
    space = workspaces.get(split_decode._workspace, torch.empty(0, device=DEVICE).device)
    space.sums.fill_(float("nan"))
    space.stats.fill_(float("nan"))
    assert torch.equal(attend(batch, Features(), LAUNCHES[1]), first)


def test_a_row_of_no_keys_is_zero() -> None:
    """A padding row of length 0 gives no NaN."""
    batch = PagedBatch([(9, 1), (0, 1)], HALF)
    batch.args["seq_len_with_cache"][1] = 0
    out = attend(batch, Features(), LAUNCHES[1])
    assert not out[1].any()
    assert torch.isfinite(out).all()


def test_splits_follow_batch_heads_and_device_alone() -> None:
    """Many splits for few sequences, one for many."""
    splits = [split_decode.default_splits(batch * 8, 132) for batch in (1, 8, 32, 128)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > 8
    assert splits[-1] == 1
