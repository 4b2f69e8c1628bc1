"""What the descriptor refuses, and what its transform may and may not touch."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels.attention import reference, select
from tests.autodeploy import scenario, standin
from tests.autodeploy.standin import GENERATIONS
from tests.autodeploy.test_prototype_flaws import CONFIG, MIXED, Batch, attention_node

E5, E6 = GENERATIONS


@pytest.fixture
def ad() -> Iterator[Any]:
    """The plugin on the newest generation."""
    with standin.installed(E6):
        yield standin.plugin()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"attn_mask": True}, "the attention mask"),
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"layout": "bnsd"}, "run match_attention_layout before"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_no_kernel_takes_is_refused_by_layer_with_a_way_out(
    ad: Any, options: dict[str, Any], word: str
) -> None:
    """At insertion, before anything is replaced, and never as an argument that lands in out=."""
    node = attention_node(E6, **options)
    with pytest.raises(UnsupportedError, match=f"of layer 7.*{word}.*attn_backend: flashinfer or trtllm"):
        ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)
    with pytest.raises(UnsupportedError, match=word):
        ad.FlashInferTrtllmAttention.get_constants(node)


@pytest.mark.parametrize("key", ["_trtllm_rope_info", "_trtllm_fused_qkv"])
def test_a_rotation_left_to_another_backend_is_refused(ad: Any, key: str) -> None:
    """fuse_rope_into_trtllm_attention takes the rotation out of the graph; nobody here would do it."""
    node = attention_node(E6)
    node.meta[key] = True
    with pytest.raises(UnsupportedError, match="a rotation left to the backend trtllm"):
        ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("capability", "options", "config"),
    [
        ((7, 0), {}, {}),
        ((9, 0), {"dim": 70}, {}),
        ((9, 0), {"heads": 512, "dim": 128}, {}),
    ],
    ids=["SM", "head size", "group"],
)
def test_what_the_kernels_of_a_gpu_lack_is_refused(
    ad: Any,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    options: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """On a GPU the reference, which waits for the device, is never the silent answer."""
    node = attention_node(E6, **options)
    on_gpu(monkeypatch, capability)
    wanted = SimpleNamespace(**{**vars(CONFIG), **config})
    with pytest.raises(
        UnsupportedError, match=r"of layer 7: no TRT-LLM kernel can do its (prefill|decode) here"
    ):
        ad.FlashInferTrtllmAttention.get_cache_initializers(node, wanted)


def test_kernels_with_a_plan_get_a_new_table_in_every_step(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent table would be taken for that of the step before; within a step all layers share one."""
    seen: list[Tensor] = []

    def prefill(*args: Any) -> Tensor:
        seen.append(args[4])
        return reference.prefill(*args)

    monkeypatch.setitem(select.PROVIDERS, "fa2", replace(select.PROVIDERS["fa2"], prefill=prefill))
    for seed in range(2):
        batch = Batch([(0, 11), (9, 4), (8, 1)], seed=seed)
        prepared = batch.prepare()
        for _layer in range(2):
            batch.check(batch.attend(prepared, prefill_kernel="fa2"))
    addresses = [table.data_ptr() for table in seen]
    assert addresses[0] == addresses[1] != addresses[2] == addresses[3]


def test_decode_by_a_kernel_with_a_plan_is_refused(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would renew its plan before a replay."""
    on_gpu(monkeypatch, (8, 0))
    chosen = select.Choice("fa2", "covers every item of the site")
    monkeypatch.setattr(select, "choose", lambda *_: chosen)
    with pytest.raises(UnsupportedError, match="no TRT-LLM kernel can do its decode here"):
        ad.FlashInferTrtllmAttention.get_cache_initializers(attention_node(E6), CONFIG)


def test_layers_may_share_a_cache() -> None:
    """A third layer that attends over the first one's keys appends nothing and equals the dense model."""
    with standin.installed(E6), torch.no_grad():
        model = scenario.Deployment(E6, shared=True)
        assert model.num_rotations == 1, "the layer that shares has no keys to rotate"
        first, second, third = (n for n in model.gm.graph.nodes if "mha_with_cache" in str(n.target))
        assert third.args[9] is first.args[9] is not second.args[9]
        # Whatever comes as its K and V, it must not get into the cache.
        third.args = (third.args[0], *second.args[1:3], *third.args[3:])
        model.gm.recompile()
        model.cm.initialize(24)
        assert len(model.cm.caches) == 2
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=4)
        scenario.morning(requests)
        requests.check_untouched()


@pytest.mark.parametrize("generation", GENERATIONS, ids=str)
@pytest.mark.parametrize("rope", ["explicit", "indexed", "two_calls"])
def test_every_form_of_the_explicit_rotation_is_fused(generation: standin.Generation, rope: str) -> None:
    """cos and sin by cat((x, x)), through an index into a buffer, for q and k in one call or two."""
    with standin.installed(generation), torch.no_grad():
        model = scenario.Deployment(generation, rope=rope)
        assert model.num_rotations == 0
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)
        requests.check_untouched()


@pytest.mark.skipif(torch.cuda.is_available(), reason="no kernel on a GPU has these head sizes")
@pytest.mark.parametrize("dim", [2, 6, 40, 80])
def test_any_even_head_size_is_rotated(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """optimize_rope leaves sizes that are no multiples of 64, and fp32, to the explicit op."""
    monkeypatch.setattr(scenario, "HEAD_DIM", dim)
    with standin.installed(E6), torch.no_grad():
        model = scenario.Deployment(E6, rope="indexed")
        assert model.num_rotations == 0
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)


def test_angles_that_are_not_shown_to_repeat_are_left_alone() -> None:
    """Different angles in the two halves are no rotation that the kernel can do: the op stays."""
    with standin.installed(E6), torch.no_grad():

        class Other(scenario.Model):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.register_buffer(
                    "sin", torch.cat((-self.table.chunk(2, -1)[1], self.table.chunk(2, -1)[1]), -1)
                )

        model = scenario.Deployment(E6, rope="indexed", model_class=Other)
        assert model.num_rotations == 2
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)


class Attention(scenario.Attention):
    """Whose rotation a test writes."""

    def explicit(self, *args: Any) -> Any:
        return torch.ops.auto_deploy.torch_rope_with_explicit_cos_sin.default(*args)

    def rows(self, positions: Tensor, *tables: Tensor) -> Any:
        return (torch.ops.aten.index.Tensor(table, [positions]) for table in tables)


class Written(Attention):
    """The halves of sin repeat until the graph turns the second one round, in a view."""

    def rotated(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, cos: Tensor, sin: Tensor
    ) -> Any:
        cos, sin = self.rows(positions, cos, sin)
        torch.ops.aten.neg_.default(torch.ops.aten.slice.Tensor(sin, -1, scenario.HEAD_DIM // 2))
        return scenario._pair(self.explicit(q, k, cos, sin, 2))


class WrittenBuffer(Attention):
    """As ``Written``, in a table that another node reads."""

    table: Tensor

    def rotated(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, cos: Tensor, sin: Tensor
    ) -> Any:
        torch.ops.aten.fill_.Scalar(torch.ops.aten.slice.Tensor(self.table, -1, scenario.HEAD_DIM // 2), 0.5)
        cos, sin = self.rows(positions, cos, self.table)
        return scenario._pair(self.explicit(q, k, cos, sin, 2))


class Backwards(Attention):
    """The results of the rotation are counted from the end."""

    def rotated(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor, cos: Tensor, sin: Tensor
    ) -> Any:
        rotated = self.explicit(q, k, *self.rows(positions, cos, sin), 2)
        return rotated[-2], rotated[-1]


class KeyIsValue(Attention):
    """The rotated K is V too."""

    def forward(self, x: Tensor, positions: Tensor, tables: Any, kv: Any) -> tuple[Tensor, Any]:
        sizes = [scenario.HEADS, scenario.KV_HEADS, scenario.KV_HEADS]
        q, k, _ = self.qkv(x).unflatten(-1, (-1, scenario.HEAD_DIM)).split(sizes, 2)
        q, k = self.rotated(q, k, positions, *tables)
        out = torch.ops.auto_deploy.torch_attention.default(
            q, k, k, sliding_window=self.window, layout="bsnd", **self.options
        )
        return self.out(out.flatten(2)), (k, k)


@pytest.mark.parametrize("generation", GENERATIONS, ids=str)
@pytest.mark.parametrize("kind", [Written, WrittenBuffer, Backwards, KeyIsValue], ids=lambda k: k.__name__)
def test_a_rotation_that_cannot_be_taken_out_is_left_alone(
    kind: type[Attention], generation: standin.Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op stays, and the answer is that of the model."""
    monkeypatch.setattr(scenario, "Attention", kind)

    class WithTables(scenario.Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for layer in self.layers:
                layer.register_buffer("table", self.get_buffer("sin").clone())

    with standin.installed(generation), torch.no_grad():
        model = scenario.Deployment(generation, rope="indexed", model_class=WithTables)
        assert model.num_rotations == 2
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)


def test_one_angle_for_all_sequences(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The explicit rotation spreads cos and sin [1, 1, dim] over the batch: a row for each token."""
    from ad_flashinfer_pass.autodeploy import ops

    seen: list[Any] = []
    append = ops.ragged.append

    def recorded(*args: Any) -> Tensor:
        seen.append(args[9])
        return append(*args)

    monkeypatch.setattr(ops.ragged, "append", recorded)
    batch = Batch([(9, 1), (8, 1), (3, 1)])
    angles = torch.full((1, 1, batch.q.shape[3]), 0.5)
    batch.attend(rope_cos=angles.cos(), rope_sin=angles.sin())
    assert [tuple(x.shape) for x in seen[0][:2]] == [(3, batch.q.shape[3] // 2)] * 2


@pytest.mark.parametrize("cap", [0.0, -1.0])
def test_a_cap_that_is_none_for_autodeploy_is_none(ad: Any, cap: float) -> None:
    """Its ops cap logits only above 0."""
    node = attention_node(E6, logit_cap=cap)
    ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)
    site, _ = node.meta[ad.BACKEND]
    assert site.logit_cap is None
    assert ad.FlashInferTrtllmAttention.get_constants(node)[:3] == [site.scale, None, None]


def test_a_rotation_that_something_else_reads_is_left_alone(ad: Any) -> None:
    """It could not be taken out."""

    class Reads(scenario.Model):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                y, (key, _) = layer(x, position_ids, (self.table, self.cos, self.sin), None)
                x = x + y + key.mean((2, 3), keepdim=True).flatten(2)
            return self.head(x)

    with torch.no_grad():
        model = scenario.Deployment(E6, model_class=Reads)
        assert model.num_rotations == 2
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)


@pytest.mark.parametrize("generation", GENERATIONS, ids=str)
def test_models_of_the_hugging_face_path(
    generation: standin.Generation, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers passes no is_causal there, and some configs say -1 for no window: causal, said once."""
    with standin.installed(generation), torch.no_grad(), caplog.at_level(logging.INFO):
        model = scenario.Deployment(generation, options={}, no_window=-1)
        said = [r.getMessage() for r in caplog.records if "is_causal" in r.getMessage()]
        assert said == ["is_causal=False without a mask, in 2 layers: they attend causally"]
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)
        requests.check_untouched()
    handlers = [handler.sliding_window for handler in model.cm._handlers.values()]
    assert handlers == ([0, scenario.WINDOW] if generation.window_pools else [0, 0])


def test_the_cap_of_a_transformers_model_reaches_the_op(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoDeploy hands on what stands in its table; Gemma2 calls its cap softcap."""
    unified: Any = importlib.import_module(f"{standin.PACKAGE}.export.library.unified_attn")
    mapping, passed = unified.HF_ATTN_KWARGS_MAPPING, []

    def wrapper(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        passed.append({mapping[name]: value for name, value in kwargs.items() if name in mapping})
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recorded", wrapper)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, attn_logit_softcapping=30.0,
    )  # fmt: skip
    config._attn_implementation = "recorded"
    with torch.no_grad():
        Gemma2ForCausalLM(config)(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False)
    assert [found["logit_cap"] for found in passed] == [30.0, 30.0]
    names = [arg.name for arg in torch.ops.auto_deploy.torch_attention.default._schema.arguments]
    assert all(name in names for found in passed for name in found)


def test_counts_on_the_device_are_refused(ad: Any) -> None:
    """AD_BATCH_INFO_DEVICE=1: a captured step could not read them."""
    from ad_flashinfer_pass.autodeploy import ops

    with pytest.raises(UnsupportedError, match="batch_info_host is on meta: unset AD_BATCH_INFO_DEVICE"):
        ops.Counts(torch.zeros(12, dtype=torch.int32, device="meta"))


def test_a_result_for_fp8_linears_is_quantized(ad: Any) -> None:
    """The transform fuse_trtllm_attn_quant_fp8 leaves their input scale at the attention."""
    node = attention_node(E6)
    owner: Any = torch.nn.Module()
    owner.scale = torch.tensor(0.125)
    node.graph.owning_module = owner
    with node.graph.inserting_before(node):
        node.meta["trtllm_attention_input_scale"] = node.graph.create_node("get_attr", "scale")
    ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)
    schema = ad.FlashInferTrtllmAttention.get_cached_attention_op()._schema.arguments
    names = [arg.name for arg in schema][10:]
    constants = ad.FlashInferTrtllmAttention.get_constants(node)
    assert dict(zip(names, constants, strict=False))["out_scale"] == 0.125
    assert len(constants) == len(names) - 1, "out= must be left unfilled"
    batch, plain = Batch(MIXED, padding=3), Batch(MIXED, padding=3).attend()
    got = batch.attend(out_scale=0.125)
    assert got.dtype is torch.float8_e4m3fn
    want = (plain * 8.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(got.float(), want.float())
    out = torch.full_like(got.float(), float("nan")).to(torch.float8_e4m3fn)
    Batch(MIXED, padding=3).attend(out_scale=0.125, out=out)
    assert torch.equal(out.float(), want.float())


def test_an_older_autodeploy_is_told_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2 and the snapshots before BatchInfo."""
    with standin.installed(E5):
        interface: Any = importlib.import_module(f"{standin.PACKAGE}.custom_ops.attention_interface")
        monkeypatch.delattr(interface, "BatchInfo")
        with pytest.raises(
            ImportError, match=r"no BatchInfo.*Upgrade tensorrt-llm.*attn_backend: flashinfer"
        ):
            standin.plugin()


def test_one_pool_where_the_metadata_of_others_would_be_missing() -> None:
    """Versions between E5 and E6 had pools by window and one metadata op: there all layers get one pool."""
    with standin.installed(E6):
        kvcache: Any = importlib.import_module(f"{standin.PACKAGE}.transform.library.kvcache")
        kvcache._InsertCachedOperator = standin.insertion.InsertByHandlers
        plugin = standin.plugin()
        node = attention_node(E6, sliding_window=9)
        handler = plugin.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)["kv_cache"]
        assert handler.sliding_window == 0
    with standin.installed(E6):
        handler = standin.plugin().FlashInferTrtllmAttention.get_cache_initializers(
            attention_node(E6, sliding_window=9), CONFIG
        )["kv_cache"]
        assert handler.sliding_window == 9


def test_the_plugin_stays_small() -> None:
    """``wc -l`` of all that the plugin is."""
    root = Path(__file__).parent.parent.parent
    files = [
        *(root / "ad_flashinfer_pass/autodeploy").glob("*.py"),
        root / "ad_flashinfer_pass/autodeploy_hook.py",
    ]
    assert sum(file.read_text().count("\n") for file in files) <= 450
