"""trtllm_gen against FlashInfer's own wrapper and its checks, with a formula in place of the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention import reference, trtllm_gen
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec

pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
if not (modules.has("0.6.18") and not modules.has("0.7.4")):
    pytest.skip("the launchers here are those of flashinfer-python 0.6.18 to 0.7.2", allow_module_level=True)

HEADS, KV_HEADS, DIM, PAGE, PAGES, WIDTH = 4, 2, 64, 16, 12, 5
SPECS = {
    "plain": AttentionSpec(0.2),
    "window": AttentionSpec(0.2, 9),
    "fp8": AttentionSpec(0.2, None, None, None, 0.5, 2.0),
}


class Kernel:
    """What FlashInfer's C++ entries do, by the arguments that its wrapper passes to them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def trtllm_paged_attention_decode(self, *args: Any) -> None:
        """Arguments of FlashInfer's launcher of decode."""
        out, _, query, k, v, scratch, counters, table, lens, max_q_len, max_kv_len, *rest = args
        qk_scale, v_scale, _, _, _, batch, window_left, _, _, enable_pdl, scratch_bytes, sinks = rest[:12]
        assert (max_q_len, batch, enable_pdl) == (1, query.shape[0], False)
        bounds = torch.arange(batch + 1, dtype=torch.int32)
        self._attend(out, query, k, v, table, lens, bounds, qk_scale, v_scale, window_left, sinks)
        self._check(scratch, counters, scratch_bytes, table, max_kv_len, lens)

    def trtllm_paged_attention_context(self, *args: Any) -> None:
        """Arguments of FlashInfer's launcher of prefill."""
        out, _, query, k, v, scratch, counters, table, lens, max_q_len, max_kv_len, *rest = args
        qk_scale, v_scale, _, _, _, batch, window_left, q_bounds, kv_bounds, _, enable_pdl, scratch_bytes = (
            rest[:12]
        )
        sinks, is_causal = rest[12], rest[19]
        assert (batch, enable_pdl, is_causal) == (len(lens), False, True)
        assert torch.equal(kv_bounds.diff(), lens)
        assert q_bounds.dtype == kv_bounds.dtype == torch.int32
        assert max_q_len >= q_bounds.diff().max()
        self._attend(out, query, k, v, table, lens, q_bounds, qk_scale, v_scale, window_left, sinks)
        self._check(scratch, counters, scratch_bytes, table, max_kv_len, lens)

    def _check(
        self,
        scratch: Tensor,
        counters: Tensor,
        scratch_bytes: int,
        table: Tensor,
        max_kv_len: int,
        lens: Tensor,
    ) -> None:
        assert scratch.nbytes == scratch_bytes
        assert not counters.any()
        assert (table.dtype, lens.dtype) == (torch.int32, torch.int32)
        assert lens.max() <= max_kv_len <= table.shape[1] * PAGE
        self.calls.append((max_kv_len,))

    @staticmethod
    def _attend(
        out: Tensor,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        table: Tensor,
        lens: Tensor,
        bounds: Tensor,
        qk_scale: float,
        v_scale: float,
        window_left: int,
        sinks: Tensor | None,
    ) -> None:
        """``window_left`` tokens before the current one are seen, -1: all."""
        for row, total in enumerate(lens.tolist()):
            start, end = bounds[row : row + 2].tolist()
            pages = table[row, : -(-total // PAGE)]
            k, v = (
                cache[pages].double().transpose(0, 1).flatten(1, 2)[:, :total].repeat_interleave(2, 0)
                for cache in (k_cache, v_cache)
            )
            position = torch.arange(total - (end - start), total)[:, None]
            key = torch.arange(total)
            hidden = (key > position) | ((window_left >= 0) & (key < position - window_left))
            logits = query[start:end].double().transpose(0, 1) @ k.transpose(1, 2) * qk_scale
            weights = logits.masked_fill(hidden, float("-inf")).exp()
            total_weight = weights.sum(-1, keepdim=True)
            if sinks is not None:
                assert sinks.dtype == torch.float32
                total_weight = total_weight + sinks.double().exp()[:, None, None]
            out[start:end] = (weights / total_weight @ v * v_scale).transpose(0, 1).to(out.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """FlashInfer's wrapper on CPU tensors, in front of the formula."""
    import flashinfer.decode
    import flashinfer.prefill

    ours = Kernel()
    for module, name in (
        (flashinfer.decode, "get_trtllm_gen_decode_module"),
        (flashinfer.decode, "get_trtllm_gen_fmha_module"),
        (flashinfer.prefill, "get_trtllm_gen_fmha_module"),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *args: ours)
    for module in (flashinfer.decode, flashinfer.prefill):
        monkeypatch.setattr(module, "get_device_sm_count", lambda device: 148)
    return ours


def batch(
    spec: AttentionSpec, lengths: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, cache, bounds of new tokens, lengths and block table."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(PAGES * 2, 2, KV_HEADS, PAGE, DIM, generator=generator)
    cache = cache.to(torch.float8_e4m3fn if spec.k_scale != 1.0 else torch.bfloat16)
    query = torch.randn(sum(new for _, new in lengths), HEADS, DIM, generator=generator).bfloat16()
    bounds = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0).int()
    lens = torch.tensor([past + new for past, new in lengths]).int()
    table = torch.randperm(PAGES * 2, generator=generator)[: len(lengths) * WIDTH].int().view(-1, WIDTH)
    return query, cache, bounds, lens, table


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_decode_passes_what_the_kernel_needs(name: str, has_sinks: bool, kernel: Kernel) -> None:
    """The arguments that reach the kernel make it compute what the reference does."""
    spec = SPECS[name]
    query, cache, _, lens, table = batch(spec, [(0, 1), (15, 1), (16, 1), (70, 1)])
    sinks = torch.randn(HEADS).bfloat16() if has_sinks else None
    args = (query, cache, lens, table, spec._replace(sinks=sinks))
    torch.testing.assert_close(trtllm_gen.decode(*args), reference.decode(*args), atol=0.02, rtol=0.02)
    assert kernel.calls == [(WIDTH * PAGE,)]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", ["plain", "window"])
def test_prefill_passes_what_the_kernel_needs(name: str, has_sinks: bool, kernel: Kernel) -> None:
    """Fresh prompts and chunks with a past; the bounds of the lengths do not depend on the step."""
    spec = SPECS[name]
    query, cache, bounds, lens, table = batch(spec, [(0, 20), (0, 2), (16, 30), (40, 3)])
    sinks = torch.randn(HEADS) if has_sinks else None
    args = (query, cache, bounds, lens, table, spec._replace(sinks=sinks))
    torch.testing.assert_close(trtllm_gen.prefill(*args), reference.prefill(*args), atol=0.02, rtol=0.02)
    assert kernel.calls == [(WIDTH * PAGE,)]


def test_a_failure_says_where_the_binaries_come_from(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network FlashInfer fails deep inside; the error names the kernel, the cause and the remedy."""

    def fails(*args: Any) -> None:
        raise RuntimeError("Artifact not found locally")

    monkeypatch.setattr(kernel, "trtllm_paged_attention_decode", fails)
    query, cache, _, lens, table = batch(SPECS["plain"], [(3, 1)])
    with pytest.raises(
        KernelError,
        match=r"trtllm_gen, decode: .* Artifact not found locally.* `flashinfer install-cubin-wheel` takes "
        r"flashinfer-cubin of the same version from .* GitHub \(those on PyPI end at 0.6.13\)",
    ):
        trtllm_gen.decode(query, cache, lens, table, SPECS["plain"])
