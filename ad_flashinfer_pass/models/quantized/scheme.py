"""How one weight is stored: the tensors that make it up, and what they become as arguments of our ops.

A scheme is told by the tensors' shapes and dtypes alone, so that it also describes weights on meta.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import float8, four_bits

REAL = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors names them."""
DTYPES = {**REAL, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
_REAL = tuple(REAL)


class Rule(NamedTuple):
    """What the numbers of a tensor must be."""

    text: str
    is_kept: Callable[[Tensor], Tensor]
    """Element by element; of float64, or of integers."""


POSITIVE = Rule("above 0 and finite", lambda values: (values > 0) & (values < math.inf))
NOT_NEGATIVE = Rule("finite and not below 0", lambda values: (values >= 0) & (values < math.inf))
FINITE = Rule("finite", torch.isfinite)
NUMBER = Rule("at most 254, since 255 is no number", lambda values: values != four_bits.NOT_A_NUMBER)


class Part(NamedTuple):
    """A tensor of a weight."""

    shapes: list[list[int]]
    """Those that it may have; the last is named in messages."""
    dtypes: tuple[str, ...] = _REAL
    """As safetensors names them."""
    rule: Rule | None = None
    is_optional: bool = False


class Operands(NamedTuple):
    """Arguments of ``ops.quantized_linear``, or of ``ops.quantized_experts`` for all experts of a layer."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    zero_point: Tensor | None = None


Parts = Mapping[str, Tensor]
"""By the ends of their names."""


@dataclass(frozen=True)
class Scheme(ABC):
    """Of the weights of some modules; the tensors of one have one name but for its end."""

    weight: ClassVar[str]
    """The end of the name of the tensor that shows such a weight."""
    plain: ClassVar[str] = ".weight"
    """The end of the name of the weight in the unquantized model."""
    is_of_experts: ClassVar[bool] = False
    """Whether it holds a projection of all experts of a layer, of which the model has the transpose."""
    only_dequantized: ClassVar[bool] = False
    """Whether no op computes with it."""

    @property
    def activation(self) -> str:
        """Argument of ``ops.quantized_linear``."""
        return "none"

    @abstractmethod
    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[..., rows, depth] by the shape of the tensor that shows the weight; None: it can be none."""

    @abstractmethod
    def parts(self, *sizes: int) -> dict[str, Part]:
        """All tensors of a weight [..., rows, depth]."""

    def fault(self, parts: Parts) -> tuple[str, str] | None:
        """The part, and what is wrong with it, where shapes, dtypes and rules do not tell."""
        return None

    @abstractmethod
    def operands(self, parts: Parts) -> Operands:
        """The arguments of the op."""

    def dequantized(self, parts: Parts) -> Tensor:
        """float32 [..., rows, depth]."""
        weight, scale, _, zero_point = self.operands(parts)
        return float8.dequantized(weight, scale, torch.float32, zero_point)


@dataclass(frozen=True)
class Float8(Scheme):
    """float8_e4m3fn: weight, weight_scale, input_scale; or weight_scale_inv, a factor just as well."""

    weights: Literal["tensor", "channel", "block"]
    """What shares a scale: all of a weight, a row, or a block of 128 x 128."""
    inputs: Literal["none", "tensor", "token", "block"] = "none"
    scale: str = ".weight_scale"

    weight: ClassVar[str] = ".weight"

    @property
    def activation(self) -> str:
        """Argument of ``ops.quantized_linear``."""
        return self.inputs

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[rows, depth]."""
        return shape if len(shape) == 2 else None

    def parts(self, *sizes: int) -> dict[str, Part]:
        """With input_scale if activations have a static one."""
        rows, depth = sizes
        if self.weights == "block":
            shapes = [[-(-rows // float8.BLOCK), -(-depth // float8.BLOCK)]]
        else:
            shapes = [[], [1]] if self.weights == "tensor" else [[rows, 1]]
        found = {".weight": Part([[rows, depth]], ("F8_E4M3",)), self.scale: Part(shapes, rule=POSITIVE)}
        if self.inputs == "tensor":
            found[".input_scale"] = Part([[], [1]], rule=POSITIVE)
        return found

    def operands(self, parts: Parts) -> Operands:
        """As they are stored."""
        return Operands(parts[".weight"], parts[self.scale], parts.get(".input_scale"))


def words_to_numbers(words: Tensor) -> Tensor:
    """int32 [..., n] of eight numbers of 4 bits, the first in the lowest bits: uint8 0 to 15 [..., 8 n].

    Which is what a little-endian machine has in memory.
    """
    if not words.is_contiguous() or words.stride(-1) != 1:  # one of size 1 counts as contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    return four_bits.halves(words.view(torch.uint8))
