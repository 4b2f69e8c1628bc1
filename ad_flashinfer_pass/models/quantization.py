"""What says that the weights of a checkpoint are quantized, and as what: files beside it, or its tensors.

Scales of the KV cache alone do not make weights quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ad_flashinfer_pass.models.json_file import read_json
from ad_flashinfer_pass.models.quantized.formats import read_layout
from ad_flashinfer_pass.models.quantized.layout import Layout
from ad_flashinfer_pass.models.source import Source


class Quantized(NamedTuple):
    """Weights that are not those of the unquantized model."""

    format: str
    """As precisely as can be told, for example ``GPTQ int4``."""
    said_by: str
    """The file and key, or the tensor, that says so."""
    layout: Layout | str = "no file says how they are to be read"
    """How to read them, or what keeps them from being read, empty if it is all of the format."""

    def __str__(self) -> str:
        return f"quantized as {self.format} ({self.said_by})"


class Stored(NamedTuple):
    """A tensor in a safetensors file, by its header."""

    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, F8_E4M3, I8, ..."""
    shape: tuple[int, ...]


# By quant_method, as transformers names it.
_METHODS: dict[str, Callable[[dict[str, Any]], str]] = {
    "modelopt": lambda keys: f"modelopt {keys.get('quant_algo', 'of an unknown algorithm')}",
    "compressed-tensors": lambda keys: f"compressed-tensors {keys.get('format', 'of an unknown format')}",
    "fp8": lambda keys: f"block fp8 {size}" if (size := keys.get("weight_block_size")) else "fp8",
    "gptq": lambda keys: f"GPTQ int{keys.get('bits', '?')}",
    "awq": lambda keys: f"AWQ int{keys.get('bits', keys.get('w_bit', '?'))}",
    "mxfp4": lambda keys: "MXFP4",
    "bitsandbytes": lambda keys: f"bitsandbytes {4 if keys.get('load_in_4bit') else 8}-bit",
}
# The method where quant_method does not name it, by a key that only this method has.
_KEYS = {
    "quant_algo": "modelopt",
    "config_groups": "compressed-tensors",
    "desc_act": "gptq",
    "w_bit": "awq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
}
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# By the last part of a tensor's name and its dtype; the first entry that fits any tensor counts.
_TENSORS = tuple(
    (re.compile(name), re.compile(dtype), form)
    for name, dtype, form in (
        ("g_idx", ".*", "GPTQ"),
        ("qweight|qzeros", ".*", "AWQ or GPTQ integers"),
        (r"bitsandbytes__\w+|quant_map|absmax|SCB", ".*", "bitsandbytes"),
        (r"\w+_blocks", "U8", "MXFP4"),
        ("weight_packed", ".*", "compressed-tensors, packed"),
        ("weight_scale_2", ".*", "modelopt NVFP4"),
        ("weight_scale_inv", ".*", "block fp8"),
        (r"\w+:(qdata|scale)", ".*", "torchao"),
        (".*", "F8_.*", "fp8"),
        (".*", "F4|F6_.*", "floating point of less than 8 bits"),
        (r"(?!.*(bias|mask|ids)$).*", "[IU][48]", "integers of at most 8 bits"),
        (r"\w*(weight|input)_scale\w*|scale_weight", ".*", "an unknown format with scales"),
    )
)


def find_quantized(source: Source, raw: dict[str, Any]) -> Quantized | None:
    """What the files say; None if they say nothing of the weights.

    Args:
        source: of the model.
        raw: its config.json.

    Raises:
        LoadError: a file of a quantizer cannot be read.
    """
    found = [(f"{source.config_file}: {key}", value) for key, value in _sections(raw)]
    for name in _FILES:
        file = source.directory / name
        if file.is_file():
            found.append((str(file), read_json(file)))
    quantized = None
    for said_by, settings in found:
        method, form = _format(settings)
        if not form:
            continue
        layout = read_layout(method, settings)
        if quantized is None:
            named = settings.get("quant_method") if isinstance(settings, dict) else None
            quantized = Quantized(form, f"{said_by}, quant_method {named!r}" if named else said_by, layout)
        elif layout != quantized.layout and not isinstance(quantized.layout, str):
            quantized = quantized._replace(layout=f"{said_by} says otherwise")
    return quantized


def find_quantized_tensor(tensors: Mapping[str, Stored]) -> Quantized | None:
    """What the headers of the weights say."""
    kinds: dict[tuple[str, str], str] = {}
    for name, stored in tensors.items():
        kinds.setdefault((name.rpartition(".")[2], stored.dtype), name)
    for last, dtype, form in _TENSORS:
        for kind, name in kinds.items():
            if last.fullmatch(kind[0]) and dtype.fullmatch(kind[1]):
                return Quantized(form, f"{tensors[name].file}: tensor {name!r}, {tensors[name].dtype}")
    return None


def _sections(raw: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """What is said under the keys of quantizers, also in the parts of a model such as text_config."""
    for key, value in raw.items():
        if key in _CONFIG_KEYS:
            yield where + key, value
        elif key.endswith("_config") and isinstance(value, dict):
            yield from _sections(value, f"{where}{key}.")


def _format(settings: Any) -> tuple[str, str | None]:
    """The method, and the format as precisely as can be told; None: of no weights."""
    if not settings:
        return "", None
    if not isinstance(settings, dict):
        return "", "an unknown format"
    if isinstance(settings.get("quantization"), dict):  # hf_quant_config.json
        settings = {"quant_algo": None, **settings["quantization"]}
    method = settings.get("quant_method") or next((m for key, m in _KEYS.items() if key in settings), None)
    # Both can quantize the KV cache alone.
    if "quant_algo" in settings and settings["quant_algo"] is None:
        return "", None
    if method == "compressed-tensors" and settings.get("config_groups") == {}:
        return "", None
    known = _METHODS.get(str(method))
    return str(method), known(settings) if known else f"{method or 'an unknown format'}"
