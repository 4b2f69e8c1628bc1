"""Heads: the tokens are those of plain decoding, and the guesses those of the head computed anew."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, SpeculativeConfig
from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.exported import to_program
from ad_flashinfer_pass.heads.eagle3 import random_eagle3
from ad_flashinfer_pass.heads.load import load_head
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests import architectures
from tests.models.head_checkpoints import Written, write_eagle3, write_mtp
from tests.runtime.joining import run_joining
from tests.runtime.watched import Watched

PROMPTS = architectures.random_prompts((1, 9, 20, 5), vocab_size=128)
NUM_NEW_TOKENS = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i / 4 for i in range(8)],
}
HEADS = ["eagle3", "eagle3_own_embeddings", "deepseek_v3", "glm4_moe", "qwen3_5_text"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head of each layout with its model, each made once."""

    @cache
    def make(name: str) -> Written:
        folder: Path = tmp_path_factory.mktemp(name)
        if name == "eagle3":
            return write_eagle3(folder)
        if name == "eagle3_own_embeddings":
            return write_eagle3(folder, own_embeddings=True, reads=[0, 4])
        return write_mtp(folder, mtp_config(name))

    return make


def mtp_config(kind: str) -> Any:
    """Of a model that can be verified: Qwen's with full attention alone."""
    full: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    changes: dict[str, Any] = full if kind.startswith("qwen") else {}
    return architectures.small_config(kind, tie_word_embeddings=False, **changes)


def drafter_of(name: str) -> Literal["eagle3", "mtp"]:
    return "eagle3" if name.startswith("eagle3") else "mtp"


def served(head: Written, name: str | None, num_tokens: int = 3, **changes: Any) -> CachedModel:
    """Of a head, or without one; with fewer pages than the prompts need."""
    spec = name and SpeculativeConfig(drafter=drafter_of(name), model="given", num_tokens=num_tokens)
    config = AutoDeployConfig(
        device="cpu",
        max_batch_size=4,
        max_seq_len=64,
        max_num_tokens=32,
        kv_cache_config=KvCacheConfig(tokens_per_block=8, max_tokens=7 * 8),
        speculative_config=spec or None,
        **changes,
    )
    draft = load_head(drafter_of(name), str(head.folder), head.model) if name else None
    model, _ = transform_module(head.model, config, draft=draft)
    model.verify_cost = {1: 0.0}  # so that drafts always pay
    return model


def captured(model: CachedModel) -> CachedModel:
    """With its steps as a GPU would replay them."""
    module = CudaGraphModule(model.module, [1, 2, 4], [8, 32], drafter=model.drafter)
    module.capture(model.sequence_info, model.caches)
    replayed = CachedModel(
        module, model.caches, model.sequence_info, model.vocab_size, model.weights, model.drafter
    )
    replayed.verify_cost = model.verify_cost
    return replayed


@pytest.mark.parametrize("name", HEADS)
def test_guesses_are_those_of_the_head_and_tokens_those_of_plain_decoding(
    name: str, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks, preemption and neighbours, replayed steps ahead or not; the oracle has no cache."""
    head = written(name)
    expected = architectures.generated_by_transformers(head.model, PROMPTS, NUM_NEW_TOKENS)
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    eager = served(head, name)
    for model, steps_ahead in ((eager, 0), (captured(eager), 2)):
        with monkeypatch.context() as patch:
            watched = Watched(model, patch, texts)
            found, engine = run_joining(
                model,
                PROMPTS,
                SamplingParams(max_new_tokens=NUM_NEW_TOKENS),
                steps_ahead,
                enable_block_reuse=False,
            )
        assert found == expected
        assert engine.metrics.num_preemptions > 0
        assert min(engine.metrics.num_accepted) > 5
        for sequence, place, guesses in watched.found:
            if guesses and place < len(sequence.token_ids):  # a step ahead may go beyond the end
                assert guesses == head.guesses(sequence.token_ids[: place + 1], len(guesses)), place
        assert sum(len(guesses) == 3 for _, _, guesses in watched.found) > 10


@pytest.mark.parametrize("is_replayed", [False, True])
def test_reads_steps_that_verify_nothing(
    is_replayed: bool, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beside a penalised request: what is guessed once it has ended is what the head guesses of all."""
    head = written("eagle3")
    model = served(head, "eagle3")
    model = captured(model) if is_replayed else model
    watched = Watched(model, monkeypatch)
    engine = Engine(model, steps_ahead=2 * is_replayed, prefill_chunk_tokens=1)
    lengths = {engine.add_request(PROMPTS[1], SamplingParams(max_new_tokens=30)): 30}
    lengths[engine.add_request(PROMPTS[3], SamplingParams(max_new_tokens=9, repetition_penalty=1.3))] = 9
    found = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                found[output.request_id] = output.completion.token_ids
    assert [found[0]] == architectures.generated_by_transformers(head.model, [PROMPTS[1]], 30)
    assert {index: len(tokens) for index, tokens in found.items()} == lengths
    num_plain = engine.metrics.num_steps - engine.metrics.num_verify_steps
    assert num_plain >= 9
    guessed = [each for each in watched.found if each[2] and each[1] < len(each[0].token_ids)]
    assert len(guessed) > 10
    for sequence, place, guesses in guessed:
        assert guesses == head.guesses(sequence.token_ids[: place + 1], len(guesses)), place


def test_requests_that_begin_alike_share_pages_of_both(written: Any) -> None:
    """The second one computes little of its prompt; the tokens are the same."""
    head = written("eagle3")
    plain, drafted = served(head, None), served(head, "eagle3")
    results = []
    for model in (plain, drafted):
        engine, found = Engine(model), []
        for prompt in (PROMPTS[2], [*PROMPTS[2], 7]):
            engine.add_request(prompt, SamplingParams(max_new_tokens=12, temperature=0.7, seed=3))
            while engine.has_work:
                found += [o.completion.token_ids for o in engine.step() if o.completion is not None]
        assert engine.metrics.num_cached_tokens >= 16
        results.append(found)
    assert results[0] == results[1]


def test_a_model_may_take_lengths_that_its_head_does_not() -> None:
    """Of longrope; chunks and steps of the model have one input more."""
    config = architectures.CONFIGS["llama_mha"](num_layers=3)
    config.rope_parameters = LONGROPE
    model = architectures.random_model(config)
    layer: Any = architectures.CONFIGS["llama_mha"](num_layers=1)
    one = random_eagle3(layer, model, torch.float32)
    spec = SpeculativeConfig(drafter="eagle3", model="given")
    keys: dict[str, Any] = {"device": "cpu", "max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 32}
    plain, _ = transform_module(model, AutoDeployConfig(**keys))
    drafted, _ = transform_module(model, AutoDeployConfig(**keys, speculative_config=spec), draft=one)
    params = SamplingParams(max_new_tokens=12)
    assert (
        run_joining(drafted, PROMPTS, params, 2, enable_block_reuse=False)[0]
        == run_joining(plain, PROMPTS, params, 0, enable_block_reuse=False)[0]
    )


def test_refuses_what_a_head_cannot_be_used_for(written: Any) -> None:
    """No head, a model in its place, a target with states, and a program that would be saved without it."""
    head = written("eagle3")
    spec = SpeculativeConfig(drafter="eagle3", model="given")
    config = AutoDeployConfig(device="cpu", max_seq_len=64, speculative_config=spec)
    with pytest.raises(ConfigError, match="drafter: eagle3 of speculative_config takes a head, got nothing"):
        transform_module(head.model, config)
    with pytest.raises(ConfigError, match="drafter: eagle3 of speculative_config takes a head, got a model"):
        transform_module(head.model, config, draft=head.model)
    with pytest.raises(ConfigError, match="a model whose hidden states a head reads cannot be saved"):
        to_program(served(head, "eagle3"))
    longer: Any = architectures.CONFIGS["llama_mha"](num_layers=1)
    longer.rope_parameters = LONGROPE
    with pytest.raises(ConfigError, match="rotary frequencies of the head depend on how long a sequence is"):
        transform_module(head.model, config, draft=random_eagle3(longer, head.model, torch.float32))
    hybrid = architectures.random_model(architectures.small_config("qwen3_next"))
    drafter = load_head("eagle3", str(head.folder), hybrid)
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        transform_module(hybrid, config, draft=drafter)
