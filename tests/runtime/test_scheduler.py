from __future__ import annotations

from ad_flashinfer_pass.runtime.page_pool import PagePool
from ad_flashinfer_pass.runtime.scheduler import Scheduler, SequenceState

Plan = list[tuple[int, int]]


class Harness:
    """A scheduler whose steps always succeed and generate token 0."""

    def __init__(
        self,
        capacity: int = 100,
        max_batch_size: int = 8,
        max_num_tokens: int = 16,
        chunk: int | None = None,
        shares_pages: bool = False,
        num_drafts: int = 0,
        tokens_ahead: int = 0,
    ) -> None:
        self.pool = PagePool(capacity + 1)
        self.cleared: list[int] = []
        self.scheduler: Scheduler[SequenceState] = Scheduler(
            self.pool,
            tokens_per_page=4,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            clear_pages=self.cleared.extend,
            prefill_chunk_tokens=chunk,
            shares_pages=shares_pages,
            num_drafts=num_drafts,
            tokens_ahead=tokens_ahead,
        )
        self.sequences: list[SequenceState] = []

    def add(self, num_tokens: int, token: int = 0) -> SequenceState:
        """A sequence with a prompt of this length."""
        sequence = SequenceState(request_id=len(self.sequences), token_ids=[token] * num_tokens)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Plan:
        """One step as (request id, new tokens)."""
        plan = self.scheduler.schedule()
        for sequence, num_new in plan:
            sequence.num_cached += num_new
            self.scheduler.name_pages(sequence)
            if sequence.num_cached == len(sequence.token_ids):
                sequence.token_ids.append(0)
        return [(sequence.request_id, num_new) for sequence, num_new in plan]


def test_decodes_come_first_in_the_budget_and_last_in_the_step() -> None:
    """A sequence that decodes gets its token; prompts share the rest, the oldest first."""
    h = Harness(max_num_tokens=8)
    h.add(3)
    assert h.step() == [(0, 3)]
    h.add(20)
    h.add(5)
    assert h.step() == [(1, 7), (0, 1)]
    assert h.step() == [(1, 7), (0, 1)]
    assert h.step() == [(1, 6), (0, 1), (2, 1)], "one token of budget was left for sequence 2"
    assert h.step() == [(2, 4), (0, 1), (1, 1)]


def test_orders_prefill_then_extend_then_single_tokens() -> None:
    """A new prompt stands before the rest of an older one, a prompt of one token at the end."""
    h = Harness(max_num_tokens=16, chunk=4)
    h.add(10)
    assert h.step() == [(0, 4)]
    h.add(6)
    h.add(1)
    assert h.step() == [(1, 4), (0, 4), (2, 1)]
    assert h.step() == [(0, 2), (1, 2), (2, 1)]


def test_chunk_size_bounds_each_prompt_alone() -> None:
    """prefill_chunk_tokens is for a sequence, max_num_tokens for the step."""
    h = Harness(max_num_tokens=16, chunk=7)
    h.add(20)
    h.add(20)
    h.add(20)
    assert h.step() == [(0, 7), (1, 7), (2, 2)]


def test_prompts_that_join_a_full_batch_come_in_small_chunks_unless_many_wait() -> None:
    """Three of four decode: a prompt of 1,000 tokens takes two steps, one of 5,000 begins at full speed."""
    for length, chunks in ((1000, [512, 488]), (5000, [3997, 512, 491])):
        h = Harness(capacity=3000, max_batch_size=4, max_num_tokens=4000)
        for _ in range(3):
            h.add(2)
        h.step()
        h.add(length)
        steps = [h.step() for _ in chunks]
        assert [step[0] for step in steps] == [(3, chunk) for chunk in chunks]
        assert all(len(step) == 4 for step in steps)


def test_admits_in_order_of_arrival() -> None:
    """A short request does not pass a long one for which there are no pages yet."""
    h = Harness(capacity=4)
    h.add(12)
    h.add(12)
    h.add(1)
    assert h.step() == [(0, 12)]
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (1, 2)


def test_runs_no_more_sequences_than_the_budget_has_tokens() -> None:
    """With max_num_tokens below max_batch_size no running sequence starves."""
    h = Harness(max_batch_size=8, max_num_tokens=2)
    for _ in range(3):
        h.add(1)
    assert h.step() == [(0, 1), (1, 1)]


def test_preempts_the_youngest_and_recomputes_it_from_the_start() -> None:
    """It loses its pages, waits in front, and comes back with all its tokens as its prompt."""
    h = Harness(capacity=4)
    h.add(4)
    youngest = h.add(4)
    late = h.add(2)
    assert h.step() == [(0, 4), (1, 4)]
    assert h.step() == [(0, 1), (1, 1)], "both have taken a second page: the pool is full"
    for _ in range(3):
        assert h.step() == [(0, 1), (1, 1)]
    pages = list(youngest.pages)
    assert h.step() == [(0, 1)], "sequence 0 needs a third page"
    assert (youngest.pages, youngest.num_cached, len(youngest.token_ids)) == ([], 0, 9)
    assert youngest.slot == 0
    assert sorted(h.cleared) == sorted(pages)
    assert h.scheduler.num_preemptions == 1
    h.scheduler.remove(h.sequences[0])
    assert h.step() == [(1, 9)], "it goes before the one that arrived after it"
    assert (late.pages, late.slot) == ([], 0)
    assert youngest.slot > 0


def test_a_sequence_that_is_youngest_itself_gives_way() -> None:
    """When the youngest needs a page and there is none, it waits; the older ones go on."""
    h = Harness(capacity=3)
    h.add(3)
    h.add(3)
    assert h.step() == [(0, 3), (1, 3)]
    assert h.step() == [(0, 1), (1, 1)]
    assert h.step() == [(0, 1)], "sequence 0 took the last page"
    assert h.scheduler.num_preemptions == 1


def test_remove_frees_the_pages_of_running_and_forgets_waiting_sequences() -> None:
    """After all sequences are removed every page is free and clean, and nothing is scheduled."""
    h = Harness(capacity=4)
    for _ in range(3):
        h.add(8)
    h.step()
    for sequence in h.sequences:
        h.scheduler.remove(sequence)
    assert h.pool.num_in_use == 0
    assert h.scheduler.schedule() == []


def test_as_many_slots_as_sequences_that_run_and_each_has_its_own() -> None:
    """However often they come and go."""
    h = Harness(max_batch_size=3)
    for number in range(6):
        h.add(1)
        h.step()
        if number >= 2:
            h.scheduler.remove(h.sequences[number - 2])
            h.step()
        slots = [sequence.slot for sequence in h.sequences if sequence.pages]
        assert len({*slots}) == len(slots)
        assert {*slots} <= {1, 2, 3}


def test_restart_queues_all_in_order_without_pages() -> None:
    """Whatever was lost half-way, what is given is scheduled afresh and no page is missing."""
    h = Harness(capacity=6)
    for _ in range(3):
        h.add(4)
    h.step()
    h.pool.allocate(1)  # as if interrupted between allocation and assignment
    h.scheduler.restart(h.sequences)
    assert h.pool.num_in_use == 0
    assert h.step() == [(0, 5), (1, 5)], "sequence 2 waits for two pages and two of growth"


def shared(h: Harness) -> tuple[int, int]:
    """Pages that several sequences use together, and pages kept."""
    in_all = sum(len(sequence.pages) for sequence in h.sequences)
    return in_all - h.pool.num_in_use, h.pool.num_kept


def test_a_sequence_starts_after_its_longest_known_prefix_and_shares_its_pages() -> None:
    """At a page's edge, with one token at least to compute; an ended sequence's pages count as well."""
    h = Harness(shares_pages=True)
    first = h.add(10)
    h.step()
    same = h.add(8)
    h.step()
    assert (same.num_reused, same.pages[0], shared(h)) == (4, first.pages[0], (1, 0))
    h.scheduler.remove(first)
    h.scheduler.remove(same)
    assert (h.pool.num_in_use, h.pool.num_kept) == (0, 2)
    longer = h.add(11)
    assert h.step() == [(2, 3)]
    assert longer.num_reused == 8
    assert h.cleared == [3, 4], "one was not full, of the other there are two"


def test_of_prompts_that_begin_alike_one_computes_the_beginning() -> None:
    """They come together: the others wait for its chunks, and compute what is theirs alone."""
    h = Harness(max_num_tokens=100, chunk=8, shares_pages=True)
    for _ in range(3):
        h.add(18)
    assert [h.step() for _ in range(3)] == [[(0, 8)], [(0, 8)], [(0, 2), (1, 2), (2, 2)]]
    assert [sequence.num_reused for sequence in h.sequences] == [0, 16, 16]
    assert shared(h) == (8, 0)


def test_kept_pages_give_way_least_recently_used_first() -> None:
    """And are zeroed then, not before."""
    h = Harness(capacity=6, shares_pages=True)
    for token in (1, 2, 1):
        sequence = h.add(9, token)
        h.step()
        h.scheduler.remove(sequence)
    h.scheduler.clear_released_pages()
    assert (h.pool.num_kept, len(h.cleared)) == (4, 3)
    h.add(16, 3)
    h.step()
    assert (h.pool.num_kept, len(h.cleared)) == (2, 5)
    again = [h.add(9, 1), h.add(9, 2)]
    h.scheduler.remove(h.sequences[3])
    h.step()
    assert [sequence.num_reused for sequence in again] == [8, 0]


def test_other_tokens_or_another_salt_share_nothing() -> None:
    """A page's name is of all tokens up to its end."""
    h = Harness(shares_pages=True)
    h.add(9)
    h.step()
    other = h.add(9)
    other.token_ids[0] = 1
    salted = h.add(9)
    salted.salt = b"a tenant"
    computed = h.add(9)
    computed.takes_known = False
    h.step()
    assert [sequence.num_reused for sequence in (other, salted, computed)] == [0, 0, 0]


def test_nobody_uses_the_pages_of_a_broken_sequence() -> None:
    """Not those either that it shared before."""
    h = Harness(shares_pages=True)
    for _ in range(2):
        h.add(9)
        h.step()
    h.scheduler.remove(h.sequences[1], is_broken=True)
    h.scheduler.remove(h.sequences[0])
    assert h.pool.num_kept == 0
    assert h.pool.num_free == h.pool.capacity


def test_a_preempted_sequence_goes_on_after_what_is_left_of_it() -> None:
    """That it had computed those tokens before counts as no reuse."""
    h = Harness(capacity=8, shares_pages=True)
    h.add(11, 1)
    h.step()
    h.add(15, 2)
    while not h.scheduler.num_preemptions:
        h.step()
    assert h.sequences[1].pages == []
    h.scheduler.remove(h.sequences[0])
    h.step()
    assert h.sequences[1].num_cached > 12
    assert h.sequences[1].num_reused == 0


def test_drafts_get_spare_pages_which_are_cleared_when_they_are_taken_back() -> None:
    """Nobody gives way for them, and who waits comes first; what a rejected draft left in one is zeroed."""
    h = Harness(capacity=4, num_drafts=3)
    first = h.add(2)
    h.step()
    assert h.step() == [(0, 1)]
    _, spare = first.pages
    assert h.scheduler.max_cached(first) == 8
    assert h.scheduler.is_settled
    second = h.add(9)
    assert not h.scheduler.is_settled
    assert h.step() == [(0, 1)]
    assert (second.pages, spare in first.pages, spare in h.cleared) == ([], False, True)
    assert h.scheduler.max_cached(first) == 4
    assert h.scheduler.num_preemptions == 0


def test_drafts_end_with_the_sequence_and_where_it_is_computed_anew() -> None:
    """By its pages, by the token that ends it, and by the length from which its ropes are others."""
    h = Harness(num_drafts=3)
    first = h.add(3)
    h.step()
    assert h.scheduler.max_cached(first) == 4
    h.step()
    assert h.scheduler.max_cached(first) == 8
    first.max_len = 8
    assert h.scheduler.max_cached(first) == 7
    h.scheduler._recompute_at = 6
    assert h.scheduler.max_cached(first) == 6
    h.scheduler._recompute_at = 4
    assert h.scheduler.max_cached(first) == 7, "it is longer already"


def test_what_may_have_come_is_settled_by_what_came() -> None:
    """Three of four tokens that a step could give."""
    sequence = SequenceState(request_id=0, token_ids=[1, 2, 3], num_cached=6, num_pending=4)
    Scheduler.settle(sequence, 4, 3)
    sequence.token_ids += [4, 5, 6]
    assert (sequence.num_tokens, sequence.num_cached) == (6, 5)


def test_who_waits_for_room_changes_no_pages() -> None:
    """The metadata on the device stand as long as the same sequences decode in the same pages."""
    h = Harness(capacity=4, tokens_ahead=8)
    h.add(5)
    h.step()
    h.add(12)
    h.step()
    epoch = h.scheduler.epoch
    assert h.step() == [(0, 1)]
    assert h.scheduler.epoch == epoch
    assert h.scheduler.num_waiting == 1
