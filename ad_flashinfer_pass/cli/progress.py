"""Progress of the command on stderr: a live line on a terminal, short lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from ad_flashinfer_pass.runtime.llm import Progress

_SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Tells where a run stands; everything goes to stderr.

    Args:
        quiet: say nothing, warnings of the package included.
        live: whether the live line may be drawn while results are generated; not while they go to
            the same terminal.
        debug: show the package's debug log too.
    """

    def __init__(self, *, quiet: bool, live: bool, debug: bool = False) -> None:
        self._quiet = quiet
        self._live = live
        self._console: Console | None = None
        self._status: Status | None = None
        self._start = self._last_line = time.monotonic()
        self._most_pages = 0
        self._handler = _LogLines(self)
        self._log_level = logging.DEBUG if debug else logging.INFO

    def __enter__(self) -> Reporter:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, markup=False)
        logger = logging.getLogger("ad_flashinfer_pass")
        logger.addHandler(self._handler)
        logger.setLevel(self._log_level)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("ad_flashinfer_pass")
        logger.removeHandler(self._handler)
        logger.setLevel(logging.NOTSET)
        self._stop()

    def phase(self, name: str) -> None:
        """A phase of making the model begins; ``name`` may be that of a transform."""
        self._show(name.replace("_", " "))

    def ready(self, device: str) -> None:
        """The model is on its device, and generation begins."""
        self._stop()
        now = time.monotonic()
        self.line(f"ready on {device} in {now - self._start:.1f} s")
        self._start = self._last_line = now

    def step(self, progress: Progress) -> None:
        """A step of generation ended."""
        self._most_pages = max(self._most_pages, progress.pages_in_use)
        text = (
            f"{progress.num_finished} of {progress.num_total} prompts, "
            f"{self._speed(progress.num_new_tokens)}, "
            f"pages in use {progress.pages_in_use} of {progress.num_pages}"
        )
        now = time.monotonic()
        if self._console is not None:
            if self._live:
                self._show(text)
        elif now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.line(text)

    def done(self, num_tokens: int, num_pages: int, num_preemptions: int) -> None:
        """Generation ended."""
        self._stop()
        pages = f", at most {self._most_pages} of {num_pages} pages" if self._most_pages else ""
        preempted = f", {num_preemptions} preemptions" if num_preemptions else ""
        self.line(f"{self._speed(num_tokens)}{pages}{preempted}")

    def refused(self, where: str, error: str) -> None:
        """One prompt has no continuation; said even if quiet."""
        self._stop()
        print(f"error: {where}: {' '.join(error.split())}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._quiet:
            return
        if self._console is not None:
            self._console.print(text, style="dim", soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _speed(self, num_tokens: int) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / seconds:.0f} tokens/s)"

    def _show(self, text: str) -> None:
        if self._console is None:
            self.line(text)
        elif self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class _LogLines(logging.Handler):
    """Shows the package's warnings among the lines of progress."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._reporter.line(prefix + record.getMessage())
