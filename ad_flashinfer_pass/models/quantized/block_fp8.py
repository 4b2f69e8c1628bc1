"""Block fp8, of DeepSeek and Qwen: float8_e4m3fn with weight_scale_inv, a factor for each block of 128 x 128.

Source: FineGrainedFP8Config of transformers, and inference/kernel.py of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Len
from pydantic import model_validator

from ad_flashinfer_pass.models.quantized.layout import (
    Exact,
    Group,
    Layout,
    Names,
    by_transformers,
    check_patterns,
)
from ad_flashinfer_pass.models.quantized.scheme import Float8


class Section(Exact):
    """quantization_config."""

    quant_method: Literal["fp8"]
    weight_block_size: Annotated[list[Literal[128]], Len(2, 2)]
    activation_scheme: Literal["dynamic"]
    fmt: Literal["e4m3"] = "e4m3"
    scale_fmt: Literal["float"] = "float"
    expert_dtype: Literal["fp8"] = "fp8"
    dequantize: Literal[False] = False
    modules_to_not_convert: Names = None
    ignored_layers: Names = None
    modules_to_convert: Names = None

    @model_validator(mode="after")
    def _patterns(self) -> Section:
        if self.modules_to_convert:
            raise ValueError("modules_to_convert names embeddings")
        check_patterns([*(self.modules_to_not_convert or ()), *(self.ignored_layers or ())])
        return self

    def layout(self) -> Layout:
        """What it says."""
        named = self.ignored_layers if self.modules_to_not_convert is None else self.modules_to_not_convert
        group = Group(("Linear",), Float8("block", "block", ".weight_scale_inv"))
        return Layout((group,), tuple(named or ()), by_transformers, named is None)
