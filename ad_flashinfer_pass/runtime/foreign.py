"""The border to code that comes with a model: its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ad_flashinfer_pass.errors import AdFlashinferError, RequestError, is_panic

_MAX_MESSAGE = 300


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """Make whatever such code raises an error of the one request that it ran for.

    Tokenizers are Rust and Python, templates are programs of their own: they can raise anything. Ctrl-C and
    the like pass through.

    Args:
        what: failed, as a sentence without its end.

    Raises:
        RequestError: something was raised.
    """
    try:
        yield
    except AdFlashinferError:
        raise
    except BaseException as err:
        if not isinstance(err, Exception) and not is_panic(err):
            raise
        message = " ".join(str(err).split())[:_MAX_MESSAGE]
        raise RequestError(f"{what}: {type(err).__name__}: {message}") from None
