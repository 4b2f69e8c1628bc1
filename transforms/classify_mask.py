"""Mask subgraphs -> attributes of the attention op.

Before: attention(q, k, v, mask)
After:  attention(q, k, v, None, is_causal=True, sliding_window=W, chunk=C, alibi_slopes=slopes)

Legal because ``masks.prove`` showed the mask's own program to be equal to the closed form at every length
up to max_seq_len; a mask that it cannot prove stops the pass. ALiBi becomes a float32 buffer of one slope
a head, ``alibi_slopes_0``, which layers with the same slopes share. Masks that are computed by the same
steps are proved once. The mask's nodes then die.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import fx, nn

from ad_flashinfer_pass import masks
from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register


@register("classify_mask")
def classify_mask(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Prove every mask and move its meaning into the op.

    Raises:
        MaskError: a mask is unknown, or a site attends to later tokens.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("classify_mask")
    proved: dict[fx.Node, masks.Certificate] = {}
    by_steps: dict[Hashable, masks.Certificate] = {}
    slopes: dict[tuple[float, ...], fx.Node] = {}
    op = torch.ops.ad_flashinfer.attention.default
    for node in model.graph.find_nodes(op="call_function", target=op):
        args = g.op_args(node)
        mask = args["attn_mask"]
        if mask is None:
            if not args["is_causal"]:
                raise MaskError(
                    f"{g.where(node)}: this attention has no mask, so each token sees later ones; only "
                    "causal attention has a cache. Encoders and cross-attention are not supported.",
                    node=node,
                )
            continue
        if mask not in proved:
            steps = _fingerprint(mask)
            if steps not in by_steps:
                by_steps[steps] = _proved(mask, ctx.sequence_info.max_seq_len)
                report.notes.append(f"{g.where(mask)}: {by_steps[steps]}")
            proved[mask] = by_steps[steps]
        _apply(model, node, proved[mask], slopes)
        report.num_matches += 1
    if report.num_matches:
        g.finish(model)
    return model, report


def _proved(mask: fx.Node, max_seq_len: int) -> masks.Certificate:
    try:
        return masks.prove(mask, max_seq_len)
    except MaskError as err:
        err.node = mask
        raise


def _fingerprint(mask: fx.Node) -> Hashable:
    try:
        return masks.fingerprint(mask)
    except MaskError as err:
        err.node = mask
        raise


def _apply(
    gm: fx.GraphModule,
    node: fx.Node,
    certificate: masks.Certificate,
    slopes: dict[tuple[float, ...], fx.Node],
) -> None:
    """Put the class of a site's mask in place of the mask."""
    args, found = g.op_args(node), certificate.mask_class
    if args["sinks"] is not None and certificate.shifts_rows:
        raise MaskError(
            f"{g.where(node)}: the attention mask adds a number to whole rows, which changes the share of "
            "the attention sinks; a mask beside sinks must add 0 to the query's own logit."
        )
    if "site_notes" in node.meta:
        node.meta["site_notes"].mask = str(certificate)
    options: dict[str, int | fx.Node | None] = {"sliding_window": found.sliding_window, "chunk": found.chunk}
    if found.alibi_slopes is not None:
        options["alibi_slopes"] = _slopes_of(gm, node, found.alibi_slopes, slopes)
    node.args = (*node.args[:3], None, True)
    node.kwargs = {**node.kwargs, **{name: value for name, value in options.items() if value is not None}}


def _slopes_of(
    gm: fx.GraphModule, site: fx.Node, values: tuple[float, ...], known: dict[tuple[float, ...], fx.Node]
) -> fx.Node:
    """A buffer of one slope a query head, on the device of the query."""
    query = g.op_args(site)["query"]
    num_heads = g.shape(query)[2]
    if len(values) == 1:
        values *= int(num_heads)
    if len(values) != num_heads:
        raise MaskError(
            f"{g.where(site)}: an ALiBi mask must have one slope for each of the {num_heads} query heads, "
            f"got {len(values)}."
        )
    if values not in known:
        tensor = torch.tensor(values, dtype=torch.float32, device=g.value(query).device)
        with gm.graph.inserting_before(site):
            known[values] = g.add_attribute(gm, f"alibi_slopes_{len(known)}", tensor)
    return known[values]
