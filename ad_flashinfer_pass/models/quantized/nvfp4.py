"""NVFP4: float4_e2m1, a float8_e4m3fn scale for each 16 elements of a row, a float32 one for all.

modelopt multiplies by the latter, weight_scale_2; compressed-tensors divides by it, weight_global_scale. No
op here computes with it. Sources: modelopt/torch/quantization/qtensor/nvfp4_tensor.py,
compressed_tensors/compressors/nvfp4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized.scheme import (
    NOT_NEGATIVE,
    POSITIVE,
    Operands,
    Part,
    Parts,
    Scheme,
)

GROUP = 16
"""Elements of a row that share a scale."""


@dataclass(frozen=True)
class _Nvfp4(Scheme):
    whole: ClassVar[str]
    """The part that is the scale of all of a weight."""
    input: ClassVar[str]
    only_dequantized: ClassVar[bool] = True

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[rows, depth]."""
        return (shape[0], 2 * shape[1]) if len(shape) == 2 and shape[1] % (GROUP // 2) == 0 else None

    def parts(self, *sizes: int) -> dict[str, Part]:
        """The input's scale is there or not."""
        rows, depth = sizes
        return {
            self.weight: Part([[rows, depth // 2]], ("U8",)),
            ".weight_scale": Part([[rows, depth // GROUP]], ("F8_E4M3",), NOT_NEGATIVE),
            self.whole: Part([[], [1]], rule=POSITIVE),
            self.input: Part([[], [1]], rule=POSITIVE, is_optional=True),
        }

    def operands(self, parts: Parts) -> Operands:
        """None."""
        raise NotImplementedError

    def dequantized(self, parts: Parts) -> Tensor:
        """float32 [rows, depth]."""
        scale = parts[".weight_scale"].float()
        whole = parts[self.whole].float()
        scale = scale * whole if self.whole == ".weight_scale_2" else scale / whole
        numbers = four_bits.e2m1(four_bits.halves(parts[self.weight]), torch.float32)
        return (numbers.unflatten(-1, (-1, GROUP)) * scale[..., None]).flatten(-2)


@dataclass(frozen=True)
class _ModelOpt(_Nvfp4):
    weight: ClassVar[str] = ".weight"
    whole: ClassVar[str] = ".weight_scale_2"
    input: ClassVar[str] = ".input_scale"


@dataclass(frozen=True)
class _CompressedTensors(_Nvfp4):
    weight: ClassVar[str] = ".weight_packed"
    whole: ClassVar[str] = ".weight_global_scale"
    input: ClassVar[str] = ".input_global_scale"


MODELOPT = _ModelOpt()
COMPRESSED_TENSORS = _CompressedTensors()
