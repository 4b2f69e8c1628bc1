"""Which linears of a checkpoint are float8, and how, by what its files say: three formats are understood.

A key that is not known is no understanding: it may change what the numbers mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ad_flashinfer_pass.kernels.linear.float8 import BLOCK

SUPPORTED = "modelopt FP8, compressed-tensors float-quantized and block fp8 [128, 128]"


class Group(NamedTuple):
    """Linears that are quantized alike."""

    targets: tuple[str, ...]
    """Names of modules, ``re:`` and a pattern of them, or Linear for all others."""
    weights: Literal["tensor", "channel", "block"]
    """What shares a scale: all of a weight, a row, or a block."""
    activation: Literal["none", "tensor", "token", "block"]
    """Argument of ``ops.quantized_linear``."""

    def scale_shapes(self, rows: int, columns: int) -> list[list[int]]:
        """The shapes that the scales of a weight may have."""
        if self.weights == "tensor":
            return [[], [1]]
        if self.weights == "channel":
            return [[rows, 1]]
        return [[-(-rows // BLOCK), -(-columns // BLOCK)]]


class Layout(NamedTuple):
    """What the files of a checkpoint say of its float8 linears."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    """Names, or patterns of names, of linears that are not quantized."""
    method: Literal["modelopt", "compressed-tensors", "fp8"]
    head_is_plain: bool = False
    """The linear that makes the logits is not quantized, though nothing names it."""

    @property
    def scale(self) -> str:
        """The last part of the name of a weight's scale."""
        return "weight_scale_inv" if self.method == "fp8" else "weight_scale"

    def group_of(self, name: str) -> Group | None:
        """How a linear of this name is quantized; None: it is not."""
        if any(_EXCLUDES[self.method](pattern, name) for pattern in self.ignored):
            return None
        # The most specific counts.
        for matches in (_is_name, _is_pattern, lambda target, _: target == "Linear"):
            for group in self.groups:
                if any(matches(target, name) for target in group.targets):
                    return group
        return None


def read_layout(method: str, settings: dict[str, Any]) -> Layout | str:
    """What a quantizer's settings say, or what is not understood, empty if all of it.

    Args:
        method: modelopt, compressed-tensors or fp8; any other is not understood.
        settings: those of hf_quant_config.json are under ``quantization``.
    """
    if method not in _READERS:
        return ""
    reader = _ModelOptFile if "quantization" in settings else _READERS[method]
    try:
        return reader.model_validate(settings).layout()
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            return str(first["ctx"]["error"])
        if first["type"] == "extra_forbidden":
            return f"its key {place} is unknown"
        if first["type"] == "missing":
            return f"its key {place} is missing"
        return f"its {place} is {first['input']!r:.100}"


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


def _is_pattern(pattern: str, name: str) -> bool:
    return pattern.startswith("re:") and re.match(pattern.removeprefix("re:"), name) is not None


def _is_name(pattern: str, name: str) -> bool:
    return pattern == name


def _by_compressed_tensors(pattern: str, name: str) -> bool:
    return pattern in (name, "Linear") or _is_pattern(pattern, name)


def _by_modelopt(pattern: str, name: str) -> bool:
    """Shell patterns of a module, or of one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def _by_transformers(pattern: str, name: str) -> bool:
    """A pattern from the start to the end of a module's name, or the end of the name."""
    return name.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) is not None


_EXCLUDES: dict[str, Callable[[str, str], bool]] = {
    "modelopt": _by_modelopt,
    "compressed-tensors": _by_compressed_tensors,
    "fp8": _by_transformers,
}


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            raise ValueError(f"{pattern!r} is no pattern") from None


_Nothing = Annotated[dict[str, Any], Len(0, 0)] | None
_Names = list[str] | None


class _Float8(_Exact):
    """Of weights and of activations alike."""

    num_bits: Literal[8]
    type: Literal["float"]


class _ModelOptNumbers(_Float8):
    dynamic: Literal[False] = False


class _ModelOptGroup(_Exact):
    weights: _ModelOptNumbers
    input_activations: _ModelOptNumbers
    output_activations: None = None
    targets: list[Literal["Linear"]]


class _ModelOptQuantization(_Exact):
    quant_algo: Literal["FP8"]
    kv_cache_quant_algo: Literal["FP8"] | None = None
    exclude_modules: _Names = None


class _ModelOptFile(_Exact):
    """hf_quant_config.json."""

    producer: Any = None
    quantization: _ModelOptQuantization

    def layout(self) -> Layout:
        return _modelopt(self.quantization.exclude_modules)


class _ModelOpt(_ModelOptQuantization):
    """quantization_config, in the words of either library."""

    quant_method: Literal["modelopt"] = "modelopt"
    producer: Any = None
    config_groups: Annotated[dict[str, _ModelOptGroup], Len(1, 1)] | None = None
    ignore: _Names = None
    kv_cache_scheme: Any = None

    def layout(self) -> Layout:
        return _modelopt(self.ignore if self.exclude_modules is None else self.exclude_modules)


def _modelopt(ignored: list[str] | None) -> Layout:
    group = Group(("Linear",), "tensor", "tensor")
    return Layout((group,), tuple(sorted(ignored or ())), "modelopt")


class _Numbers(_Float8):
    """QuantizationArgs of compressed-tensors; what only a quantizer reads may be anything."""

    symmetric: Literal[True] = True
    group_size: None = None
    block_structure: None = None
    actorder: None = None
    observer: Any = None
    observer_kwargs: Any = None
    zp_dtype: Any = None


class _Weights(_Numbers):
    strategy: Literal["tensor", "channel"]
    dynamic: Literal[False] = False
    scale_dtype: Any = None


class _PerTensor(_Numbers):
    strategy: Literal["tensor"]
    dynamic: Literal[False] = False
    scale_dtype: Any = None


class _PerToken(_Numbers):
    strategy: Literal["token"]
    dynamic: Literal[True]
    scale_dtype: None = None


class _Group(_Exact):
    targets: Annotated[list[str], Len(1)]
    weights: _Weights
    input_activations: Annotated[_PerTensor | _PerToken, Field(discriminator="strategy")] | None = None
    output_activations: None = None
    format: Literal["float-quantized"] | None = None

    def group(self) -> Group:
        how = self.input_activations
        return Group(tuple(self.targets), self.weights.strategy, "none" if how is None else how.strategy)


class _CompressedTensors(_Exact):
    quant_method: Literal["compressed-tensors"] = "compressed-tensors"
    format: Literal["float-quantized"]
    config_groups: Annotated[dict[str, _Group], Len(1)]
    ignore: _Names = None
    kv_cache_scheme: Any = None
    quantization_status: Literal["compressed"] = "compressed"
    global_compression_ratio: Any = None
    version: Any = None
    sparsity_config: _Nothing = None
    transform_config: _Nothing = None
    moe_sparsity_config: _Nothing = None

    @model_validator(mode="after")
    def _patterns(self) -> _CompressedTensors:
        named = chain(self.ignore or (), *(group.targets for group in self.config_groups.values()))
        _check_patterns(name.removeprefix("re:") for name in named if name.startswith("re:"))
        return self

    def layout(self) -> Layout:
        groups = tuple(group.group() for group in self.config_groups.values())
        return Layout(groups, tuple(self.ignore or ()), "compressed-tensors")


class _BlockFp8(_Exact):
    """FineGrainedFP8Config of transformers."""

    quant_method: Literal["fp8"]
    weight_block_size: Annotated[list[Literal[128]], Len(2, 2)]
    activation_scheme: Literal["dynamic"]
    fmt: Literal["e4m3"] = "e4m3"
    scale_fmt: Literal["float"] = "float"
    expert_dtype: Literal["fp8"] = "fp8"
    dequantize: Literal[False] = False
    modules_to_not_convert: _Names = None
    ignored_layers: _Names = None
    modules_to_convert: _Names = None

    @model_validator(mode="after")
    def _patterns(self) -> _BlockFp8:
        if self.modules_to_convert:
            raise ValueError("modules_to_convert names embeddings")
        _check_patterns([*(self.modules_to_not_convert or ()), *(self.ignored_layers or ())])
        return self

    def layout(self) -> Layout:
        named = self.ignored_layers if self.modules_to_not_convert is None else self.modules_to_not_convert
        return Layout((Group(("Linear",), "block", "block"),), tuple(named or ()), "fp8", named is None)


_READERS: dict[str, type[_ModelOpt | _CompressedTensors | _BlockFp8]] = {
    "modelopt": _ModelOpt,
    "compressed-tensors": _CompressedTensors,
    "fp8": _BlockFp8,
}
