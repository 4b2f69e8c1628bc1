"""Requests that fail beside requests that go on, and wrong types in whatever users call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ad_flashinfer_pass import (
    LLM,
    AutoDeployConfig,
    CacheSession,
    KvCacheConfig,
    SamplingParams,
    build_model,
    exported,
)
from ad_flashinfer_pass.pipeline import transform_module
from tests.faults.harness import TIMES, refusal_of
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import NAN_TOKEN, VOCAB_SIZE, ToyModel, greedy_alone


class Raises:
    """Of a class whose methods fail."""

    def __iter__(self) -> Any:
        raise RuntimeError("no")

    __len__ = __index__ = __float__ = __iter__


BAD_PROMPTS: dict[str, Any] = {
    "empty": [],
    "negative": [3, -1],
    "beyond the vocabulary": [VOCAB_SIZE],
    "huge": [10**30],
    "too long": [1] * 500,
    "NaN": [2, NAN_TOKEN],
    "text": "abc",
    "half a character": "\ud800",
    "bytes": b"abc",
    "none": None,
    "number": 1.5,
    "floats": [1.0, 2.0],
    "bools": [True],
    "strings": ["a"],
    "nested": [[1, 2]],
    "mapping": {1: 2},
    "set": {1, 2},
    "float tensor": torch.ones(2),
    "two rows": np.ones((2, 2), dtype=int),
    "meta": torch.zeros(2, dtype=torch.int64, device="meta"),
    "class": Raises(),
    "ids of a class": [1, Raises()],
}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_a_bad_prompt_beside_good_ones(bad: str, steps_ahead: int) -> None:
    """It gets its error, in one line; the others their tokens, and all pages come back."""
    llm = LLM(ToyModel(num_pages=9, max_batch_size=2), steps_ahead=steps_ahead)
    good = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    first, failed, *others = llm.generate([good[0], BAD_PROMPTS[bad], *good[1:]], max_new_tokens=6)
    assert [r.token_ids for r in (first, *others)] == [greedy_alone(prompt, 6) for prompt in good]
    assert failed.finish_reason == "error"
    assert failed.error
    assert "\n" not in failed.error
    assert llm.engine.metrics.pages_in_use == llm.engine.metrics.num_running == 0


@pytest.mark.parametrize("seed", range(30 * TIMES))
def test_requests_that_end_in_all_ways(seed: int) -> None:
    """Refused, failed, cancelled, left half-way, with a step that fails: no token of another differs."""
    dice = random.Random(seed)
    model = ToyModel(num_pages=dice.randrange(8, 20), max_batch_size=dice.randrange(1, 4))
    llm = LLM(model, steps_ahead=dice.randrange(2))
    for _ in range(6):
        prompts = [[dice.randrange(NAN_TOKEN) for _ in range(dice.randrange(1, 9))] for _ in range(4)]
        at = dice.randrange(5)
        prompts.insert(at, BAD_PROMPTS[dice.choice(list(BAD_PROMPTS))])
        results = llm.generate_iter(prompts, max_new_tokens=5)
        for index in range(dice.randrange(6)):
            result = next(results)
            assert (result.index, result.error is None) == (index, index != at)
            if result.error is None:
                assert result.token_ids == greedy_alone(prompts[index], 5)
        if dice.random() < 0.3:
            model.fail_next = RuntimeError("out of memory")
            llm.engine.add_request([1], SamplingParams(max_new_tokens=2))
            while llm.engine.has_work and model.fail_next is not None:
                llm.engine.step()
        results.close()
        while llm.engine.has_work:
            llm.engine.step()
        assert llm.engine.metrics.pages_in_use == llm.engine.metrics.num_running == 0


def _refusal(call: Callable[[], Any], value: Any, *parts: str) -> str | None:
    """As ``refusal_of``; what the value's own class raises is the caller's."""
    try:
        return refusal_of(call, *parts)
    except RuntimeError as err:
        if not isinstance(value, Raises):
            raise
        return str(err)


WRONG: list[Any] = [None, -1, 1.5, "x", b"x", [], {}, object(), Raises(), float("nan"), 10**40, True]
NUMBERS = ("max_new_tokens", "top_k", "no_repeat_ngram_size", "temperature", "top_p", "min_p")


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", [*NUMBERS, "repetition_penalty", "seed", "stop", "suppress_tokens"])
def test_a_sampling_parameter_of_a_wrong_type(name: str, value: Any) -> None:
    """It is refused when it is made, or works."""
    if _refusal(lambda: SamplingParams(**{name: value}), value, name) is None:
        llm = LLM(ToyModel())
        sampling = SamplingParams(**{"max_new_tokens": 3, name: value})
        (result,) = llm.generate([[1, 2]], sampling_params=sampling)
        assert result.error is None or "needs" in result.error
        assert llm.engine.metrics.pages_in_use == 0


def _key(make: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda value: make(**{name: value})


def _cache_key(name: str) -> Callable[[Any], Any]:
    return lambda value: _key(AutoDeployConfig, "kv_cache_config")({name: value})


CHATTING = toy_tokenizers.chatting()
SESSION = ("max_batch_size", "max_seq_len", "max_num_tokens", "device", "kv_cache_config")
CALLS: dict[str, Callable[[Any], Any]] = {
    "LLM": lambda value: LLM(value),
    "LLM: default_sampling": lambda value: LLM(ToyModel(), default_sampling=value),
    "LLM: eos_token_ids": lambda value: LLM(ToyModel(), eos_token_ids=value),
    "LLM: steps_ahead": lambda value: LLM(ToyModel(), steps_ahead=value),
    "LLM: prefill_chunk_tokens": lambda value: LLM(ToyModel(), prefill_chunk_tokens=value),
    "generate": lambda value: LLM(ToyModel()).generate(value, max_new_tokens=1),
    "generate: sampling_params": lambda value: list(
        LLM(ToyModel()).generate([[1], [2]], sampling_params=value, max_new_tokens=1)
    ),
    "generate: max_new_tokens": lambda value: list(
        LLM(ToyModel(), default_sampling=SamplingParams(max_new_tokens=1)).generate(
            [[1]], max_new_tokens=value
        )
    ),
    "chat": lambda value: LLM(ToyModel(), CHATTING).chat(value, max_new_tokens=1),
    "stream: max_new_tokens": lambda value: list(LLM(ToyModel(), CHATTING).stream([1], max_new_tokens=value)),
    "add_request": lambda value: LLM(ToyModel()).engine.add_request(value),
    "cancel": lambda value: LLM(ToyModel()).engine.cancel(value),
    "build_model": lambda value: build_model(value),
    "transform_module": lambda value: transform_module(value, AutoDeployConfig()),
    "transform_module: config": lambda value: transform_module(torch.nn.Identity(), value),
    "transform": lambda value: exported.transform(value),
    "to_program": lambda value: exported.to_program(value),
    "restore": lambda value: exported.restore(value),
    **{f"AutoDeployConfig: {name}": _key(AutoDeployConfig, name) for name in AutoDeployConfig.model_fields},
    **{f"kv_cache_config: {name}": _cache_key(name) for name in KvCacheConfig.model_fields},
    **{f"KvCacheConfig: {name}": _key(KvCacheConfig, name) for name in KvCacheConfig.model_fields},
    **{f"CacheSession: {name}": _key(CacheSession, name) for name in SESSION},
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_a_wrong_type(call: str) -> None:
    """It is taken, or refused in one line: whatever stands there."""
    for value in WRONG:
        _refusal(lambda value=value: CALLS[call](value), value)  # type: ignore[misc]
