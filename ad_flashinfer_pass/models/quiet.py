"""transformers without its log and progress bars: the package shows its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging

logger = logging.getLogger(__name__)


@contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """Collect what transformers would print while it loads; no progress bars."""
    messages: list[str] = []
    handler = _Collector(messages)
    verbosity, has_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.disable_default_handler()
    hf_logging.add_handler(handler)
    hf_logging.set_verbosity_warning()
    hf_logging.disable_progress_bar()
    try:
        yield messages
    finally:
        hf_logging.remove_handler(handler)
        hf_logging.enable_default_handler()
        hf_logging.set_verbosity(verbosity)
        if has_bars:
            hf_logging.enable_progress_bar()
        for message in messages:
            logger.debug("transformers: %s", message)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())
