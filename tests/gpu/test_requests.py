"""What requests can ask for, on the device and with captured graphs: as on the host, and as alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Completion, Engine
from ad_flashinfer_pass.runtime.sampling import BadWords, BatchParams, Sampler, SamplingParams
from ad_flashinfer_pass.runtime.structure import GuidedDecodingParams, mask_by_bits, new_bits
from tests.gpu.test_end_to_end import PROMPTS, model_of, transformed
from tests.runtime.test_sampling import Row, random_logits

ASKED = {
    "penalties": SamplingParams(presence_penalty=1.0, frequency_penalty=0.7, logit_bias={5: 2.0}),
    "drawn": SamplingParams(temperature=0.9, frequency_penalty=0.7, seed=3),
    "bad_words": SamplingParams(bad_words_ids=[[3], [5, 7], [7, 7, 7]]),
    "ends": SamplingParams(min_tokens=12, stop_token_ids=list(range(40))),
}


@pytest.fixture(scope="module")
def model() -> CachedModel:
    return transformed(model_of("LlamaConfig"), "torch-cudagraph")[0]


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
    ids = [engine.add_request(prompt, params) for prompt, params in asked]
    ended: dict[int, Completion] = {}
    while engine.has_work:
        ended.update({o.request_id: o.completion for o in engine.step() if o.completion})
    assert not any(completion.error for completion in ended.values())
    assert engine.metrics.pages_in_use == 0
    return [ended[request_id] for request_id in ids]


@pytest.mark.parametrize("params", ASKED.values(), ids=ASKED)
def test_scores_are_those_of_the_host(params: SamplingParams) -> None:
    """Bit for bit, of rows with and without, also of tokens that the host was not told."""
    rows = [Row(params, [1, 2, 5, 7, 7]), Row(SamplingParams(), [3, 4, 4])]
    found = []
    for device in ("cpu", "cuda"):
        sampler, logits = Sampler(), random_logits(2, seed=1).to(device)
        first = sampler.penalise(logits, rows)
        sampler.note(torch.tensor([7, 3], device=device))
        found.append(torch.stack([first, sampler.penalise(logits, rows)]).cpu())
    assert torch.equal(*found)
    assert BatchParams.of(rows, 40, torch.device("cuda")) is not None


def test_bits_are_applied_as_on_the_host() -> None:
    """Tokens whose bit is not set cannot be chosen."""
    bits, logits = new_bits(2, 70), torch.randn(2, 70)
    bits[1, 0], bits[1, 2] = 6, 0
    assert torch.equal(mask_by_bits(logits.cuda(), bits.cuda()).cpu(), mask_by_bits(logits, bits))
    assert BadWords.of([[(1, 2)]], torch.device("cuda")).rows.is_cuda


@pytest.mark.parametrize("name", ["penalties", "drawn", "bad_words"])
def test_tokens_are_those_of_the_synchronous_loop(model: CachedModel, name: str) -> None:
    """With steps ahead the same kernels run, in the same order."""
    asked = [(prompt, replace(ASKED[name], max_new_tokens=24, ignore_eos=True)) for prompt in PROMPTS]
    lists = [[each.token_ids for each in run(Engine(model, steps_ahead=ahead), asked)] for ahead in (0, 1, 3)]
    assert lists[0] == lists[1] == lists[2]


def test_logprobs_of_tokens_and_prompts(model: CachedModel) -> None:
    """Each token of a greedy request is as likely as any; of a prompt all have one but the first."""
    params = SamplingParams(max_new_tokens=12, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    for completion, prompt in zip(
        run(Engine(model, steps_ahead=1), [(prompt, params) for prompt in PROMPTS]), PROMPTS, strict=True
    ):
        assert completion.logprobs is not None
        assert [one.token_id for one in completion.logprobs] == completion.token_ids
        assert all(one.top[0][1] == one.logprob for one in completion.logprobs)  # logits of 16 bits tie
        assert completion.prompt_logprobs is not None
        assert [one and one.token_id for one in completion.prompt_logprobs] == [None, *prompt[1:]]
        assert all(one.logprob <= 0 for one in completion.prompt_logprobs if one)


def test_a_known_prefix_is_not_computed_again(model: CachedModel) -> None:
    """And the continuation goes on as that of the whole, but for what 16 bits round otherwise."""
    engine = Engine(model, steps_ahead=1)
    prompt = [token % 97 + 3 for token in range(100)]
    params = SamplingParams(max_new_tokens=16, logprobs=0, ignore_eos=True)
    (first,) = run(engine, [(prompt, params)])
    (second,) = run(engine, [(prompt, params)])
    assert second.num_cached_tokens == 96
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert first.logprobs[0].logprob == pytest.approx(second.logprobs[0].logprob, abs=0.05)


def test_texts_have_their_form(model: CachedModel) -> None:
    """With steps ahead, beside requests without a form."""
    pytest.importorskip("xgrammar")
    from tests.runtime import toy_tokenizers

    engine = Engine(model, toy_tokenizers.chatting(), [0], steps_ahead=1)
    form = SamplingParams(guided_decoding=GuidedDecodingParams(regex="(ab|cd){2,5}x"), max_new_tokens=24)
    plain = SamplingParams(max_new_tokens=24, ignore_eos=True)
    found = run(engine, [(PROMPTS[0], form), (PROMPTS[1], plain), (PROMPTS[2], form)])
    assert all(re.fullmatch("(ab|cd){2,5}x", found[index].text or "") for index in (0, 2))
