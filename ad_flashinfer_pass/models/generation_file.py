"""generation_config.json, and the tokens that end a text: those that files name, not defaults of classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import GenerationConfig

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.source import first_line, read_json

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"


class _Fields(BaseModel):
    """What the file may say; transformers checks none of these types when it reads them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    eos_token_id: int | list[int] | None = None
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


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """generation_config.json of a checkpoint, as transformers reads it; None if there is none.

    Raises:
        LoadError: it cannot be read, or a value is of the wrong type.
    """
    file = directory / GENERATION_FILE
    if not file.exists():
        return None
    raw = read_json(file)
    _check_types(file, raw)
    try:
        return GenerationConfig.from_dict(raw)
    except (ValueError, TypeError, AttributeError, KeyError) as err:
        raise LoadError(f"{file}: {first_line(err)}") from None


def named_eos_token_ids(file: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens that a JSON file names under eos_token_id.

    Raises:
        LoadError: they are no integers.
    """
    _check_types(file, {"eos_token_id": raw.get("eos_token_id")})
    found = raw.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(token < 0 for token in ids):
        logger.warning("%s: eos_token_id %s: a negative number ends no text", file, found)
    return tuple(token for token in ids if token >= 0)


def _check_types(file: Path, raw: dict[str, Any]) -> None:
    try:
        _Fields.model_validate(raw)
    except ValidationError as err:
        key = str(err.errors()[0]["loc"][0])
        kind = str(_Fields.model_fields[key].annotation).replace(" | None", "")
        kind = kind.removeprefix("<class '").removesuffix("'>")
        raise LoadError(f"{file}: {key}: must be {kind} or null, got {raw[key]!r}.") from None
