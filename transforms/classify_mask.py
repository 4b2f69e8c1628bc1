"""Mask subgraphs -> attributes of the attention op.

Before: attention(q, k, v, mask)
After:  attention(q, k, v, None, is_causal=True, sliding_window=W, chunk=C)

Legal because ``masks.prove`` ran the mask's own program and found it equal to the closed form; a mask
that it cannot prove stops the pass. The mask's nodes then die.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass import masks
from ad_flashinfer_pass.errors import MaskError
from ad_flashinfer_pass.registry import TransformContext, TransformReport, register


@register("classify_mask")
def classify_mask(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Prove every mask and move its meaning into the op.

    Raises:
        MaskError: a mask is unknown, or a site attends to later tokens.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("classify_mask")
    proved: dict[fx.Node, masks.Certificate] = {}
    op = torch.ops.ad_flashinfer.attention.default
    for node in model.graph.find_nodes(op="call_function", target=op):
        args = g.op_args(node)
        mask = args["attn_mask"]
        if mask is None:
            if not args["is_causal"]:
                raise MaskError(
                    f"{g.where(node)}: this attention has no mask, so each token sees later ones; only "
                    "causal attention has a cache. Encoders and cross-attention are not supported."
                )
            continue
        if mask not in proved:
            proved[mask] = masks.prove(mask, ctx.config.max_seq_len)
            report.notes.append(f"{g.where(mask)}: {proved[mask]}")
        if "site_notes" in node.meta:
            node.meta["site_notes"].mask = str(proved[mask])
        found = proved[mask].mask_class
        node.args = (*node.args[:3], None, True)
        kwargs = {"sliding_window": found.sliding_window, "chunk": found.chunk}
        node.kwargs = {**node.kwargs, **{k: v for k, v in kwargs.items() if v is not None}}
        report.num_matches += 1
    if report.num_matches:
        g.finish(model)
    return model, report
