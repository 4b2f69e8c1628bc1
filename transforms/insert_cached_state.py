"""Ops with a state -> the same over slots.

Before: out = gated_delta_rule(query, key, value, g, beta, use_qk_l2norm)
After:  out = cached_gated_delta_rule(query, ..., recurrent_state_i, batch_info_host, ..., slot_idx)

Legal because the cached op computes the same for the tokens of each sequence, from the state that those
before them left in its slot; a sequence that begins starts from zero. New graph inputs: ``slot_idx``, int64,
the slot of each sequence, then conv_state_0, ..., recurrent_state_0, ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import StateResource, StateSite, TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

_METADATA = ("batch_info_host", "cu_seqlen", "input_pos")
_Shapes = dict[str, tuple[int, ...]]


class _Kind(NamedTuple):
    """What one op keeps of a sequence."""

    pool: str
    """The argument of the cached op, and the name of the resource, with a number."""
    shape: Callable[[_Shapes], tuple[int, ...]]
    """Of one state, from the shapes of the op's tensors."""
    of_model: bool = False
    """Whether in the dtype of the model: what is kept are tokens. A sum of many is kept in float32."""


def _matrix(shapes: _Shapes) -> tuple[int, ...]:
    return (shapes["value"][2], shapes["key"][3], shapes["value"][3])


_KINDS = {
    "causal_conv1d": _Kind("conv_state", lambda s: (s["x"][2], s["weight"][1] - 1), of_model=True),
    "gated_delta_rule": _Kind("recurrent_state", _matrix),
    "kda": _Kind("recurrent_state", _matrix),
    "selective_scan": _Kind("recurrent_state", lambda s: s["A"]),
    "ssd_scan": _Kind("recurrent_state", lambda s: (*s["hidden_states"][2:], s["B"][3])),
}
"""By the name of the op."""


@register("insert_cached_state")
def insert_cached_state(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Give every op with a state its pool.

    Raises:
        UnsupportedError: extends are drafts, as ``max_extend_len`` of ``insert_cached_attention`` says.
    """
    assert isinstance(model, fx.GraphModule)
    report = TransformReport("insert_cached_state")
    ops = {getattr(torch.ops.ad_flashinfer, name): kind for name, kind in _KINDS.items()}
    sites = [node for node in model.graph.nodes if g.is_op(node, *ops)]
    if not sites:
        return model, report
    if ctx.sequence_info.max_extend_len:
        way_out = (
            "leave out speculative_config"
            if ctx.sequence_info.num_drafts
            else "leave max_extend_len of transforms.insert_cached_attention at 0"
        )
        raise UnsupportedError(
            f"{g.where(sites[0])}: {sites[0].target} has a state, which cannot be taken back where a draft "
            f"is rejected: {way_out}.",
            node=sites[0],
        )
    ctx.sequence_info.has_states = True
    placeholders = {node.name: node for node in model.graph.find_nodes(op="placeholder")}
    slot_idx = g.add_input(model, "slot_idx", ctx.sequence_info.named_args()["slot_idx"])
    metadata = [*(placeholders[name] for name in _METADATA), slot_idx]
    for node in sites:
        name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
        _insert(model, ctx, node, name, _KINDS[name], metadata)
        report.num_matches += 1
    report.notes.append(f"{len(sites)} sites, {sum(s.bytes_per_slot for s in ctx.states)} bytes a sequence")
    g.finish(model)
    return model, report


def _insert(
    gm: fx.GraphModule, ctx: TransformContext, node: fx.Node, name: str, kind: _Kind, metadata: list[fx.Node]
) -> None:
    args = g.op_args(node)
    tensors = {key: g.value(arg) for key, arg in args.items() if g.is_tensor(arg)}
    dtype = g.value(node).dtype
    number = sum(state.name.startswith(kind.pool) for state in ctx.states)
    resource = StateResource(
        name=f"{kind.pool}_{number}",
        shape=tuple(map(int, kind.shape({key: tuple(tensor.shape) for key, tensor in tensors.items()}))),
        dtype=dtype if kind.of_model else torch.promote_types(dtype, torch.float32),
    )
    ctx.states.append(resource)
    # The number of slots is not known yet; nothing in the graph depends on it.
    pool = g.add_input(gm, resource.name, resource.allocate(2, torch.device("meta")))
    op: Any = getattr(torch.ops.ad_flashinfer, f"cached_{name}").default
    with gm.graph.inserting_before(node):
        cached = g.call_op(gm.graph, op, *args.values(), pool, *metadata)
    g.copy_origin(cached, node)
    g.replace(node, cached)
    kernel = "triton" if (ctx.target or ctx.device).type == "cuda" else "torch"
    ctx.state_sites.append(
        StateSite(g.where(cached), g.module_path(cached), name, kernel, kernel, resource.name)
    )
