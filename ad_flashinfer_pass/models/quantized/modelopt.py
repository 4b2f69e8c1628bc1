"""modelopt: hf_quant_config.json, or quantization_config in the words of either library.

FP8 has a weight_scale and an input_scale for each linear, which are factors; NVFP4: see ``nvfp4``. Source:
modelopt/torch/export of NVIDIA/TensorRT-Model-Optimizer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Len

from ad_flashinfer_pass.models.quantized.layout import Exact, Group, Layout, Names, by_modelopt
from ad_flashinfer_pass.models.quantized.nvfp4 import MODELOPT
from ad_flashinfer_pass.models.quantized.scheme import Float8, Scheme

_SCHEMES: dict[str, Scheme] = {"FP8": Float8("tensor", "tensor"), "NVFP4": MODELOPT}


class _Numbers(Exact):
    dynamic: Literal[False] = False
    num_bits: Literal[4, 8]
    type: Literal["float"]
    group_size: Literal[16] | None = None


class _Group(Exact):
    weights: _Numbers
    input_activations: _Numbers
    output_activations: None = None
    targets: list[Literal["Linear"]]


class _Cache(_Numbers):
    num_bits: Literal[8]
    group_size: None = None


class _Quantization(Exact):
    quant_algo: Literal["FP8", "NVFP4"]
    kv_cache_quant_algo: Literal["FP8"] | None = None
    group_size: Literal[16] | None = None
    exclude_modules: Names = None


class File(Exact):
    """hf_quant_config.json."""

    producer: Any = None
    quantization: _Quantization

    def layout(self) -> Layout:
        """What it says."""
        return _layout(self.quantization.quant_algo, self.quantization.exclude_modules)


class Section(_Quantization):
    """quantization_config."""

    quant_method: Literal["modelopt"] = "modelopt"
    producer: Any = None
    config_groups: Annotated[dict[str, _Group], Len(1, 1)] | None = None
    ignore: Names = None
    kv_cache_scheme: _Cache | None = None

    def layout(self) -> Layout:
        """What it says."""
        for group in (self.config_groups or {}).values():
            bits = {group.weights.num_bits, group.input_activations.num_bits}
            if bits != {8 if self.quant_algo == "FP8" else 4}:
                raise ValueError(f"its num_bits are not those of its quant_algo {self.quant_algo}")
        return _layout(self.quant_algo, self.ignore if self.exclude_modules is None else self.exclude_modules)


def _layout(algorithm: str, ignored: Names) -> Layout:
    group = Group(("Linear",), _SCHEMES[algorithm])
    return Layout((group,), tuple(sorted(ignored or ())), by_modelopt)
