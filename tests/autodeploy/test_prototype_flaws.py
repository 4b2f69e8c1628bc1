"""The flaws of the first prototype of this backend, one test each, which fails if the flaw comes back.

The prototype: a public branch of January 2026, custom_ops/flashinfer_trtllm_attention.py at 837577af, with
the test test_flashinfer_trtllm.py at f8d1f680.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ad_flashinfer_pass.autodeploy_hook import PACKAGES
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels.attention import reference, select
from ad_flashinfer_pass.kernels.attention.provider import Provider
from tests.autodeploy import scenario, standin
from tests.autodeploy.standin import GENERATIONS, Generation, capture, interface

E5, E6 = GENERATIONS
PAGE, HEADS, KV_HEADS, DIM, MAX_BATCH, WIDTH = 8, 4, 2, 16, 6, 6
POISON = 100.0


@pytest.fixture
def ad() -> Iterator[Any]:
    """The plugin on the newest generation."""
    with standin.installed(E6):
        yield standin.plugin()


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insertion as on a machine without a GPU, wherever the test runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Batch:
    """Random tokens over random pages, on the CPU, for the plugin's ops, and SDPA to compare with.

    Args:
        lengths: (tokens in the cache, new tokens), ordered prefill, decode.
        pages: of each sequence; default: shuffled, page 0 among them.
        padding: tokens after the last.
    """

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        pages: list[list[int]] | None = None,
        padding: int = 0,
        kv_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        order = torch.randperm(64, generator=generator).tolist()
        order.remove(0)
        counts = [-(-(past + n) // PAGE) for past, n in lengths]
        self.pages = pages or [[order.pop() for _ in range(n)] for n in counts]
        new = [n for _, n in lengths]
        self.num_tokens = sum(new)
        self.is_decode = all(n == 1 for n in new)
        total = self.num_tokens + padding
        shape = (total, 1) if self.is_decode else (1, total)
        self.q, self.k, self.v = (
            torch.randn(*shape, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        num_decode = next((i for i, n in enumerate(reversed(new)) if n != 1), len(new))
        long = len(new) - num_decode
        info = [
            long,
            sum(new[:long]),
            0,
            0,
            num_decode,
            num_decode,
            WIDTH * PAGE,
            WIDTH,
            2,
            MAX_BATCH,
            *[0] * 4,
        ]
        self.info = torch.tensor(info, dtype=torch.int32)
        self.cu_seqlen = self._full([0, *accumulate(new)], MAX_BATCH + 1)
        self.seq_len_with_cache = self._full([past + n for past, n in lengths], MAX_BATCH)
        self.cache_loc = self._full([p for one in self.pages for p in one], MAX_BATCH * WIDTH + 40)
        self.cu_num_pages = self._full([0, *accumulate(map(len, self.pages))], MAX_BATCH + 1)
        pool = torch.full((64, 3, 2, KV_HEADS, PAGE, DIM), POISON).to(kv_dtype)
        self.pool, self.kv_cache = pool, pool[:, 1]
        self.past = [torch.randn(2, KV_HEADS, past, DIM, generator=generator) for past, _ in lengths]
        for kept, one in zip(self.past, self.pages, strict=True):
            for i in range(kept.shape[2]):
                self.kv_cache[one[i // PAGE], :, :, i % PAGE] = kept[:, :, i].to(kv_dtype)

    @staticmethod
    def _full(values: list[int], size: int) -> Tensor:
        """At full capacity, with a tail that is stale."""
        return torch.tensor([*values, *range(3, 3 + size - len(values))], dtype=torch.int32)

    def prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        op = torch.ops.auto_deploy.flashinfer_trtllm_attention_prepare_metadata.default
        return op(self.info, self.cu_seqlen, self.seq_len_with_cache, self.cache_loc, self.cu_num_pages)

    def table(self) -> Tensor:
        """The block table, in its shape."""
        return self.prepare()[0][: MAX_BATCH * WIDTH].view(MAX_BATCH, WIDTH)

    def attend(self, prepared: Any = None, **options: Any) -> Tensor:
        op = torch.ops.auto_deploy.flashinfer_trtllm_attention_mha_with_cache.default
        prepared = prepared or self.prepare()
        metadata = (self.info, self.cu_seqlen, self.seq_len_with_cache, *prepared)
        return op(
            self.q, self.k, self.v, *metadata, self.kv_cache, options.pop("scale", DIM**-0.5), **options
        )

    def expected(self, window: int | None = None) -> Tensor:
        """SDPA over each sequence's own tokens; [tokens, heads, dim]."""
        outs, start = [], 0
        for (past, n), kept in zip(self.lengths, self.past, strict=True):
            rows = slice(start, start + n)
            k, v = (
                torch.cat((kept[i], x.flatten(0, 1)[rows].transpose(0, 1)), 1)
                for i, x in enumerate((self.k, self.v))
            )
            q = self.q.flatten(0, 1)[rows].transpose(0, 1)
            i, j = torch.arange(past, past + n)[:, None], torch.arange(past + n)
            mask = (j <= i) & (j > i - (window or past + n))
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)[0]
            outs.append(out.transpose(0, 1))
            start += n
        return torch.cat(outs)

    def check(self, got: Tensor, **options: Any) -> None:
        torch.testing.assert_close(got.flatten(0, 1)[: self.num_tokens], self.expected(**options))


MIXED = [(0, 11), (0, 3), (9, 4), (17, 1), (8, 1)]


def attention_node(generation: Generation, heads: int = 4, dim: int = 64, **options: Any) -> fx.Node:
    """One source attention, with shapes."""

    class One(nn.Module):
        def forward(self, x: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
            q, k, v = x.split([heads, 2, 2], 2)
            extra = {"sinks": sinks} if options.get("sinks") else {}
            extra |= {"attn_mask": mask} if options.get("attn_mask") else {}
            given = {"is_causal": True, "layout": "bsnd", **options, **extra}
            if generation.layer_idx:
                given.setdefault("layer_idx", 7)
            return torch.ops.auto_deploy.torch_attention.default(q, k, v, **given)

    gm = fx.symbolic_trace(One())
    dtype = torch.bfloat16
    x = torch.zeros(1, 4, heads + 4, dim, dtype=dtype)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and "torch_attention" in str(n.target)]
    with FakeTensorMode():
        for node in nodes[0].args:
            width = {0: heads}.get(list(nodes[0].args).index(node), 2)
            node.meta["val"] = torch.zeros(1, 4, width, dim, dtype=dtype)
    assert x.dtype is dtype
    return nodes[0]


CONFIG = SimpleNamespace(dtype="auto", tokens_per_block=32)


def test_flaw_01_real_page_id_0_taken_for_padding(ad: Any) -> None:
    """Page 0 is a page: first, in the middle or alone."""
    for pages in ([[5, 0, 9], [3]], [[0, 5, 9], [3]], [[5, 9, 7], [0]]):
        batch = Batch([(0, 20), (4, 1)], pages)
        table = batch.table()
        assert [table[i, : len(one)].tolist() for i, one in enumerate(pages)] == pages
        batch.check(batch.attend())


def test_flaw_02_sequences_counted_by_the_shape_of_input_ids(ad: Any) -> None:
    """A flattened batch [1, total] holds as many sequences as batch_info_host says."""
    batch = Batch(MIXED)
    assert batch.q.shape[0] == 1
    _, rows, _ = batch.prepare()
    assert rows[: batch.num_tokens].tolist() == [i for i, (_, n) in enumerate(MIXED) for _ in range(n)]


def test_flaw_03_positions_from_the_total_of_the_batch(ad: Any) -> None:
    """Each token's position is its own sequence's."""
    batch = Batch(MIXED)
    _, _, positions = batch.prepare()
    expected = [p for past, n in MIXED for p in range(past, past + n)]
    assert positions[: batch.num_tokens].tolist() == expected


def test_flaw_04_prefill_through_the_decode_kernel(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prefill is right, and never reaches a decode function."""
    batch = Batch([(0, 11), (0, 3), (9, 4)])
    capability = select.PROVIDERS["reference"].capability
    monkeypatch.setitem(
        select.PROVIDERS, "reference", Provider(capability=capability, prefill=reference.prefill)
    )
    batch.check(batch.attend())


def test_flaw_05_lengths_rebuilt_from_input_pos(ad: Any) -> None:
    """Lengths and positions come from seq_len_with_cache; no op asks for input_pos."""
    packet = torch.ops.auto_deploy.flashinfer_trtllm_attention_prepare_metadata
    for op in (packet.default, ad.FlashInferTrtllmAttention.get_cached_attention_op()):
        assert "input_pos" not in [arg.name for arg in op._schema.arguments]
    # In a window's pool the length is the window's: 17 of 40 tokens are left, in 3 of 5 pages.
    batch = Batch([(16, 1)], [[7, 4, 9]])
    batch.check(batch.attend())


@pytest.mark.usefixtures("without_gpu")
def test_flaw_06_window_sinks_cap_mask_and_causality_ignored(ad: Any) -> None:
    """A window, sinks and a cap change the result as they must; a mask is refused."""
    batch = Batch(MIXED)
    batch.check(batch.attend(sliding_window=5), window=5)
    plain = batch.attend()
    assert not torch.allclose(batch.attend(logit_cap=0.5), plain)
    sunk = batch.attend(sinks=torch.full((HEADS,), 50.0))
    torch.testing.assert_close(sunk, torch.zeros_like(sunk))  # a sink that takes all the weight
    descriptor = ad.FlashInferTrtllmAttention
    node = attention_node(E6, attn_mask=True)
    with pytest.raises(UnsupportedError, match=r"of layer 7.*mask.*attn_backend"):
        descriptor.get_cache_initializers(node, CONFIG)
    node = attention_node(E6, sliding_window=9, logit_cap=30.0, sinks=True)
    descriptor.get_cache_initializers(node, CONFIG)
    constants = descriptor.get_constants(node)
    assert constants[1:3] == [9, 30.0]
    assert constants[3].name == "sinks"


@pytest.mark.usefixtures("without_gpu")
def test_flaw_07_fp8_cache_without_cast_or_check(ad: Any) -> None:
    """The cache's dtype is the config's; K and V are converted on the way in and saturate."""
    handler = ad.FlashInferTrtllmAttention.get_cache_initializers(
        attention_node(E6), SimpleNamespace(dtype="fp8", tokens_per_block=32)
    )["kv_cache"]
    assert handler.dtype is torch.float8_e4m3fn
    batch = Batch([(0, 5)], kv_dtype=torch.float8_e4m3fn)
    batch.k[0, 0, 0, 0] = 1e4
    assert not bool(batch.attend().isnan().any())
    assert float(batch.kv_cache[batch.pages[0][0], 0, 0, 0, 0]) == 448.0
    batch = Batch([(6, 1)], kv_dtype=torch.float8_e4m3fn)
    assert float((batch.attend().flatten(0, 1) - batch.expected()).abs().max()) < 0.15


def test_flaw_08_scale_none_passed_on(ad: Any) -> None:
    """The default scale is resolved once, at insertion, as is one that is given."""
    for scale, want in ((None, 64**-0.5), (0.25, 0.25)):
        node = attention_node(E6, scale=scale)
        ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)
        assert ad.FlashInferTrtllmAttention.get_constants(node)[0] == want


def test_flaw_09_forced_kernel_and_layout(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """HND, and the kernels that the ledger chooses; on a GPU for which it has none, the layer is refused."""
    descriptor, node = ad.FlashInferTrtllmAttention, attention_node(E6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(UnsupportedError, match="of layer 7: no TRT-LLM kernel can do its prefill here"):
        descriptor.get_cache_initializers(node, CONFIG)
    chosen = {"prefill": select.Choice("fmha_v2", ""), "decode": select.Choice("xqa", "")}
    monkeypatch.setattr(select, "choose", lambda site, phase, *_: chosen[phase])
    assert descriptor.get_cache_initializers(node, CONFIG)["kv_cache"].kv_layout == "HND"
    assert descriptor.get_constants(node)[5:7] == ["fmha_v2", "xqa"]


def test_flaw_10_separate_contiguous_caches(ad: Any) -> None:
    """One paged handler a layer, and a cache that is a strided view, written in place."""
    caches = ad.FlashInferTrtllmAttention.get_cache_initializers(attention_node(E6), CONFIG)
    assert {key: type(handler) for key, handler in caches.items()} == {"kv_cache": interface.WindowedHandler}
    batch = Batch(MIXED)
    assert not batch.kv_cache.is_contiguous()
    batch.check(batch.attend())
    assert bool((batch.pool[:, 0::2] == POISON).all()), "another layer's memory was written"


def test_flaw_11_needs_input_ids(ad: Any) -> None:
    """A graph of a vision-language model has inputs_embeds in their place."""
    schema = torch.ops.auto_deploy.flashinfer_trtllm_attention_prepare_metadata.default._schema
    assert "input_ids" not in [arg.name for arg in schema.arguments]
    assert "input_ids" not in ad.FlashInferTrtllmAttention.get_standard_metadata_args()


def test_flaw_12_padding_requests(ad: Any) -> None:
    """Rows of one dummy request, all on its page, leave the others right and are finite themselves."""
    batch = Batch([(12, 1), (3, 1), (0, 1), (0, 1)], [[4, 9], [2], [5], [5]])
    out = batch.attend().flatten(0, 1)
    torch.testing.assert_close(out[:2], batch.expected()[:2])
    assert bool(out.isfinite().all())
    changed = {p for p in range(64) if not bool((batch.kv_cache[p] == POISON).all())}
    assert changed == {4, 9, 2, 5}


class WithoutData:
    """The plugin's Python code on tensors without data (device meta): reading one on the host is an error.

    Launchers of kernels are replaced by functions that give results of the right shape; ``launches`` has
    their names.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lengths: list[tuple[int, int]]) -> None:
        pytest.importorskip("triton", reason="triton is not installed")
        from ad_flashinfer_pass.autodeploy import ops
        from ad_flashinfer_pass.kernels.attention import fmha_v2, xqa
        from ad_flashinfer_pass.kernels.cache import prepare_ragged_metadata, rope_append

        self.launches: list[str] = []
        self.ops: Any = ops
        self.batch = Batch(lengths)

        def launch(name: str, result: bool) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.launches.append(name)
                return torch.empty_like(args[0]) if result else None

            return call

        monkeypatch.setattr(ops, "_buffers", {})
        monkeypatch.setattr(prepare_ragged_metadata, "prepare", launch("prepare", False))
        monkeypatch.setattr(rope_append, "append", launch("append", False))
        decode = replace(xqa.PROVIDER, decode=launch("decode", True))
        prefill = replace(fmha_v2.PROVIDER, prefill=launch("prefill", True))
        monkeypatch.setitem(select.PROVIDERS, "xqa", decode)
        monkeypatch.setitem(select.PROVIDERS, "fmha_v2", prefill)

    def step(self) -> Tensor:
        b = self.batch
        metadata = [x.to("meta") for x in (b.cu_seqlen, b.seq_len_with_cache, b.cache_loc, b.cu_num_pages)]
        prepared = self.ops.prepare_metadata(b.info, *metadata)
        qkv = [x.to("meta") for x in (b.q, b.k, b.v)]
        kernels: dict[str, Any] = {"prefill_kernel": "fmha_v2", "decode_kernel": "xqa"}
        return self.ops.mha_with_cache(
            *qkv, b.info, *metadata[:2], *prepared, b.kv_cache.to("meta"), 0.25, **kernels
        )


def test_flaw_13_item_on_device_tensors(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and prefill run with no value of a device tensor ever read by the host."""
    for lengths in ([(12, 1), (3, 1)], MIXED):
        gpu = WithoutData(monkeypatch, lengths)
        out = gpu.step()
        assert out.shape == gpu.batch.q.shape


def test_flaw_14_item_in_fake_implementations(ad: Any) -> None:
    """Both ops propagate shapes under FakeTensors, for a batch of any lengths, with and without out=."""
    batch, mode = Batch(MIXED), FakeTensorMode()
    with mode:
        fake = {name: mode.from_tensor(x) for name, x in vars(batch).items() if isinstance(x, Tensor)}
        batch.__dict__.update(fake)
        out = batch.attend()
        assert out.shape == batch.q.shape
        assert batch.attend(out=torch.empty_like(batch.q)).shape == (0,)


def test_flaw_15_block_tables_of_the_capture(ad: Any) -> None:
    """The same memory holds the pages of each new step."""
    first = Batch([(12, 1), (3, 1)], [[4, 9], [2]])
    table, (flat, _, positions) = first.table(), first.prepare()
    assert table[0, :2].tolist() == [4, 9]
    second = Batch([(15, 1), (7, 1)], [[8, 1], [0]], seed=1)
    first.cache_loc.copy_(second.cache_loc)
    first.seq_len_with_cache.copy_(second.seq_len_with_cache)
    again, _, _ = first.prepare()
    assert again.data_ptr() == flat.data_ptr() == table.data_ptr()
    assert table[0, :2].tolist() == [8, 1]
    assert positions[:2].tolist() == [15, 7]


def test_flaw_16_block_table_as_wide_as_the_longest_sequence(ad: Any) -> None:
    """Width and addresses of what is prepared depend on capacities, not on a step's lengths."""
    batch = Batch([(12, 1), (3, 1)])
    prepared = batch.prepare()
    shapes, addresses = [x.shape for x in prepared], [x.data_ptr() for x in prepared]
    assert set(shapes) == {batch.cache_loc.shape}
    longer = Batch([(40, 1), (33, 1)])
    batch.cache_loc.copy_(longer.cache_loc)
    batch.cu_num_pages.copy_(longer.cu_num_pages)
    batch.seq_len_with_cache.copy_(longer.seq_len_with_cache)
    again = batch.prepare()
    assert [x.shape for x in again] == shapes
    assert [x.data_ptr() for x in again] == addresses


def test_flaw_17_longest_length_baked_from_the_sample(ad: Any) -> None:
    """What a capture with lengths of 1 bakes in is the deployment's bound."""
    from ad_flashinfer_pass.autodeploy import ops

    batch = Batch([(0, 1), (0, 1)])
    assert ops.Counts(batch.info).table(batch.prepare()[0]).shape == (MAX_BATCH, WIDTH)


def test_flaw_18_boolean_masks_as_indices(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No op of a step has a shape that depends on data: it could not run without any."""
    gpu = WithoutData(monkeypatch, MIXED)
    gpu.step()
    assert gpu.launches == ["prepare", "append", "prefill", "decode"]


@pytest.mark.parametrize("generation", [E5, E6], ids=str)
def test_flaw_19_names_and_out_that_piecewise_graphs_need(generation: Generation) -> None:
    """Both ops are dynamic in every table, with the right policy; out= is last, filled and not returned."""
    with standin.installed(generation):
        plugin = standin.plugin()
        utils = standin.importlib.import_module(f"{PACKAGES[0]}.compile.piecewise_utils")
        graph = fx.Graph()
        attention = graph.call_function(plugin.FlashInferTrtllmAttention.get_cached_attention_op())
        prepare = graph.call_function(
            plugin.FlashInferTrtllmAttention.get_prepare_extra_metadata_info(attention)[0]
        )
        policy = capture.DynamicOpPolicy
        assert capture.policy_of(utils, attention) is policy.OUT_BUFFER
        assert capture.policy_of(utils, prepare) is policy.EAGER
        assert attention.target._schema.arguments[-1].name == "out"  # type: ignore[union-attr]
        assert plugin.FlashInferTrtllmAttention.get_host_prepare_metadata_function() is None
    batch = Batch(MIXED, padding=7)
    out = torch.full_like(batch.q, float("nan"))
    assert batch.attend(out=out).numel() == 0
    batch.check(out)
    assert bool((out.flatten(0, 1)[batch.num_tokens :] == 0).all()), "padding must be zero"


def test_flaw_20_metadata_in_every_layer(ad: Any) -> None:
    """One metadata op for each pool, before the first layer; nothing else between the layers is ours."""
    model = scenario.Deployment(E6)
    ours = [n.target._opname for n in model.gm.graph.nodes if "flashinfer_trtllm" in str(n.target)]
    assert (
        ours
        == ["flashinfer_trtllm_attention_prepare_metadata"] * 2
        + ["flashinfer_trtllm_attention_mha_with_cache"] * 2
    )


def test_flaw_21_python_loop_over_sequences(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of one sequence and one of six launch the same kernels and call as many torch ops."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for lengths in ([(12, 1)], [(12, 1)] * 6):
        gpu = WithoutData(monkeypatch, lengths)
        with Count() as count:
            gpu.step()
        counts.append((gpu.launches, count.calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("generation", [E5, E6], ids=str)
def test_flaw_22_workspace_as_an_argument(generation: Generation) -> None:
    """The graph's inputs are AutoDeploy's and one cache a layer; workspaces belong to a device."""
    with standin.installed(generation):
        model = scenario.Deployment(generation)
        names = {str(n.target) for n in model.gm.graph.find_nodes(op="placeholder")}
        assert names - model.info.available_args == {"r0_kv_cache", "r1_kv_cache"}


def test_flaw_23_metadata_that_is_passed_and_unused(ad: Any) -> None:
    """Each tensor that the cached attention is given decides something."""
    lengths = [(9, 4), (12, 5), (17, 1)]
    want = Batch(lengths).attend()
    prepared = Batch(lengths).prepare()
    for index in range(3):
        batch = Batch(lengths)
        wrong = [x.clone() for x in prepared]
        wrong[index] = wrong[index].flip(0)
        assert not torch.allclose(batch.attend(tuple(wrong)), want), f"extra metadata {index} is unused"
    for name in ("cu_seqlen", "seq_len_with_cache"):
        batch = Batch(lengths)
        getattr(batch, name)[1] += 1
        assert not torch.allclose(batch.attend(prepared), want), f"{name} is unused"


def test_flaw_24_tests_that_cannot_fail(ad: Any) -> None:
    """A missing argument is an error, the registry is asked by its methods, and nothing is swallowed."""
    op = ad.FlashInferTrtllmAttention.get_cached_attention_op()
    batch = Batch(MIXED)
    with pytest.raises(RuntimeError, match="missing value for argument"):
        op(batch.q, batch.k, batch.v, batch.info)
    registry = standin.importlib.import_module(
        f"{PACKAGES[0]}.custom_ops.attention_interface"
    ).AttentionRegistry
    assert registry.has("flashinfer_trtllm")
    assert not hasattr(registry, "_registry")
    for path in Path(__file__).parent.rglob("*.py"):
        caught = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Try) and n.handlers]
        assert not caught, f"{path.name} catches exceptions"
