"""``fuse_rope_into_flashinfer_trtllm``: the rotation of Q and K joins the append of K and V.

Before: q', k' = rope(q, k, ...); out = torch_attention(q', k', v)
After:  out = torch_attention(deferred_rope(q, ...), deferred_rope(k, ...), v)
then, by the cache insertion of this backend: cached_attention(q, k, v, ..., cos, sin), one kernel for both.

``deferred_rope`` never runs: with another backend the first forward says what is wrong. Stage:
``post_load_fusion``, the last before the insertion; a transform of a plugin comes last in its stage, so after
``optimize_rope``, and finds ``flashinfer_rope`` or, where that did not match, the explicit form.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass.autodeploy import api

FUSE_ROPE = "fuse_rope_into_flashinfer_trtllm"

_TABLE = "auto_deploy::flashinfer_rope"
_EXPLICIT = "auto_deploy::torch_rope_with_explicit_cos_sin"
_POINTWISE = {
    "aten::cos",
    "aten::sin",
    "aten::mul",
    "aten::_to_copy",
    "aten::to",
    "aten::alias",
    "aten::unsqueeze",
}


@api.transform.TransformRegistry.register(FUSE_ROPE)
class FuseRopeIntoFlashInferTrtllm(api.transform.BaseTransform):
    """Leave the rotation of every attention to the backend, where it is one that the kernel can do."""

    def _apply(
        self, gm: fx.GraphModule, cm: Any, factory: Any, shared_config: Any
    ) -> tuple[fx.GraphModule, Any]:
        nodes = [node for node in gm.graph.nodes if _name(node) == "auto_deploy::torch_attention"]
        fused = sum(_fuse(node) for node in nodes)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        info = api.transform.TransformInfo(
            skipped=fused == 0, num_matches=fused, is_clean=fused == 0, has_valid_shapes=fused == 0
        )
        return gm, info


def _name(node: Any) -> str:
    target = getattr(node, "target", None)
    name = target._name if isinstance(target, torch._ops.OpOverload) else ""
    return name.partition(".")[0] or getattr(target, "_qualified_op_name", "")


def _fuse(node: fx.Node) -> bool:
    query, key, shared = api.op_args(node, "query", "key", "shared_kv_source_layer_idx")
    rope = _rope_of(query, key)
    if rope is None or shared is not None:
        return False
    options = _options(rope)
    if options is None:
        return False
    for index, rotated in enumerate((query, key)):
        with node.graph.inserting_before(node):
            deferred = node.graph.call_function(
                torch.ops.auto_deploy.flashinfer_trtllm_deferred_rope.default, (rope.args[index], *options)
            )
        deferred.meta.update(rotated.meta)
        node.replace_input_with(rotated, deferred)
    return True


def _rope_of(query: Any, key: Any) -> fx.Node | None:
    """The rope op whose two results are ``query`` and ``key``, in this order."""
    picks = [(node.args[0], node.args[1]) for node in (query, key) if node.target is operator.getitem]
    if len(picks) != 2 or picks[0][0] is not picks[1][0] or [pick[1] for pick in picks] != [0, 1]:
        return None
    rope = picks[0][0]
    return rope if isinstance(rope, fx.Node) and _name(rope) in (_TABLE, _EXPLICIT) else None


def _options(rope: fx.Node) -> tuple[Any, ...] | None:
    """rope_cos, rope_sin, rope_positions and rope_interleaved of the cached attention; None if it cannot."""
    if _name(rope) == _TABLE:
        positions, table, is_neox = api.op_args(rope, "position_ids", "cos_sin_cache", "is_neox")
        return table, None, positions, not is_neox
    cos, sin, dim = api.op_args(rope, "cos", "sin", "unsqueeze_dim")
    if dim != 2 or not (_repeats(cos) and _repeats(sin)):
        return None
    return cos, sin, None, False


def _repeats(node: fx.Node) -> bool:
    """Whether the last dimension is shown to be two equal halves: ``cat((x, x), -1)``, pointwise since."""
    while _name(node) in _POINTWISE:
        if any(isinstance(arg, fx.Node) for arg in node.args[1:]):
            return False
        node = node.args[0]  # type: ignore[assignment]
    if _name(node) != "aten::cat":
        return False
    parts, dim = api.op_args(node, "tensors", "dim")
    last = parts[0].meta["val"].dim() - 1 if "val" in parts[0].meta else None
    return len(parts) == 2 and parts[0] is parts[1] and dim in (-1, last)
