"""AutoDeploy's view of the backend: which ops, which inputs, which cache, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from ad_flashinfer_pass.autodeploy import interface, rotation
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Phase, Site

BACKEND = "flashinfer_trtllm"
_ops: Any = torch.ops.auto_deploy
_NUMBERS = ("scale", "sliding_window", "logit_cap")
# The reference waits for the device; fa2 and fa3 plan on the host, for prefill alone, which runs eagerly.
_UNFIT: dict[Phase, set[str]] = {"prefill": {"reference"}, "decode": {"reference", "fa2", "fa3"}}
_WAY_OUT = "Use attn_backend: flashinfer or trtllm for this model"
_log = logging.getLogger(__name__)


def _where(node: fx.Node) -> str:
    layer = g.op_args(node).get("layer_idx")
    return f"attention {node.name} of {g.module_path(node) if layer is None else f'layer {layer}'}"


def _checked(node: fx.Node) -> dict[str, Any]:
    """The arguments of the source attention, of which those that are not taken over ask for nothing."""
    args, keys = g.op_args(node), " ".join(map(str, node.meta))
    refused = [f"a {name} of the graph" for name in _NUMBERS if isinstance(args[name], fx.Node)]
    refused += [f"the attention mask {args['attn_mask']}"] * (args["attn_mask"] is not None)
    refused += [f"dropout_p={args['dropout_p']}"] * bool(args["dropout_p"])
    refused += [f"layout {args['layout']!r} (run match_attention_layout before)"] * (args["layout"] != "bsnd")
    if "_trtllm_rope_info" in keys or "_trtllm_fused_qkv" in keys:
        refused.append("a rotation left to the backend trtllm (disable fuse_rope_into_trtllm_attention)")
    if refused:
        raise UnsupportedError(f"{_where(node)}: {BACKEND} cannot honour {', '.join(refused)}. {_WAY_OUT}.")
    # AutoDeploy counts only windows and caps above 0 (transform/library/kvcache.py, torch_attention.py).
    limits = {name: args[name] if (args[name] or 0) > 0 else None for name in ("sliding_window", "logit_cap")}
    scale = g.value(args["query"]).shape[3] ** -0.5 if args["scale"] is None else float(args["scale"])
    return {**args, "scale": scale, **limits}


def _choose(node: fx.Node, kv_dtype: torch.dtype, page_size: int) -> tuple[Site, list[str]]:
    """The site, and its kernels of prefill and decode; a captured decode must neither wait nor be planned."""
    args = _checked(node)
    qkv = (g.value(args[name]) for name in ("query", "key", "value"))
    items = {name: args[name] for name in _NUMBERS} | {"has_sinks": args["sinks"] is not None}
    items["shares_kv"] = args.get("shared_kv_source_layer_idx") is not None
    site = Site.of(*qkv, kv_dtype=kv_dtype, page_size=page_size, **items)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = {phase: select.choose(site, phase, device, _where(node)) for phase in _UNFIT}
    for phase, choice in choices.items():
        if device.type == "cuda" and choice.kernel in _UNFIT[phase]:
            raise UnsupportedError(
                f"{_where(node)}: no TRT-LLM kernel can do its {phase} here ({choice.reason}). {_WAY_OUT}, "
                "change kv_cache_config (dtype, tokens_per_block), or build what is missing: "
                "ad-flashinfer-pass prebuild."
            )
    kernels = [choice.kernel for choice in choices.values()]
    _log.info("%s: prefill by %s, decode by %s", _where(node), *kernels)
    return site, kernels


@interface.attention.AttentionRegistry.register(BACKEND)
class FlashInferTrtllmAttention(interface.attention.AttentionDescriptor):
    """What AutoDeploy asks of a backend; see ``AttentionDescriptor`` there."""

    get_attention_layout = staticmethod(lambda: "bsnd")
    get_num_qkv_args = staticmethod(lambda: 3)
    get_source_attention_op = staticmethod(lambda: _ops.torch_attention)
    get_cached_attention_op = staticmethod(lambda: _ops.flashinfer_trtllm_attention_mha_with_cache.default)
    get_prepare_extra_metadata_info: Any = staticmethod(
        lambda node: (_ops.flashinfer_trtllm_attention_prepare_metadata.default, 3, [])
    )
    # Device tensors where there is a choice: for ``_host`` twins a step may wait for the device.
    get_standard_metadata_args = staticmethod(lambda: ["batch_info_host", "cu_seqlen", "seq_len_with_cache"])
    supports_shared_kv = staticmethod(lambda: True)
    # In the pool of a window, pages and lengths are to be those of the window.
    kernel_handles_cyclic_swa = staticmethod(lambda: False)

    @classmethod
    def get_cache_initializers(cls, source_attn_node: fx.Node, cache_config: Any) -> dict[str, Any]:
        """One cache for K and V of a layer; here the layer is checked and its kernels are chosen."""
        key: Any = source_attn_node.args[1]
        kv_dtype = cls.resolve_cache_dtype(cache_config.dtype, g.value(key).dtype)
        source_attn_node.meta[BACKEND] = _choose(source_attn_node, kv_dtype, cache_config.tokens_per_block)
        site, _ = source_attn_node.meta[BACKEND]
        nodes = [node for node in source_attn_node.graph.nodes if g.is_op(node, _ops.torch_attention)]
        count = sum(not g.op_args(node)["is_causal"] for node in nodes)  # transformers passes none
        if vars(source_attn_node.graph).setdefault(BACKEND, source_attn_node) is source_attn_node and count:
            _log.info("is_causal=False without a mask, in %d layers: they attend causally", count)
        options: Any = {"dtype": kv_dtype, "kv_factor": 2, "kv_layout": "HND"}
        if interface.has_window_pools():
            options["sliding_window"] = site.sliding_window or 0
        handler = interface.attention.KVPagedResourceHandler(site.num_kv_heads, site.head_dim, **options)
        return {"kv_cache": handler}

    @classmethod
    def get_constants(cls, source_attn_node: fx.Node) -> list[Any]:
        """What follows the cache in the schema of the cached attention, up to ``out``."""
        args, meta = _checked(source_attn_node), source_attn_node.meta
        shared = args.get("shared_kv_source_layer_idx")
        if shared is not None:  # AutoDeploy asks for the cache of the other layer alone, and before
            known = [n for n in source_attn_node.graph.nodes if BACKEND in n.meta]
            owner, _ = next(n.meta[BACKEND] for n in known if g.op_args(n)["layer_idx"] == shared)
            meta[BACKEND] = _choose(source_attn_node, owner.kv_dtype, owner.page_size)
        kept = [args[name] for name in (*_NUMBERS, "sinks")]
        # What fuse_trtllm_attn_quant_fp8 left: the input scale of the FP8 linears that alone read the result.
        scale: Any = meta.get("trtllm_attention_input_scale")
        out_scale = float(g.attribute(scale)) if scale is not None and scale.op == "get_attr" else None
        return [*kept, shared is not None, *meta[BACKEND][1], *rotation.take(source_attn_node), out_scale]
