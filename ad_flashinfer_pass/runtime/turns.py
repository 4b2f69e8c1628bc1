"""A lock for threads that come again and again."""

from __future__ import annotations

from threading import Lock, get_ident


class Turns:
    """A reentrant lock that goes to a thread that waits before one that has just had it.

    A plain lock goes to whoever asks first once it is free, which is the thread that frees it.
    """

    def __init__(self) -> None:
        self._next, self._lock = Lock(), Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != get_ident():
            with self._next:
                self._lock.acquire()
            self._owner = get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
