"""JSON files of a checkpoint, read so that every failure names the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ad_flashinfer_pass.errors import LoadError


class Fields(BaseModel):
    """The types of some keys of a file; others are not looked at."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        LoadError: it cannot be read, or holds no object.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise LoadError(f"{file}: {err.strerror}.") from None
    except (ValueError, RecursionError) as err:
        raise LoadError(f"{file}: not valid JSON ({err}); fetch the file again.") from None
    if not isinstance(raw, dict):
        raise LoadError(f"{file}: must hold an object, got {type(raw).__name__}.")
    return raw


def check_types(file: Path, raw: dict[str, Any], fields: type[Fields]) -> None:
    """Compare the values of a file with the types that they must have.

    Raises:
        LoadError: names the first key whose value is of another type.
    """
    try:
        fields.model_validate(raw)
    except ValidationError as err:
        key = str(err.errors()[0]["loc"][0])
        kind = fields.model_fields[key].annotation
        shown = (
            (kind.__name__ if isinstance(kind, type) else str(kind))
            .replace("None", "null")
            .replace("typing.", "")
        )
        raise LoadError(f"{file}: {key}: must be {shown}, got {raw[key]!r:.100}.") from None
