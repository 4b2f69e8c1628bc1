"""K and V expanded from a latent against float64: compiled where there is a GPU, else in Triton's interpreter."""

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

from ad_flashinfer_pass.kernels.attention import latent_prefill, reference  # noqa: E402
from ad_flashinfer_pass.kernels.attention.latent_prefill import Config  # noqa: E402
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec  # noqa: E402
from ad_flashinfer_pass.ops.attention import expand  # noqa: E402
from tests.kernels.paged_batch import Features, PagedBatch, Shape, dense_attention  # noqa: E402

MLA = Shape(
    num_heads=3,
    num_kv_heads=1,
    head_dim=40,
    v_head_dim=32,
    page_size=16,
    dtype=torch.float16,  # the interpreter's bfloat16 dot is wrong
    is_latent=True,
)
SMALL = Config(16, 16, 4, 2)
NOPE, SIZE = 16, 32


def ups(shape: Shape, nope: int, size: int) -> tuple[Tensor, Tensor]:
    """W_UK and W_UV of each head, as views of one weight that has other rows, too."""
    generator = torch.Generator().manual_seed(1)
    rank = shape.v_head_dim
    weight = torch.randn(shape.num_heads, nope + size + 3, rank, generator=generator) / rank**0.5
    weight = weight.to(shape.dtype)
    return weight[:, 1 : 1 + nope], weight[:, nope + 2 : nope + 2 + size]


def check(
    lengths: list[tuple[int, int]],
    shape: Shape = MLA,
    nope: int = NOPE,
    size: int = SIZE,
    config: Config | None = SMALL,
    extra: int = 0,
) -> None:
    """The new tokens are appended by the reference, then prefilled."""
    batch, n = PagedBatch(lengths, shape), len(lengths)
    batch.round_as_cached()
    table, slots = batch.prepare(batch.args["position_ids"])
    new = torch.cat([x[-tokens:] for x, (_, tokens) in zip(batch.key, lengths, strict=True)])[None]
    rank = shape.v_head_dim
    reference.append(new, new[..., :rank], slots, batch.kv_cache, shape.k_scale, shape.k_scale)
    up = ups(shape, nope, size)
    width = nope + shape.head_dim - rank
    queries = [query[..., :width] for query in batch.query]
    spec = AttentionSpec(
        0.3,
        k_scale=shape.k_scale,
        v_scale=shape.k_scale,
        v_head_dim=rank,
        key_up=up[0].to(DEVICE),
        value_up=up[1].to(DEVICE),
    )
    given = (
        torch.cat(batch.query)[..., :width],
        batch.memory[:, 0],
        batch.args["cu_seqlen"][: n + 1],
        batch.args["seq_len_with_cache"][:n],
        table[:n],
    )
    query, pool, *rest = (x.to(DEVICE) for x in given)
    out = latent_prefill.prefill(query, pool, *rest, spec, config=config, extra=extra).cpu()
    wanted = []
    for q, key, (past, _) in zip(queries, batch.key, lengths, strict=True):
        k, v = expand(key.double(), key[..., :rank].double(), *(x.double() for x in up))
        wanted.append(dense_attention(q, k, v, past, Features()))
    # K, V, softmax weights and result are rounded to half precision: values are of size 1.
    torch.testing.assert_close(out.double(), torch.cat(wanted), atol=6e-3, rtol=0)


@pytest.mark.parametrize("extra", [0, 20, 1000])
@pytest.mark.parametrize(
    "lengths",
    [[(0, 12)], [(0, 7), (7, 7), (14, 3)], [(0, 40), (30, 5), (65, 33), (1, 1)]],
    ids=["prompt", "chunks", "ragged"],
)
def test_equals_the_formula(
    lengths: list[tuple[int, int]], extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the past is expanded: none, as far as there is room, and all of it."""
    monkeypatch.setattr(latent_prefill, "LEAST", 5)
    check(lengths, extra=extra)


@pytest.mark.parametrize(
    ("changes", "nope", "size"),
    [
        ({}, 12, 20),
        ({"head_dim": 32}, 16, 16),
        ({"head_dim": 80, "v_head_dim": 48}, 24, 40),
        ({"page_size": 5, "num_heads": 1}, 16, 16),
        ({"kv_dtype": torch.float8_e4m3fn, "k_scale": 0.25}, 16, 32),
    ],
    ids=str,
)
def test_sizes(changes: dict[str, object], nope: int, size: int) -> None:
    """Sizes that are no powers of two, no part that is not V, pages that fit no block, 8 bits."""
    shape = replace(MLA, **changes)  # type: ignore[arg-type]
    check([(0, 17), (20, 9)], shape, nope, size, None, extra=7)
