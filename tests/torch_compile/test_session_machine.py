"""Random steps, cuts and errors of a session against the model without a cache."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from ad_flashinfer_pass.errors import AdFlashinferError, CapacityError
from tests.torch_compile.capture_on_cpu import capturing
from tests.torch_compile.small_models import MAX_LEN, VOCAB, Net, compiled, session

PAGE, NUM_PAGES, MAX_BATCH = 16, 10, 4
EXAMPLES = 10
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
PICK = st.integers(0, 1000)


class Serving:
    """Two models that share a session, both called in every batch."""

    def __init__(self, backend: str) -> None:
        torch._dynamo.reset()
        self.nets = Net(1), Net(2)
        limits = {"tokens_per_block": PAGE, "max_tokens": NUM_PAGES * PAGE}
        self.session = session(max_batch_size=MAX_BATCH, kv_cache_config=limits)
        self.models = [compiled(net, self.session, compile_backend=backend) for net in self.nets]


class Machine(RuleBasedStateMachine):
    """The session beside plain lists of tokens."""

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self.serving, self.session = serving, serving.session
        self.session.free()
        self.texts: dict[int, list[int]] = {}

    def run(self, batch: Any, news: list[list[int]], *, fails: bool = False) -> None:
        """Both models run; the logits are those of the whole texts. With ``fails`` nothing stays of it."""
        found: list[Tensor] = []
        with suppress(ZeroDivisionError), batch:
            found = [batch.last_logits(model(*batch.inputs.values())) for model in self.serving.models]
            if fails:
                raise ZeroDivisionError
        texts = [
            [*self.texts.get(sequence, []), *new] for sequence, new in zip(batch.sequences, news, strict=True)
        ]
        for net, rows in zip(self.serving.nets, found, strict=True):
            for row, text in zip(rows, texts, strict=True):
                with torch.no_grad():
                    wanted = net(torch.tensor([text]), torch.arange(len(text))[None])[0, -1]
                torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-3)
        if not fails:
            self.texts |= dict(zip(batch.sequences, texts, strict=True))

    def fits(self, schedule: list[tuple[int | None, list[int]]]) -> bool:
        """Whether the session has to take it."""
        pasts = [len(self.texts.get(sequence, [])) if sequence is not None else 0 for sequence, _ in schedule]
        ends = [past + len(new) for past, (_, new) in zip(pasts, schedule, strict=True)]
        pages = sum(-(-end // PAGE) - -(-past // PAGE) for past, end in zip(pasts, ends, strict=True))
        free = NUM_PAGES - sum(-(-len(text) // PAGE) for text in self.texts.values())
        return len(schedule) <= MAX_BATCH and max(ends) <= MAX_LEN and pages <= free

    @rule(
        new=st.lists(TOKENS, max_size=2),
        more=st.lists(st.tuples(PICK, TOKENS), max_size=3),
        fails=st.booleans(),
    )
    def step(self, new: list[list[int]], more: list[tuple[int, list[int]]], fails: bool) -> None:
        schedule: list[tuple[int | None, list[int]]] = [(None, tokens) for tokens in new]
        known = list(self.texts)
        for pick, tokens in more if known else []:
            sequence = known[pick % len(known)]
            if sequence not in dict(schedule):
                schedule.insert(pick % (len(schedule) + 1), (sequence, tokens))
        if not schedule:
            return
        if not self.fits(schedule):
            with pytest.raises(CapacityError):
                self.session.step(schedule, sort=True)
            return
        self.run(self.session.step(schedule, sort=True), [tokens for _, tokens in schedule], fails=fails)

    @precondition(lambda self: self.texts)
    @rule(token=st.integers(0, VOCAB - 1), fails=st.booleans())
    def decode(self, token: int, fails: bool) -> None:
        known = list(self.texts)[:MAX_BATCH]
        if not self.fits([(sequence, [token]) for sequence in known]):
            with pytest.raises(CapacityError):
                self.session.decode([token] * len(known), known)
            return
        batch = self.session.decode(torch.full((len(known), 1), token), known)
        self.run(batch, [[token]] * len(known), fails=fails)

    @precondition(lambda self: self.texts)
    @rule(pick=PICK, length=PICK)
    def truncate(self, pick: int, length: int) -> None:
        sequence = list(self.texts)[pick % len(self.texts)]
        keep = 1 + length % len(self.texts[sequence])
        self.session.truncate(sequence, keep)
        del self.texts[sequence][keep:]

    @precondition(lambda self: self.texts)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        sequence = list(self.texts)[pick % len(self.texts)]
        self.session.free([sequence])
        del self.texts[sequence]

    @rule(call=st.sampled_from(["empty", "unknown", "order", "twice", "negative"]))
    def refused(self, call: str) -> None:
        known = next(iter(self.texts), 10**6)
        schedules: dict[str, list[tuple[int | None, list[int]]]] = {
            "empty": [(None, [])],
            "unknown": [(10**6, [1])],
            "order": [(None, [1]), (None, [1, 2])],
            "twice": [(known, [1]), (known, [1])],
            "negative": [(None, [-1])],
        }
        with pytest.raises(AdFlashinferError):
            self.session.step(schedules[call])

    @invariant()
    def books_agree(self) -> None:
        assert self.session.lengths == {sequence: len(text) for sequence, text in self.texts.items()}
        used = sum(-(-len(text) // PAGE) for text in self.texts.values())
        assert self.session.num_free_pages == NUM_PAGES - used


@pytest.mark.parametrize("backend", ["torch-simple", "torch-opt"])
def test_random_use_of_a_session(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the graph as it is, and by captured decode steps, which are padded."""
    if backend == "torch-opt":
        capturing(monkeypatch, by_inductor=False)
    serving = Serving(backend)
    run_state_machine_as_test(
        lambda: Machine(serving),  # type: ignore[arg-type]
        settings=settings(max_examples=EXAMPLES, stateful_step_count=20, deadline=None, derandomize=True),
    )
    if backend == "torch-opt":
        assert serving.session.num_replays > EXAMPLES
