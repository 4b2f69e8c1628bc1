"""Where a model lies, and what its config.json says.

``find_source`` turns the ``model`` key into a directory; ``read_config`` reads config.json with
``model_kwargs`` applied; ``check_architecture`` refuses what has no paged KV cache. None of them
reads weights, so that a wrong path or a wrong model is told at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)

from ad_flashinfer_pass.config import AutoDeployConfig, nearest
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.models.json_file import read_json

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
# Above this, transformers would make modules without an end.
_COUNT, _MOST = re.compile(r"(num|n)_\w*(layer|expert|head)s?"), 10_000
_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the code of a model raises on a value that it does not expect: plain Python, for the most part.
UNEXPECTED_VALUE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)
_SUPPORTED = (
    "supported are decoder-only causal language models with attention, such as Llama, Qwen, Mistral or Gemma"
)


@dataclass(frozen=True)
class Source:
    """A model on this disk."""

    directory: Path
    """Holds the weights and the tokenizer, where there are any."""
    config_file: Path
    """config.json, or the JSON file that was given in its place."""


def find_source(config: AutoDeployConfig, stack: ExitStack) -> Source:
    """The files of ``config.model``; what is not on this disk is fetched from the hub.

    Args:
        config: ``model`` is ``demo``, a directory, the path of a config.json, or a hub id.
        stack: keeps the demo's files in place until it is closed.

    Raises:
        ConfigError: there is no such directory, no config.json in it, or no such hub id.
    """
    if config.model == "demo":
        demo = resources.files("ad_flashinfer_pass.demo")
        return _in_directory(stack.enter_context(resources.as_file(demo)))
    path = Path(os.path.expanduser(config.model))
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except OSError as err:
        raise ConfigError(f"model {_shown(config.model)}: {err.strerror}.") from None
    if is_dir and config.model:
        return _in_directory(path)
    if is_file and path.suffix == ".json":
        return Source(path.parent, path)
    if is_file:
        raise ConfigError(
            "model must be a directory, the path of a config.json or a hub id, got the file "
            f"{path}; give the directory that holds it."
        )
    weights = [] if config.skip_loading_weights else ["*.safetensors"]
    return _in_directory(fetch(config.model, weights, "model", config.trust_remote_code))


def fetch(model_id: str, extra_files: list[str], key: str, trust_remote_code: bool) -> Path:
    """The local copy of a hub repository: its JSON, tokenizer and ``extra_files``, never pickles.

    Args:
        model_id: ``name`` or ``owner/name``.
        extra_files: glob patterns.
        key: the configuration key that an error names.
        trust_remote_code: fetch Python files too.

    Raises:
        ConfigError: it is not an id, or cannot be reached and was not fetched before.
    """
    problem = f"{key} {_shown(model_id)}: no such directory, and not a hub id that could be read"
    if not _HUB_ID.fullmatch(model_id):
        raise ConfigError(f"{problem}; give the path of a directory.")
    patterns = [*_HUB_FILES, *extra_files, *(["*.py"] if trust_remote_code else [])]
    logger.info("reading %s from the hub", model_id)
    try:
        return Path(
            snapshot_download(
                model_id,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],  # second copies of the weights
            )
        )
    except (OSError, ValueError) as err:
        raise ConfigError(f"{problem}: {first_line(err)}") from None


def read_config(source: Source, config: AutoDeployConfig) -> PretrainedConfig:
    """config.json with ``model_kwargs`` applied as if they had stood in it.

    Mappings in ``model_kwargs`` are merged into those of config.json. Fewer ``num_hidden_layers``
    also shorten the lists that have one entry a layer.

    Raises:
        ConfigError: ``model_kwargs`` has an unknown key or a value that the model refuses.
        LoadError: config.json cannot be read, or its model is unknown to transformers.
    """
    file = source.config_file
    raw = read_json(file)
    cleaned = _cleaned(file, raw)
    _cleaned(Path("model_kwargs"), config.model_kwargs)
    with tempfile.TemporaryDirectory() as folder:
        # Remote code is found beside config.json, so the directory is what transformers must be given.
        where = source.directory if file.name == "config.json" else file
        if cleaned != raw:
            where = Path(folder) / "config.json"
            where.write_text(json.dumps(cleaned), encoding="utf-8")
        try:
            hf_config = AutoConfig.from_pretrained(
                str(where), trust_remote_code=config.trust_remote_code, local_files_only=True
            )
        except UNEXPECTED_VALUE as err:
            raise LoadError(f"{file}: {_unreadable(raw, err)}") from None
    if config.model_kwargs:
        _check_keys(config.model_kwargs, hf_config, "model_kwargs")
        try:
            hf_config = type(hf_config).from_dict(_overridden(cleaned, config.model_kwargs))
        except UNEXPECTED_VALUE as err:
            raise ConfigError(f"model_kwargs: {_reason(err)}") from None
    # Who reads weights looks for it in the file: the model is built as the unquantized one.
    for part in (hf_config, *(getattr(hf_config, key, None) for key in hf_config.sub_configs)):
        if part is not None:
            vars(part).pop("quantization_config", None)
    return hf_config


def raw_config(source: Source, config: AutoDeployConfig) -> dict[str, Any]:
    """config.json as it is written, ``model_kwargs`` applied: without what classes add by default."""
    return _overridden(read_json(source.config_file), config.model_kwargs)


def check_architecture(hf_config: PretrainedConfig, config: AutoDeployConfig) -> None:
    """Refuse models that have no causal attention whose K and V could be paged.

    Raises:
        LoadError: an encoder, an encoder-decoder, a model without attention, or an unknown one.
    """
    kind = hf_config.model_type
    if getattr(hf_config, "is_encoder_decoder", False):
        raise LoadError(f"{kind!r} is an encoder-decoder model; {_SUPPORTED}.")
    known = type(hf_config) in MODEL_FOR_CAUSAL_LM_MAPPING
    remote = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if not known and not remote:
        raise LoadError(
            f"{kind!r} has no causal language model in transformers {transformers.__version__}; {_SUPPORTED}."
        )
    if not known and not config.trust_remote_code:
        raise LoadError(
            f"{kind!r} needs the Python code of its checkpoint; read that code, then set "
            "trust_remote_code (--trust-remote-code)."
        )
    # BERT and its kin have a causal class, but without is_decoder it runs without a causal mask.
    is_decoder = getattr(hf_config, "is_decoder", None)
    if is_decoder is False and type(hf_config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise LoadError(
            f"{kind!r} is an encoder, in which tokens attend to later tokens (config.json has no "
            f"is_decoder: true); {_SUPPORTED}."
        )


def build_settings(hf_config: PretrainedConfig, config: AutoDeployConfig) -> dict[str, Any]:
    """What transformers is given beside the config to build the model.

    Raises:
        ConfigError: ``attn_implementation`` leaves out a cap that the model has.
    """
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.dtype != "auto":
        settings["dtype"] = getattr(torch, config.dtype)
    attention = config.attn_implementation
    cap = getattr(hf_config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if cap is not None:  # transformers 5.17 picks sdpa for Gemma 2, which computes without the cap
        if attention == "sdpa":
            raise ConfigError(
                f"attn_implementation: sdpa of transformers has no attn_logit_softcapping, which is {cap} "
                "here; set eager, or leave the key out."
            )
        attention = "eager"
    if attention is not None:
        settings["attn_implementation"] = attention
    return settings


def with_max_seq_len(hf_config: PretrainedConfig, config: AutoDeployConfig) -> AutoDeployConfig:
    """The config with max_seq_len resolved: what it gives, else the positions of the model, at most 4,096.

    More positions than the model was made for are a warning: they work where they are computed, if less well,
    and ``number_by_positions`` refuses a table that ends before them.
    """
    text = hf_config.get_text_config(decoder=True)
    named = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    limit = next((value for value in named if isinstance(value, int) and value >= 1), None)
    if config.max_seq_len is None:
        return config.model_copy(
            update={"max_seq_len": min(config.sequence_limit, limit or config.sequence_limit)}
        )
    if limit is not None and config.max_seq_len > limit:
        logger.warning(
            "max_seq_len %d is above the %d positions that the model was made for; text past those "
            "may be poor",
            config.max_seq_len,
            limit,
        )
    return config


def first_line(err: BaseException) -> str:
    """The first line of an error's text, for use in a one-line message."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].strip()


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _in_directory(directory: Path) -> Source:
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"no config.json in {directory}; give the directory of a Hugging Face checkpoint.")
    return Source(directory, file)


def _cleaned(file: Path, raw: dict[str, Any], where: str = "") -> dict[str, Any]:
    """config.json with each dtype as transformers takes it: bfloat16 for torch.bfloat16, none for auto.

    Raises:
        LoadError: a dtype is none that weights have, or a count is beyond all models.
    """
    cleaned = dict(raw)
    for key, value in raw.items():
        if key == "transformers_weights" and value is not None:
            raise LoadError(f"{file}: {key}: only model.safetensors and its index are read, got {value!r}.")
        if key == "quantization_config" and not isinstance(value, dict):
            del cleaned[key]  # transformers cannot read it, even where no weights are
        elif key.endswith("_config") and isinstance(value, dict):
            cleaned[key] = _cleaned(file, value, f"{where}{key}.")
        if _COUNT.fullmatch(key) and isinstance(value, int) and value > _MOST:
            raise LoadError(f"{file}: {where}{key}: must be at most {_MOST:,}, got {value}.")
        if key not in ("dtype", "torch_dtype") or value is None or isinstance(value, dict):
            continue
        name = value.strip().removeprefix("torch.") if isinstance(value, str) else ""
        if name == "auto":
            del cleaned[key]
        elif getattr(torch, name or "?", None) in _PLAIN:
            cleaned[key] = name
        else:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _PLAIN)
            raise LoadError(f"{file}: {where}{key}: must be auto or one of {known}, got {value!r}.")
    return cleaned


def unfit_values(hf_config: PretrainedConfig, err: Exception) -> str:
    """Why transformers cannot build a model from config.json: the value that it does not know, if any."""
    for part in (hf_config, hf_config.get_text_config(decoder=True)):
        rope = getattr(part, "rope_parameters", None) or {}
        for key, found in (
            ("rope_parameters", rope),
            *((f"rope_parameters.{k}", v) for k, v in rope.items()),
        ):
            kind = found.get("rope_type") if isinstance(found, dict) else None
            if kind is not None and kind not in ROPE_INIT_FUNCTIONS and kind != "default":
                known = ", ".join(("default", *ROPE_INIT_FUNCTIONS))
                return f"{key}.rope_type: {kind!r} is unknown to transformers; known: {known}."
    if isinstance(err, KeyError):  # an activation, for example
        for key, value in hf_config.get_text_config(decoder=True).to_dict().items():
            if value == err.args[0]:
                return f"{key}: {value!r} is unknown to transformers."
    return f"transformers cannot build the model: {_reason(err)}"


def _reason(err: Exception) -> str:
    """The text of an error on one line, with its kind where the text alone says little, as for a KeyError."""
    text = " ".join(str(err).split())
    return (
        text
        if isinstance(err, (OSError, ValueError, StrictDataclassError)) and text
        else f"{type(err).__name__}: {text}"
    )


def _unreadable(raw: dict[str, Any], err: Exception) -> str:
    """Why transformers could not make a config of ``raw``."""
    kind = raw.get("model_type")
    if "auto_map" in raw and "trust_remote_code" in str(err):
        return (
            f"{kind!r} needs the Python code of its checkpoint; read that code, then set "
            "trust_remote_code (--trust-remote-code)."
        )
    if not isinstance(kind, (str, type(None))):
        return f"model_type: must be a string, got {kind!r}."
    if kind is None:
        return "has no model_type; add the key, for example model_type: llama."
    if "does not recognize this architecture" in str(err):
        return (
            f"model_type {kind!r} is unknown to transformers {transformers.__version__}; upgrade "
            "transformers or correct the key."
        )
    return _reason(err)


def _check_keys(changes: dict[str, Any], current: PretrainedConfig, where: str) -> None:
    known = {*current.to_dict(), *current.attribute_map}
    for key, value in changes.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, list(known))}")
        part = getattr(current, key, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            _check_keys(value, part, f"{where}.{key}")


def _overridden(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(raw)
    for key, value in changes.items():
        old = raw.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _overridden(old, value)
        merged[key] = value
    old_layers, new_layers = raw.get("num_hidden_layers"), merged.get("num_hidden_layers")
    if isinstance(new_layers, int):
        for key, value in raw.items():
            per_layer = "layer" in key and isinstance(value, list) and len(value) == old_layers
            if per_layer and key not in changes:
                merged[key] = value[:new_layers]
    return merged
