"""MXFP4, of gpt-oss: experts of which a layer has all in one tensor of blocks and one of scales.

Blocks [num_experts, rows, groups, 16] hold two numbers of float4_e2m1 in a byte, the first in the low half,
and scales [num_experts, rows, groups] the exponents of powers of two, plus 127. The model has the transpose.
Sources: gpt_oss/torch/weights.py of openai/gpt-oss; transformers.integrations.mxfp4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import model_validator

from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized.layout import (
    Exact,
    Group,
    Layout,
    Names,
    by_transformers,
    check_patterns,
)
from ad_flashinfer_pass.models.quantized.scheme import NUMBER, Operands, Part, Parts, Scheme

GROUP = 32
"""Elements of a row that share a scale."""


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """A projection of all experts of a layer."""

    weight: ClassVar[str] = "_blocks"
    plain: ClassVar[str] = ""
    is_of_experts: ClassVar[bool] = True

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[num_experts, rows, depth]."""
        if len(shape) != 4 or shape[3] != GROUP // 2:
            return None
        return (*shape[:2], shape[2] * GROUP)

    def parts(self, *sizes: int) -> dict[str, Part]:
        """Blocks and scales."""
        *rows, depth = sizes
        return {
            "_blocks": Part([[*rows, depth // GROUP, GROUP // 2]], ("U8",)),
            "_scales": Part([[*rows, depth // GROUP]], ("U8",), NUMBER),
        }

    def operands(self, parts: Parts) -> Operands:
        """The groups of a row in one."""
        return Operands(four_bits.pack(four_bits.halves(parts["_blocks"].flatten(-2))), parts["_scales"])


class Section(Exact):
    """quantization_config."""

    quant_method: Literal["mxfp4"]
    modules_to_not_convert: Names = None
    dequantize: Literal[False] = False

    @model_validator(mode="after")
    def _patterns(self) -> Section:
        check_patterns(self.modules_to_not_convert or ())
        return self

    def layout(self) -> Layout:
        """What it says."""
        group = Group((r"re:.*\.experts\.(gate_up|down)_proj$",), Mxfp4())
        return Layout((group,), tuple(self.modules_to_not_convert or ()), by_transformers)
