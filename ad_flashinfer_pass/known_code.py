"""Code of others that was read, and is known again by its digest."""

from __future__ import annotations

import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Iterable
from typing import Any


def digest(functions: Iterable[Callable[..., Any]]) -> str:
    """Of the code of functions, without comments and layout."""
    found = hashlib.sha256()
    for function in functions:
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                found.update(f"{token.string} ".encode())
    return found.hexdigest()[:16]
