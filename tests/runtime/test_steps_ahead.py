"""Steps enqueued before the last ones are read: the same tokens, with little work for the host."""

from __future__ import annotations

from typing import Any

import pytest

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.runtime.engine import Completion, Engine, StepOutput
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import RowParams, SequenceStep
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import NAN_TOKEN, ToyModel, greedy_alone

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19, 20]]
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "sampled": SamplingParams(max_new_tokens=24, temperature=1.2, top_p=0.95, top_k=20, seed=11),
    "penalty": SamplingParams(max_new_tokens=24, temperature=1.2, repetition_penalty=1.4, seed=3),
    "greedy_penalty": SamplingParams(max_new_tokens=24, repetition_penalty=1.4),
    "ngrams": SamplingParams(max_new_tokens=24, no_repeat_ngram_size=1, suppress_tokens=range(20)),
    "drawn_ngrams": SamplingParams(max_new_tokens=24, temperature=0.3, no_repeat_ngram_size=2, seed=2),
}


class CountingModel(ToyModel):
    """Counts the steps whose metadata come from the host."""

    num_nested = 0

    def nest(self, sequences: Any, row_params: Any = (), verifies: bool = False) -> None:
        """As ``CachedModel.nest``."""
        self.num_nested += 1
        super().nest(sequences, row_params, verifies)


def drain(engine: Engine) -> dict[int, Completion]:
    completions: dict[int, Completion] = {}
    while engine.has_work:
        completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
    return completions


def tokens_with_late_arrivals(engine: Engine, params: list[SamplingParams]) -> list[list[int]]:
    """Two prompts at once, then one every third step."""
    completions: dict[int, Completion] = {}
    for index, (prompt, p) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add_request(prompt, p)
        for _ in range(3 if index else 0):
            completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
    completions.update(drain(engine))
    assert all(completion.error is None for completion in completions.values())
    return [completions[i].token_ids for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    ("steps_ahead", "num_pages", "with_graphs"),
    [(1, 12, False), (2, 100, True), (4, 12, True)],
    ids=["1-tight-eager", "2-roomy-graphs", "4-tight-graphs"],
)
def test_tokens_are_those_of_the_synchronous_loop(
    steps_ahead: int, num_pages: int, with_graphs: bool
) -> None:
    """Greedy, sampled, with penalty, mixed; with arrivals, chunks, stop tokens, and preemption."""
    stops = greedy_alone(PROMPTS[2], 7)[-1:]
    values = list(PARAMS.values())
    stopped = SamplingParams(max_new_tokens=24, stop_token_ids=stops)
    num_preemptions = [0, 0]
    for params in [[p] * len(PROMPTS) for p in values] + [[*values[:4], stopped], [stopped, *values[2:]]]:
        tokens = []
        for index, ahead in enumerate((0, steps_ahead)):
            model = ToyModel(num_pages=num_pages, with_graphs=with_graphs and ahead > 0)
            options: dict[str, Any] = {"eos_token_ids": [40, 41], "prefill_chunk_tokens": 4}
            engine = Engine(model, **options, steps_ahead=ahead)
            tokens.append(tokens_with_late_arrivals(engine, params))
            num_preemptions[index] += engine.metrics.num_preemptions
            assert engine.metrics.pages_in_use == 0
        assert tokens[0] == tokens[1]
    assert [n > 0 for n in num_preemptions] == [num_pages == 12] * 2


def test_the_host_writes_metadata_only_when_the_batch_or_its_pages_change() -> None:
    """Pages are reserved ahead for all at once: in 100 steps the host writes metadata a few times."""
    model = CountingModel(tokens_per_page=8)
    engine = Engine(model, steps_ahead=2)
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_new_tokens=100))
    completions = drain(engine)
    assert [completions[i].token_ids for i in range(5)] == [greedy_alone(p, 100) for p in PROMPTS]
    assert engine.metrics.num_steps == 100
    assert model.num_nested <= 2 + 100 // 16 + 2


def test_without_steps_ahead_each_step_is_read_before_the_next() -> None:
    """The synchronous loop is the same loop with nothing in flight."""
    model = CountingModel()
    engine = Engine(model)
    engine.add_request([1, 2], SamplingParams(max_new_tokens=6))
    for count in range(1, 7):
        assert [output.token_id for output in engine.step()] == greedy_alone([1, 2], count)[-1:]
        assert len(model.steps) == count
    assert model.num_nested == 6


def test_steps_ahead_are_enqueued_before_the_first_token_is_read() -> None:
    """After the first call of step there are as many steps more as were asked for."""
    model = ToyModel()
    engine = Engine(model, steps_ahead=3)
    engine.add_request([1, 2], SamplingParams(max_new_tokens=20))
    assert [output.token_id for output in engine.step()] == greedy_alone([1, 2], 1)
    assert len(model.steps) == 4
    assert [output.token_id for output in engine.step()] == greedy_alone([1, 2], 2)[1:]
    assert len(model.steps) == 5


def test_no_step_is_made_for_tokens_beyond_the_length() -> None:
    """How many tokens a request may have is known without reading them."""
    model = ToyModel()
    engine = Engine(model, steps_ahead=4)
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_new_tokens=6))
    drain(engine)
    assert sum(len(step) for step in model.steps) == 6 * len(PROMPTS)


def test_a_stopped_sequence_rests_in_the_steps_already_enqueued() -> None:
    """Its stop token is noticed on the device: the steps ahead read and write none of its pages."""
    tokens = greedy_alone(PROMPTS[0], 5)
    assert tokens[-1] not in tokens[:-1]
    model = ToyModel()
    engine = Engine(model, steps_ahead=4)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=50, stop_token_ids=tokens[-1:]))
    engine.add_request(PROMPTS[1], SamplingParams(max_new_tokens=30))
    completions = drain(engine)
    assert completions[0].token_ids == tokens
    assert completions[1].token_ids == greedy_alone(PROMPTS[1], 30)
    pages = {page for step in model.steps[:1] for s in step[:1] for page in s.pages}
    in_steps = [any(pages & set(s.pages) for s in step) for step in model.steps]
    assert in_steps.index(False) == 5, "the prompt and four tokens"
    assert not any(in_steps[5:9])


def test_more_stop_tokens_than_the_device_holds() -> None:
    """The host knows them all; what the device computes beyond the stop is dropped."""
    tokens = greedy_alone(PROMPTS[0], 9)
    unused = [t for t in range(47) if t not in tokens][:20]
    engine = Engine(ToyModel(), steps_ahead=3)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=50, stop_token_ids=[*unused, tokens[-1]]))
    first = tokens.index(tokens[-1]) + 1
    assert drain(engine)[0] == Completion(tokens[:first], None, "stop")


@pytest.mark.parametrize("steps_ahead", [1, 3])
def test_streams_and_stop_strings_give_the_same_text(steps_ahead: int) -> None:
    """A stop string is found some steps late, and the text ends before it all the same."""
    tokenizer = toy_tokenizers.byte_level()
    whole = str(tokenizer.decode(greedy_alone([1, 2, 3], 12), skip_special_tokens=True))
    results = []
    for ahead in (0, steps_ahead):
        llm = LLM(ToyModel(), tokenizer, steps_ahead=ahead)
        params = SamplingParams(max_new_tokens=12, stop=[whole[5:7]])
        results.append(
            (list(llm.stream([1, 2, 3], sampling_params=params)), list(llm.stream([9], max_new_tokens=8)))
        )
        assert not llm.engine.has_work
    assert results[0] == results[1]
    assert "".join(results[1][0]) == whole[: whole.index(whole[5:7])]


def test_cancelling_drops_what_is_in_flight() -> None:
    """A cancelled request has the tokens that were reported; the others go on, and its pages come back."""
    model = ToyModel()
    engine = Engine(model, steps_ahead=3)
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=20)) for prompt in PROMPTS[:3]]
    seen: list[StepOutput] = [output for _ in range(4) for output in engine.step()]
    assert engine.cancel(ids[1])
    completions = drain(engine)
    reported = [output.token_id for output in seen if output.request_id == ids[1]]
    assert completions[ids[1]] == Completion(greedy_alone(PROMPTS[1], 4), None, "cancelled")
    assert completions[ids[1]].token_ids == reported
    for i in (0, 2):
        assert completions[ids[i]].token_ids == greedy_alone(PROMPTS[i], 20)
    assert (engine.metrics.pages_in_use, model.num_dirty_pages) == (0, 0)


def test_bad_logits_end_one_request_only() -> None:
    """NaN is noticed on the device too: the row rests, and its neighbours go on."""
    engine = Engine(ToyModel(), steps_ahead=3)
    prompts = [[1, 2], [3, NAN_TOKEN], [4, 5]]
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    completions = drain(engine)
    assert completions[ids[1]].error == "the logits after 2 tokens hold NaN or +inf, or only -inf."
    for i in (0, 2):
        assert completions[ids[i]].token_ids == greedy_alone(prompts[i], 6)


def test_a_failing_step_keeps_the_tokens_of_the_steps_before_it() -> None:
    """They were enqueued before it, and are read before its requests end."""
    model = ToyModel(max_batch_size=2)
    engine = Engine(model, steps_ahead=2)
    for prompt in PROMPTS[:3]:
        engine.add_request(prompt, SamplingParams(max_new_tokens=8))
    engine.step()
    model.fail_next = RuntimeError("boom")
    completions = {o.request_id: o.completion for o in engine.step() if o.completion}
    error = "the model failed: RuntimeError: boom"
    for i in range(2):
        assert completions[i] == Completion(greedy_alone(PROMPTS[i], 3), None, "error", error)
    assert drain(engine)[2].token_ids == greedy_alone(PROMPTS[2], 8)


def test_an_interrupt_loses_no_token() -> None:
    """Ctrl-C forgets the steps in flight; their tokens are drawn again, and are the same."""
    params = PARAMS["penalty"]
    expected = tokens_with_late_arrivals(Engine(ToyModel()), [params] * 5)
    model = ToyModel()
    engine = Engine(model, steps_ahead=3)
    for prompt in PROMPTS:
        engine.add_request(prompt, params)
    completions: dict[int, Completion] = {}
    for step in range(12):
        model.fail_next = KeyboardInterrupt() if step % 4 == 3 else None
        try:
            completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
        except KeyboardInterrupt:
            assert engine.metrics.pages_in_use == 0
    model.fail_next = None
    completions.update(drain(engine))
    assert [completions[i].token_ids for i in range(5)] == expected


def test_spare_pages_are_taken_back_before_a_sequence_is_preempted() -> None:
    """Pages reserved ahead never cost a sequence its place: with just enough pages nothing is preempted."""
    exact = sum(-(-(len(p) + 19) // 4) for p in PROMPTS)
    engine = Engine(ToyModel(num_pages=exact + 1), steps_ahead=2)
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_new_tokens=20))
    completions = drain(engine)
    assert [completions[i].token_ids for i in range(5)] == [greedy_alone(p, 20) for p in PROMPTS]
    assert engine.metrics.num_preemptions == 0


def test_graphs_replay_the_loop() -> None:
    """Every step of it has a graph, with prompts or without."""
    model = ToyModel(with_graphs=True)
    engine = Engine(model, steps_ahead=2)
    tokens = tokens_with_late_arrivals(engine, [PARAMS["greedy"]] * 5)
    assert tokens == [greedy_alone(prompt, 24) for prompt in PROMPTS]
    assert engine.metrics.eager_steps == {}


def test_refuses_a_negative_number() -> None:
    """There is nothing before the present step."""
    with pytest.raises(ConfigError, match="steps_ahead must be at least 0, got -1"):
        Engine(ToyModel(), steps_ahead=-1)


def test_a_step_may_name_a_token_of_the_step_before() -> None:
    """-1 - i stands for the i-th sampled token, wherever it goes."""
    model = ToyModel()
    model.nest([SequenceStep([1, 2], 0, [1], slot=1), SequenceStep([3], 0, [2], slot=2)], [RowParams()] * 2)
    tokens = model.forward().argmax(-1)
    model.sequence_info.advance(tokens)
    model.nest([SequenceStep([-2], 1, [2], slot=2), SequenceStep([-1], 2, [1], slot=1)])
    assert model.sequence_info.named_args()["input_ids"].flatten().tolist() == tokens.flip(0).tolist()
