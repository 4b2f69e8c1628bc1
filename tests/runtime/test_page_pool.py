from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.runtime.page_pool import PagePool

CAPACITY = 9


class PagePoolMachine(RuleBasedStateMachine):
    """Any order of allocations and releases, right and wrong, against a list of owned pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.owned: list[int] = []

    @rule(n=st.integers(0, CAPACITY + 2))
    def allocate(self, n: int) -> None:
        """Fresh pages that nobody has, or an error that changes nothing."""
        num_free = CAPACITY - len(self.owned)
        if n > num_free:
            with pytest.raises(CapacityError, match=f"{n} pages were asked for, but {num_free} of"):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert len(pages) == n
        assert set(pages) <= set(range(1, CAPACITY + 1)), "page 0 or an unknown page"
        assert not set(pages) & set(self.owned), "a page has two owners"
        self.owned += pages

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        """Any part of what is owned can be given back."""
        pages = data.draw(st.lists(st.sampled_from(self.owned), unique=True)) if self.owned else []
        self.pool.free(pages)
        self.owned = [page for page in self.owned if page not in pages]

    @rule(data=st.data(), bad=st.integers(-1, CAPACITY + 1))
    def free_wrongly(self, data: st.DataObject, bad: int) -> None:
        """A page that is not owned, or given twice, is an error that changes nothing."""
        pages = [bad, bad] if bad in self.owned else [*self.owned, bad]
        with pytest.raises(ValueError, match="only pages in use can be freed"):
            self.pool.free(data.draw(st.permutations(pages)))

    @rule()
    def free_all(self) -> None:
        """Everything comes back at once."""
        self.pool.free_all()
        self.owned = []

    @invariant()
    def every_page_is_free_or_owned(self) -> None:
        """No page is lost and none is counted twice."""
        assert self.pool.num_in_use == len(self.owned)
        assert self.pool.num_free == CAPACITY - len(self.owned)

    def teardown(self) -> None:
        """At the end all pages can be had again."""
        self.pool.free(self.owned)
        assert sorted(self.pool.allocate(CAPACITY)) == list(range(1, CAPACITY + 1))


TestPagePoolMachine = PagePoolMachine.TestCase
TestPagePoolMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


@pytest.mark.parametrize("num_pages", [0, 1])
def test_refuses_a_pool_without_usable_pages(num_pages: int) -> None:
    """Page 0 alone is no pool."""
    with pytest.raises(CapacityError, match=f"page 0 is scratch, got {num_pages}"):
        PagePool(num_pages)
