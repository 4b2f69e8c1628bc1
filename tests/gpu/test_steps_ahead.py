"""The decode loop on the device against the synchronous one: the same tokens, every step a replay."""

from __future__ import annotations

import pytest

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests.gpu.test_end_to_end import PROMPTS, model_of, transformed

PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7),
    "without_ngrams": SamplingParams(no_repeat_ngram_size=2, suppress_tokens=[3, 5]),
    "penalty": SamplingParams(temperature=0.9, repetition_penalty=1.3, seed=7),
}


@pytest.fixture(scope="module")
def model() -> CachedModel:
    return transformed(model_of("LlamaConfig"), "torch-cudagraph")[0]


def generate(model: CachedModel, params: SamplingParams, steps_ahead: int) -> list[list[int]]:
    """Requests of known length: the batch is composed alike whatever is known of their tokens."""
    engine = Engine(model, steps_ahead=steps_ahead)
    tokens = {}
    for index, prompt in enumerate(PROMPTS):
        fields = {**vars(params), "max_new_tokens": 20 + 5 * index}
        engine.add_request(prompt, SamplingParams(**fields))
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                tokens[output.request_id] = output.completion.token_ids
    assert engine.metrics.pages_in_use == 0
    return [tokens[index] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("name", PARAMS)
def test_tokens_are_those_of_the_synchronous_loop(model: CachedModel, name: str) -> None:
    """Bit for bit, since the same graphs run."""
    expected = generate(model, PARAMS[name], 0)
    assert [len(tokens) for tokens in expected] == [20 + 5 * index for index in range(len(PROMPTS))]
    for steps_ahead in (1, 3):
        assert generate(model, PARAMS[name], steps_ahead) == expected


def test_a_stop_token_ends_a_request_in_the_middle_of_steps_ahead(model: CachedModel) -> None:
    """Each ends where it does in the synchronous loop, as far as its neighbours round alike."""
    whole = generate(model, PARAMS["greedy"], 0)
    stop = whole[3][9]
    params = SamplingParams(stop_token_ids=[stop])
    tokens = generate(model, params, 3)[3]
    assert tokens == whole[3][: whole[3].index(stop) + 1]
