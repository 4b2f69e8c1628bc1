"""Bad inputs and faults, one a row; what each must end in.

Whatever is wrong, a command says it in one line, with the right exit code and without a traceback, and
leaves whole files alone: what stood there stands, and nothing is left beside it. ``FAULTS=10 pytest
tests/faults`` runs ten times as many of the cases that are drawn, from other seeds.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ad_flashinfer_pass import cli
from ad_flashinfer_pass.errors import AdFlashinferError

TIMES = int(os.environ.get("FAULTS", "1"))


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Runner:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: str | Path) -> Ended:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, *self._capsys.readouterr())


def assert_one_line(ended: Ended, codes: tuple[int, ...], *parts: str) -> None:
    """An error line that names what it must, and nothing else on stderr."""
    assert ended.code in codes, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith(("error: ", "interrupted")), ended.err
    assert_no_bug(ended.err)
    for part in parts:
        assert part in ended.err


def assert_no_bug(text: str) -> None:
    """Nothing that only a fault of ours would say."""
    assert "Traceback" not in text
    assert "(unexpected" not in text


def refusal_of(call: Callable[[], Any], *parts: str) -> str | None:
    """What a Python function says on bad input, in one line; None if it took it."""
    try:
        call()
    except AdFlashinferError as err:
        text = str(err)
        assert "\n" not in text
        for part in parts:
            assert part in text
        return text
    return None


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """No file of this process can become larger: the kernel refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


STEPS = ("open", "fdopen", "fchmod", "fsync", "replace")
"""What a file goes through on its way, by the function of os."""

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)


def at_step(
    monkeypatch: pytest.MonkeyPatch, step: str, fault: Callable[[], None], late: bool = False
) -> None:
    """Let something happen when a file reaches a step, before or after it is done."""
    real = getattr(os, step)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if _is_of_tests(sys._getframe(1).f_code.co_filename):
            return real(*args, **kwargs)
        if late:
            result = real(*args, **kwargs)
            fault()
            return result
        fault()
        return real(*args, **kwargs)

    monkeypatch.setattr(os, step, faulty)


def _is_of_tests(file: str) -> bool:
    """Of the code that may go on working: all but the writer."""
    return not file.endswith(os.path.join("ad_flashinfer_pass", "files.py"))


def raising(number: int) -> Callable[[], None]:
    """A fault that is an error of the system."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def damaged(content: bytes, seed: int) -> bytes:
    """A file with some bytes flipped, cut off, taken out, doubled or put in."""
    dice = random.Random(seed)
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(data)) if data else 0
        match dice.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 2:
                data[at : at + 1] = dice.choice(
                    (b'"', b"{", b"}", b"[", b":", b",", b"\n", b"\t", b"9", b"-", b"*")
                )
            case 3:
                del data[at:]
            case 4:
                del data[at : at + dice.randrange(1, 20)]
            case 5:
                data[at:at] = data[max(0, at - dice.randrange(1, 40)) : at]
    return bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
