"""The results of the command: text or JSON lines, on stdout or in a file, whole or absent."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from ad_flashinfer_pass.errors import ConfigError

if TYPE_CHECKING:
    from ad_flashinfer_pass.prompts import GivenPrompt
    from ad_flashinfer_pass.runtime.llm import GenerationResult

_MAX_HEADING = 72


class Stdout:
    """Results on stdout, each flushed as it comes."""

    def __enter__(self) -> Stdout:
        if isinstance(sys.stdout, io.TextIOWrapper):  # of an encoding that may lack what a model writes
            sys.stdout.reconfigure(errors="backslashreplace")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        """Write and flush.

        Raises:
            OSError: its filename is ``stdout``; a BrokenPipeError if the reader went away.
        """
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as err:
            # Python flushes stdout again when it exits, and would complain if that failed again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise OSError(err.errno, err.strerror, "stdout") from None

    def keep(self) -> None:
        """Nothing is to be kept: what was written is out."""

    def keep_partial(self) -> Path | None:
        """Nothing is to be kept: what was written is out."""
        return None


class OutputFile:
    """A file that appears under its name when it is complete, and not before.

    What is written goes to a hidden file beside it, to which ``keep`` gives the name, and which is
    removed if the block ends without. A device or pipe is written directly.

    Args:
        path: of the file; a link is followed.

    Raises:
        ConfigError: on entry, if the file cannot be made.
        OSError: from ``write`` and ``keep``, with the path; the disk may be full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._target = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> OutputFile:
        try:
            if self._path.is_dir():
                raise IsADirectoryError(None, "is a directory")
            if self._path.exists() and not os.access(self._path, os.W_OK):
                raise PermissionError(None, "not writable")
            if self._path.is_file() or not self._path.exists():
                self._temporary = self._target.with_name(f".{self._target.name}.{os.getpid()}.tmp")
            self._file = open(self._temporary or self._path, "w", encoding="utf-8")
        except OSError as err:
            raise ConfigError(
                f"--output {self._path}: {err.strerror}; give a path that can be written."
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            self._close()
        except OSError:
            if kind is None:
                raise
        finally:
            if self._temporary is not None:
                self._temporary.unlink(missing_ok=True)

    def write(self, text: str) -> None:
        """Write and flush, so that a full disk is noticed at the first result, not at the last."""
        assert self._file is not None
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as err:
            raise self._named(err) from None

    def keep(self) -> None:
        """Give the file its name, in place of what may have stood there."""
        self._finish(self._target)

    def keep_partial(self) -> Path | None:
        """Give what was written the name with ``.partial`` at its end, which is returned."""
        if self._temporary is None:
            return None
        partial = self._target.with_name(self._target.name + ".partial")
        self._finish(partial)
        return partial

    def _finish(self, target: Path) -> None:
        assert self._file is not None
        try:
            if self._temporary is None:
                self._close()
                return
            os.fsync(self._file.fileno())
            self._close()
            os.replace(self._temporary, target)
        except OSError as err:
            raise self._named(err) from None

    def _close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            finally:
                self._file = None

    def _named(self, err: OSError) -> OSError:
        return OSError(err.errno, err.strerror, f"--output {self._path}")


def as_json(result: GenerationResult, prompt: GivenPrompt, *, ascii_only: bool = False) -> str:
    """One line of JSON; ``prompt`` is as it was given."""
    record = {
        "index": result.index,
        "prompt": prompt.content,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "error": result.error,
    }
    return json.dumps(record, ensure_ascii=ascii_only) + "\n"


def as_text(result: GenerationResult, prompt: GivenPrompt, num_prompts: int) -> str:
    """The continuation, under a heading if there are several prompts; empty if it was refused."""
    if result.error is not None and not result.token_ids:
        return ""
    text = result.text
    if text is None:  # no tokenizer
        text = _joined(result.token_ids)
    if num_prompts == 1:
        return text + "\n"
    return f"--- {result.index}: {heading(prompt)}\n{text}\n\n"


def heading(prompt: GivenPrompt) -> str:
    """A prompt on one short line."""
    content = prompt.content
    if isinstance(content, list):
        last = content[-1]
        content = last["content"] if isinstance(last, dict) else _joined(content)
    line = " ".join(content.split())
    return line if len(line) <= _MAX_HEADING else line[: _MAX_HEADING - 3] + "..."


def _joined(token_ids: Sequence[object]) -> str:
    return " ".join(map(str, token_ids))
