"""Kernels whose launches overlap give, replayed in a graph, the bits that they give one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import overlap
from ad_flashinfer_pass.kernels.attention import split_decode
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.cache import rope_append
from ad_flashinfer_pass.kernels.linear import small_gemm
from ad_flashinfer_pass.kernels.linear.small_gemm import Around, Config

DEVICE = torch.device("cuda")
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, PAGE, MAX_LEN = 6, 1024, 2048, 16, 4, 64, 16, 256


class Layers:
    """What a decode step runs between embedding and logits, with random weights.

    The layers write to two caches in turn, and none has memory of its own: a kernel that ran too early would
    read or overwrite what another is at.
    """

    def __init__(self, batch: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(batch)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=DEVICE, dtype=torch.bfloat16, generator=generator)

        pages = MAX_LEN // PAGE
        self.batch = batch
        self.qkv = drawn(LAYERS, (HEADS + 2 * KV_HEADS) * DIM, HIDDEN) / HIDDEN**0.5
        self.out = drawn(LAYERS, HIDDEN, HEADS * DIM) / HIDDEN**0.5
        self.gate_up = drawn(LAYERS, 2 * INNER, HIDDEN) / HIDDEN**0.5
        self.down = drawn(LAYERS, HIDDEN, INNER) / INNER**0.5
        self.norm = drawn(HIDDEN).abs() + 0.5
        self.caches = drawn(2, 1 + batch * pages, 2, KV_HEADS, PAGE, DIM)
        self.table = (1 + torch.arange(batch * pages, device=DEVICE, dtype=torch.int32)).view(batch, pages)
        self.x, self.cos, self.sin = drawn(batch, HIDDEN), drawn(batch, DIM // 2), drawn(batch, DIM // 2)
        self.lengths = torch.ones(batch, dtype=torch.int32, device=DEVICE)

    def run(self) -> Tensor:
        n, h, normed = self.batch, self.x, Around(norm=self.norm, eps=1e-5)
        wide, split = Config(64, 64, 1, 4, 3), Config(64, 64, 4, 4, 3)
        last = (self.lengths - 1).long()
        rows = torch.arange(n, device=DEVICE)
        slots = self.table[rows, last // PAGE].long() * PAGE + last % PAGE
        for i in range(LAYERS):
            qkv = small_gemm.run(h, self.qkv[i], normed, wide).view(n, 1, -1, DIM)
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 2)
            cache = self.caches[i % 2]
            q = rope_append.rope_append(q, k, v, cache, slots, self.cos, self.sin).view(n, HEADS, DIM)
            spec = AttentionSpec(DIM**-0.5)
            o = split_decode.decode(q, cache, self.lengths, self.table, spec, splits=4)
            h = small_gemm.run(o.view(n, -1), self.out[i], Around(residual=h), split)
            m = small_gemm.run(h, self.gate_up[i], normed._replace(gated=True), wide)
            h = small_gemm.run(m, self.down[i], Around(residual=h), split)
        return h


@pytest.mark.parametrize("batch", [2, 32, 128])
def test_replays_are_those_of_launches_one_after_the_other(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 replays with other inputs and lengths, bit for bit, caches included."""
    if not overlap.options(DEVICE, 2)["OVERLAPS"]:
        pytest.skip("needs compute capability 9.0 and a triton that can overlap launches")
    layers, generator = Layers(batch), torch.Generator().manual_seed(0)
    layers.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layers.run()
    for _ in range(60):
        layers.x.copy_(torch.randn(layers.x.shape, generator=generator))
        layers.lengths.copy_(torch.randint(1, MAX_LEN, (batch,), generator=generator))
        before = layers.caches.clone()
        graph.replay()
        after = layers.caches.clone()
        layers.caches.copy_(before)
        with monkeypatch.context() as patch:
            patch.setattr(overlap, "options", lambda *_, **__: {"OVERLAPS": False})
            expected = layers.run()
        assert bool(torch.isfinite(expected).all())
        assert torch.equal(replayed, expected)
        assert torch.equal(after, layers.caches)
