"""Drafts change no token: greedy and sampled, in every way of batching, whatever is guessed."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter, guess
from ad_flashinfer_pass.runtime.drafts.payoff import Payoff
from ad_flashinfer_pass.runtime.engine import Completion, Engine
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import Sampler, SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import IDLE, RowParams, SequenceInfo, SequenceStep
from tests.runtime import toy_tokenizers
from tests.runtime.guesser import Guesser
from tests.runtime.test_steps_ahead import CountingModel
from tests.runtime.toy_model import NAN_TOKEN, ToyModel, greedy_alone

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19, 20]]
CPU = torch.device("cpu")


def toy(share_right: float, *, num_drafts: int = 3, tokens_per_page: int = 8, **options: Any) -> ToyModel:
    return ToyModel(
        has_states=False,
        num_drafts=num_drafts,
        tokens_per_page=tokens_per_page,
        drafter=lambda info: Guesser(info, share_right),
        **options,
    )


def drain(engine: Engine) -> dict[int, Completion]:
    completions: dict[int, Completion] = {}
    while engine.has_work:
        completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
    return completions


def tokens_of(engine: Engine, params: SamplingParams) -> list[list[int]]:
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    completions = drain(engine)
    return [completions[i].token_ids for i in ids]


@pytest.mark.parametrize("steps_ahead", [0, 1, 3])
@pytest.mark.parametrize("num_drafts", [1, 3, 7])
def test_right_drafts_are_all_taken(num_drafts: int, steps_ahead: int) -> None:
    """Each step gives a sequence one token more than there are drafts, and they are the model's."""
    engine = Engine(toy(1.0, num_drafts=num_drafts), steps_ahead=steps_ahead)
    tokens = tokens_of(engine, SamplingParams(max_new_tokens=1 + 5 * (1 + num_drafts)))
    assert tokens == [greedy_alone(prompt, 1 + 5 * (1 + num_drafts)) for prompt in PROMPTS]
    metrics = engine.metrics
    assert metrics.num_accepted == (25,) * num_drafts
    assert metrics.drafts is not None
    assert metrics.drafts.tokens_a_step == 1 + num_drafts
    assert str(metrics.drafts) == (
        f"{1 + num_drafts}.00 tokens a sequence in the 5 of 6 steps that verified some; taken by position: "
        + ", ".join(["100%"] * num_drafts)
    )
    assert (metrics.num_steps, metrics.num_verify_steps, metrics.num_verified) == (6, 5, 25)


def test_wrong_drafts_cost_no_token() -> None:
    """A step gives at least what a plain one does."""
    engine = Engine(toy(0.0))
    tokens = tokens_of(engine, SamplingParams(max_new_tokens=20))
    assert tokens == [greedy_alone(prompt, 20) for prompt in PROMPTS]
    assert engine.metrics.num_steps <= 20


SAMPLED = {
    "greedy": SamplingParams(max_new_tokens=40),
    "sampled": SamplingParams(max_new_tokens=40, temperature=0.4, top_p=0.95, top_k=20, seed=11),
    "logprobs": SamplingParams(max_new_tokens=40, temperature=0.4, seed=3, logprobs=2),
    "penalty": SamplingParams(max_new_tokens=40, temperature=1.2, repetition_penalty=1.4, seed=3),
}


@pytest.mark.parametrize("share_right", [0.5, 0.95])
@pytest.mark.parametrize("name", SAMPLED)
def test_tokens_are_those_of_plain_decoding(name: str, share_right: float) -> None:
    """By the same seeds, with neighbours, chunks, preemption, stop tokens, steps ahead, replayed or not."""
    params, preempted = SAMPLED[name], 0
    for num_pages, steps_ahead, with_graphs in ((100, 0, False), (9, 1, False), (9, 2, True), (9, 0, True)):
        options: dict[str, Any] = {"num_pages": num_pages, "with_graphs": with_graphs}
        completions = []
        for model in (
            ToyModel(has_states=False, tokens_per_page=8, **options),
            toy(share_right, **options),
        ):
            engine = Engine(model, eos_token_ids=[40], prefill_chunk_tokens=4, steps_ahead=steps_ahead)
            found: dict[int, Completion] = {}
            for index, prompt in enumerate(PROMPTS):
                engine.add_request(prompt, params)
                for _ in range(index % 2):
                    found.update({o.request_id: o.completion for o in engine.step() if o.completion})
            completions.append({**found, **drain(engine)})
            assert engine.metrics.pages_in_use == 0
            assert model.num_dirty_pages <= engine.metrics.pages_kept
        assert completions[0] == completions[1]
        preempted += engine.metrics.num_preemptions
        assert (engine.metrics.num_verified > 0) == (name != "penalty")
    assert preempted > 0


def test_no_step_has_a_chunk_and_drafts() -> None:
    """While a prompt is read the others decode one token each; else all are verified."""
    model = toy(1.0)
    engine = Engine(model, prefill_chunk_tokens=4)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=30))
    for _ in range(3):
        engine.step()
    engine.add_request(list(range(20)), SamplingParams(max_new_tokens=4))
    drain(engine)
    kinds = [sorted(len(s.token_ids) for s in step) for step in model.steps]
    assert kinds[:3] == [[3], [4], [4]]
    assert kinds[3:8] == [[1, 4]] * 5
    assert set(map(tuple, kinds[8:])) == {(4, 4), (4,)}


def test_a_stop_string_within_the_accepted_tokens() -> None:
    """The text ends before it, and no token after it is reported."""
    tokenizer = toy_tokenizers.byte_level()
    whole = str(tokenizer.decode(greedy_alone([1, 2, 3], 12), skip_special_tokens=True))
    results = []
    for model in (ToyModel(has_states=False, tokens_per_page=8), toy(1.0)):
        llm = LLM(model, tokenizer)
        params = SamplingParams(max_new_tokens=12, stop=[whole[4:6]])
        (result,) = llm.generate([1, 2, 3], params)
        results.append((result, "".join(llm.stream([1, 2, 3], params))))
    assert results[0] == results[1]


@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_what_is_cancelled_between_steps_gives_its_pages_back(steps_ahead: int) -> None:
    """Also while steps are ahead whose tokens nobody knows; the others go on."""
    model = toy(0.9)
    engine = Engine(model, steps_ahead=steps_ahead)
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=40)) for prompt in PROMPTS]
    for _ in range(4):
        engine.step()
    assert engine.cancel(ids[1])
    completions = drain(engine)
    for index in (0, 2, 3, 4):
        assert completions[ids[index]].token_ids == greedy_alone(PROMPTS[index], 40)
    cancelled = completions[ids[1]].token_ids
    assert cancelled == greedy_alone(PROMPTS[1], len(cancelled))
    assert (engine.metrics.pages_in_use, model.num_dirty_pages - engine.metrics.pages_kept) == (0, 0)


def test_a_stopped_sequence_rests_in_the_steps_already_enqueued() -> None:
    """Its stop token is noticed on the device, among drafts too: the steps ahead touch none of its pages."""
    tokens = greedy_alone(PROMPTS[0], 10)
    assert tokens[-1] not in tokens[:-1]
    model = toy(1.0)
    engine = Engine(model, steps_ahead=3)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=80, stop_token_ids=tokens[-1:]))
    engine.add_request(PROMPTS[1], SamplingParams(max_new_tokens=60))
    completions = drain(engine)
    assert completions[0].token_ids == tokens
    assert completions[1].token_ids == greedy_alone(PROMPTS[1], 60)
    pages = {page for step in model.steps[:1] for s in step[:1] for page in s.pages}
    in_steps = [any(pages & set(s.pages) for s in step) for step in model.steps]
    assert in_steps.index(False) == 4, "the prompt, and three times four tokens"
    assert not any(in_steps[4:])


def test_bad_logits_end_one_request_only() -> None:
    """A draft of which the logits are NaN is no more than a wrong draft."""
    model = ToyModel(has_states=False, num_drafts=3, tokens_per_page=8)

    class Bad(NgramDrafter):
        def propose(self, accepted: torch.Tensor | None = None) -> None:
            super().propose(accepted)
            self._info.drafts[:, 2] = NAN_TOKEN

    model.drafter = Bad(model.sequence_info)
    engine = Engine(model)
    prompts = [[1, 2], [3, NAN_TOKEN], [4, 5]]
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=9)) for prompt in prompts]
    completions = drain(engine)
    assert completions[ids[1]].error == "the logits after 2 tokens hold NaN or +inf, or only -inf."
    for i in (0, 2):
        assert completions[ids[i]].token_ids == greedy_alone(prompts[i], 9)


def test_the_host_writes_few_steps() -> None:
    """Steps that verify follow one another on the device as those that decode do."""
    model = CountingModel(
        has_states=False, tokens_per_page=8, num_drafts=3, drafter=lambda info: Guesser(info, 0.7)
    )
    engine = Engine(model, steps_ahead=2)
    for prompt in PROMPTS[:2]:
        engine.add_request(prompt, SamplingParams(max_new_tokens=150))
    completions = drain(engine)
    assert [completions[i].token_ids for i in range(2)] == [greedy_alone(p, 150) for p in PROMPTS[:2]]
    assert model.num_nested < engine.metrics.num_steps / 2


def test_another_engine_on_the_same_model() -> None:
    """Its first request has the number and the slot of another's, of whose tokens nothing is left."""
    model = toy(1.0)
    for prompt in (PROMPTS[0], *PROMPTS[2:]):
        engine = Engine(model)
        engine.add_request(prompt, SamplingParams(max_new_tokens=21))
        assert drain(engine)[0].token_ids == greedy_alone(prompt, 21)
        assert engine.metrics.num_accepted == (5, 5, 5)


def test_a_failing_step_ends_its_requests_and_no_others() -> None:
    """They have the tokens of the steps before it; the next ones run."""
    model = toy(1.0)
    engine = Engine(model, steps_ahead=1)
    engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=60))
    for _ in range(3):
        engine.step()
    model.fail_next = RuntimeError("boom")
    (completion,) = drain(engine).values()
    assert completion.error == "the model failed: RuntimeError: boom"
    assert completion.token_ids == greedy_alone(PROMPTS[0], len(completion.token_ids))
    assert tokens_of(engine, SamplingParams(max_new_tokens=9)) == [greedy_alone(p, 9) for p in PROMPTS]


def _probabilities(logits: torch.Tensor, drafts: list[int]) -> dict[tuple[int, ...], float]:
    """Of each outcome of a step: the drafts up to the first that is not chosen, and what is chosen there."""
    found, reached = dict[tuple[int, ...], float](), 1.0
    for place, probs in enumerate(logits.softmax(-1).double()):
        for token, prob in enumerate(probs.tolist()):
            if place == len(drafts) or token != drafts[place]:
                found[(*drafts[:place], token)] = reached * prob
        if place < len(drafts):
            reached *= float(probs[drafts[place]])
    return found


def test_sampled_tokens_keep_the_distribution() -> None:
    """Chi-square of 10**6 verifications over a vocabulary of 12, against the exact probabilities."""
    n, num_batches, vocab, temperature = 8192, 123, 12, 0.7
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)) * 1.5
    drafts = [*logits.argmax(-1).tolist()[:2], int(logits[2].argsort()[-2])]
    info = SequenceInfo(64, n, 4 * n, 8, CPU, num_drafts=3)
    params = SamplingParams(temperature=temperature)
    counts: Counter[tuple[int, ...]] = Counter()

    class Row:
        token_ids, num_prompt_tokens, num_tokens, num_generated = [1], 1, 1, 0
        stop_token_ids = frozenset[int]()

        def __init__(self, seed: int) -> None:
            self.params, self.seed = params, seed

    scores = logits.repeat(n, 1)
    step = [SequenceStep([1, *drafts], 1, [1 + i], max_cached=60) for i in range(n)]
    info.nest_sequences(step, row_params=[RowParams()] * n, verifies=True)
    written = {name: view.clone() for name, view in info.views.items()}
    sampler, rows = Sampler(), [Row(seed) for seed in range(n) for _ in range(4)]
    for batch in range(num_batches):
        for name, view in written.items():
            info.views[name].copy_(view)
        numbers = info.views["num_generated"]  # 0 to 3, after which other numbers are drawn
        info.accept(sampler.sample(scores, rows, num_generated=numbers + 4 * batch))
        codes, times = ((info.tokens.view(n, 4) + 2) @ torch.tensor([16**3, 16**2, 16, 1])).unique(
            return_counts=True
        )
        for code, count in zip(codes.tolist(), times.tolist(), strict=True):
            outcome = [code >> shift & 15 for shift in (12, 8, 4, 0)]
            counts[tuple(digit - 2 for digit in outcome if digit - 2 != IDLE)] += count
    expected = _probabilities(logits / temperature, drafts)
    total = n * num_batches
    assert total > 10**6
    assert counts.keys() <= expected.keys()
    chi = sum((counts[k] - total * p) ** 2 / (total * p) for k, p in expected.items())
    freedom = len(expected) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_guesses_what_followed_the_longest_run() -> None:
    """Four tokens that agree count more than two, the newest place of equals wins, and circles go on."""
    assert guess(torch.tensor([1, 2, 3, 4, 9, 8, 3, 4, 7, 1, 2, 3, 4]), 3).tolist() == [9, 8, 3]
    assert guess(torch.tensor([3, 4, 5, 3, 4, 6, 3, 4]), 2).tolist() == [6, 3]
    assert guess(torch.tensor([5, 6, 5, 6, 5]), 5).tolist() == [6, 5, 6, 5, 6]
    assert guess(torch.tensor([7, 7, 7]), 2).tolist() == [7, 7]
    for none in ([1], [1, 2], [3, 1, 2, 1], [1, 2, 3, 4]):
        assert guess(torch.tensor(none), 2).tolist() == none[-1:] * 2


def test_guesses_as_a_search_of_every_place_does() -> None:
    """Against a few lines of Python, on texts of few tokens."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 24))]
        last, best = len(tokens) - 1, (1, 0)
        for place in range(last):
            length = next((n for n in range(4) if place - n < 0 or tokens[place - n] != tokens[last - n]), 4)
            best = max(best, (length, place))
        expected = tokens[-1:] * 3
        if best[0] > 1:
            after = tokens[best[1] + 1 :]
            expected = [after[i % len(after)] for i in range(3)]
        assert guess(torch.tensor(tokens), 3).tolist() == expected


def test_pauses_double_as_long_as_nothing_is_gained() -> None:
    """Of a thousand steps a few are tries; what pays goes on."""
    payoff = Payoff({1: 1.1, 8: 1.4})
    verified = []
    for _ in range(1000):
        verified.append(payoff.is_on)
        if payoff.is_on:
            payoff.note(1, 1)
        else:
            payoff.note_plain()
    assert verified[:129] == [True] * 4 + [False] * 40 + [True] * 4 + [False] * 80 + [True]
    assert sum(verified) == 32
    assert [payoff.cost_of(n) for n in (1, 2, 8, 9)] == [1.1, 1.4, 1.4, 1.4]
    for _ in range(200):
        payoff.note_plain()
    for _ in range(50):
        assert payoff.is_on
        payoff.note(16, 8)


def test_without_gain_nearly_all_steps_are_plain() -> None:
    """Random text: the n-gram drafter leaves itself out, and the tokens are the same."""
    model = ToyModel(has_states=False, num_drafts=3, tokens_per_page=8, max_seq_len=1000, num_pages=300)
    model.verify_cost = {1: 1.2}
    engine = Engine(model, steps_ahead=1)
    engine.add_request([1, 2], SamplingParams(max_new_tokens=300))
    assert drain(engine)[0].token_ids == greedy_alone([1, 2], 300)
    assert engine.metrics.num_verify_steps < 18


def test_a_sequence_that_ends_at_the_last_position() -> None:
    """Drafts beyond max_seq_len, and beyond the last page, are never taken."""
    for num_drafts in (1, 3, 7):
        engine = Engine(toy(1.0, num_drafts=num_drafts, max_seq_len=21, num_pages=4), steps_ahead=1)
        engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=500))
        assert drain(engine)[0] == Completion(greedy_alone([1, 2, 3], 18), None, "length")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"speculative_config": {"drafter": "oracle"}},
            "speculative_config.drafter: input should be 'ngram'",
        ),
        ({"speculative_config": {"decoding_type": "MTP"}}, "unknown key 'speculative_config.decoding_type'"),
        ({"speculative_config": {"drafter": "ngram", "num_tokens": 0}}, "greater than or equal to 1, got 0"),
        (
            {"speculative_config": {"drafter": "ngram"}, "max_num_tokens": 20},
            r"max_batch_size \* \(1 \+ speculative_config.num_tokens\) = 32, .* got 20",
        ),
        (
            {"speculative_config": {"drafter": "ngram"}, "kv_cache_config": {"tokens_per_block": 3}},
            "must be less than kv_cache_config.tokens_per_block=3, got 3",
        ),
        (
            {
                "speculative_config": {"drafter": "ngram"},
                "transforms": {"insert_cached_attention": {"max_extend_len": 4}},
            },
            "leave it out with speculative_config",
        ),
    ],
)
def test_refuses_settings_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    """In one line, with the value and the limit."""
    with pytest.raises(ConfigError, match=message):
        AutoDeployConfig(device="cpu", **keys)
