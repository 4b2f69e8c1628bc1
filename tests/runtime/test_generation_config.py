"""generation_config.json: what transformers' generate makes of it is the oracle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from ad_flashinfer_pass import AutoDeployConfig, KvCacheConfig, SamplingParams, build_model
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.generation_config import default_sampling, end_tokens
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import BatchParams
from tests.runtime import toy_tokenizers
from tests.runtime.test_sampling import Row
from tests.runtime.toy_model import ToyModel, greedy_alone

VOCAB_SIZE = 64
NUM_NEW_TOKENS = 18
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 9, 10, 12, 13, 14, 15, 16, 17, 18, 9, 10], [20, 21, 20, 21, 20]]
EOS = 63


def small_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def served(model: Any) -> CachedModel:
    """With pages for little more than the longest sequence."""
    config = AutoDeployConfig(
        max_batch_size=4,
        max_num_tokens=8,
        max_seq_len=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=4, max_tokens=36),
    )
    return transform_module(model, config)[0]


def generated(model: Any, config: GenerationConfig, prompt: list[int]) -> list[int]:
    """What transformers makes of a prompt, alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generation_config", config)
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


def random_values(generator: random.Random) -> dict[str, Any]:
    """Some of the values that a file can hold; each is left out half of the time."""
    kinds: dict[str, list[Any]] = {
        "do_sample": [True, True, False],
        "temperature": [0.3, 0.7, 1.0, 1.8],
        "top_k": [0, 1, 5, 20, 60, 200],
        "top_p": [0.1, 0.5, 0.9, 1.0],
        "min_p": [0.0, 0.05, 0.4],
        "repetition_penalty": [0.8, 1.0, 1.3, 2.5],
        "no_repeat_ngram_size": [0, 1, 2, 3, 4],
        "suppress_tokens": [[], [1, 2, 3], list(range(0, VOCAB_SIZE, 4)), [7, 500]],
    }
    return {name: generator.choice(kind) for name, kind in kinds.items() if generator.random() < 0.6}


def transformers_scores(
    model: Any, config: GenerationConfig, ids: list[int], logits: torch.Tensor
) -> torch.Tensor:
    """The scores from which generate draws, or takes the largest of, with this config of the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generation_config", config)
        prepared, _ = model._prepare_generation_config(None)
    processors = model._get_logits_processor(prepared, input_ids_seq_length=len(ids), device="cpu")
    scores: torch.Tensor = processors(torch.tensor([ids]), logits.clone())
    return scores


def test_the_processed_distribution_is_that_of_generate(model: Any) -> None:
    """Kept tokens and their scores, bit for bit, for 300 files, in batches of rows with different ones."""
    generator = random.Random(0)
    num_drawn = 0
    for seed in range(60):
        configs = [GenerationConfig(**random_values(generator)) for _ in range(5)]
        rows = [
            Row(default_sampling(config), [generator.randrange(VOCAB_SIZE // 4) for _ in range(length)])
            for config, length in zip(configs, (1, 2, 7, 30, 30), strict=True)
        ]
        logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4
        batch = BatchParams.of(rows, VOCAB_SIZE, torch.device("cpu"))
        penalised = batch.penalise(logits)
        drawn = batch.filter(penalised)
        for i, (config, row) in enumerate(zip(configs, rows, strict=True)):
            expected = transformers_scores(model, config, row.token_ids, logits[i : i + 1])
            assert (row.params.temperature > 0) == (config.do_sample is True)
            ours = drawn if config.do_sample else penalised
            num_drawn += bool(config.do_sample)
            assert torch.equal(ours[i : i + 1], expected), config
    assert 60 < num_drawn < 240


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.5},
        {"suppress_tokens": list(range(0, VOCAB_SIZE, 3))},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
        {"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "typical_p": 0.5},
        {"do_sample": True, "top_k": 1, "no_repeat_ngram_size": 1},
    ],
    ids=lambda values: "-".join(values),
)
def test_same_tokens_as_generate(model: Any, served: CachedModel, values: dict[str, Any]) -> None:
    """In a ragged batch, with chunks of prompts, preemption, and steps ahead of the host."""
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS, **values)
    expected = [generated(model, config, prompt) for prompt in PROMPTS]
    served.generation_config = config
    for steps_ahead in (0, 2):
        llm = LLM(served, steps_ahead=steps_ahead)
        results = llm.generate(PROMPTS, max_new_tokens=NUM_NEW_TOKENS)
        assert [result.token_ids for result in results] == expected
        assert llm.engine.metrics.num_preemptions > 0
        assert llm.engine.metrics.pages_in_use == 0


def test_the_file_decides_and_what_is_given_wins(model: Any, tmp_path: Path) -> None:
    """Without parameters the file holds; parameters are taken whole; none leaves the file aside."""
    model.save_pretrained(tmp_path)
    values = {"eos_token_id": EOS, "pad_token_id": EOS, "repetition_penalty": 1.5, "max_new_tokens": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    prompt = PROMPTS[3]
    ids = AutoModelForCausalLM.from_pretrained(tmp_path).generate(torch.tensor([prompt]))
    with_file = ids[0, len(prompt) :].tolist()
    config: dict[str, Any] = {"model": str(tmp_path), "max_seq_len": 64, "max_batch_size": 1}
    llm = build_model(AutoDeployConfig(**config))
    assert [r.token_ids for r in llm.generate(prompt)] == [with_file]
    (given,) = llm.generate(prompt, sampling_params=SamplingParams(max_new_tokens=9))
    assert given.token_ids != with_file
    plain = build_model(AutoDeployConfig(**config, generation_config="none"))
    assert [r.token_ids for r in plain.generate(prompt, max_new_tokens=9)] == [given.token_ids]


@pytest.mark.parametrize(
    "values",
    [{"temperature": 1.8, "top_k": 0}, {"top_k": 4}, {"top_k": 0, "top_p": 0.7}],
    ids=lambda values: list(values)[-1] if len(values) == 1 else "-".join(values),
)
def test_a_file_that_samples_draws_what_generate_draws(
    model: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    """Several tokens, all of them among those that transformers keeps."""
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **values}))
    prompt = PROMPTS[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1:]
    scores = transformers_scores(model, GenerationConfig.from_pretrained(tmp_path), prompt, logits)
    config: dict[str, Any] = {"model": str(tmp_path), "max_seq_len": 64, "max_batch_size": 64}
    llm = build_model(AutoDeployConfig(**config))
    drawn = {token for r in llm.generate([prompt] * 200, max_new_tokens=1) for token in r.token_ids}
    assert len(drawn) > 1
    assert drawn <= {token for token in range(VOCAB_SIZE) if scores[0, token].isfinite()}


def test_defaults_of_a_file_that_samples() -> None:
    """top_k is 50 where the file names none; what greedy generate does not look at is not taken."""
    drawn = default_sampling(GenerationConfig(do_sample=True, temperature=0.6))
    assert drawn == SamplingParams(temperature=0.6, top_k=50)
    assert default_sampling(GenerationConfig(do_sample=True, top_k=0)) == SamplingParams(temperature=1.0)
    assert default_sampling(GenerationConfig(temperature=0.6, top_p=0.5)) == SamplingParams()
    assert default_sampling(GenerationConfig(stop_strings="END")).stop == ("END",)
    assert default_sampling(None) == SamplingParams()


def test_what_changes_no_token_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    """Lengths of output, caches, ids of padding, and whatever holds a value that switches it off."""
    config = GenerationConfig(
        max_length=4096,
        cache_implementation="static",
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        return_dict_in_generate=True,
        num_beams=1,
        length_penalty=2.0,
        guidance_scale=1.0,
        min_length=0,
        bad_words_ids=None,
        begin_suppress_tokens=[],
        typical_p=0.9,
        chat_format="chatml",
    )
    with caplog.at_level("WARNING", "ad_flashinfer_pass"):
        assert default_sampling(config) == SamplingParams()
    assert [each.getMessage() for each in caplog.records if each.name.startswith("ad_flashinfer")] == [
        "generation_config.json: max_length 4096 is not used; max_new_tokens ends a text, 256 unless it is "
        "given"
    ]
    caplog.clear()
    assert default_sampling(GenerationConfig(max_length=4096, max_new_tokens=5)).max_new_tokens == 5
    assert not caplog.messages


def test_what_is_not_supported_is_named_whole() -> None:
    """All of it, in one line, with the way out."""
    config = GenerationConfig(num_beams=4, begin_suppress_tokens=[1], do_sample=True, typical_p=0.9)
    with pytest.raises(LoadError) as caught:
        default_sampling(config)
    message = str(caught.value)
    assert "num_beams=4, begin_suppress_tokens=[1], typical_p=0.9" in message
    assert "--generation-config none" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": "1.5"},
        {"repetition_penalty": 1e-320},
        {"do_sample": True, "top_k": -1},
        {"do_sample": True, "top_p": [0.9]},
        {"suppress_tokens": "abc"},
        {"suppress_tokens": [-1]},
        {"no_repeat_ngram_size": 1.5},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_a_value_of_no_use_is_named(values: dict[str, Any]) -> None:
    """By its key, as one of generation_config.json, with the way out."""
    config = GenerationConfig()
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(LoadError, match=rf"^generation_config\.json: {list(values)[-1]} must .*none"):
        default_sampling(config)


def test_a_model_and_a_tokenizer_alone_stop_at_their_end_tokens() -> None:
    """The tokenizer's, and those of the generation config, unless that is made of a class's defaults."""
    tokenizer = toy_tokenizers.byte_level()
    assert tokenizer.eos_token_id == 1
    prompt, token = [5, 6, 7, 8, 9, 10, 11, 12, 13], 0
    while 1 not in greedy_alone([*prompt, token], 20):
        token += 1
    expected = greedy_alone([*prompt, token], 20, eos=[1])
    (result,) = LLM(ToyModel(), tokenizer).generate([*prompt, token], max_new_tokens=20)
    assert (result.token_ids, result.finish_reason) == (expected, "stop")
    model = ToyModel()
    model.generation_config = GenerationConfig(eos_token_id=[expected[0], 999])
    (result,) = LLM(model, tokenizer).generate([*prompt, token], max_new_tokens=20)
    assert result.token_ids == expected[:1]
    assert end_tokens(small_model().generation_config, tokenizer) == (1,)
    assert end_tokens(GenerationConfig(eos_token_id=3), tokenizer) == (1, 3)
    with pytest.raises(LoadError, match=r"generation_config\.json: eos_token_id must be integers"):
        end_tokens(GenerationConfig(eos_token_id="1"), None)
