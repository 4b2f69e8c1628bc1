"""What the command writes: results on stdout, and files that are whole or absent."""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from ad_flashinfer_pass.errors import ConfigError

if TYPE_CHECKING:
    from ad_flashinfer_pass.cli.prompts import GivenPrompt
    from ad_flashinfer_pass.runtime.llm import GenerationResult

_MAX_HEADING = 72


class Stdout:
    """Results on stdout, each flushed as it comes."""

    def __enter__(self) -> Stdout:
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

    What is written goes to a hidden file beside it, which nobody can have put there: its name cannot be
    guessed, and it is opened only if it is new. It has the mode of the file that stands there. ``keep`` gives
    it the name; if the block ends without, it is removed. A device or pipe is written directly.

    Args:
        path: of the file; a link is followed.
        name: in messages; default: ``--output`` and the path.

    Raises:
        ConfigError: on entry, if the file cannot be made.
        OSError: from ``write`` and ``keep``, with the name; the disk may be full.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self._path = path
        self._name = name or f"--output {path}"
        self._target = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> OutputFile:
        try:
            if self._path.is_dir():
                raise IsADirectoryError(None, "is a directory")
            exists = self._path.exists()
            if exists and not os.access(self._path, os.W_OK):
                raise PermissionError(None, "not writable")
            if exists and not self._path.is_file():
                self._file = open(self._path, "wb")
                return self
            self._temporary = self._target.with_name(f".{secrets.token_hex(8)}.tmp")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._temporary, flags, 0o600 if exists else 0o666), "wb")
            if exists:
                old = self._target.stat()
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(self._file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(self._file.fileno(), stat.S_IMODE(old.st_mode))
        except OSError as err:
            self.__exit__(type(err), err, None)
            raise ConfigError(f"{self._name}: {err.strerror}; give a path that can be written.") from None
        except BaseException as err:
            self.__exit__(type(err), err, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close()
        except OSError as err:
            if kind is None:
                raise self._named(err) from None
        finally:
            if self._temporary is not None:
                with suppress(OSError):  # it is not there, or neither is its folder
                    self._temporary.unlink()

    def write(self, content: str | bytes) -> None:
        """Write and flush, so that a full disk is noticed at the first result, not at the last."""
        assert self._file is not None
        data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
        try:
            self._file.write(data)
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
        return OSError(err.errno, err.strerror, self._name)


def write_file(path: Path, content: str | bytes, name: str = "") -> None:
    """Write a file whole, or leave what stands there.

    Args:
        path: of the file; a link is followed.
        content: text goes as UTF-8.
        name: in messages; default: the path.

    Raises:
        ConfigError: the file cannot be made.
        OSError: it cannot be finished, with the name; the disk may be full.
    """
    with OutputFile(path, name or str(path)) as file:
        file.write(content)
        file.keep()


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
