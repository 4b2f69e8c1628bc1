"""AWQ, version gemm: integers of 4 bits by groups of the inputs, eight outputs in an int32.

qweight [depth, rows / 8] and qzeros [depth / group, rows / 8] hold in a word, from the lowest bits on, the
outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight; scales are [depth / group, rows]. A weight is (number - zero) *
scale. Source: awq/modules/linear/gemm.py and awq/utils/packing_utils.py of casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, Field
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized.layout import Exact, Group, Layout, Names, by_part
from ad_flashinfer_pass.models.quantized.scheme import (
    FINITE,
    Operands,
    Part,
    Parts,
    Scheme,
    words_to_numbers,
)

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight outputs in a word."""


@dataclass(frozen=True)
class Awq(Scheme):
    """Of a linear."""

    group: int | None
    """Inputs that share a scale. None: all."""

    weight: ClassVar[str] = ".qweight"

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[rows, depth]."""
        if len(shape) != 2 or shape[0] % (self.group or 2):
            return None
        return (8 * shape[1], shape[0])

    def parts(self, *sizes: int) -> dict[str, Part]:
        """All of them."""
        rows, depth = sizes
        groups = depth // (self.group or depth)
        return {
            ".qweight": Part([[depth, rows // 8]], ("I32",)),
            ".qzeros": Part([[groups, rows // 8]], ("I32",)),
            ".scales": Part([[groups, rows]], rule=FINITE),
        }

    def operands(self, parts: Parts) -> Operands:
        """By rows, in order."""
        return Operands(
            four_bits.pack(_in_order(parts[".qweight"]).T.contiguous()),
            parts[".scales"].T.contiguous(),
            zero_point=_in_order(parts[".qzeros"]).T.contiguous(),
        )


def _in_order(words: Tensor) -> Tensor:
    return words_to_numbers(words).unflatten(-1, (-1, 8))[..., _PLACES].flatten(-2)


class Section(Exact):
    """quantization_config, or quant_config.json."""

    quant_method: Literal["awq"] = "awq"
    bits: Annotated[Literal[4], Field(validation_alias=AliasChoices("bits", "w_bit"))]
    group_size: Annotated[int, Field(validation_alias=AliasChoices("group_size", "q_group_size"))]
    zero_point: Literal[True]
    version: Literal["gemm", "GEMM"]
    modules_to_not_convert: Names = None
    backend: Any = None
    do_fuse: Any = None
    fuse_max_seq_len: Any = None
    modules_to_fuse: Any = None
    exllama_config: Any = None

    def layout(self) -> Layout:
        """What it says; that the head is plain, it does not."""
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 2):
            raise ValueError(f"its group_size is {self.group_size}")
        group = Group(("Linear",), Awq(None if self.group_size == -1 else self.group_size))
        ignored = tuple(self.modules_to_not_convert or ())
        return Layout((group,), ignored, by_part, head_is_plain=True, names_all=False)
