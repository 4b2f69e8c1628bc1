"""Decode attention runs the kernel that was measured to be the fastest, by batch size.

Before: out = cached_attention(q, kv_cache_i, ..., decode_kernel="xqa")
After:  out = cached_attention(q, kv_cache_i, ..., decode_kernel="xqa 1=split_decode/16 8=split_decode/8")

Legal because only providers are timed that cover every item of the site. Only where steps are captured.
``decode: NAME`` in its settings pins a provider for all sites, and nothing is timed.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass.config import TuneAttention
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.select import Choice
from ad_flashinfer_pass.kernels.attention.tune import Decode, kind_of
from ad_flashinfer_pass.kernels.measure import tune
from ad_flashinfer_pass.records import CachedSite, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes, verified_batches

_Place = tuple[fx.Node, CachedSite]


@register("tune_attention")
def tune_attention(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Measure the decode kernels of each site, and let the graph use what was found.

    Raises:
        UnsupportedError: the pinned provider does not cover a site; says which items it lacks.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("tune_attention")
    op = torch.ops.ad_flashinfer.cached_attention.default
    nodes = model.graph.find_nodes(op="call_function", target=op)
    places = list(zip(nodes, ctx.sites, strict=True))
    pinned = ctx.config.settings(TuneAttention).decode
    if pinned != "auto":
        for node, site in places:
            _pin(node, site, pinned, ctx)
            report.num_matches += 1
    elif ctx.device.type != "cuda" or ctx.config.compile_backend == "torch-simple":
        report.notes.append("steps are not captured: kernels as declared")
    elif not ctx.caches:
        report.notes.append("the pools are made elsewhere, nothing to time over: kernels as declared")
    else:
        for kind, same in _by_kind(places).items():
            _tune(kind, same, ctx, report)
    if report.num_matches:
        g.finish(model)
    return model, report


def _pin(node: fx.Node, site: CachedSite, name: str, ctx: TransformContext) -> None:
    refusals = select.PROVIDERS[name].capability.refusals(site.site, "decode", ctx.device)
    if refusals:
        raise UnsupportedError(
            f"{site.where}: transforms.tune_attention.decode is {name}, which cannot decode this site "
            f"({', '.join(refusals)}). Set it to auto, or to another provider."
        )
    site.decode = Choice(name, "pinned by transforms.tune_attention.decode")
    node.kwargs = {**node.kwargs, "decode_kernel": name}


def _by_kind(places: list[_Place]) -> dict[Site, list[_Place]]:
    kinds: dict[Site, list[_Place]] = {}
    for node, site in places:
        kinds.setdefault(kind_of(site.site), []).append((node, site))
    return kinds


def _tune(kind: Site, places: list[_Place], ctx: TransformContext, report: TransformReport) -> None:
    sizes, _ = bucket_sizes(ctx.config)
    pools = list({site.cache: ctx.caches[site.cache] for _, site in places}.values())
    plans, notes = tune(
        Decode(kind, pools, ctx.sequence_info.max_blocks_per_seq),
        sorted({*sizes, ctx.config.max_batch_size}),  # to which steps with prefill are padded
        lambda done, total: ctx.on_event(f"tune_attention: {done} of {total} batch sizes"),
    )
    report.notes += [f"{len(places)} sites, {note}" for note in notes]
    for node, _ in places:
        node.kwargs = {**node.kwargs, "decode_kernel": plans[kind]}
        report.num_matches += 1
    if not all(site.verify for _, site in places):
        return
    drafts = Decode(kind, pools, ctx.sequence_info.max_blocks_per_seq, ctx.sequence_info.num_drafts)
    plans, notes = tune(drafts, verified_batches(ctx.config))
    report.notes += [f"{len(places)} sites, {note}" for note in notes]
    for node, site in places:
        site.verify = plans[kind]
        node.kwargs = {**node.kwargs, "verify_kernel": plans[kind]}
