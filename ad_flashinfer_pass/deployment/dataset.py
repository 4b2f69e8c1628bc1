"""Files of requests for ``bench``: conversations as ShareGPT has them, or lengths alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ad_flashinfer_pass.errors import ConfigError

MAX_PROMPT, MAX_TOTAL = 1024, 2048
"""Tokens of a conversation; longer ones are left out, as vLLM's benchmark does."""
_SHORTEST = 4


class Lengths(BaseModel):
    """A request of random tokens."""

    prompt_len: int = Field(ge=1)
    output_len: int = Field(ge=1)


class _Turn(BaseModel):
    value: str


class Conversation(BaseModel):
    """A request whose prompt is the first turn and whose answer is as long as the second."""

    conversations: list[_Turn] = Field(min_length=2)


@dataclass(frozen=True)
class Request:
    """What is sent, and when."""

    prompt: list[int]
    output_len: int
    arrival: float
    """Seconds after the beginning."""


Entry = Lengths | Conversation


def read(file: Path, number: int) -> list[Entry]:
    """The first requests of a file.

    Args:
        file: a JSON list, or an object a line: {"prompt_len": 100, "output_len": 20}, or
            {"conversations": [{"value": TEXT}, {"value": TEXT}]}; other fields are not read, and
            conversations of one turn are left out.
        number: how many, at most.

    Raises:
        ConfigError: it cannot be read, or has other objects, or none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        lines = enumerate(text.split("\n"), 1)  # splitlines would split texts at U+2028, too
        found = (
            list(enumerate(json.loads(text), 1))
            if text.lstrip()[:1] == "["
            else [(at, json.loads(line)) for at, line in lines if line.strip()]
        )
    except OSError as err:
        raise ConfigError(f"--dataset {file}: {err.strerror}.") from None
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"--dataset {file}: must be JSON, or JSON lines: {err}.") from None
    whole = ((at, each) for at, each in found if not _has_one_turn(each))
    entries = [_entry(file, at, each) for at, each in islice(whole, number)]
    if not entries:
        raise ConfigError(f"--dataset {file}: has no request.")
    return entries


def _has_one_turn(value: Any) -> bool:
    turns = value.get("conversations") if isinstance(value, dict) else None
    return isinstance(turns, list) and len(turns) < 2


def _entry(file: Path, at: int, value: Any) -> Entry:
    try:
        return TypeAdapter[Entry](Entry).validate_python(value)
    except ValidationError:
        raise ConfigError(
            f"--dataset {file}: request {at} must have prompt_len and output_len of at least 1, or "
            f"conversations of two turns with value, got {json.dumps(value)[:80]}."
        ) from None


def longest(entries: Sequence[Entry]) -> int:
    """Tokens of the longest request, prompt and answer."""
    return max(e.prompt_len + e.output_len if isinstance(e, Lengths) else MAX_TOTAL for e in entries)


def requests(
    entries: Sequence[Entry], tokenizer: Any, vocab_size: int, request_rate: float, seed: int = 0
) -> list[Request]:
    """The requests with their tokens and times of arrival.

    Args:
        entries: what was read.
        tokenizer: of the model; conversations need one.
        vocab_size: random tokens are below.
        request_rate: requests a second, between which times are exponential; infinite: all at once.
        seed: of the times and of random tokens.

    Raises:
        ConfigError: a text cannot be encoded without a tokenizer, or all are too long.
    """
    drawn, made, arrival = random.Random(seed), list[Request](), 0.0
    for entry in entries:
        if isinstance(entry, Lengths):
            prompt = [drawn.randrange(vocab_size) for _ in range(entry.prompt_len)]
            output_len = entry.output_len
        elif tokenizer is None:
            raise ConfigError("--dataset has texts, but the model has no tokenizer: give lengths.")
        else:
            prompt, answer = (tokenizer.encode(turn.value) for turn in entry.conversations[:2])
            output_len = len(answer)
            is_short = len(prompt) < _SHORTEST or output_len < _SHORTEST
            if is_short or len(prompt) > MAX_PROMPT or len(prompt) + output_len > MAX_TOTAL:
                continue
        made.append(Request(prompt, output_len, arrival))
        arrival += drawn.expovariate(request_rate) if request_rate < float("inf") else 0.0
    if not made:
        raise ConfigError(
            f"--dataset: no conversation has {_SHORTEST} to {MAX_PROMPT} tokens and an answer of {_SHORTEST} "
            f"at least, together {MAX_TOTAL} at most."
        )
    return made
