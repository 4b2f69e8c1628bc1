from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter
from ad_flashinfer_pass.runtime.engine import Completion, Engine, StepOutput
from ad_flashinfer_pass.runtime.sampling import Sampler, SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.runtime.guesser import Guesser
from tests.runtime.toy_model import NAN_TOKEN, VOCAB_SIZE, ToyModel, toy_logits

MAX_SEQ_LEN = 40
EOS = (0, 1)


class _Alone:
    """The toy model with the sampler, and no pages, batch or engine."""

    def __init__(self, prompt: list[int], params: SamplingParams) -> None:
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.params = params
        self.seed = params.seed or 0
        self.stop_token_ids = frozenset(EOS)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def run(self) -> tuple[list[int], str]:
        max_len = min(self.num_prompt_tokens + self.params.max_new_tokens, MAX_SEQ_LEN)
        while len(self.token_ids) < max_len:
            logits = toy_logits(tuple(self.token_ids)).unsqueeze(0)
            (token,) = Sampler().sample(logits, [self]).tolist()
            if token < 0:
                return self.token_ids[self.num_prompt_tokens :], "error"
            self.token_ids.append(token)
            if token in EOS:
                return self.token_ids[self.num_prompt_tokens :], "stop"
        return self.token_ids[self.num_prompt_tokens :], "length"


some_tokens = st.lists(st.integers(0, VOCAB_SIZE - 2), max_size=12)
beginnings = st.sampled_from([[], [7] * 16, [7] * 16, [7] * 10, [7] * 8 + [8] * 8])
prompts = st.builds(lambda begin, rest: [*begin, *rest][:20] or [5], beginnings, some_tokens)
params_of_requests = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.0, 0.8, 1.5]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2]),
    suppress_tokens=st.sampled_from([(), (), range(2, 40, 3)]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    bad_words_ids=st.sampled_from([(), (), ([3], [5, 7], [7, 7, 7])]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    seed=st.integers(0, 3),
)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and fail in any order, over pools so small that they preempt, with steps ahead.

    ``ToyModel`` asserts in each step that no page with two users is written, that page 0 is never used, and,
    by its tokens, that nothing is read from a wrong page or position. Without states requests share pages.
    """

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[int, tuple[list[int], str]] = {}
        self.completions: dict[int, Completion] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt_lengths: dict[int, int] = {}

    @initialize(
        num_pages=st.integers(3, 20),
        tokens_per_page=st.integers(1, 5),
        max_batch_size=st.integers(1, 4),
        max_num_tokens=st.integers(1, 20),
        chunk=st.none() | st.integers(1, 7),
        steps_ahead=st.integers(0, 3),
        with_graphs=st.booleans(),
        has_states=st.sampled_from([False, False, True]),
        num_drafts=st.integers(0, 4),
        share_right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        cost=st.sampled_from([0.0, 0.0, 1.5]),
    )
    def make(
        self,
        num_pages: int,
        tokens_per_page: int,
        max_batch_size: int,
        max_num_tokens: int,
        chunk: int | None,
        steps_ahead: int,
        with_graphs: bool,
        has_states: bool,
        num_drafts: int,
        share_right: float,
        cost: float,
    ) -> None:
        """An engine of any shape."""
        self.model = ToyModel(
            num_pages=num_pages,
            tokens_per_page=tokens_per_page,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=MAX_SEQ_LEN,
            with_graphs=with_graphs,
            has_states=has_states,
            num_drafts=0 if has_states else min(num_drafts, tokens_per_page - 1),
            drafter=lambda info: Guesser(info, share_right) if share_right else NgramDrafter(info),
        )
        self.model.verify_cost = {1: cost}
        self.engine = Engine(
            self.model, eos_token_ids=EOS, prefill_chunk_tokens=chunk, steps_ahead=steps_ahead
        )

    @rule(target=live, prompt=prompts, params=params_of_requests, is_bad=st.integers(0, 9))
    def add(self, prompt: list[int], params: SamplingParams, is_bad: int) -> int:
        """A request is accepted if and only if it fits the empty pool."""
        if is_bad == 0:
            prompt = [*prompt, NAN_TOKEN]
        max_len = min(len(prompt) + params.max_new_tokens, MAX_SEQ_LEN)
        tokens_per_page = self.model.sequence_info.tokens_per_block
        if -(-(max_len - 1) // tokens_per_page) > self.model.num_pages - 1:
            with pytest.raises(RequestError, match="and the KV cache has"):
                self.engine.add_request(prompt, params)
            return -1
        request_id = self.engine.add_request(prompt, params)
        self.expected[request_id] = _Alone(prompt, params).run()
        self.tokens[request_id] = []
        self.prompt_lengths[request_id] = len(prompt)
        return request_id

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        """Some steps."""
        for _ in range(num_steps):
            self.record(self.engine.step())

    @rule(request_id=consumes(live))
    def cancel(self, request_id: int) -> None:
        """Cancelling works exactly for requests that have not ended."""
        is_live = request_id in self.expected and request_id not in self.completions
        assert self.engine.cancel(request_id) == is_live
        self.record(self.engine.step())
        if is_live:
            assert self.completions[request_id].finish_reason == "cancelled"

    @rule()
    def fail(self) -> None:
        """A failing model ends what is in the step."""
        self.model.fail_next = RuntimeError("boom")
        self.record(self.engine.step())
        self.model.fail_next = None

    @rule()
    def interrupt(self) -> None:
        """Ctrl-C in the model changes nothing that a user can see."""
        self.model.fail_next = KeyboardInterrupt()
        try:
            self.record(self.engine.step())
            assert self.model.fail_next is not None, "only a step that runs nothing is not interrupted"
        except KeyboardInterrupt:
            assert self.engine.metrics.num_running == 0
        self.model.fail_next = None

    def record(self, outputs: list[StepOutput]) -> None:
        """Keep the tokens, and check each completion against the request alone."""
        for output in outputs:
            if output.token_id is not None:
                self.tokens[output.request_id].append(output.token_id)
            if output.completion is not None:
                self.check(output.request_id, output.completion)

    def check(self, request_id: int, completion: Completion) -> None:
        """All tokens if it ended by itself, the first ones if it was ended."""
        assert request_id not in self.completions, "a request ended twice"
        self.completions[request_id] = completion
        tokens, reason = self.expected[request_id]
        assert completion.token_ids == self.tokens[request_id]
        assert completion.num_cached_tokens <= self.prompt_lengths[request_id] - 1
        assert completion.token_ids == tokens[: len(completion.token_ids)]
        if completion.finish_reason == "cancelled" or "boom" in (completion.error or ""):
            return
        assert (len(completion.token_ids), completion.finish_reason) == (len(tokens), reason)

    @rule(token=st.integers(0, VOCAB_SIZE - 2))
    def step_without_engine(self, token: int) -> None:
        """Whoever writes pages by hand between requests changes nothing for those that come."""
        if not self.engine.has_work and self.model.sequence_info.max_num_tokens > 1:
            page = list(range(1, self.model.num_pages))[: self.model.sequence_info.max_blocks_per_seq]
            self.model.step([SequenceStep([token], 0, page, slot=1)])

    @invariant()
    def pages_are_in_use_only_for_running_requests(self) -> None:
        """Each running request has at least one page, and without one nothing is in use."""
        metrics = self.engine.metrics
        assert metrics.pages_in_use + metrics.pages_kept <= metrics.num_pages
        if self.engine.no_block_reuse:
            assert metrics.num_running <= metrics.pages_in_use
            assert metrics.num_cached_tokens == metrics.pages_kept == 0
        assert (metrics.pages_in_use == 0) == (metrics.num_running == 0)
        num_live = len(self.expected) - len(self.completions)
        assert metrics.num_running + metrics.num_waiting == num_live

    def teardown(self) -> None:
        """Every request ends, within a bounded number of steps, and every page comes back."""
        for _ in range(3000):
            if not self.engine.has_work:
                break
            self.record(self.engine.step())
        assert self.completions.keys() == self.expected.keys()
        assert self.engine.metrics.pages_in_use == 0
        if self.model.num_lone_steps == 0:
            assert self.model.num_dirty_pages == self.engine.metrics.pages_kept


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True
)
