from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
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
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores: Any = processors(torch.tensor([token_ids]), logits)  # type: ignore[arg-type]
    return scores


sampled_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 10, VOCAB_SIZE, 100]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3, 2.0]),
)
rows_of_params = st.lists(sampled_params, min_size=1, max_size=5)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8)


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
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_parameters_out_of_range(values: dict[str, Any], message: str) -> None:
    """The error names the parameter, its range and what was given."""
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)
