"""A latent on a GPU: the kernel at DeepSeek's sizes against float64, captured, and whole models."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ad_flashinfer_pass.config import CompileBackend, KvDtype
from ad_flashinfer_pass.kernels.attention import latent, latent_prefill
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.ops.attention import expand
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, compared, controls
from tests import architectures
from tests.gpu.test_end_to_end import check_replays_equal_eager, transformed
from tests.kernels.paged_batch import Features, PagedBatch, Shape, dense_attention

DECODES = [(n - 1, 1) for n in (1, 31, 32, 33, 500)]
CHUNKS = [(0, 70), (0, 2), (100, 33), (300, 2)]


def rows_of_deepseek(heads: int, kv_dtype: torch.dtype | None) -> Shape:
    """512 + 64 elements, which all heads share."""
    return Shape(
        num_heads=heads,
        num_kv_heads=1,
        head_dim=576,
        v_head_dim=512,
        page_size=32,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
        k_scale=1.0 if kv_dtype is None else 0.02,
        is_latent=True,
    )


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decode", "chunks"])
@pytest.mark.parametrize("heads", [16, 40, 128])
def test_deepseeks_rows(heads: int, lengths: list[tuple[int, int]], kv_dtype: torch.dtype | None) -> None:
    """512 + 64 elements, heads of a tile, of a part of one and of two; eager, and captured for others."""
    shape = rows_of_deepseek(heads, kv_dtype)
    features = Features(scale=0.05)
    spec = AttentionSpec(0.05, k_scale=shape.k_scale, v_scale=shape.k_scale, v_head_dim=512)
    batches = [PagedBatch([(length, new) for length, new in lengths], shape, seed) for seed in (0, 1)]
    for batch in batches:
        batch.round_as_cached()
        batch.run(features)  # appends
    n = len(lengths)
    inputs = []
    for batch in batches:
        table, _ = batch.prepare(batch.args["position_ids"])
        found = [torch.cat(batch.query), batch.kv_cache, batch.args["cu_seqlen"][: n + 1]]
        inputs.append([*found, batch.args["seq_len_with_cache"][:n], table[:n]])
    static: list[Any] = [x.cuda() for x in inputs[0]]
    args = static if lengths is CHUNKS else [*static[:2], *static[3:]]
    attend: Any = latent.prefill if lengths is CHUNKS else latent.decode
    run = partial(attend, *args, spec)
    eager = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for batch, given, first in zip(batches, inputs, (eager, None), strict=True):
        for buffer, x in zip(static, given, strict=True):
            buffer.copy_(x)
        graph.replay()
        wanted = torch.cat(batch.expected(features))
        for out in (captured, first):
            if out is not None:
                error = (out.cpu().double() - wanted).abs().max() / wanted.abs().max()
                assert error < 1e-2


@pytest.mark.parametrize("extra", [0, 150, None], ids=["absorbed_past", "in_part", "expanded_past"])
@pytest.mark.parametrize(
    ("heads", "nope", "value", "kv_dtype"),
    [(16, 128, 128, None), (5, 192, 256, None), (16, 128, 128, torch.float8_e4m3fn)],
    ids=["deepseek", "glm", "fp8"],
)
def test_expanded_keys_and_values(
    heads: int, nope: int, value: int, kv_dtype: torch.dtype | None, extra: int | None
) -> None:
    """Prompts, chunks, few tokens behind a past, whatever is expanded; eager, and captured for others."""
    shape = rows_of_deepseek(heads, kv_dtype)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(heads, nope + value, 512, generator=generator).to(torch.bfloat16) / 512**0.5
    ups = weight[:, :nope], weight[:, nope:]
    spec = AttentionSpec(
        0.05,
        k_scale=shape.k_scale,
        v_scale=shape.k_scale,
        v_head_dim=512,
        key_up=ups[0].cuda(),
        value_up=ups[1].cuda(),
    )
    inputs, wanted = [], []
    for seed, lengths in enumerate(([(0, 300), (200, 140), (300, 7)], [(0, 70), (0, 190), (70, 187)])):
        batch = PagedBatch(lengths, shape, seed)
        batch.round_as_cached()
        batch.run(Features())  # appends
        table, _ = batch.prepare(batch.args["position_ids"])
        query = torch.cat(batch.query)[..., : nope + 64]
        bounds, lens = batch.args["cu_seqlen"][:4], batch.args["seq_len_with_cache"][:3]
        inputs.append([query, batch.kv_cache, bounds, lens, table[:3]])
        parts = []
        for q, key, (past, new) in zip(query.split([n for _, n in lengths]), batch.key, lengths, strict=True):
            k, v = expand(key.double(), key[..., :512].double(), *(up.double() for up in ups))
            parts.append(dense_attention(q, k, v, past, Features(scale=0.05)))
            assert len(q) == new
        wanted.append(torch.cat(parts))
    width = max(given[4].shape[1] for given in inputs)
    pages = max(given[1].shape[0] for given in inputs)
    for given in inputs:
        given[4] = torch.nn.functional.pad(given[4], (0, width - given[4].shape[1]))
        given[1] = torch.cat((given[1], given[1][:1].expand(pages - len(given[1]), -1, -1, -1, -1)))
    static: list[Any] = [x.cuda() for x in inputs[0]]
    prefill: Any = latent_prefill.prefill
    run = partial(prefill, *static, spec, extra=extra, least=64)
    first = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for given, right in zip(inputs, wanted, strict=True):
        for buffer, x in zip(static, given, strict=True):
            buffer.copy_(x)
        graph.replay()
        assert (captured.cpu().double() - right).abs().max() < 1e-2 * right.abs().max()
        if given is inputs[0]:
            assert torch.equal(captured, first)


@pytest.mark.parametrize(
    ("family", "backend"),
    [("deepseek_v2", "torch-cudagraph"), ("minicpm3", "torch-opt"), ("youtu", "torch-simple")],
)
def test_families_are_as_near_to_float32_as_the_uncached_model(family: str, backend: CompileBackend) -> None:
    """Both phases run by the kernel, and rounding sends tokens astray no farther than the model's own."""
    config = architectures.small_config(family, vocab_size=512, hidden_size=256, intermediate_size=512)
    model: nn.Module = architectures.random_model(config, "sdpa")
    model = model.to(device="cuda", dtype=torch.bfloat16)
    cached, reports = transformed(model, backend)
    notes = [note for report in reports for note in report.notes]
    for phase in ("prefill", "decode"):
        assert any(note.startswith(f"{phase}: latent, ") for note in notes)
    generated = architectures.generated_by_engine(cached, PROMPTS, NEW_TOKENS)
    found = {**compared(model, generated), **controls(model, cached, generated)}
    print(family, backend, {key: found[key] for key in ("largest_share", "num_different", "error_ratio")})
    assert found["largest_share"] <= 2.0
    assert found["error_ratio"] <= 1.25


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_captured_equals_eager_exactly(kv_dtype: KvDtype) -> None:
    """Prefill, mixed steps and decode."""
    config = architectures.small_config("deepseek_v3", vocab_size=512)
    model: nn.Module = architectures.random_model(config, "sdpa")
    cached, _ = transformed(model.to(device="cuda", dtype=torch.bfloat16), "torch-cudagraph", kv_dtype)
    check_replays_equal_eager(cached)
