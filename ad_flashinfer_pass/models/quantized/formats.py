"""The formats that are understood, by quant_method."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from ad_flashinfer_pass.models.quantized import awq, block_fp8, compressed_tensors, gptq, modelopt, mxfp4
from ad_flashinfer_pass.models.quantized.layout import Layout

SUPPORTED = (
    "modelopt FP8 and NVFP4, compressed-tensors float-quantized, pack-quantized int4 and "
    "nvfp4-pack-quantized, block fp8 [128, 128], MXFP4, AWQ and GPTQ int4"
)


_READERS: dict[str, type[BaseModel]] = {
    "modelopt": modelopt.Section,
    "compressed-tensors": compressed_tensors.Section,
    "fp8": block_fp8.Section,
    "mxfp4": mxfp4.Section,
    "awq": awq.Section,
    "gptq": gptq.Section,
}


def read_layout(method: str, settings: dict[str, Any]) -> Layout | str:
    """What a quantizer's settings say, or what is not understood, empty if all of it.

    Args:
        method: as transformers names it; most are not understood.
        settings: those of hf_quant_config.json are under ``quantization``.
    """
    if method not in _READERS:
        return ""
    reader = modelopt.File if "quantization" in settings else _READERS[method]
    try:
        read: Any = reader.model_validate(settings)
        layout: Layout = read.layout()
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
    except ValueError as err:  # of layout
        return str(err)
    return layout
