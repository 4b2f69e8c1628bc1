"""The main job against transformers' own generate: the same greedy tokens, in every way of batching."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, SpeculativeConfig, TransformConfig
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels.attention import reference, select
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures
from tests.runtime.guesser import Guesser

NUM_NEW_TOKENS = 48
PROMPTS = architectures.random_prompts((1, 2, 5, 9, 14, 20, 31, 3), vocab_size=128)

CASES = [
    pytest.param(name, attention, id=f"{name}-{attention}")
    for name in architectures.CONFIGS
    for attention in ("sdpa", "eager")
    if (name, attention) != ("gemma2", "sdpa")  # transformers has no sdpa for its logit cap
]


@cache
def model_of(name: str, attention: str) -> nn.Module:
    return architectures.random_model(architectures.CONFIGS[name](num_layers=2), attention)


@cache
def expected(name: str) -> list[list[int]]:
    return architectures.generated_by_transformers(model_of(name, "eager"), PROMPTS, NUM_NEW_TOKENS)


@cache
def served(name: str, attention: str) -> CachedModel:
    """With fewer pages than the prompts need."""
    config = AutoDeployConfig(
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16, max_tokens=20 * 16),
    )
    return transform_module(model_of(name, attention), config)[0]


def run(engine: Engine, arrivals: dict[int, list[list[int]]]) -> tuple[dict[int, list[int]], Engine]:
    """Tokens by request, with the prompts of ``arrivals[step]`` joining before that step."""
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    tokens: dict[int, list[int]] = {}
    step = 0
    while engine.has_work or step <= max(arrivals):
        for prompt in arrivals.get(step, []):
            engine.add_request(prompt, params)
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                tokens[output.request_id] = output.completion.token_ids
        step += 1
    return tokens, engine


def in_order(tokens: dict[int, list[int]]) -> list[list[int]]:
    return [tokens[request_id] for request_id in sorted(tokens)]


def logits_error(model: CachedModel, original: nn.Module) -> float:
    """Largest difference from the model's own logits, over their largest value: 40 tokens, then 20 by one."""
    (prompt,) = architectures.random_prompts((60,), vocab_size=128, seed=2)
    with torch.no_grad():
        expected = original(torch.tensor([prompt])).logits[0]
    error = 0.0
    for start, end in [(0, 40), *((i, i + 1) for i in range(40, 60))]:
        pages = list(range(1, 2 + (end - 1) // 16))
        (found,) = model.step([SequenceStep(prompt[start:end], start, pages)])
        error = max(error, float((found - expected[end - 1]).abs().max()))
    return error / float(expected.abs().max())


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_generates_the_tokens_of_transformers(name: str, attention: str) -> None:
    """And its logits; in one ragged batch."""
    model = served(name, attention)

    # Tokens alone would not show a small term that is dropped.
    assert logits_error(model, model_of(name, attention)) < 2e-5
    one_batch, _ = run(Engine(model), {0: PROMPTS[:4], 1: PROMPTS[4:]})

    assert in_order(one_batch) == expected(name)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_generates_them_in_every_way_of_batching(name: str) -> None:
    """In chunks of 7, with late arrivals, preemption and steps ahead."""
    model = served(name, "eager")
    chunked, _ = run(Engine(model, prefill_chunk_tokens=7), {0: PROMPTS})
    rng = random.Random(0)
    arrivals: dict[int, list[list[int]]] = {}
    for prompt, step in zip(PROMPTS, sorted(rng.choices(range(20), k=len(PROMPTS))), strict=True):
        arrivals.setdefault(step, []).append(prompt)
    late, engine = run(Engine(model), arrivals)
    ahead, engine_ahead = run(Engine(model, steps_ahead=2), arrivals)

    assert in_order(chunked) == expected(name)
    assert in_order(late) == in_order(ahead) == expected(name)
    for e in (engine, engine_ahead):
        assert e.metrics.num_preemptions > 0
        assert e.metrics.pages_in_use == 0


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_known_prefix_changes_no_token(name: str) -> None:
    """A second turn starts after the first one's pages, of windows too; two are alike at once."""
    engine = Engine(served(name, "eager"), steps_ahead=1)
    turns = [PROMPTS[4], PROMPTS[6]]
    run(engine, {0: turns})
    wanted = [expected(name)[4], expected(name)[6]]
    again = [[*prompt, *tokens[:20]] for prompt, tokens in zip(turns, wanted, strict=True)]

    second, _ = run(engine, {0: again, 1: again})

    for index, tokens in enumerate(in_order(second)):
        expected_tail = wanted[index % 2][20:]
        assert tokens[: len(expected_tail)] == expected_tail
    assert (engine.no_block_reuse is not None) == (engine.metrics.num_cached_tokens == 0)


@cache
def served_with_drafts(name: str) -> CachedModel:
    """As ``served``; three drafts a step, from a guesser that mostly knows what comes."""
    config = AutoDeployConfig(
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16, max_tokens=12 * 16),
        speculative_config=SpeculativeConfig(drafter="ngram"),
    )
    return transform_module(model_of(name, "eager"), config)[0]


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_drafts_change_no_token(name: str) -> None:
    """By n-grams in chunks of 7; by guesses that are mostly right, with late arrivals; with preemption."""
    model, known = served_with_drafts(name), dict[tuple[int, ...], int]()
    model.verify_cost = {1: 0.0}  # so that drafts always pay
    for prompt, tokens in zip(PROMPTS, expected(name), strict=True):
        whole = (*prompt, *tokens)
        known |= {whole[:end]: whole[end] for end in range(len(prompt), len(whole))}
    arrivals = {step: PROMPTS[step : step + 3] for step in (0, 3, 6)}

    chunked, engine = run(Engine(model, prefill_chunk_tokens=7), {0: PROMPTS})
    model.drafter = Guesser(model.sequence_info, 0.8, lambda seen: known.get(tuple(seen)), 128)
    ahead, engine_ahead = run(Engine(model, steps_ahead=2), arrivals)

    assert in_order(chunked) == in_order(ahead) == expected(name)
    assert engine.metrics.num_preemptions + engine_ahead.metrics.num_preemptions > 0
    assert engine.metrics.num_verified > 0
    assert min(engine_ahead.metrics.num_accepted) > 20
    assert engine.metrics.pages_in_use == engine_ahead.metrics.pages_in_use == 0


def longrope() -> transformers.PretrainedConfig:
    """Whose frequencies change at 40 tokens, so that what is longer is computed anew."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, **factors}
    return architectures.small_config(
        "phi3", fewest_layers=2, rope_parameters=rope, original_max_position_embeddings=40
    )


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "llama4_text", "longrope"])
def test_drafts_change_no_token_of_other_kinds(kind: str) -> None:
    """A latent, sinks, chunks, and ropes that go by the length: as without drafts."""
    config = longrope() if kind == "longrope" else architectures.small_config(kind, fewest_layers=2)
    model = architectures.random_model(config, "eager")
    keys: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 96, "max_num_tokens": 32}
    keys["kv_cache_config"] = KvCacheConfig(tokens_per_block=8, max_tokens=25 * 8)
    prompts = architectures.random_prompts((1, 9, 20, 29), vocab_size=100)
    plain = transform_module(model, AutoDeployConfig(**keys))[0]
    tokens = in_order(run(Engine(plain, prefill_chunk_tokens=7), {0: prompts})[0])
    known = {
        (*prompt, *found[:n]): found[n]
        for prompt, found in zip(prompts, tokens, strict=True)
        for n in range(len(found))
    }
    spec = SpeculativeConfig(drafter="ngram")
    drafted = transform_module(model, AutoDeployConfig(**keys, speculative_config=spec))[0]
    drafted.verify_cost = {1: 0.0}
    drafted.drafter = Guesser(drafted.sequence_info, 0.85, lambda seen: known.get(tuple(seen)), 100)
    for steps_ahead in (0, 2):
        found, engine = run(Engine(drafted, prefill_chunk_tokens=7, steps_ahead=steps_ahead), {0: prompts})
        assert in_order(found) == tokens
        assert min(engine.metrics.num_accepted) > 8
    assert (drafted.sequence_info.recompute_at == 40) == (kind == "longrope")


def test_a_model_with_states_takes_no_drafts() -> None:
    """What a rejected draft left in a state cannot be taken back."""
    config = architectures.small_config("mamba")
    with pytest.raises(UnsupportedError, match=r"cannot be taken back .*: leave out speculative_config"):
        transform_module(
            architectures.random_model(config, "eager"),
            AutoDeployConfig(speculative_config=SpeculativeConfig(drafter="ngram")),
        )


def test_logprobs_of_a_prompt_are_those_of_transformers() -> None:
    """Read in chunks, with other requests in the step."""
    engine = Engine(served("llama_gqa4", "eager"), prefill_chunk_tokens=9)
    engine.add_request(PROMPTS[3], SamplingParams(max_new_tokens=4))
    asked = engine.add_request(PROMPTS[6], SamplingParams(max_new_tokens=1, prompt_logprobs=0, logprobs=0))
    done = {}
    while engine.has_work:
        done.update({output.request_id: output.completion for output in engine.step() if output.completion})
    found = [*(done[asked].prompt_logprobs or [])[1:], *(done[asked].logprobs or [])]
    with torch.no_grad():
        logits = model_of("llama_gqa4", "eager")(torch.tensor([PROMPTS[6]])).logits[0]
    tokens = torch.tensor([*PROMPTS[6][1:], *done[asked].token_ids])
    expected = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert torch.allclose(torch.tensor([one.logprob for one in found if one]), expected, atol=1e-4)


def test_tokens_depend_on_the_prompt() -> None:
    """The oracle is no constant: no two prompts continue alike, nor repeat their last token for ever."""
    for name in architectures.CONFIGS:
        continuations = [tuple(tokens) for tokens in expected(name)]

        assert len({*continuations}) == len(PROMPTS), name
        assert sum(len({*tokens}) for tokens in continuations) > 8 * len(PROMPTS), name


def test_short_extends_give_what_the_uncached_model_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal and other lengths, beside chunks that are too long to be one, in either order, and decodes."""
    model = model_of("llama_gqa4", "sdpa")
    config = AutoDeployConfig(
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16),
        transforms={"insert_cached_attention": TransformConfig(max_extend_len=4)},
    )
    lengths: list[int] = []

    def extend(query: torch.Tensor, *args: Any, max_len: int) -> torch.Tensor:
        lengths.append(query.shape[0])
        return reference.prefill(query, *args)

    monkeypatch.setitem(select.PROVIDERS, "reference", replace(reference.PROVIDER, extend=extend))
    cached, reports = transform_module(model, config)
    assert "extends of up to 4 tokens: reference, 2 sites" in [n for r in reports for n in r.notes]
    tokens = architectures.random_prompts([40] * 4, vocab_size=128)
    pages = [[1 + 3 * i, 2 + 3 * i, 3 + 3 * i] for i in range(4)]
    done = [0] * 4
    for new, extended in (
        ((5, 15, 16, 2), 0),
        ((4, 4, 4, 4), 16),
        ((2, 4, 3, 1), 9),
        ((7, 3, 2, 1), 5),
        ((3, 6, 2, 2), 4),
        ((2, 5, 1, 1), 0),
    ):
        spans = [(start, start + n) for start, n in zip(done, new, strict=True)]
        steps = [
            SequenceStep(its[start:end], start, own)
            for its, own, (start, end) in zip(tokens, pages, spans, strict=True)
        ]
        lengths.clear()
        logits = cached.step(steps)
        assert lengths == [extended] * 2 * (extended > 0)
        for row, its, (_, end) in zip(logits, tokens, spans, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([its[:end]])).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)  # float32 summed in another order
        done = [end for _, end in spans]
