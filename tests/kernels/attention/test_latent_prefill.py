"""K and V expanded from a latent, against float64: on a GPU, or in Triton's interpreter."""

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

from ad_flashinfer_pass import ops  # noqa: E402
from ad_flashinfer_pass.kernels.attention import latent, latent_prefill, reference, select  # noqa: E402
from ad_flashinfer_pass.kernels.attention.latent_prefill import Config  # noqa: E402
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec  # noqa: E402
from ad_flashinfer_pass.ops.attention import expand  # noqa: E402
from ad_flashinfer_pass.pipeline import transform_module  # noqa: E402
from tests.architectures import (  # noqa: E402
    generated_by_engine,
    generated_by_transformers,
    random_model,
    random_prompts,
    small_config,
)
from tests.kernels.paged_batch import Features, PagedBatch, Shape, dense_attention  # noqa: E402
from tests.transforms.small_models import context  # noqa: E402

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


def appended(lengths: list[tuple[int, int]], shape: Shape) -> tuple[PagedBatch, Tensor]:
    """A step whose new tokens are in their pages, and its block table."""
    batch = PagedBatch(lengths, shape)
    batch.round_as_cached()
    table, slots = batch.prepare(batch.args["position_ids"])
    new = torch.cat([x[-tokens:] for x, (_, tokens) in zip(batch.key, lengths, strict=True)])[None]
    value = new[..., : shape.v_head_dim]
    reference.append(new, value, slots, batch.kv_cache, shape.k_scale, shape.k_scale)
    return batch, table


def expected(batch: PagedBatch, up: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Of the first elements of the query of each head, in float64."""
    found = []
    for q, key, (past, _) in zip(batch.query, batch.key, batch.lengths, strict=True):
        latent = key[..., : batch.shape.v_head_dim].double()
        k, v = expand(key.double(), latent, *(x.double() for x in up))
        found.append(dense_attention(q[..., :width], k, v, past, Features()))
    return torch.cat(found)


def check(
    lengths: list[tuple[int, int]],
    shape: Shape = MLA,
    nope: int = NOPE,
    size: int = SIZE,
    config: Config | None = SMALL,
    extra: int = 0,
    **options: int,
) -> None:
    """The kernels alone, over part of the memory of a wider query."""
    batch, table = appended(lengths, shape)
    n, rank = len(lengths), shape.v_head_dim
    up = ups(shape, nope, size)
    width = nope + shape.head_dim - rank
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
    prefill: Any = latent_prefill.prefill
    out = prefill(*(x.to(DEVICE) for x in given), spec, config=config, extra=extra, **options).cpu()
    # K, V, softmax weights and result are rounded to half precision: values are of size 1.
    torch.testing.assert_close(out.double(), expected(batch, up, width), atol=6e-3, rtol=0)


@pytest.mark.parametrize("extra", [0, 20, 1000])
@pytest.mark.parametrize(
    "lengths",
    [[(0, 12)], [(0, 7), (7, 7), (14, 3)], [(0, 40), (30, 5), (65, 33), (1, 1)]],
    ids=["prompt", "chunks", "ragged"],
)
def test_equals_the_formula(lengths: list[tuple[int, int]], extra: int) -> None:
    """Whatever part of the past is expanded: none, as far as there is room, and all of it."""
    check(lengths, extra=extra, least=5)


def test_parts_of_the_past() -> None:
    """Programs share the keys of a tile where there are fewer tiles: of one past, not of a short one."""
    check([(700, 3), (100, 20)], replace(MLA, num_heads=2), num_programs=9)


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


def test_rows_without_tokens() -> None:
    """A captured step has more rows than sequences: what they say of a length does not count."""
    batch, table = appended([(0, 7), (33, 3)], MLA)
    up = ups(MLA, NOPE, SIZE)
    width = NOPE + MLA.head_dim - MLA.v_head_dim
    rows = table[:2].new_zeros((4, table.shape[1]))
    rows[0], rows[2] = table[0], table[1]
    given = (
        torch.cat(batch.query)[..., :width],
        batch.memory[:, 0],
        torch.tensor([0, 7, 7, 10, 10], dtype=torch.int32),
        torch.tensor([7, 40, 36, 1], dtype=torch.int32),
        rows,
    )
    ups_there = (each.to(DEVICE) for each in up)
    spec = AttentionSpec(0.3, None, None, None, 1.0, 1.0, MLA.v_head_dim, None, None, *ups_there)
    prefill: Any = latent_prefill.prefill
    out = prefill(*(x.to(DEVICE) for x in given), spec, config=SMALL, extra=9).cpu()
    torch.testing.assert_close(out.double(), expected(batch, up, width), atol=6e-3, rtol=0)


@pytest.mark.parametrize("extend_len", [0, 8], ids=["prefilled", "extended"])
@pytest.mark.parametrize("fewest", [1, 10**6], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("kernel", ["latent", "reference"])
def test_mixed_steps(kernel: str, fewest: int, extend_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks and decodes of one step, padded, by the op: each provider gets its query."""
    monkeypatch.setattr(latent_prefill, "FEWEST", fewest)
    monkeypatch.setattr(latent_prefill, "EXTRA_BYTES", 2**14)
    batch, table = appended([(0, 19), (0, 2), (33, 7), (12, 1), (40, 1)], MLA)
    up = ups(MLA, NOPE, SIZE)
    width = NOPE + MLA.head_dim - MLA.v_head_dim
    query = torch.cat([*batch.query, torch.ones_like(batch.query[0])])[None, ..., :width]  # padding last
    out = ops.cached_attention(
        query.to(DEVICE),
        batch.memory.to(DEVICE)[:, 0],
        batch.args["batch_info_host"],
        batch.args["cu_seqlen"].to(DEVICE),
        batch.args["seq_len_with_cache"].to(DEVICE),
        table.to(DEVICE),
        0.3,
        MLA.v_head_dim,
        prefill_kernel=kernel,
        decode_kernel=kernel,
        max_extend_len=extend_len,
        key_up=up[0].to(DEVICE),
        value_up=up[1].to(DEVICE),
    )[0].cpu()
    tokens = sum(new for _, new in batch.lengths)
    torch.testing.assert_close(out[:tokens].double(), expected(batch, up, width), atol=6e-3, rtol=0)
    assert not out[tokens:].any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in float32, which the kernels do not declare")
@pytest.mark.parametrize("room", [0, 2**12])
def test_generates_the_tokens_of_transformers(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of at most 7 tokens, beside decodes; the past is absorbed, or expanded in part."""
    provider = replace(select.PROVIDERS["reference"], prefill=latent.prefill, expands=True)
    monkeypatch.setitem(select.PROVIDERS, "reference", provider)
    changes = {"FEWEST": 1, "default_least": lambda heads: 2, "EXTRA_BYTES": room}
    for name, value in changes.items():
        monkeypatch.setattr(latent_prefill, name, value)
    dense = random_model(small_config("youtu", fewest_layers=1))
    prompts = random_prompts([5, 17, 1], 128)
    wanted = generated_by_transformers(dense, prompts, 5)
    config = context(max_batch_size=3, max_num_tokens=7, compile_backend="torch-simple").config
    model, _ = transform_module(dense, config)
    assert generated_by_engine(model, prompts, 5) == wanted
