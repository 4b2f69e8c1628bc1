"""Only the rows whose logits are wanted go through lm_head.

Before: hidden: [b, s, d] -> linear -> logits: [b, s, vocab]
After:  hidden.view(1, b * s, d).index_select(1, token_gather_indices) -> linear -> logits: [1, n, vocab]

Legal because what stands between the gather and the output works token by token: only the last linear and
pointwise ops with constants are passed. If the graph ends in something else, the logits are gathered.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

aten = torch.ops.aten


@register("gather_logits_before_lm_head")
def gather_logits_before_lm_head(
    model: nn.Module, ctx: TransformContext
) -> tuple[nn.Module, TransformReport]:
    """Insert the gather and its input ``token_gather_indices``, int64 [n]."""
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("gather_logits_before_lm_head", num_matches=1)
    output = model.graph.output_node()
    logits = output.args[0]
    assert isinstance(logits, fx.Node)
    ctx.vocab_size = int(g.shape(logits)[-1])
    lm_head = _lm_head(logits)
    source, user = (g.args(lm_head)[0], lm_head) if lm_head is not None else (logits, output)
    report.notes.append(f"before {user.name}")
    # As many rows as there can be: each sequence has one.
    most = torch.empty(ctx.sequence_info.max_batch_size, dtype=torch.int64, device=ctx.device)
    indices = g.add_input(model, "token_gather_indices", most)
    with model.graph.inserting_before(user):
        width = g.shape(source)[-1]
        tokens = g.call_op(model.graph, aten.reshape.default, source, [1, -1, width])
        rows = g.call_op(model.graph, aten.index_select.default, tokens, 1, indices)
    user.replace_input_with(source, rows)
    g.update_values(rows)
    g.finish(model)
    return model, report


def _lm_head(node: fx.Node) -> fx.Node | None:
    """The linear that makes the logits, if only pointwise ops with constants follow it."""
    while True:
        if g.is_op(node, aten.linear, torch.ops.ad_flashinfer.quantized_linear):
            return node if len(node.users) == 1 else None
        tensors = node.all_input_nodes
        passes = g.is_pointwise(node) or g.is_op(node, aten.to, aten.clone, aten.contiguous)
        if len(tensors) != 1 or not passes or len(node.users) != 1:
            return None
        node = tensors[0]
