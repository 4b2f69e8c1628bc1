"""compressed-tensors: groups of modules with schemes of their own, as llm-compressor writes them.

float-quantized: float8 with a scale for all of a weight, a row or a block. pack-quantized: integers of 4
bits, eight in an int32, by groups of a row. nvfp4-pack-quantized: see ``nvfp4``. Sources:
compressed_tensors/quantization/quant_args.py and compressors/{naive_quantized,pack_quantized}.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Len
from pydantic import Field, model_validator

from ad_flashinfer_pass.kernels.linear import four_bits
from ad_flashinfer_pass.models.quantized import nvfp4
from ad_flashinfer_pass.models.quantized.layout import (
    Exact,
    Group,
    Layout,
    Names,
    Nothing,
    by_compressed_tensors,
    check_patterns,
)
from ad_flashinfer_pass.models.quantized.scheme import (
    FINITE,
    Float8,
    Operands,
    Part,
    Parts,
    Scheme,
    words_to_numbers,
)


@dataclass(frozen=True)
class Packed(Scheme):
    """Integers of 4 bits: weight_packed, along a row; weight_scale; weight_zero_point, along a column."""

    group: int | None
    """Elements of a row that share a scale. None: all."""
    has_zero_point: bool

    weight: ClassVar[str] = ".weight_packed"

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """[rows, depth], where no word and no group is cut short."""
        if len(shape) != 2 or (self.group is not None and 8 * shape[1] % self.group):
            return None
        return (shape[0], 8 * shape[1])

    def parts(self, *sizes: int) -> dict[str, Part]:
        """With zero points if it has them."""
        rows, depth = sizes
        groups = depth // (self.group or depth)
        found = {
            self.weight: Part([[rows, depth // 8]], ("I32",)),
            ".weight_scale": Part([[rows, groups]], rule=FINITE),
            ".weight_shape": Part([[2]], ("I64",)),
        }
        if self.has_zero_point:
            found[".weight_zero_point"] = Part([[-(-rows // 8), groups]], ("I32",))
        return found

    def fault(self, parts: Parts) -> tuple[str, str] | None:
        """weight_shape must be the one that is packed."""
        rows, words = parts[self.weight].shape
        found = parts[".weight_shape"].tolist()
        if found != [rows, 8 * words]:
            return ".weight_shape", f"must be {[rows, 8 * words]}, found {found}"
        return None

    def operands(self, parts: Parts) -> Operands:
        """By rows, in the order of ours."""
        zero_point = None
        if self.has_zero_point:
            numbers = words_to_numbers(parts[".weight_zero_point"].T)  # [groups, rows]
            zero_point = numbers.T[: parts[self.weight].shape[0]].contiguous()
        weight = four_bits.pack(words_to_numbers(parts[self.weight]))
        return Operands(weight, parts[".weight_scale"], zero_point=zero_point)


class _Arguments(Exact):
    """QuantizationArgs; what only a quantizer reads may be anything."""

    observer: Any = None
    observer_kwargs: Any = None
    zp_dtype: Any = None


class _Numbers(_Arguments):
    num_bits: Literal[8]
    type: Literal["float"]
    symmetric: Literal[True] = True
    group_size: None = None
    block_structure: None = None
    actorder: None = None


class _Weights(_Numbers):
    strategy: Literal["tensor", "channel"]
    dynamic: Literal[False] = False
    scale_dtype: Any = None


class _Blocks(_Weights):
    strategy: Literal["block"]  # type: ignore[assignment]
    block_structure: Annotated[list[Literal[128]], Len(2, 2)]  # type: ignore[assignment]


class _PerTensor(_Numbers):
    strategy: Literal["tensor"]
    dynamic: Literal[False] = False
    scale_dtype: Any = None


class _PerToken(_Numbers):
    strategy: Literal["token"]
    dynamic: Literal[True]
    scale_dtype: None = None


class _PerGroup(_Numbers):
    strategy: Literal["group"]
    dynamic: Literal[True]
    group_size: Literal[128]  # type: ignore[assignment]
    scale_dtype: None = None


class _Group(Exact):
    targets: Annotated[list[str], Len(1)]
    output_activations: None = None
    format: str | None = None


class _Float8(_Group):
    weights: Annotated[_Weights | _Blocks, Field(discriminator="strategy")]
    input_activations: (
        Annotated[_PerTensor | _PerToken | _PerGroup, Field(discriminator="strategy")] | None
    ) = None

    def scheme(self) -> Scheme:
        inputs = {None: "none", "group": "block"}
        found = None if self.input_activations is None else self.input_activations.strategy
        return Float8(self.weights.strategy, inputs.get(found, found))  # type: ignore[arg-type]


class _Integers(_Arguments):
    num_bits: Literal[4]
    type: Literal["int"]
    symmetric: bool = True
    strategy: Literal["group", "channel"]
    group_size: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    block_structure: None = None
    dynamic: Literal[False] = False
    actorder: Literal["static", "weight"] | None = None
    scale_dtype: Any = None

    @model_validator(mode="after")
    def _group(self) -> _Integers:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(f"its group_size is {self.group_size}, but its strategy {self.strategy}")
        return self


class _Packed(_Group):
    weights: _Integers
    input_activations: None = None

    def scheme(self) -> Scheme:
        return Packed(self.weights.group_size, not self.weights.symmetric)


class _Floats4(_Arguments):
    num_bits: Literal[4]
    type: Literal["float"]
    symmetric: Literal[True] = True
    strategy: Literal["tensor_group"]
    group_size: Literal[16]
    block_structure: None = None
    dynamic: Literal["local", False] = False
    actorder: None = None
    scale_dtype: Literal["torch.float8_e4m3fn"] | None = None


class _Nvfp4(_Group):
    weights: _Floats4
    input_activations: _Floats4 | None = None

    def scheme(self) -> Scheme:
        return nvfp4.COMPRESSED_TENSORS


_FORMATS: dict[str, type[_Float8 | _Packed | _Nvfp4]] = {
    "float-quantized": _Float8,
    "pack-quantized": _Packed,
    "nvfp4-pack-quantized": _Nvfp4,
}


class Section(Exact):
    """quantization_config."""

    quant_method: Literal["compressed-tensors"] = "compressed-tensors"
    format: Literal["float-quantized", "pack-quantized", "nvfp4-pack-quantized", "mixed-precision"]
    config_groups: Annotated[dict[str, dict[str, Any]], Len(1)]
    ignore: Names = None
    kv_cache_scheme: _PerTensor | None = None
    quantization_status: Literal["compressed"] = "compressed"
    global_compression_ratio: Any = None
    version: Any = None
    sparsity_config: Nothing = None
    transform_config: Nothing = None
    moe_sparsity_config: Nothing = None

    def layout(self) -> Layout:
        """What it says."""
        groups = []
        for group in self.config_groups.values():
            form = group.get("format") or self.format
            if form not in _FORMATS:
                raise ValueError(f"its format is {form!r:.100}")
            found = _FORMATS[form].model_validate(group)
            groups.append(Group(tuple(found.targets), found.scheme()))
        named = chain(self.ignore or (), *(group.targets for group in groups))
        check_patterns(name.removeprefix("re:") for name in named if name.startswith("re:"))
        return Layout(tuple(groups), tuple(self.ignore or ()), by_compressed_tensors)
