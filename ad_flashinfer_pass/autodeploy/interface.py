"""AutoDeploy itself: the one place that imports it, and what this plugin asks of it."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from ad_flashinfer_pass.autodeploy_hook import PACKAGES


def _find() -> str:
    """The package: the one that is being imported already, else the first that is installed."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).__name__
        except ModuleNotFoundError as err:
            if not name.startswith(str(err.name)):
                raise
    raise ModuleNotFoundError(f"TensorRT-LLM's AutoDeploy is not installed, none of {', '.join(PACKAGES)}.")


PACKAGE = _find()
attention: Any = importlib.import_module(f"{PACKAGE}.custom_ops.attention_interface")
if not hasattr(attention, "BatchInfo"):
    raise ImportError(
        f"{PACKAGE} is too old for attn_backend flashinfer_trtllm: it has no BatchInfo, as TensorRT-LLM main "
        "has since April 2026. Releases up to 1.2 also pin a FlashInfer without these kernels. Upgrade "
        "tensorrt-llm, or unset FLASHINFER_TRTLLM_AUTODEPLOY and use attn_backend: flashinfer."
    )


def has_window_pools() -> bool:
    """Whether the pool of each window gets metadata of its own; before, one pool is right everywhere."""
    kvcache: Any = importlib.import_module(f"{PACKAGE}.transform.library.kvcache")
    return "meta_nodes_extra_by_group" in inspect.getsource(kvcache._InsertCachedOperator)


def enter_ops(attention_op: str, prepare_op: str) -> None:
    """Say in AutoDeploy's tables what no piecewise graph may capture, and what an export must keep."""
    utils: Any = importlib.import_module(f"{PACKAGE}.compile.piecewise_utils")
    if hasattr(utils, "_DYNAMIC_OP_POLICIES"):
        utils._DYNAMIC_OP_POLICIES[attention_op] = utils.DynamicOpPolicy.OUT_BUFFER
        utils._DYNAMIC_OP_POLICIES[prepare_op] = utils.DynamicOpPolicy.EAGER
    else:
        utils._CACHED_ATTENTION_OPS.append(attention_op)
        utils._PERSISTENT_BUFFER_OPS.append(prepare_op)
        utils._SKIP_OUT_DYNAMIC_OPS.add(prepare_op)  # computed from the lists when they were made
    # Without this entry the export of a transformers model drops the cap, and no backend can see it.
    unified: Any = importlib.import_module(f"{PACKAGE}.export.library.unified_attn")
    unified.HF_ATTN_KWARGS_MAPPING.setdefault("softcap", "logit_cap")
