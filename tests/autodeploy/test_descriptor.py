"""What the descriptor refuses, and what its transform may and may not touch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import reference, select
from ad_flashinfer_pass.kernels.capability import Site
from tests.autodeploy import scenario, standin
from tests.autodeploy.standin import GENERATIONS
from tests.autodeploy.test_prototype_flaws import CONFIG, Batch, attention_node

E2, E2B, E3, E4, E5, E6 = GENERATIONS


@pytest.fixture
def ad() -> Iterator[Any]:
    """The plugin on the newest generation."""
    with standin.installed(E6):
        yield standin.plugin()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"attn_mask": True}, "the attention mask"),
        ({"is_causal": False}, "is_causal=False"),
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"layout": "bnsd"}, "match_attention_layout must run before"),
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
    with pytest.raises(UnsupportedError, match="left the rotation to the backend trtllm; disable it"):
        ad.FlashInferTrtllmAttention.get_cache_initializers(node, CONFIG)


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("capability", "options", "config"),
    [
        ((7, 0), {}, {}),
        ((9, 0), {"dim": 72}, {}),
        ((9, 0), {}, {"tokens_per_block": 24}),
        ((9, 0), {"heads": 512, "dim": 128}, {}),
    ],
    ids=["SM", "head size", "page size", "group"],
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


def test_a_page_size_that_only_the_cache_knows_is_checked_when_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 1.2 the config has no page size: the callable refuses, before the first forward."""
    with standin.installed(E2B):
        descriptor = standin.plugin().FlashInferTrtllmAttention
        module = importlib.import_module("ad_flashinfer_pass.autodeploy.descriptor")

        def choose(node: Any, site: Site) -> tuple[str, str]:
            if site.page_size not in (16, 32, 64, 128):
                raise UnsupportedError(f"page size {site.page_size}")
            return "reference", "reference"

        monkeypatch.setattr(module, "_choose", choose)
        node = attention_node(E2B)
        make = descriptor.get_cache_initializers(node, SimpleNamespace(dtype=None))["k_cache_and_v"]
        info = SimpleNamespace(page_size=64, num_pages=3, device=torch.device("cpu"))
        assert make(info).shape == (3, 2, 2, 64, 64)
        info.page_size = 8192
        with pytest.raises(UnsupportedError, match="page size 8192"):
            make(info)


def test_kernels_with_a_plan_get_a_new_table_in_every_step(ad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent table would be taken for that of the step before; within a step all layers share one."""
    seen: list[Tensor] = []

    def prefill(*args: Any) -> Tensor:
        seen.append(args[4])
        return reference.prefill(*args)

    monkeypatch.setitem(select.PROVIDERS, "fa2", SimpleNamespace(prefill=prefill))
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
        model = scenario.Deployment(E6, shared=True, fuse=True)
        assert model.fused == 2, "the layer that shares has no keys to rotate"
        first, second, third = (n for n in model.gm.graph.nodes if "mha_with_cache" in str(n.target))
        assert third.args[9] is first.args[9] is not second.args[9]
        # Whatever comes as its K and V, it must not get into the cache.
        third.args = (third.args[0], *second.args[1:3], *third.args[3:])
        model.gm.recompile()
        model.cm.initialize(24)
        assert len(model.cm.caches) == 2
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=4)
        scenario.morning(requests, extend=True)
        requests.check_untouched()


@pytest.mark.parametrize("generation", [E2, E6], ids=str)
def test_explicit_angles_are_fused_too(generation: standin.Generation) -> None:
    """cos and sin by token, made by cat((x, x)), as in transformers."""
    with standin.installed(generation), torch.no_grad():
        model = scenario.Deployment(generation, fuse=True, rope="explicit")
        assert model.fused == 2
        model.cm.initialize(24)
        requests = scenario.Requests(model, [75, 80, 140, 40], 24, seed=5)
        scenario.morning(requests)
        requests.check_untouched()


def test_angles_that_are_not_shown_to_repeat_are_left_alone(ad: Any) -> None:
    """Different angles in the two halves are no rotation that the kernel can do."""
    model = scenario.Model(E6, rope="explicit").to(scenario.DEVICE)
    gm = torch.fx.symbolic_trace(model)
    cats = [node for node in gm.graph.nodes if node.target is torch.ops.aten.cat.default]
    for node in cats:
        other = gm.graph.find_nodes(op="placeholder")[0]
        node.args = ([node.args[0][0], other], -1)
    registry = importlib.import_module(f"{standin.PACKAGE}.transform.interface").TransformRegistry
    gm, info = registry.transforms[ad.FUSE_ROPE]()._apply(gm, None, None, None)
    assert (info.num_matches, info.skipped) == (0, True)


def test_a_rotation_left_to_us_is_never_lost(ad: Any) -> None:
    """Where another backend is inserted after our transform, the first forward says so."""
    model = scenario.Model(E6).to(scenario.DEVICE)
    gm = torch.fx.symbolic_trace(model)
    ids = torch.zeros(1, 4, dtype=torch.int64, device=scenario.DEVICE)
    standin.insertion.propagate_shapes(gm, ids, ids)
    registry = importlib.import_module(f"{standin.PACKAGE}.transform.interface").TransformRegistry
    gm, info = registry.transforms[ad.FUSE_ROPE]()._apply(gm, None, None, None)
    assert info.num_matches == 2
    with pytest.raises(
        RuntimeError, match="left to the backend flashinfer_trtllm, and another one was inserted"
    ):
        gm(ids, ids)


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


def test_the_readme_has_the_size_of_the_plugin() -> None:
    """``wc -l`` of all that the plugin is."""
    root = Path(__file__).parent.parent.parent
    files = [
        *(root / "ad_flashinfer_pass/autodeploy").glob("*.py"),
        root / "ad_flashinfer_pass/autodeploy_hook.py",
    ]
    lines = sum(file.read_text().count("\n") for file in files)
    assert f"autodeploy_hook.py`: {lines} lines" in (root / "README.md").read_text()
