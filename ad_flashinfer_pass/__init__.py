"""A PyTorch pass that gives an exported LLM paged, cached attention on FlashInfer's TRT-LLM kernels.

Public names are loaded when they are first used: importing this package imports neither
transformers nor flashinfer, and does not touch CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.errors import (
    AdFlashinferError,
    CapacityError,
    ConfigError,
    ExportError,
    KernelError,
    LoadError,
    MaskError,
    NoAttentionError,
    PackingError,
    RankError,
    RequestError,
    SessionError,
    TransformError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from ad_flashinfer_pass.build import build_model
    from ad_flashinfer_pass.config import (
        AutoDeployConfig,
        KvCacheConfig,
        SpeculativeConfig,
        TransformConfig,
    )
    from ad_flashinfer_pass.exported import restore, to_program, transform
    from ad_flashinfer_pass.pipeline import transform_module
    from ad_flashinfer_pass.runtime.cached_model import CachedModel
    from ad_flashinfer_pass.runtime.llm import LLM, GenerationResult, Progress
    from ad_flashinfer_pass.runtime.sampling import SamplingParams
    from ad_flashinfer_pass.runtime.structure import GuidedDecodingParams
    from ad_flashinfer_pass.torch_compile.session import CacheSession

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AdFlashinferError",
    "AutoDeployConfig",
    "CacheSession",
    "CachedModel",
    "CapacityError",
    "ConfigError",
    "ExportError",
    "GenerationResult",
    "GuidedDecodingParams",
    "KernelError",
    "KvCacheConfig",
    "LoadError",
    "MaskError",
    "NoAttentionError",
    "PackingError",
    "Progress",
    "RankError",
    "RequestError",
    "SamplingParams",
    "SessionError",
    "SpeculativeConfig",
    "TransformConfig",
    "TransformError",
    "UnsupportedError",
    "build_model",
    "restore",
    "to_program",
    "transform",
    "transform_module",
]

_HOME = {
    "LLM": "runtime.llm",
    "AutoDeployConfig": "config",
    "CacheSession": "torch_compile.session",
    "CachedModel": "runtime.cached_model",
    "GenerationResult": "runtime.llm",
    "GuidedDecodingParams": "runtime.structure",
    "KvCacheConfig": "config",
    "Progress": "runtime.llm",
    "SamplingParams": "runtime.sampling",
    "SpeculativeConfig": "config",
    "TransformConfig": "config",
    "build_model": "build",
    "restore": "exported",
    "to_program": "exported",
    "transform": "exported",
    "transform_module": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
