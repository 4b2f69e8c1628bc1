"""A stand-in of AutoDeploy, one for each generation that is served, to hold the plugin to its contract.

``tensorrt_llm`` cannot be installed where these tests run. What is here was written from AutoDeploy's public
sources (NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/auto_deploy; ``AD/`` below), with the file and what it says
beside each rule. It is a test of the contract that was read, not of TensorRT-LLM.

====  =======================================================================================================
E5    April to May 2026: ``BatchInfo`` of 12 integers, extend requests, ``out=``
E6    main, summer 2026: one pool a sliding window, shared caches, a table of policies. Its
      attention_interface.py could not be read; inferred from its kvcache.py, flashinfer_attention.py,
      trtllm_attention.py, piecewise_utils.py and shim/interface.py
====  =======================================================================================================

Adversarial on purpose: what lies behind the current length of an input is a plausible wrong value, page 0 is
a request's, page ids are shuffled, pools are strided and full of large numbers, caches move at a resize.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.autodeploy.standin import capture, insertion, interface, source_ops

PACKAGE = "tensorrt_llm._torch.auto_deploy"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one generation has."""

    name: str
    batch_info: int
    """Integers of ``batch_info_host``."""
    policies: bool
    """Dynamic ops stand in one table; else in lists of names."""
    window_pools: bool
    layer_idx: bool
    """The source op has ``layer_idx`` and ``shared_kv_source_layer_idx``."""

    def __str__(self) -> str:
        return self.name


E5 = Generation(name="E5", batch_info=12, policies=False, window_pools=False, layer_idx=False)
E6 = Generation(name="E6", batch_info=14, policies=True, window_pools=True, layer_idx=True)
GENERATIONS = (E5, E6)


@contextmanager
def installed(generation: Generation) -> Iterator[Any]:
    """AutoDeploy of that generation in ``sys.modules``; yields its ``auto_deploy`` package."""
    assert not any(name.split(".")[0] == "tensorrt_llm" for name in sys.modules), "TensorRT-LLM is here"
    library = source_ops.define(generation.layer_idx)
    contents = {
        "custom_ops.attention_interface": interface.attention_interface(generation),
        "transform.library.kvcache": insertion.kvcache(generation),
        "compile.piecewise_utils": capture.piecewise_utils(generation),
        "export.library.unified_attn": {"HF_ATTN_KWARGS_MAPPING": dict(source_ops.HF_ATTN_KWARGS_MAPPING)},
    }
    names = set()
    for path, content in contents.items():
        full = f"{PACKAGE}.{path}"
        parts = full.split(".")
        names |= {".".join(parts[: i + 1]) for i in range(len(parts))}
        for i in range(1, len(parts)):
            _package(".".join(parts[:i]))
        module = types.ModuleType(full)
        module.__dict__.update(content)
        sys.modules[full] = module
    ops: Any = sys.modules.get("ad_flashinfer_pass.autodeploy.ops")
    if ops is not None:  # its ops stay registered, for whichever generation comes next
        ops.attention = sys.modules[f"{PACKAGE}.custom_ops.attention_interface"]
    try:
        yield sys.modules[PACKAGE]
    finally:
        for name in [*names, *(m for m in sys.modules if m.startswith("ad_flashinfer_pass.autodeploy."))]:
            if name != "ad_flashinfer_pass.autodeploy.ops":
                sys.modules.pop(name, None)
        sys.modules.pop("ad_flashinfer_pass.autodeploy", None)
        library._destroy()


def plugin() -> Any:
    """The plugin, imported as a user imports it."""
    return importlib.import_module("ad_flashinfer_pass.autodeploy")


def _package(name: str) -> None:
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
