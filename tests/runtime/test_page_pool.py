from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.runtime.page_pool import PagePool

CAPACITY = 9
NAMES = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])


class PagePoolMachine(RuleBasedStateMachine):
    """Any order of allocations, names and releases, right and wrong, against lists of who uses which page."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.users: list[int] = []
        """Each page once for each user."""
        self.names: dict[bytes, int] = {}
        self.kept: list[int] = []

    @property
    def num_free(self) -> int:
        """Pages that are neither in use nor kept."""
        return CAPACITY - len(set(self.users)) - len(self.kept)

    @rule(n=st.integers(0, CAPACITY + 2))
    def allocate(self, n: int) -> None:
        """Fresh pages that nobody has, or an error that changes nothing."""
        if n > self.num_free:
            with pytest.raises(CapacityError, match=f"{n} pages were asked for, but {self.num_free} of"):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert len(pages) == n
        assert set(pages) <= set(range(1, CAPACITY + 1)), "page 0 or an unknown page"
        assert not set(pages) & {*self.users, *self.kept}, "a page has two owners, or was kept"
        self.users += pages

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        """Any part of what is in use can be given back; what has a name is kept when its last user leaves."""
        owned = sorted(set(self.users))
        pages = data.draw(st.lists(st.sampled_from(owned), unique=True)) if owned else []
        freed = self.pool.free(pages)
        for page in reversed(pages):
            self.users.remove(page)
            if page not in self.users and page in self.names.values():
                self.kept.append(page)
        assert set(freed) == {*pages} - {*self.users, *self.kept}

    @rule(data=st.data(), bad=st.integers(-1, CAPACITY + 1))
    def free_wrongly(self, data: st.DataObject, bad: int) -> None:
        """A page that is not in use, or given twice, is an error that changes nothing."""
        pages = [bad, bad] if bad in self.users else [*set(self.users), bad]
        with pytest.raises(ValueError, match="only pages in use can be freed"):
            self.pool.free(data.draw(st.permutations(pages)))

    @precondition(lambda self: self.users)
    @rule(data=st.data(), name=NAMES)
    def name(self, data: st.DataObject, name: bytes) -> None:
        """One page a name, one name a page, and the first that was given."""
        page = data.draw(st.sampled_from(sorted(set(self.users))))
        self.pool.name(page, name)
        if page not in self.names.values():
            self.names.setdefault(name, page)

    @rule(name=NAMES)
    def share(self, name: bytes) -> None:
        """Who knows the name of a page can use it, too."""
        page = self.pool.find(name)
        assert page == self.names.get(name)
        if page is not None:
            assert self.pool.is_kept(page) == (page in self.kept)
            self.pool.share(page)
            self.users.append(page)
            self.kept = [each for each in self.kept if each != page]

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """Pages in use can lose their names."""
        pages = data.draw(st.lists(st.sampled_from(sorted(set(self.users))), unique=True))
        self.pool.forget(pages)
        self.names = {name: page for name, page in self.names.items() if page not in pages}

    @rule(n=st.integers(0, CAPACITY + 2))
    def drop_kept(self, n: int) -> None:
        """No more than is needed, the first that was given up in front."""
        dropped = self.pool.drop_kept(n)
        assert dropped == self.kept[: max(0, n - self.num_free)]
        self.kept = self.kept[len(dropped) :]
        self.names = {name: page for name, page in self.names.items() if page not in dropped}

    @rule()
    def free_all(self) -> None:
        """Everything comes back at once."""
        self.pool.free_all()
        self.users, self.names, self.kept = [], {}, []

    @invariant()
    def every_page_is_free_or_kept_or_in_use(self) -> None:
        """No page is lost and none is counted twice."""
        assert self.pool.num_in_use == len(set(self.users))
        assert self.pool.num_kept == len(self.kept)
        assert self.pool.num_free == self.num_free

    def teardown(self) -> None:
        """At the end all pages can be had again."""
        while self.users:
            pages = sorted(set(self.users))
            self.pool.free(pages)
            for page in pages:
                self.users.remove(page)
        self.pool.drop_kept(CAPACITY)
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
