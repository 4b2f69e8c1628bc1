"""AutoDeploy's view of the backend: which ops, which inputs, which cache, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ad_flashinfer_pass.autodeploy import api, ops
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import select
from ad_flashinfer_pass.kernels.capability import Site

BACKEND = "flashinfer_trtllm"
WAY_OUT = "Use attn_backend: flashinfer or trtllm for this model"

_CHOICE = "flashinfer_trtllm_kernels"
_log = logging.getLogger(__name__)


def _where(node: fx.Node) -> str:
    (layer,) = api.op_args(node, "layer_idx")
    stack = node.meta.get("nn_module_stack") or {}
    path = next((value[0] for value in reversed(list(stack.values()))), "")
    return f"attention {node.name}" + (
        f" of layer {layer}" if layer is not None else f" ({path})" if path else ""
    )


def _refuse(node: fx.Node, what: str) -> UnsupportedError:
    return UnsupportedError(f"{_where(node)}: {BACKEND} cannot honour {what}. {WAY_OUT}.")


def _checked(node: fx.Node) -> dict[str, Any]:
    """The arguments of the source attention that are taken over; all others must ask for nothing."""
    names = ("query", "key", "value", "scale", "sinks", "sliding_window", "logit_cap")
    args = dict(zip(names, api.op_args(node, *names), strict=True))
    mask, dropout, causal, layout = api.op_args(node, "attn_mask", "dropout_p", "is_causal", "layout")
    if any("trtllm" in key and ("rope" in key or "fused_qkv" in key) for key in map(str, node.meta)):
        raise _refuse(
            node, "fuse_rope_into_trtllm_attention: it left the rotation to the backend trtllm; disable it"
        )
    if mask is not None:
        raise _refuse(node, f"the attention mask {mask}: it attends causally, by position")
    if not causal:
        raise _refuse(node, "is_causal=False: it attends causally")
    if dropout:
        raise _refuse(node, f"dropout_p={dropout}")
    if layout != "bsnd":
        raise _refuse(node, f"layout {layout!r}; the transform match_attention_layout must run before")
    if args["scale"] is None:
        args["scale"] = args["query"].meta["val"].shape[3] ** -0.5
    for name in ("scale", "sliding_window", "logit_cap"):
        if isinstance(args[name], fx.Node):
            raise _refuse(node, f"a {name} that is computed in the graph")
    args["sliding_window"] = args["sliding_window"] or None
    return args


def _site(node: fx.Node, kv_dtype: torch.dtype, page_size: int, shares_kv: bool) -> Site:
    args = _checked(node)
    query, key, value = (args[name].meta["val"] for name in ("query", "key", "value"))
    return Site(
        dtype=query.dtype,
        kv_dtype=kv_dtype,
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        v_head_dim=value.shape[3],
        page_size=page_size,
        scale=args["scale"],
        sliding_window=args["sliding_window"],
        logit_cap=args["logit_cap"],
        has_sinks=args["sinks"] is not None,
        shares_kv=shares_kv,
    )


def _choose(node: fx.Node, site: Site) -> tuple[str, str]:
    """The kernels of prefill and decode; a captured decode must neither wait nor be planned."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = []
    for phase in ("prefill", "decode"):
        choice = select.choose(site, phase, device, _where(node))
        unfit = {"reference"} | (ops.HOST_PLANNED if phase == "decode" else set())
        if device.type == "cuda" and choice.kernel in unfit:
            raise UnsupportedError(
                f"{_where(node)}: no TRT-LLM kernel can do its {phase} here ({choice.reason}). {WAY_OUT}, "
                "change kv_cache_config (dtype, tokens_per_block), or build what is missing: "
                "ad-flashinfer-pass prebuild."
            )
        chosen.append(choice.kernel)
    _log.info("%s: prefill by %s, decode by %s", _where(node), *chosen)
    return chosen[0], chosen[1]


def _kv_dtype(cls: Any, cache_config: Any, key: Tensor) -> torch.dtype:
    wanted = cache_config.dtype
    if wanted is None or isinstance(wanted, torch.dtype):  # CacheConfig, up to 1.2
        return wanted or key.dtype
    return cls.resolve_cache_dtype(wanted, key.dtype)


@api.attention.AttentionRegistry.register(BACKEND)
class FlashInferTrtllmAttention(api.attention.AttentionDescriptor):
    """The methods of every generation's AttentionDescriptor; one calls those that it knows."""

    @classmethod
    def is_paged(cls) -> bool:
        """Asked up to 1.2."""
        return True

    @classmethod
    def get_attention_layout(cls) -> str:
        """Of q, k and v."""
        return "bsnd"

    @classmethod
    def get_num_qkv_args(cls) -> int:
        """q, k, v."""
        return 3

    @classmethod
    def get_source_attention_op(cls) -> Any:
        """What is replaced."""
        return torch.ops.auto_deploy.torch_attention

    @classmethod
    def get_cached_attention_op(cls) -> Any:
        """What it is replaced with."""
        return torch.ops.auto_deploy.flashinfer_trtllm_attention_mha_with_cache.default

    @classmethod
    def get_standard_metadata_args(cls) -> list[str]:
        """Device tensors where there is a choice: for ``_host`` twins a step may wait for the device."""
        return [
            "batch_info_host" if api.HAS_HOST_NAMES else "batch_info",
            "cu_seqlen",
            "seq_len_with_cache",
        ]

    @classmethod
    def get_prepare_extra_metadata_info(cls, any_source_attn_node: fx.Node) -> tuple[Any, int, list[Any]]:
        """The metadata op; AutoDeploy passes it the inputs that its schema names."""
        packet = torch.ops.auto_deploy.flashinfer_trtllm_attention_prepare_metadata
        return (packet.default if api.HAS_HOST_NAMES else packet.batch_info), 3, []

    @classmethod
    def get_host_prepare_metadata_function(cls) -> None:
        """None: everything is prepared on the device, so nothing can be forgotten before a replay."""
        return None

    @classmethod
    def get_cache_initializers(cls, source_attn_node: fx.Node, cache_config: Any) -> dict[str, Any]:
        """One cache for K and V of a layer; here the layer is checked and its kernels are chosen.

        Raises:
            UnsupportedError: the layer needs what its kernels cannot do; the message names it and a way out.
        """
        key = source_attn_node.args[1].meta["val"]  # type: ignore[union-attr]
        kv_dtype, heads, head_dim = _kv_dtype(cls, cache_config, key), key.shape[2], key.shape[3]
        # Up to 1.2 the page size is known to the callable alone, which checks it.
        page_size = getattr(cache_config, "tokens_per_block", None) or 32
        site = _site(source_attn_node, kv_dtype, page_size, shares_kv=False)
        source_attn_node.meta[_CHOICE] = _choose(source_attn_node, site)
        if api.KVPagedResourceHandler is None:
            # resize_kv_cache counts and resizes the caches whose names begin so (shim/interface.py of 1.2).
            return {"k_cache_and_v": _allocate(source_attn_node, site)}
        window = {"sliding_window": site.sliding_window or 0} if api.HAS_WINDOW_POOLS else {}
        handler = api.KVPagedResourceHandler(
            heads, head_dim, dtype=kv_dtype, kv_factor=2, kv_layout="HND", **window
        )
        return {"kv_cache": handler}

    @classmethod
    def get_global_buffer_initializers(cls, source_attn_node: fx.Node) -> dict[str, Any]:
        """Asked up to 1.2; the kernels own their workspaces, one a device."""
        return {}

    @classmethod
    def prepare_node_for_cache_insertion(cls, gm: fx.GraphModule, attn_node: fx.Node) -> None:
        """Nothing to prepare: a fused rotation comes with the arguments of its nodes."""

    @classmethod
    def get_constants(cls, source_attn_node: fx.Node) -> list[Any]:
        """What follows the cache in the schema of the cached attention, up to ``out``.

        Raises:
            UnsupportedError: as ``get_cache_initializers``.
        """
        args = _checked(source_attn_node)
        (shared,) = api.op_args(source_attn_node, "shared_kv_source_layer_idx")
        rope, _ = (_take_rope(args[name]) for name in ("query", "key"))
        return [
            float(args["scale"]),
            args["sliding_window"],
            args["logit_cap"],
            args["sinks"],
            shared is not None,
            *_kernels(source_attn_node, shared),
            *rope,
        ]

    @classmethod
    def supports_shared_kv(cls) -> bool:
        """A layer may read the cache of another."""
        return True

    @classmethod
    def kernel_handles_cyclic_swa(cls) -> bool:
        """False: in the pool of a window, pages and lengths are to be those of the window."""
        return False


def _allocate(node: fx.Node, site: Site) -> Callable[[Any], Tensor]:
    def allocate(info: Any) -> Tensor:
        _choose(node, Site(**{**vars(site), "page_size": info.page_size}))
        shape = (info.num_pages, 2, site.num_kv_heads, info.page_size, site.head_dim)
        return torch.empty(shape, device=info.device, dtype=site.kv_dtype)

    return allocate


def _kernels(node: fx.Node, shared: int | None) -> tuple[str, str]:
    """What ``get_cache_initializers`` chose, which is not asked for a layer that shares another's cache."""
    if shared is None:
        return node.meta[_CHOICE]
    sources = [n for n in node.graph.nodes if _CHOICE in n.meta and api.op_args(n, "layer_idx") == [shared]]
    if not sources:
        raise _refuse(node, f"the cache of layer {shared}, which it does not know")
    return sources[0].meta[_CHOICE]


def _take_rope(node: fx.Node) -> list[Any]:
    """The rotation that was left to us before ``node``, which becomes its argument."""
    if node.target is not torch.ops.auto_deploy.flashinfer_trtllm_deferred_rope.default:
        return [None, None, None, False]
    rope = api.op_args(node, "rope_cos", "rope_sin", "rope_positions", "rope_interleaved")
    node.target, node.args, node.kwargs = torch.ops.aten.alias.default, node.args[:1], {}
    return rope


assert ops.ATTENTION  # the ops are registered by their module
