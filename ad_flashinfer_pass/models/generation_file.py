"""generation_config.json, and the tokens that end a text: those that files name, not defaults of classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.json_file import Fields, check_types, read_json
from ad_flashinfer_pass.models.source import UNEXPECTED_VALUE, first_line

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"


# Keys of config.json that are not about generation, though GenerationConfig has them, too.
_OF_MODELS = {"transformers_version", "use_cache", "output_attentions", "output_hidden_states"}


class Found(NamedTuple):
    """What a checkpoint says of generation."""

    config: GenerationConfig | None
    """None if it says nothing."""
    file: Path
    """That says it."""


class _EndTokens(Fields):
    eos_token_id: int | list[int] | None = None


class _Fields(_EndTokens):
    """What the file may say; transformers checks none of these types when it reads them."""

    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    num_beams: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    guidance_scale: float | None = None


def read_generation_config(directory: Path, config_file: Path, raw: dict[str, Any]) -> Found:
    """What a checkpoint says of generation, as transformers reads it.

    Args:
        directory: of generation_config.json.
        config_file: counts where that is missing: older models say there what is to be generated.
        raw: what ``config_file`` holds.

    Raises:
        LoadError: it cannot be read, or a value is of the wrong type.
    """
    file = directory / GENERATION_FILE
    if file.exists():
        raw = read_json(file)
    else:
        file, known = config_file, {key for key in vars(GenerationConfig()) if not key.startswith("_")}
        known -= _OF_MODELS
        text = raw.get("text_config")
        parts = [raw, *([text] if isinstance(text, dict) else [])]
        raw = {key: part[key] for part in reversed(parts) for key in known if part.get(key) is not None}
        if not raw:
            return Found(None, file)
    check_types(file, raw, _Fields)
    try:
        return Found(GenerationConfig.from_dict(raw), file)
    except UNEXPECTED_VALUE as err:
        raise LoadError(f"{file}: {first_line(err)}") from None


def named_eos_token_ids(file: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that a JSON file names under eos_token_id.

    Raises:
        LoadError: they are no integers.
    """
    check_types(file, raw, _EndTokens)
    found = raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(token < 0 for token in ids):
        logger.warning("%s: eos_token_id %s: a negative number cannot end a text", file, found)
    return tuple(token for token in ids if token >= 0)
