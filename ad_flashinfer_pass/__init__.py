"""A PyTorch pass that gives an exported LLM paged, cached attention on FlashInfer's TRT-LLM kernels.

Public names are loaded when they are first used: importing this package imports neither
transformers nor flashinfer, and does not touch CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ad_flashinfer_pass.build import build_model
    from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
    from ad_flashinfer_pass.exported import restore, to_program, transform
    from ad_flashinfer_pass.runtime.llm import LLM, GenerationResult
    from ad_flashinfer_pass.runtime.sampling import SamplingParams
    from ad_flashinfer_pass.torch_compile.session import CacheSession

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AutoDeployConfig",
    "CacheSession",
    "GenerationResult",
    "KvCacheConfig",
    "SamplingParams",
    "build_model",
    "restore",
    "to_program",
    "transform",
]

_HOME = {
    "LLM": "runtime.llm",
    "AutoDeployConfig": "config",
    "CacheSession": "torch_compile.session",
    "GenerationResult": "runtime.llm",
    "KvCacheConfig": "config",
    "SamplingParams": "runtime.sampling",
    "build_model": "build",
    "restore": "exported",
    "to_program": "exported",
    "transform": "exported",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
