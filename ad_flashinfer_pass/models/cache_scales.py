"""Scales of an 8-bit KV cache that a checkpoint carries, such as ``k_proj.k_scale``.

They mean what ``kv_cache_config.k_scale`` does: an element of the cache stands for its number times that.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers import PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.quantization import Stored

logger = logging.getLogger(__name__)

# One of the query or of the softmax weights is for kernels that round those, too.
_NAME = re.compile(r"(.+?)(?:\.attn)?(?:\.[qkv]_proj)?\.(k|v|kv|q|prob)_scale")
_OUTPUT = re.compile(r"\.([kv])_proj\.output_scale$")  # the older name


def is_cache_scale(name: str) -> bool:
    """Whether a tensor that the model does not have is a scale for its cache."""
    return _match(name) is not None


def with_cache_scales(
    config: AutoDeployConfig, directory: Path, tensors: Mapping[str, Stored], text: PretrainedConfig
) -> AutoDeployConfig:
    """The config with the scales of a checkpoint, if its cache is fp8 and it gives none of its own.

    Args:
        config: what was asked for.
        directory: of the checkpoint.
        tensors: those that the model does not have.
        text: of the language model; scales of layers after its last are not read.

    Raises:
        LoadError: a scale of K or of V is missing, or is not one number above 0.
    """
    names: dict[tuple[int, ...], dict[str, str]] = defaultdict(dict)
    for name in tensors:
        match = _match(name)
        layer = tuple(int(part) for part in match[1].split(".") if part.isdigit()) if match else ()
        if match and match[2] in ("k", "v", "kv") and layer and layer[-1] < text.num_hidden_layers:
            for kind in match[2]:
                names[layer][kind] = name
    if not names:
        return config
    first, cache = next(iter(names[min(names)].values())), config.kv_cache_config
    why_not = None
    if cache.dtype != "fp8":
        why_not = f"kv_cache_config.dtype is {cache.dtype}; dtype: fp8 uses them"
    elif {"k_scale", "v_scale"} & cache.model_fields_set:
        why_not = "kv_cache_config gives its own"
    elif getattr(text, "kv_lora_rank", None):
        # Nothing in a file says whether they are of the latent or of the keys of each head.
        why_not = "a latent may be cached; `ad-flashinfer-pass calibrate` makes its k_scale"
    if why_not is not None:
        logger.warning(
            "%s: scales of a KV cache (%s, ...) are not used, because %s", directory, first, why_not
        )
        return config
    scales: dict[str, list[float]] = {"k": [], "v": []}
    for layer in sorted(names):
        for kind, column in scales.items():
            column.append(_value(directory, tensors, names[layer], kind))
    update = {"k_scale": scales["k"], "v_scale": scales["v"]}
    return config.model_copy(update={"kv_cache_config": cache.model_copy(update=update)})


def _match(name: str) -> re.Match[str] | None:
    return _NAME.fullmatch(_OUTPUT.sub(r".\1_scale", name))


def _value(directory: Path, tensors: Mapping[str, Stored], names: Mapping[str, str], kind: str) -> float:
    advice = "give kv_cache_config.k_scale and v_scale; `ad-flashinfer-pass calibrate` makes them"
    if kind not in names:
        raise LoadError(f"{directory}: {min(names.values())!r} has no {kind}_scale beside it; {advice}.")
    stored = tensors[names[kind]]
    value = math.nan
    if math.prod(stored.shape) == 1:
        with safe_open(stored.file, framework="pt") as opened:
            value = float(opened.get_tensor(names[kind]))
    if not 0.0 < value < math.inf:
        raise LoadError(
            f"{stored.file}: {names[kind]!r} must be one number above 0 to scale the KV cache, got "
            f"{value if stored.shape in ((), (1,)) else f'shape {list(stored.shape)}'}; {advice}."
        )
    return value
