"""A second model that guesses: the tokens are those of plain decoding, whatever it guesses."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, SpeculativeConfig
from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.drafts.model import ModelDrafter
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests import architectures
from tests.runtime.joining import run_joining

PROMPTS = architectures.random_prompts((1, 9, 20, 5), vocab_size=128)
NUM_NEW_TOKENS = 32


@cache
def model_of(name: str, num_layers: int = 2) -> nn.Module:
    return architectures.random_model(architectures.CONFIGS[name](num_layers=num_layers), "eager")


def served(name: str, draft: nn.Module | None, cache: KvCacheConfig | None = None) -> CachedModel:
    """With fewer pages than the prompts need."""
    spec = SpeculativeConfig(drafter="model", model="given", num_tokens=3)
    config = AutoDeployConfig(
        max_batch_size=4,
        max_seq_len=128,
        max_num_tokens=32,
        kv_cache_config=cache or KvCacheConfig(tokens_per_block=8, max_tokens=10 * 8),
        speculative_config=None if draft is None else spec,
    )
    model, _ = transform_module(model_of(name), config, draft=draft)
    model.verify_cost = {1: 0.0}  # so that drafts always pay
    return model


@pytest.mark.parametrize("name", ["llama_gqa4", "gemma2"])
def test_tokens_are_those_of_plain_decoding(name: str) -> None:
    """Greedy and sampled, with chunks, preemption, steps ahead; by a draft that is right, and another."""
    greedy = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    sampled = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, top_p=0.9, seed=5)
    plain = served(name, None)
    expected = [run_joining(plain, PROMPTS, params, 0)[0] for params in (greedy, sampled)]
    right, wrong = served(name, model_of(name)), served(name, model_of("llama_mha", 1))
    preempted = 0
    for model, params, steps_ahead in ((right, greedy, 0), (right, sampled, 2), (wrong, greedy, 2)):
        found, engine = run_joining(model, PROMPTS, params, steps_ahead)
        assert found == expected[params is sampled]
        drafts = engine.metrics.drafts
        assert drafts is not None
        assert drafts.num_verified > 20
        if model is right and params is greedy:
            assert drafts.acceptance[2] > 0.8
        preempted += engine.metrics.num_preemptions
    assert preempted > 0


def test_both_models_have_pages_within_one_budget() -> None:
    """As many of each, so that a sequence has the same ones."""
    model = served("llama_gqa4", model_of("llama_mha", 1))
    drafter = model.drafter
    assert isinstance(drafter, ModelDrafter)
    assert {len(cache) for cache in drafter.caches.values()} == {model.num_pages} == {11}
    assert len(drafter.caches) == 1
    (pool,) = drafter.caches.values()
    pool.fill_(float("nan"))
    model.clear_pages([3])
    assert [bool(page.isnan().all()) for page in pool] == [page != 3 for page in range(11)]
    assert not pool[3].any()


def test_scales_of_a_cache_are_those_of_the_model_alone() -> None:
    """One for each of its layers, of which the model that guesses has fewer."""
    cache = KvCacheConfig(tokens_per_block=8, max_tokens=10 * 8, dtype="fp8", k_scale=[0.5, 0.25])
    plain, drafted = (served("llama_gqa4", draft, cache) for draft in (None, model_of("llama_mha", 1)))
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    assert run_joining(drafted, PROMPTS, params, 0)[0] == run_joining(plain, PROMPTS, params, 0)[0]


def test_loads_both_models(tmp_path: Path) -> None:
    """Named in the config; random weights of both are drawn here."""
    for folder, num_layers in (("large", 2), ("small", 1)):
        architectures.CONFIGS["llama_gqa4"](num_layers=num_layers).save_pretrained(tmp_path / folder)
    keys: dict[str, Any] = {"model": f"{tmp_path / 'large'}", "skip_loading_weights": True, "max_seq_len": 64}
    spec = SpeculativeConfig(drafter="model", model=f"{tmp_path / 'small'}")
    plain, drafted = (
        build_model(AutoDeployConfig(**keys, speculative_config=each)).generate(
            [[1, 2, 3]], max_new_tokens=20
        )
        for each in (None, spec)
    )
    assert drafted[0].token_ids == plain[0].token_ids


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drafter": "model"}, "model must be given with drafter: model and eagle3.* got .*model: None"),
        ({"drafter": "eagle3"}, "model must be given with drafter: model and eagle3.* got .*model: None"),
        ({"drafter": "ngram", "model": "x"}, "cannot be with ngram, got drafter: ngram, model: 'x'"),
    ],
)
def test_refuses_a_config_that_names_no_model_or_one_too_many(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig(**keys)


def test_refuses_models_that_do_not_go_together() -> None:
    """No model, another vocabulary, and one with states, each by what is wrong."""
    spec = SpeculativeConfig(drafter="model", model="given")
    with pytest.raises(ConfigError, match="drafter: model of speculative_config takes a model, got nothing"):
        transform_module(model_of("llama_gqa4"), AutoDeployConfig(speculative_config=spec))
    with pytest.raises(ConfigError, match="drafter: None of speculative_config takes nothing, got a model"):
        transform_module(model_of("llama_gqa4"), AutoDeployConfig(), draft=model_of("llama_mha"))
    config = architectures.CONFIGS["llama_mha"](num_layers=1)
    config.vocab_size = 96
    other = architectures.random_model(config, "eager")
    with pytest.raises(ConfigError, match="its vocabulary has 96 tokens, that of the model 128"):
        served("llama_gqa4", other)
    states = architectures.random_model(architectures.small_config("mamba"), "eager")
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        served("llama_gqa4", states)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("gpt2", "n_positions"),
        ("opt", "max_position_embeddings"),
        ("gptj", "n_positions"),
        ("trocr", "max_position_embeddings"),
    ],
)
def test_refuses_a_model_whose_table_of_positions_is_too_short(family: str, positions: str) -> None:
    """Of 128 that the other model has; learned, behind an offset, of a rope, and by an expanded arange."""
    config = architectures.small_config(family, **{positions: 124})
    config.vocab_size = 128
    short = architectures.random_model(config, "eager")
    with pytest.raises(
        ConfigError, match=r"a table of 12\d positions, and max_seq_len is 128; set max_seq_len: 124, or"
    ):
        served("llama_gqa4", short)
    with pytest.raises(ConfigError, match=r"12\d positions, and max_seq_len is 128; set max_seq_len: 124\."):
        transform_module(short, AutoDeployConfig(max_seq_len=128))
    transform_module(short, AutoDeployConfig(max_seq_len=124))
    setattr(config, positions, 128)
    served("llama_gqa4", architectures.random_model(config, "eager"))
