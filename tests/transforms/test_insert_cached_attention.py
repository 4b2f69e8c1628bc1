"""``insert_cached_attention``: what it puts into the graph, that it computes the same, that errors show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, NoAttentionError, UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import reference, select
from ad_flashinfer_pass.kernels.attention.capability import Capability
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.records import TransformContext
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import METADATA_ARGS
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import (
    ATTENTION,
    HEAD_DIM,
    KV_HEADS,
    SCALE,
    Layer,
    SmallModel,
    additive,
    causal,
    context,
    count,
    eager,
    exported,
    find,
    run,
    sdpa,
    snapshot,
    softmax_with_sinks,
)

PREPARE = torch.ops.ad_flashinfer.prepare_metadata
APPEND = torch.ops.ad_flashinfer.append_kv
ATTEND = torch.ops.ad_flashinfer.cached_attention
MATCH = ("match_repeat_kv", "match_attention", "classify_mask")
WINDOW, CAP = 4, 2.0

everything = eager(
    scores=lambda q, k: torch.tanh(q @ k.transpose(2, 3) * SCALE / CAP) * CAP,
    mask=lambda x, p: x + additive(causal(p, WINDOW)),
    weights=softmax_with_sinks,
)


def windowed(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal(p, WINDOW), scale=SCALE, enable_gqa=True)


def inserted(model: SmallModel, ctx: TransformContext) -> fx.GraphModule:
    return run(exported(model, *MATCH, ctx=ctx), ctx, "insert_cached_attention")[0]


def test_nodes_and_inputs() -> None:
    """Metadata is prepared once, each layer appends and attends, and the inputs are in documented order."""
    ctx = context()
    gm = inserted(SmallModel(sdpa, windowed, sdpa), ctx)
    assert (count(gm, PREPARE), count(gm, APPEND), count(gm, ATTEND)) == (1, 3, 3)
    assert count(gm, ATTENTION) == 0
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    caches = [f"kv_cache_{i}" for i in range(3)]
    assert names == ["input_ids", "position_ids", *METADATA_ARGS, *caches]
    assert [resource.name for resource in ctx.resources] == caches


def test_resources_describe_the_pools() -> None:
    """Each declared cache has the heads, sizes and dtype of its layer and the page size of the config."""
    ctx = context(kv_cache_config={"tokens_per_block": 16, "dtype": "bfloat16"})
    inserted(SmallModel(sdpa), ctx)
    (resource,) = ctx.resources
    assert (resource.num_kv_heads, resource.head_dim, resource.page_size) == (KV_HEADS, HEAD_DIM, 16)
    assert resource.dtype == torch.bfloat16
    pool = resource.allocate(3, torch.device("cpu"))
    assert pool.shape == (3, 2, KV_HEADS, 16, HEAD_DIM)
    assert pool.dtype == torch.bfloat16
    assert not pool.any()
    assert resource.bytes_per_page == pool[0].numel() * 2


@pytest.mark.parametrize("k_scale", [0.25, [0.25, 0.5, 4.0]], ids=["one", "one_a_cache"])
def test_scales_of_an_8_bit_cache_reach_append_and_attend(k_scale: float | list[float]) -> None:
    """Each layer divides by the scales that it multiplies with, K's and V's each; 1.0 leaves no trace."""
    ctx = context(kv_cache_config={"tokens_per_block": 5, "dtype": "fp8", "k_scale": k_scale})
    gm = inserted(SmallModel(sdpa, sdpa, sdpa), ctx)
    wanted = k_scale if isinstance(k_scale, list) else [k_scale] * 3
    for node in (*find(gm, APPEND), *find(gm, ATTEND)):
        assert "v_scale" not in node.kwargs
    assert [g.op_args(node)["k_scale"] for node in find(gm, APPEND)] == wanted
    assert [g.op_args(node)["k_scale"] for node in find(gm, ATTEND)] == wanted
    assert all(resource.dtype == torch.float8_e4m3fn for resource in ctx.resources)


@pytest.mark.parametrize("limit", [1, 33, "4"])
def test_a_length_of_extends_that_no_kernel_has_is_refused(limit: object) -> None:
    """XQA's masks hold 2 to 32 tokens."""
    settings: Any = {"insert_cached_attention": {"max_extend_len": limit}}
    with pytest.raises(ConfigError, match=rf"max_extend_len: must be 0 or within 2\.\.32, got {limit!r}"):
        AutoDeployConfig(transforms=settings)


def test_drafts_have_a_kernel_of_their_own() -> None:
    """Every site knows how many tokens of a sequence are verified, and by which; the report says it."""
    ctx = context(speculative_config={"drafter": "ngram", "num_tokens": 2})
    gm, reports = run(exported(SmallModel(sdpa, sdpa), *MATCH, ctx=ctx), ctx, "insert_cached_attention")
    for node in find(gm, ATTEND):
        args = g.op_args(node)
        assert (args["max_extend_len"], args["verify_kernel"]) == (3, "reference")
    assert "2 drafts of each sequence: reference, 2 sites" in reports["insert_cached_attention"].notes


def test_as_many_scales_as_caches_are_needed() -> None:
    """A list of another length names the key, what is needed and what was given."""
    ctx = context(kv_cache_config={"dtype": "fp8", "v_scale": [1.0, 2.0]})
    with pytest.raises(
        ConfigError, match=r"kv_cache_config.v_scale must be one number, or .* 1 caches, got 2"
    ):
        inserted(SmallModel(sdpa), ctx)


def test_append_stands_before_attend_on_its_own_cache() -> None:
    """In the order of the graph each layer writes its cache before it reads it, from its own K and V."""
    gm = inserted(SmallModel(sdpa, sdpa), context())
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for append, attend in zip(find(gm, APPEND), find(gm, ATTEND), strict=True):
        written, read = g.op_args(append), g.op_args(attend)
        assert written["kv_cache"] is read["kv_cache"]
        assert order[append] < order[attend]
        assert g.module_path(written["key"]) == g.module_path(attend)


def test_every_item_of_a_site_reaches_the_op() -> None:
    """Scale, window, cap and sinks of the source op are arguments of the cached one, unchanged."""
    ctx = context()
    matched = exported(SmallModel(everything), *MATCH, ctx=ctx)
    source = g.op_args(find(matched, ATTENTION)[0])
    gm, _ = run(matched, ctx, "insert_cached_attention")
    args = g.op_args(find(gm, ATTEND)[0])
    assert args["sliding_window"] == WINDOW
    assert args["logit_cap"] == pytest.approx(CAP)
    assert args["scale"] == pytest.approx(SCALE)
    for name in ("scale", "sliding_window", "logit_cap", "chunk", "sinks", "alibi_slopes"):
        assert args[name] == source[name], name
    (site,) = ctx.sites
    assert (site.site.sliding_window, site.site.has_sinks) == (WINDOW, True)
    assert (site.prefill.kernel, site.decode.kernel, site.cache) == ("reference", "reference", "kv_cache_0")


def test_shared_k_and_v_have_one_cache_and_one_append() -> None:
    """Layers that read the K and V of another share its pool: one append, before the first of them."""
    model, ctx = SmallModel(sdpa, windowed, sdpa, shares_kv=True), context()
    gm = inserted(model, ctx)
    assert (count(gm, APPEND), count(gm, ATTEND), len(ctx.resources)) == (1, 3, 1)
    (append,) = find(gm, APPEND)
    nodes = list(gm.graph.nodes)
    assert all(nodes.index(append) < nodes.index(attend) for attend in find(gm, ATTEND))
    assert [site.site.shares_kv for site in ctx.sites] == [False, True, True]
    assert_serves_like(cached(model), model)


@pytest.mark.parametrize(
    "attends",
    [(sdpa,), (windowed,), (everything,), (sdpa, everything, windowed)],
    ids=["causal", "window", "window_cap_sinks", "chain"],
)
def test_numerics_are_preserved(attends: tuple[Any, ...]) -> None:
    """Served from pages, in mixed batches, the model gives the logits that it gave densely."""
    model = SmallModel(*attends)
    assert_serves_like(cached(model), model)


def test_result_with_several_users_is_replaced_everywhere() -> None:
    """All that read the attention's result read the cached one."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        out = sdpa(layer, q, k, v, p)
        return out + out.sin() + q

    model = SmallModel(attend)
    assert_serves_like(cached(model), model)


def test_report_counts_sites_and_caches() -> None:
    """The report has one match a site, and says how many caches they need."""
    ctx = context()
    gm = exported(SmallModel(sdpa, sdpa, shares_kv=True), *MATCH, ctx=ctx)
    _, reports = run(gm, ctx, "insert_cached_attention")
    report = reports["insert_cached_attention"]
    assert (report.num_matches, report.skipped, report.notes[0]) == (2, [], "2 sites, 1 caches")


def test_report_says_which_kernel_runs_each_phase_and_why() -> None:
    """One note for each phase and choice, with the number of sites and the reason."""
    ctx = context()
    gm = exported(SmallModel(sdpa, windowed), *MATCH, ctx=ctx)
    _, reports = run(gm, ctx, "insert_cached_attention")
    notes = reports["insert_cached_attention"].notes[1:]
    for note, phase in zip(notes, ("prefill", "decode"), strict=True):
        assert note.startswith(f"{phase}: reference, 2 sites: covers every item of the site; not xqa: ")


def test_each_phase_has_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that declares one phase gets that one, and the reference the other."""
    fast = Provider(capability=Capability(name="fast", phases=frozenset({"decode"})))
    monkeypatch.setattr(select, "PROVIDERS", {"fast": fast, "reference": reference.PROVIDER})
    gm = inserted(SmallModel(sdpa), context())
    args = g.op_args(find(gm, ATTEND)[0])
    assert (args["prefill_kernel"], args["decode_kernel"]) == ("reference", "fast")


def test_graph_without_canonical_attention_is_refused_and_unchanged() -> None:
    """Without match_attention there is nothing to insert for, which is an error that says so."""
    gm, ctx = exported(SmallModel(sdpa)), context()
    before = snapshot(gm)
    with pytest.raises(NoAttentionError, match="enable match_attention before this transform"):
        run(gm, ctx, "insert_cached_attention")
    assert snapshot(gm) == before
    assert ctx.resources == []


def test_a_site_that_no_kernel_covers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the ledger refuses a site the pass stops with its node, its line and the item."""
    limited = Provider(capability=Capability(name="limited", logit_cap=False))
    monkeypatch.setattr(select, "PROVIDERS", {"limited": limited})
    with pytest.raises(UnsupportedError) as raised:
        inserted(SmallModel(sdpa, everything), context())
    message = str(raised.value)
    assert message.startswith("node attention_default_1 (")
    assert "small_models.py:" in message
    assert "for prefill on cpu (limited: logit_cap)" in message


# What a broken rewrite would do. Each must show in the numerics, or the tests above prove nothing.


def set_argument(name: str, change: Callable[[Any], Any]) -> Callable[[fx.GraphModule], None]:
    """Change one argument of every cached_attention."""

    def mutate(gm: fx.GraphModule) -> None:
        for node in find(gm, ATTEND):
            arguments = g.op_args(node)
            arguments[name] = change(arguments[name])
            node.args, node.kwargs = (), arguments

    return mutate


def swap_k_and_v(gm: fx.GraphModule) -> None:
    for node in find(gm, APPEND):
        key, value, *rest = node.args
        node.args = (value, key, *rest)


def read_the_first_layers_cache(gm: fx.GraphModule) -> None:
    first, *others = find(gm, ATTEND)
    for node in others:
        node.update_arg(1, first.args[1])


def append_to_the_first_layers_cache(gm: fx.GraphModule) -> None:
    first, *others = find(gm, APPEND)
    for node in others:
        node.update_arg(3, first.args[3])


def append_after_attend(gm: fx.GraphModule) -> None:
    for append, attend in zip(find(gm, APPEND), find(gm, ATTEND), strict=True):
        attend.append(append)


def forget_to_append(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(find(gm, APPEND)[1])


def append_one_slot_late(gm: fx.GraphModule) -> None:
    for node in find(gm, APPEND):
        with gm.graph.inserting_before(node):
            late = gm.graph.call_function(torch.roll, (node.args[2], 1))
        node.update_arg(2, late)


def take_the_next_layers_query(gm: fx.GraphModule) -> None:
    first, second = find(gm, ATTEND)
    second.update_arg(0, first.args[0])


MUTATIONS: dict[str, Callable[[fx.GraphModule], None]] = {
    "scale_dropped": set_argument("scale", lambda scale: 1.0),
    "default_scale": set_argument("scale", lambda scale: HEAD_DIM**-0.5),
    "window_dropped": set_argument("sliding_window", lambda window: None),
    "window_one_wider": set_argument("sliding_window", lambda window: window + 1),
    "window_one_narrower": set_argument("sliding_window", lambda window: window - 1),
    "window_taken_for_chunk": set_argument("chunk", lambda chunk: WINDOW),
    "cap_dropped": set_argument("logit_cap", lambda cap: None),
    "cap_changed": set_argument("logit_cap", lambda cap: cap * 1.1),
    "sinks_dropped": set_argument("sinks", lambda sinks: None),
    "k_and_v_swapped": swap_k_and_v,
    "wrong_layers_cache_read": read_the_first_layers_cache,
    "wrong_layers_cache_written": append_to_the_first_layers_cache,
    "append_after_attend": append_after_attend,
    "append_forgotten": forget_to_append,
    "append_one_slot_late": append_one_slot_late,
    "wrong_layers_query": take_the_next_layers_query,
}


@pytest.fixture(scope="module")
def two_layers() -> tuple[SmallModel, CachedModel]:
    model = SmallModel(everything, everything)
    return model, cached(model)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_rewrite_is_noticed(mutation: str, two_layers: tuple[SmallModel, CachedModel]) -> None:
    """The numerics check above fails for each way in which the rewrite could be wrong."""
    model, right = two_layers
    assert isinstance(right.module, fx.GraphModule)
    broken = fx.GraphModule(right.module, copy.deepcopy(right.module.graph))
    MUTATIONS[mutation](broken)
    broken.recompile()
    caches = {name: torch.zeros_like(pool) for name, pool in right.caches.items()}
    with pytest.raises(AssertionError, match="step "):
        assert_serves_like(CachedModel(broken, caches, right.sequence_info, right.vocab_size), model)


def test_the_right_rewrite_passes_the_same_check(two_layers: tuple[SmallModel, CachedModel]) -> None:
    """Without a mutation the check that the broken ones fail is met."""
    model, right = two_layers
    assert_serves_like(right, model)
