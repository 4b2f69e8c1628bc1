"""The pages of the KV cache, and the slots of states: who may use which.

Pure bookkeeping, no tensors. Page 0 is scratch, for padding rows, and is never handed out; so is slot 0.

A page can have a name that says what is in it. Then several may use it, who only read it, and it is kept when
nobody does any more, until its place is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ad_flashinfer_pass.errors import CapacityError


class PagePool:
    """Hands out page ids and takes them back.

    Args:
        num_pages: pages of the cache, page 0 included.

    Raises:
        CapacityError: there is no page besides page 0.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise CapacityError(
                f"the KV cache must have 2 pages or more, of which page 0 is scratch, got "
                f"{num_pages}. Raise kv_cache_config.max_tokens."
            )
        self.capacity = num_pages - 1
        self.free_all()

    def free_all(self) -> None:
        """Take every page back, whoever has it, and forget all names."""
        self._free = list(range(self.capacity, 0, -1))
        self._num_users: dict[int, int] = {}
        """Of each page that is in use."""
        self._kept: dict[int, None] = {}
        """Pages with a name that nobody uses, the one given up first in front."""
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can still hand out."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Pages that somebody uses."""
        return len(self._num_users)

    @property
    def num_kept(self) -> int:
        """Pages that nobody uses, kept for their names: ``drop_kept`` makes them free."""
        return len(self._kept)

    def allocate(self, n: int) -> list[int]:
        """Hand out n pages, all or none.

        Raises:
            CapacityError: fewer than n pages are free.
        """
        if n > len(self._free):
            raise CapacityError(
                f"{n} pages were asked for, but {len(self._free)} of {self.capacity} are free. "
                "Free some, or raise kv_cache_config.max_tokens."
            )
        pages = [self._free.pop() for _ in range(n)]
        self._num_users.update(dict.fromkeys(pages, 1))
        return pages

    def free(self, pages: Sequence[int]) -> list[int]:
        """Take pages back from one of their users, all or none.

        Returns:
            Those that are free now: nobody uses them, and they have no name.

        Raises:
            ValueError: a page is given twice or is not in use: freed before, or never handed out.
        """
        returned = set(pages)
        if len(returned) != len(pages) or not returned <= self._num_users.keys():
            raise ValueError(
                f"only pages in use can be freed, each once, got {list(pages)}, of which "
                f"{sorted(returned - self._num_users.keys())} are not in use"
            )
        freed = []
        # The last first: what stands before a page is of use without it, not the other way round.
        for page in reversed(pages):
            self._num_users[page] -= 1
            if self._num_users[page]:
                continue
            del self._num_users[page]
            if page in self._names:
                self._kept[page] = None
            else:
                freed.append(page)
        self._free += freed
        return freed

    def name(self, page: int, name: bytes) -> None:
        """Say what is in a page in use, which nobody writes any more, unless another page has that name."""
        if page not in self._names and name not in self._pages:
            self._names[page] = name
            self._pages[name] = page

    def find(self, name: bytes) -> int | None:
        """The page of that name."""
        return self._pages.get(name)

    def is_kept(self, page: int) -> bool:
        """Whether nobody uses this page, which has a name."""
        return page in self._kept

    def is_shared(self, page: int) -> bool:
        """Whether several use this page, which is in use."""
        return self._num_users[page] > 1

    def share(self, page: int) -> None:
        """Hand out a page that is in use, or has a name, to one user more, who does not write it either."""
        self._kept.pop(page, None)
        self._num_users[page] = self._num_users.get(page, 0) + 1

    def forget(self, pages: Sequence[int]) -> None:
        """Take the names of these pages, which are in use."""
        for page in pages:
            name = self._names.pop(page, None)
            if name is not None:
                del self._pages[name]

    def drop_kept(self, n: int) -> list[int]:
        """Forget kept pages, the one given up first in front, until n pages are free or none is kept.

        Returns:
            Those that became free.
        """
        dropped = list(islice(self._kept, max(n - len(self._free), 0)))
        for page in dropped:
            del self._kept[page]
        self.forget(dropped)
        self._free += dropped
        return dropped
