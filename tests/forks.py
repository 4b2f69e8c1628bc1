"""Processes of tests that begin with all that this one has imported, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from ad_flashinfer_pass import follow
from ad_flashinfer_pass.runtime import ranks


def fork(main: Callable[[], object], **settings: Any) -> subprocess.Popen[Any]:
    """A process that does this in place of a program; settings as of ``subprocess.Popen``."""
    ranks._close()  # a fork cannot leave a group whose threads it has not
    return subprocess.Popen(
        [sys.executable], preexec_fn=partial(_only, main), restore_signals=False, **settings
    )


def _only(main: Callable[[], object]) -> None:
    """Do this and end, in a child that has its stdin, stdout and stderr."""
    # What is open here is not closed: its number would be another file's when whoever had it closes it.
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2:
            os.dup2(null, number)
    # A fork of a fork forgets those of the first, which closes nothing.
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(n, "r" if n == 0 else "w", closefd=False) for n in range(3)
    )
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        ranks._close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def followers_are_forked(patch: pytest.MonkeyPatch) -> None:
    """The other ranks of models that are built here."""

    def popen(command: list[str], **settings: Any) -> subprocess.Popen[Any]:
        assert command == [sys.executable, "-m", follow.__name__]
        return fork(follow.main, **settings)

    patch.setattr(ranks, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
