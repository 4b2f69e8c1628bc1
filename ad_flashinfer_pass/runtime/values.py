"""Values from callers as plain Python: numpy's numbers are numbers, a bool is none."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any

import numpy as np

from ad_flashinfer_pass.errors import RequestError


def as_int(name: str, value: Any) -> int:
    """An integer of any size.

    Raises:
        RequestError: it is not an integer; the message calls it ``name``.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise RequestError(f"{name} must be an integer, got {value!r:.80}.")


def as_float(name: str, value: Any) -> float:
    """A number, also one that is not finite.

    Raises:
        RequestError: it is not a number, or it is too large for a float.
    """
    try:
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise RequestError(f"{name} must be a number, got {value!r:.80}.")


def as_bool(name: str, value: Any) -> bool:
    """True or false.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise RequestError(f"{name} must be True or False, got {value!r:.80}.")


def as_ints(name: str, values: Any) -> tuple[int, ...]:
    """Integers, at least 0, from anything that holds some: a list, an array, an iterator.

    Raises:
        RequestError: it holds something else, or is a mapping or text.
    """
    values = plain(values)
    try:
        if not isinstance(values, str | bytes | bytearray | Mapping):
            numbers = tuple(as_int(name, value) for value in values)
            if min(numbers, default=0) >= 0:
                return numbers
    except (TypeError, RequestError):
        pass
    raise RequestError(f"{name} must be integers, none below 0, got {values!r:.80}.")


def as_token_ids(prompt: Any) -> list[int]:
    """A prompt's ids.

    Raises:
        RequestError: it is not a sequence of integers.
    """
    prompt = plain(prompt)
    try:
        if isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes | bytearray | Mapping | Set):
            tokens = list(prompt)
            are_plain = {*map(type, tokens)} <= {int}  # of long prompts in a tenth of the time
            return tokens if are_plain else [as_int("a token id", token) for token in tokens]
    except RequestError:
        pass
    raise RequestError(f"a prompt must be text or token ids, got {prompt!r:.80}.")


def plain(value: Any) -> Any:
    """The list that an array or a tensor holds; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) or hasattr(value, "untyped_storage") else value
