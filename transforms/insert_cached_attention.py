"""``attention`` -> metadata, append and attend over the pages.

Before: out = attention(q, k, v, None, True, scale=c, ...)
After:  block_table, slot_mapping = prepare_metadata(position_ids, ...)        once a graph
        append_kv(k, v, slot_mapping, kv_cache_i)                               once a (k, v) pair
        out = cached_attention(q, kv_cache_i, ..., block_table, c, ...)

A latent, whose V is the first part of K (``cache_latent``), has one row a token in its pool, with K's scale.

Legal because the mask was proved to be the causal, windowed or chunked one that the kernel applies, and the
ledger found a kernel that honours every other item of the site. Sites that read the same k and v (layers
that share a cache) share one pool and one append. New graph inputs: the metadata by name, then
kv_cache_0, kv_cache_1, ...

sequence_length(position_ids) becomes one more input, ``sequence_lengths``, where the graph has it.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass.config import InsertCachedAttention
from ad_flashinfer_pass.errors import ConfigError, NoAttentionError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.ops import STATES
from ad_flashinfer_pass.records import (
    CachedSite,
    KvCacheResource,
    SiteNotes,
    TransformContext,
    TransformReport,
)
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.sequence_info import METADATA_ARGS

_ITEMS = ("sliding_window", "logit_cap", "chunk", "sinks", "alibi_slopes", "key_up", "value_up")
_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@register("insert_cached_attention")
def insert_cached_attention(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Give every attention site its cache.

    Raises:
        UnsupportedError: no kernel covers a site; says which item each kernel lacks.
        NoAttentionError: there is no canonical attention in the graph.
        ConfigError: k_scale or v_scale has not one number a cache.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("insert_cached_attention")
    op = torch.ops.ad_flashinfer.attention.default
    sites = list(model.graph.find_nodes(op="call_function", target=op))
    if not sites and not any(g.is_op(node, *STATES) for node in model.graph.nodes):
        raise NoAttentionError(
            "no ad_flashinfer.attention in the graph: enable match_attention before this transform."
        )
    info = ctx.sequence_info
    info.max_extend_len = ctx.config.settings(InsertCachedAttention).max_extend_len
    if info.num_drafts:
        info.max_extend_len = 1 + info.num_drafts
    scales = _scales(ctx, list(dict.fromkeys(cache_pair(node) for node in sites)))
    inputs = _insert_inputs(model, ctx)
    if sites:
        block_table, slot_mapping = _insert_block_table(model, ctx, inputs)
    caches: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in sites:
        _insert_site(model, ctx, node, caches, scales, inputs, block_table, slot_mapping)
        report.num_matches += 1
    _cancel_transposes(model.graph)
    report.notes.append(f"{len(sites)} sites, {len(ctx.resources)} caches")
    report.notes += _choices(ctx.sites)
    if ctx.sequence_info.max_extend_len:
        report.notes += _extends(ctx)
    g.finish(model)
    return model, report


def _insert_inputs(gm: fx.GraphModule, ctx: TransformContext) -> dict[str, fx.Node]:
    examples = ctx.sequence_info.named_args()
    inputs = {name: g.add_input(gm, name, examples[name]) for name in METADATA_ARGS}
    _insert_lengths(gm, ctx)
    return inputs


def _insert_block_table(
    gm: fx.GraphModule, ctx: TransformContext, inputs: dict[str, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    position_ids: fx.Node = next(node for node in placeholders if node.name == "position_ids")
    info = ctx.sequence_info
    first = placeholders[-1]
    if g.value(position_ids).dim() > 2:  # one position for each axis of an image: their number is that of one
        with gm.graph.inserting_after(first):
            first = position_ids = g.call_op(gm.graph, torch.ops.aten.select.int, position_ids, 0, 0)
    with gm.graph.inserting_after(first):
        prepared = g.call_op(
            gm.graph,
            torch.ops.ad_flashinfer.prepare_metadata.default,
            position_ids,
            inputs["batch_info_host"],
            inputs["cu_seqlen"],
            inputs["input_pos"],
            inputs["cache_loc"],
            inputs["cu_num_pages"],
            info.max_blocks_per_seq,
            info.tokens_per_block,
        )
    with gm.graph.inserting_after(prepared):
        slot_mapping = g.call_op(gm.graph, operator.getitem, prepared, 1)
        block_table = g.call_op(gm.graph, operator.getitem, prepared, 0)
    return block_table, slot_mapping


def _insert_lengths(gm: fx.GraphModule, ctx: TransformContext) -> None:
    """The input ``sequence_lengths`` in place of ``sequence_length``."""
    op = torch.ops.ad_flashinfer.sequence_length.default
    nodes = gm.graph.find_nodes(op="call_function", target=op)
    if not nodes:
        return
    ctx.sequence_info.has_lengths = True
    lengths = g.add_input(gm, "sequence_lengths", ctx.sequence_info.named_args()["sequence_lengths"])
    lengths.meta["val"] = g.value(nodes[0])
    for node in nodes:
        g.replace(node, lengths)


def _insert_site(
    gm: fx.GraphModule,
    ctx: TransformContext,
    node: fx.Node,
    caches: dict[tuple[fx.Node, fx.Node], fx.Node],
    scales: dict[tuple[fx.Node, fx.Node], tuple[float, float]],
    inputs: dict[str, fx.Node],
    block_table: fx.Node,
    slot_mapping: fx.Node,
) -> None:
    args = g.op_args(node)
    query, key, value = args["query"], args["key"], args["value"]
    pair = cache_pair(node)
    is_latent = _is_latent(key, value)
    k_scale, v_scale = scales[pair]
    both = (k_scale, k_scale if is_latent else v_scale)
    site = site_of(ctx, args, both, shares_kv=pair in caches, is_latent=is_latent)
    quantized = {name: s for name, s in zip(("k_scale", "v_scale"), both, strict=True) if s != 1.0}
    target = ctx.target or ctx.device
    prefill, decode = (
        select.choose(site, phase, target, g.where(node), ctx.sm) for phase in ("prefill", "decode")
    )
    limit, verify = ctx.sequence_info.max_extend_len, ""
    num_drafts = ctx.sequence_info.num_drafts
    if num_drafts and (verifiers := select.verifiers(site, num_drafts, target, ctx.sm)):
        verify = verifiers[0]
    with gm.graph.inserting_before(node):
        if pair not in caches:
            caches[pair] = _add_cache(gm, ctx, site)
            g.call_op(
                gm.graph,
                torch.ops.ad_flashinfer.append_kv.default,
                key,
                value,
                slot_mapping,
                caches[pair],
                **quantized,
            )
        options = {name: args[name] for name in _ITEMS if args[name] is not None}
        cached = g.call_op(
            gm.graph,
            torch.ops.ad_flashinfer.cached_attention.default,
            query,
            caches[pair],
            inputs["batch_info_host"],
            inputs["cu_seqlen"],
            inputs["seq_len_with_cache"],
            block_table,
            site.scale,
            site.v_head_dim,
            prefill_kernel=prefill.kernel,
            decode_kernel=decode.kernel,
            **options,
            **quantized,
            **({"max_extend_len": limit} if limit else {}),
            **({"verify_kernel": verify} if verify else {}),
        )
    g.copy_origin(cached, node)
    g.replace(node, cached)
    ctx.sites.append(
        CachedSite(
            where=g.where(cached),
            module=g.module_path(cached),
            notes=node.meta.get("site_notes", SiteNotes("ad_flashinfer.attention")),
            site=site,
            prefill=prefill,
            decode=decode,
            cache=caches[pair].name,
            verify=verify,
        )
    )


def _choices(sites: list[CachedSite]) -> list[str]:
    """Which kernel runs each phase, of how many sites, and why."""
    counts = Counter((phase, getattr(site, phase)) for site in sites for phase in ("prefill", "decode"))
    return [f"{phase}: {kernel}, {n} sites: {why}" for (phase, (kernel, why)), n in counts.items()]


def _extends(ctx: TransformContext) -> list[str]:
    """What runs extends that are no longer than the limit, or drafts, of how many sites."""
    kernels = Counter(
        site.verify or (site.decode if select.extender(site.decode.kernel) else site.prefill).kernel
        for site in ctx.sites
    )
    info = ctx.sequence_info
    what = f"extends of up to {info.max_extend_len} tokens"
    if info.num_drafts:
        what = f"{info.num_drafts} drafts of each sequence"
    return [f"{what}: {kernel}, {n} sites" for kernel, n in kernels.items()]


def _scales(
    ctx: TransformContext, pairs: list[tuple[fx.Node, fx.Node]]
) -> dict[tuple[fx.Node, fx.Node], tuple[float, float]]:
    """k_scale and v_scale of each cache, by the K and V that it holds."""
    columns = []
    for name in ("k_scale", "v_scale"):
        given = getattr(ctx.config.kv_cache_config, name)
        column = given if isinstance(given, list) else [given] * len(pairs)
        if len(column) != len(pairs):
            raise ConfigError(
                f"kv_cache_config.{name} must be one number, or one for each of the model's {len(pairs)} "
                f"caches, got {len(column)}; the checkpoint's are taken where the config has none. "
                "`ad-flashinfer-pass calibrate` makes them."
            )
        columns.append(column)
    return dict(zip(pairs, zip(*columns, strict=True), strict=True))


def _is_latent(key: fx.Node, value: fx.Node) -> bool:
    """Whether V is the first part of K."""
    if not g.is_op(value, torch.ops.aten.slice.Tensor):
        return False
    args = g.op_args(value)
    return args["self"] is key and args["dim"] % 4 == 3 and not args["start"] and args["step"] == 1


def site_of(ctx: TransformContext, args: dict[str, Any], scales: tuple[float, float], **items: bool) -> Site:
    """What an attention with these arguments asks of a kernel."""
    query, key, value = (g.value(args[name]) for name in ("query", "key", "value"))
    kv_dtype = _DTYPES.get(ctx.config.kv_cache_config.dtype, key.dtype)
    return Site.of(
        query,
        key,
        value,
        kv_dtype=kv_dtype,
        page_size=ctx.sequence_info.tokens_per_block,
        scale=args["scale"],
        k_scale=scales[0],
        v_scale=scales[1],
        sliding_window=args["sliding_window"],
        logit_cap=args["logit_cap"],
        chunk=args["chunk"],
        has_sinks=args["sinks"] is not None,
        has_alibi=args["alibi_slopes"] is not None,
        **items,
    )


def _add_cache(gm: fx.GraphModule, ctx: TransformContext, site: Site) -> fx.Node:
    resource = KvCacheResource(
        name=f"kv_cache_{len(ctx.resources)}",
        num_kv_heads=site.num_kv_heads,
        head_dim=max(site.head_dim, site.v_head_dim),
        page_size=site.page_size,
        dtype=site.kv_dtype,
        planes=1 if site.is_latent else 2,
    )
    ctx.resources.append(resource)
    # The page count is not known yet; nothing in the graph depends on it.
    return g.add_input(gm, resource.name, resource.allocate(2, torch.device("meta")))


def cache_pair(site: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What identifies the cache of a site: the K and V that it holds."""
    args = g.op_args(site)
    return _source(args["key"]), _source(args["value"])


def _source(node: fx.Node) -> fx.Node:
    """What a transpose of layout was made of: two sites share a cache if they read the same tensor."""
    return g.args(node)[0] if g.is_op(node, torch.ops.aten.transpose) else node


def _cancel_transposes(graph: fx.Graph) -> None:
    """transpose(transpose(x, 1, 2), 1, 2) -> x, which is how a change of layout and back looks."""
    transpose = torch.ops.aten.transpose.int
    for node in graph.find_nodes(op="call_function", target=transpose):
        inner = g.args(node)[0]
        if g.is_op(inner, transpose) and inner.args[1:] == node.args[1:]:
            node.replace_all_uses_with(g.args(inner)[0])
