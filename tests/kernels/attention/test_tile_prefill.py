"""Our prefill kernel against float64: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.attention import reference, tile_prefill  # noqa: E402
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec  # noqa: E402
from ad_flashinfer_pass.kernels.attention.tile_prefill import Config  # noqa: E402
from tests.kernels.paged_batch import EACH_FEATURE, Features, PagedBatch, Shape  # noqa: E402

HALF = Shape(dtype=torch.float16, page_size=16, num_heads=2, num_kv_heads=1)  # bfloat16's dot is wrong
SMALL = Config(16, 16, 4, 2)
# (past, new): one tile and several, short last ones, pasts that end within a page, one token.
LENGTHS = [(0, 17), (0, 16), (21, 5), (37, 33), (0, 1)]


def prefill(batch: PagedBatch, features: Features, config: Config | None) -> Tensor:
    """The new tokens of each sequence, appended by the reference and attended by the kernel."""
    shape, n = batch.shape, len(batch.lengths)
    table, slots = batch.prepare(batch.args["position_ids"])
    new = [count for _, count in batch.lengths]
    new_key, new_value = (
        torch.cat([x[-count:] for x, count in zip(tensors, new, strict=True)])[None]
        for tensors in (batch.key, batch.value)
    )
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
    bounds = torch.tensor([0, *new]).cumsum(0).int()
    return tile_prefill.prefill(
        torch.cat(batch.query).to(DEVICE),
        batch.memory.to(DEVICE)[:, shape.layers_between_pages // 2],
        bounds.to(DEVICE),
        torch.tensor([past + count for past, count in batch.lengths], dtype=torch.int32).to(DEVICE),
        table[:n].to(DEVICE),
        spec,
        config=config,
    ).cpu()


def check(shape: Shape, features: Features, config: Config | None = SMALL) -> None:
    batch = PagedBatch(LENGTHS, shape)
    batch.round_as_cached()
    out = prefill(batch, features, config)
    # Softmax weights and result are rounded to half precision: values are of size 1.
    torch.testing.assert_close(out.double(), torch.cat(batch.expected(features)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("features", EACH_FEATURE, ids=str)
def test_every_feature(features: Features) -> None:
    """Windows and chunks that begin inside a block, caps, sinks and slopes."""
    check(HALF, features)


@pytest.mark.parametrize(
    "shape",
    [
        replace(HALF, page_size=32),
        replace(HALF, page_size=5),
        replace(HALF, num_heads=3, num_kv_heads=3),
        replace(HALF, head_dim=24, v_head_dim=40),
        replace(HALF, layers_between_pages=3),
        replace(HALF, kv_dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=2.0),
    ],
    ids=str,
)
def test_every_shape(shape: Shape) -> None:
    """Pages larger than a block or of odd size, padded head sizes, strided pools, 8 bits."""
    check(shape, Features())


def test_default_launch() -> None:
    check(HALF, Features(), None)


def test_tiles_beyond_the_last_and_sequences_without_tokens() -> None:
    """As a captured step has them: they change nothing, and nothing is written for them."""
    batch = PagedBatch([(0, 17), (21, 5)], HALF)
    expected = prefill(batch, Features(), SMALL)
    table = batch.prepare(batch.args["position_ids"])[0]
    query = torch.cat([*batch.query, torch.full((40, 2, 16), torch.nan, dtype=torch.float16)])
    found = tile_prefill.prefill(
        query.to(DEVICE),
        batch.kv_cache.to(DEVICE),
        torch.tensor([0, 17, 22, 22, 22], dtype=torch.int32, device=DEVICE),
        torch.tensor([17, 26, 0, 0], dtype=torch.int32, device=DEVICE),
        torch.cat([table[:2], torch.zeros_like(table[:2])]).to(DEVICE),
        AttentionSpec(0.3, v_head_dim=16),
        config=SMALL,
    )
    assert torch.equal(found[:22].cpu(), expected)
