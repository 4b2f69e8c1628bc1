from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.sampling import BatchParams, Sampler, SamplingParams

VOCAB_SIZE = 40
CPU = torch.device("cpu")
MANY = settings(max_examples=200, deadline=None, derandomize=True)


@dataclass(eq=False)
class Row:
    """A sequence as the sampler sees it."""

    params: SamplingParams
    token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    seed: int = 0
    num_prompt_tokens: int = 2
    stop_token_ids: frozenset[int] = frozenset((0, 5))

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def sample(logits: Tensor, rows: list[Row], sampler: Sampler | None = None) -> list[int]:
    return (sampler or Sampler()).sample(logits, rows).tolist()


def random_logits(num_rows: int, seed: int, *, ties: bool = False) -> Tensor:
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.round() if ties else logits


def transformers_scores(params: SamplingParams, token_ids: list[int], logits: Tensor) -> Tensor:
    """What ``generate(do_sample=True)`` draws from, for one row [1, vocab_size]."""
    processors = LogitsProcessorList()
    if params.logit_bias:
        biases = {(token,): bias for token, bias in params.biases}
        processors.append(SequenceBiasLogitsProcessor(biases))  # type: ignore[arg-type]
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.bad_words_ids:
        processors.append(NoBadWordsLogitsProcessor([list(run) for run in params.bad_words_ids]))
    if params.min_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(2, params.min_tokens, [0, 5]))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores: Any = processors(torch.tensor([token_ids]), logits)  # type: ignore[arg-type]
    return scores


PENALTIES = st.sampled_from([-2.0, -0.5, 0.0, 0.7, 2.0])
sampled_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 10, VOCAB_SIZE, 100]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3, 2.0]),
    logit_bias=st.sampled_from([{}, {}, {3: 5.0, 7: -100.0}]),
    bad_words_ids=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=3),
    min_tokens=st.sampled_from([0, 0, 1, 4]),
)
rows_of_params = st.lists(sampled_params, min_size=1, max_size=5)
tokens = st.lists(st.integers(0, 4) | st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=8)


@MANY
@given(params=rows_of_params, seen=tokens, seed=st.integers(0, 999), ties=st.booleans())
def test_the_distribution_is_that_of_transformers(
    params: list[SamplingParams], seen: list[int], seed: int, ties: bool
) -> None:
    """Bit for bit, in a batch of rows with different parameters."""
    logits = random_logits(len(params), seed, ties=ties)
    batch = BatchParams.of([Row(p, seen) for p in params], VOCAB_SIZE, CPU)
    actual = batch.filter(batch.penalise(logits))
    for index, p in enumerate(params):
        expected = transformers_scores(p, seen, logits[index : index + 1])
        assert torch.equal(actual[index : index + 1], expected)


@MANY
@given(
    seen=tokens,
    seed=st.integers(0, 999),
    pairs=st.lists(st.tuples(PENALTIES, PENALTIES), min_size=1, max_size=4),
)
def test_openai_penalties_count_the_continuation(
    seen: list[int], seed: int, pairs: list[tuple[float, float]]
) -> None:
    """Theirs: logit - count * frequency_penalty - (count > 0) * presence_penalty, of noted tokens, too."""
    rows = [Row(SamplingParams(presence_penalty=a, frequency_penalty=b), seen) for a, b in pairs]
    sampler, logits = Sampler(), random_logits(len(pairs), seed)
    sampler.penalise(logits, rows)
    sampler.note(torch.tensor([3] * len(pairs)))
    actual = sampler.penalise(logits, rows)
    counts = Counter([*seen[2:], 3])
    for index, (presence, frequency) in enumerate(pairs):
        for token in range(VOCAB_SIZE):
            taken = counts[token] * frequency + (counts[token] > 0) * presence
            assert abs(float(logits[index, token]) - taken - float(actual[index, token])) < 1e-5


def test_draws_follow_the_distribution() -> None:
    """Frequencies over 20,000 seeds are transformers' probabilities to 4 standard errors."""
    params = SamplingParams(temperature=4.0, top_k=12, top_p=0.9, repetition_penalty=1.2)
    count = 20_000
    rows = [Row(params, seed=seed) for seed in range(count)]
    logits = random_logits(1, seed=5)
    probs = transformers_scores(params, rows[0].token_ids, logits).softmax(-1)[0].double()
    drawn = Counter(sample(logits.expand(count, -1), rows))
    frequencies = torch.tensor([drawn[token] for token in range(VOCAB_SIZE)]) / count
    standard_error = (probs * (1 - probs) / count).sqrt()
    assert ((frequencies - probs).abs() <= 4 * standard_error).all()
    assert (probs > 0).sum() > 5, "the case is not trivial"


@MANY
@given(params=sampled_params, others=rows_of_params, seed=st.integers(-9, 999))
def test_a_seed_gives_the_same_token_in_any_batch(
    params: SamplingParams, others: list[SamplingParams], seed: int
) -> None:
    """Neither the rows beside it nor the steps before it change what a row draws."""
    logits = random_logits(len(others) + 1, seed=3)
    row = Row(params, seed=seed)
    alone = sample(logits[-1:], [row])
    sampler = Sampler()
    sampler.sample(logits[:1], [Row(others[0])])
    assert sample(logits, [*(Row(p, seed=8) for p in others), row], sampler)[-1:] == alone


def test_successive_tokens_and_seeds_draw_independently() -> None:
    """A request's draws differ from token to token, and from those of another seed."""
    params = SamplingParams(temperature=1.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    draws: dict[int, list[int]] = {}
    for seed in range(2):
        row = Row(params, seed=seed)
        for _ in range(30):
            row.token_ids.append(sample(logits, [row])[0])
        draws[seed] = row.token_ids[3:]
        assert len(set(draws[seed])) > 10
    assert draws[0] != draws[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_greedy_takes_the_first_largest(dtype: torch.dtype) -> None:
    """As torch.argmax, in any floating type, also beside a sampled row and whatever the filters."""
    logits = torch.tensor([[0, 3, 1, 3], [5, 1, 1, 1], [0, 0, 0, 9]], dtype=dtype)
    greedy = Row(SamplingParams(top_k=2, top_p=0.5, min_p=0.5))
    assert sample(logits, [greedy, greedy, greedy]) == [1, 0, 3]
    sampled = Row(SamplingParams(temperature=1.0))
    assert sample(logits, [greedy, greedy, sampled])[:2] == [1, 0]


def test_repetition_penalty_counts_prompt_and_generated_tokens() -> None:
    """Greedy with a penalty follows transformers over many tokens, rows joining and leaving."""
    params = SamplingParams(repetition_penalty=1.5)
    rows = [Row(params, [3, 4]), Row(SamplingParams(), [5]), Row(params, [6])]
    sampler = Sampler()
    for step in range(25):
        logits = random_logits(3, seed=step % 3)
        chosen = [0, 1, 2] if step % 5 else [2, 0]
        expected = [
            int(
                RepetitionPenaltyLogitsProcessor(rows[i].params.repetition_penalty)(
                    torch.tensor([rows[i].token_ids]), logits[i : i + 1]
                ).argmax()
            )
            for i in chosen
        ]
        sampled = sample(logits[chosen], [rows[i] for i in chosen], sampler)
        assert sampled == expected
        for i, token in zip(chosen, sampled, strict=True):
            rows[i].token_ids.append(token)


@pytest.mark.parametrize("bad", ["nan", "one_nan", "inf", "minus_inf"])
@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "sampled"])
@pytest.mark.parametrize("penalty", [1.0, 1.3], ids=["plain", "penalty"])
def test_a_bad_row_is_marked_and_the_others_are_not(bad: str, temperature: float, penalty: float) -> None:
    """NaN, +inf or nothing but -inf gives -1; the other rows get what they get without it."""
    params = SamplingParams(temperature=temperature, top_k=9, top_p=0.9, repetition_penalty=penalty)
    logits = random_logits(3, seed=1)
    logits[0, 7] = -torch.inf  # a masked token is no error
    good = sample(logits, [Row(params, seed=i) for i in range(3)])
    row = {
        "nan": torch.full((VOCAB_SIZE,), torch.nan),
        "one_nan": logits[1].clone().index_fill(0, torch.tensor([4]), torch.nan),
        "inf": logits[1].clone().index_fill(0, torch.tensor([4]), torch.inf),
        "minus_inf": torch.full((VOCAB_SIZE,), -torch.inf),
    }[bad]
    logits[1] = row
    assert sample(logits, [Row(params, seed=i) for i in range(3)]) == [
        good[0],
        -1,
        good[2],
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0."),
        ({"temperature": -1.0}, "temperature must be 0 .* got -1.0."),
        ({"temperature": 1e-9}, "temperature must be 0 .* at least 1e-06, got 1e-09."),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan."),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or positive, got -1."),
        ({"top_p": 1.5}, "top_p must lie in 0..1, 1 being off, got 1.5."),
        ({"min_p": -0.1}, "min_p must lie in 0..1, 0 being off, got -0.1."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, 1 being off, got 0.0."),
        ({"stop": "text"}, "stop must be a sequence of strings, none of them empty, got 'text'."),
        ({"stop": ("a", "")}, "stop must be a sequence of strings"),
        ({"stop": [1]}, r"stop must be a sequence of strings, none of them empty, got \[1\]"),
        ({"stop": None}, "stop must be a sequence of strings"),
        ({"stop": {"a": 1}}, "stop must be a sequence of strings"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5."),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True."),
        ({"max_new_tokens": "9"}, "max_new_tokens must be an integer, got '9'."),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None."),
        ({"seed": 1.5}, "seed must be an integer, got 1.5."),
        ({"seed": "1"}, "seed must be an integer, got '1'."),
        ({"temperature": "1"}, "temperature must be a number, got '1'."),
        ({"temperature": None}, "temperature must be a number, got None."),
        ({"temperature": 1e300}, "temperature must be 0 .* got 1e\\+300."),
        ({"temperature": 10**400}, "temperature must be a number, got 1000"),
        ({"top_k": 1.0}, "top_k must be an integer, got 1.0."),
        ({"top_p": [0.9]}, r"top_p must be a number, got \[0.9\]."),
        ({"min_p": float("nan")}, "min_p must lie in 0..1, 0 being off, got nan."),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must lie in 1e-06..1e\\+06, 1 being off, got"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number, got True."),
        ({"no_repeat_ngram_size": -1}, r"no_repeat_ngram_size must be 0 \(off\) or positive, got -1."),
        ({"suppress_tokens": [1.5]}, r"suppress_tokens must be integers, none below 0, got \[1.5\]."),
        ({"suppress_tokens": "12"}, "suppress_tokens must be integers, none below 0, got '12'."),
        ({"stop_token_ids": [-1]}, r"stop_token_ids must be integers, none below 0, got \[-1\]."),
        ({"stop_token_ids": 3}, "stop_token_ids must be integers, none below 0, got 3."),
        ({"stop_token_ids": [True]}, "stop_token_ids must be integers"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_wrong_parameters(values: dict[str, Any], message: str) -> None:
    """The error names the parameter, what it must be and what was given."""
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)


def test_numbers_of_numpy_are_numbers_and_everything_is_kept_as_it_is_read() -> None:
    """As plain numbers and tuples: what is given may be an array or an iterator, and may change later."""
    stop_token_ids = [4]
    given = SamplingParams(
        max_new_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=1,
        seed=np.int64(-5),  # type: ignore[arg-type]
        stop=(char for char in "ab"),  # type: ignore[arg-type]
        stop_token_ids=stop_token_ids,
        suppress_tokens=np.arange(2),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
    )
    stop_token_ids.append(9)
    assert given == SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        seed=-5,
        stop=("a", "b"),
        stop_token_ids=(4,),
        suppress_tokens=(0, 1),
        ignore_eos=True,
    )
    assert [type(v) for v in (given.max_new_tokens, given.temperature, given.top_p, given.seed)] == [
        int,
        float,
        float,
        int,
    ]
    assert hash(given)


def test_any_integer_is_a_seed_and_any_size_is_one() -> None:
    """Numbers beyond 64 bits are taken too."""
    huge = SamplingParams(
        max_new_tokens=10**30,
        temperature=1.0,
        top_k=10**30,
        seed=10**40,
        no_repeat_ngram_size=10**30,
        suppress_tokens=[10**30],
    )
    assert 0 <= sample(random_logits(1, seed=0), [Row(huge, seed=10**40)])[0] < VOCAB_SIZE


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_no_run_of_tokens_occurs_twice(size: int) -> None:
    """Greedy against transformers over many tokens, rows of other sizes joining and leaving."""
    params = SamplingParams(no_repeat_ngram_size=size)
    rows = [
        Row(params, [3, 4, 3]),
        Row(SamplingParams(), [5]),
        Row(SamplingParams(no_repeat_ngram_size=2), [6, 6, 6]),
    ]
    sampler = Sampler()
    for step in range(24):
        logits = random_logits(3, seed=step % 4)
        chosen = [0, 1, 2] if step % 5 else [2, 0]
        expected = []
        for i in chosen:
            scores = logits[i : i + 1]
            if rows[i].params.no_repeat_ngram_size:
                ban = NoRepeatNGramLogitsProcessor(rows[i].params.no_repeat_ngram_size)
                scores = ban(torch.tensor([rows[i].token_ids]), scores)
            expected.append(int(scores.argmax()))
        sampled = sample(logits[chosen], [rows[i] for i in chosen], sampler)
        assert sampled == expected
        for i, token in zip(chosen, sampled, strict=True):
            rows[i].token_ids.append(token)
