"""Code of others that was read, and is known again by its digest."""

from __future__ import annotations

import hashlib
import inspect
import io
import tokenize
from collections.abc import Callable, Iterable
from typing import Any


def digest(functions: Iterable[Callable[..., Any]]) -> str:
    """Of the code of functions, without comments and layout; what somebody else has wrapped is other code."""
    found = hashlib.sha256()
    for function in functions:
        while (inner := getattr(function, "__wrapped__", None)) is not None:
            home = str(getattr(function, "__globals__", {}).get("__name__"))
            found.update(b"" if home.partition(".")[0] in ("transformers", "torch") else home.encode())
            function = inner
        if not inspect.isfunction(function):
            found.update(repr(function).encode())
            continue
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(function)).readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                found.update(f"{token.string} ".encode())
    return found.hexdigest()[:16]
