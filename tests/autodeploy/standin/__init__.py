"""A stand-in of AutoDeploy, one for each generation of its interface, to hold the plugin to its contract.

``tensorrt_llm`` cannot be installed where these tests run. What is here was written from AutoDeploy's public
sources (NVIDIA/TensorRT-LLM, tensorrt_llm/_torch/auto_deploy; ``AD/`` below), with the file and what it says
beside each rule. It is a test of the contract that was read, not of TensorRT-LLM.

====  =======================================================================================================
E2    January 2026: AD/custom_ops/attention_interface.py and AD/transform/library/kvcache.py at 01d93fe
E2b   the interface that 1.2 most likely has: the same files with ``_host`` names and host-prepare functions
E3    February 2026: resource handlers, ``tokens_per_block``, one pool for all layers
E4    March 2026: the first piecewise graphs (AD/compile/piecewise_utils.py, lists of names)
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
from typing import Any, Literal

import torch

from tests.autodeploy.standin import capture, insertion, interface, source_ops

PACKAGE = "tensorrt_llm._torch.auto_deploy"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one generation has."""

    name: str
    host_names: bool = True
    """Every input has a ``_host`` twin; else ``batch_info`` is the host's (01d93fe: _host_return_args)."""
    handlers: bool = True
    """Caches are declared by resource handlers; else made by callables."""
    batch_info: int = 3
    """Integers of ``batch_info_host``."""
    extend: bool = False
    """Requests with a past and more than one token are counted apart."""
    piecewise: Literal["none", "lists", "lists_and_persistent", "policies"] = "none"
    window_pools: bool = False
    layer_idx: bool = False
    """The source op has ``layer_idx`` and ``shared_kv_source_layer_idx``."""

    def __str__(self) -> str:
        return self.name


GENERATIONS = (
    Generation(name="E2", host_names=False, handlers=False),
    Generation(name="E2b", handlers=False),
    Generation(name="E3"),
    Generation(name="E4", piecewise="lists"),
    Generation(name="E5", batch_info=12, extend=True, piecewise="lists_and_persistent"),
    Generation(
        name="E6", batch_info=14, extend=True, piecewise="policies", window_pools=True, layer_idx=True
    ),
)


@contextmanager
def installed(generation: Generation) -> Iterator[Any]:
    """AutoDeploy of that generation in ``sys.modules``; yields its ``auto_deploy`` package."""
    assert not any(name.split(".")[0] == "tensorrt_llm" for name in sys.modules), "TensorRT-LLM is here"
    library = source_ops.define(generation.layer_idx)
    contents = {
        "custom_ops.attention_interface": interface.attention_interface(generation),
        "transform.interface": insertion.transform_interface(),
        "transform.library.kvcache": insertion.kvcache(generation),
    }
    if generation.piecewise != "none":
        contents["compile.piecewise_utils"] = capture.piecewise_utils(generation)
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
    try:
        yield sys.modules[PACKAGE]
    finally:
        for name in [*names, *(m for m in sys.modules if m.startswith("ad_flashinfer_pass.autodeploy."))]:
            if name != "ad_flashinfer_pass.autodeploy.ops":  # its ops stay registered
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
