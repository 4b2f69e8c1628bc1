"""Files that are whole or absent."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ad_flashinfer_pass.errors import ConfigError


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


def cache_folder(name: str) -> Path | None:
    """A folder for what can be made again, below XDG_CACHE_HOME or ~/.cache; made if it is not there.

    Returns:
        None if it cannot be made, or somebody else owns it or can write or look there: what lies in it may be
        code, and is then neither read nor written.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "ad-flashinfer-pass"
    with suppress(OSError):
        for each in (folder, folder / name):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = each.lstat()
            if (stat.S_IFMT(found.st_mode), found.st_uid) != (
                stat.S_IFDIR,
                os.geteuid(),
            ) or found.st_mode & 0o77:
                return None
        return folder / name
    return None
