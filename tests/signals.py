"""Signals in the processes that tests start."""

from __future__ import annotations

import signal


def hear_signals() -> None:
    """Also where the tests run under nohup or in the background; a ``preexec_fn``."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
