"""The pages of the KV cache, and the slots of states: who may use which.

Pure bookkeeping, no tensors. Page 0 is scratch, for padding rows, and is never handed out; so is slot 0.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        """Take every page back, whoever has it."""
        self._free = list(range(self.capacity, 0, -1))
        self._in_use: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can still hand out."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Pages handed out and not yet freed."""
        return len(self._in_use)

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
        self._in_use.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Take pages back, all or none.

        Raises:
            ValueError: a page is given twice or is not in use: freed before, or never handed out.
        """
        returned = set(pages)
        if len(returned) != len(pages) or not returned <= self._in_use:
            raise ValueError(
                f"only pages in use can be freed, each once, got {list(pages)}, of which "
                f"{sorted(returned - self._in_use)} are not in use"
            )
        self._in_use -= returned
        self._free.extend(pages)
