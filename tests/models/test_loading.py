import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.models.loading import LoadedModel, load_model

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[5, 9, 2, 44, 17]])


def load(directory: Path | str, **keys: Any) -> LoadedModel:
    return load_model(AutoDeployConfig(model=str(directory), **keys))


def config_only(directory: Path, config: transformers.PretrainedConfig) -> Path:
    config.save_pretrained(directory)
    return directory


def greedy(module: Any, ids: Tensor, num_tokens: int) -> list[int]:
    out = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["10MB", "30KB"], ids=["whole", "sharded"])
def test_gives_the_logits_of_transformers(tmp_path: Path, tied: bool, shard_size: str) -> None:
    """The loaded module is the one that was saved, to the bit."""
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    saved = AutoModelForCausalLM.from_config(config).eval()
    saved.save_pretrained(tmp_path, max_shard_size=shard_size)
    loaded = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(IDS).logits, saved(IDS).logits, rtol=0, atol=0)


def test_module_is_ready_to_export(tmp_path: Path) -> None:
    """Dropout is off and no parameter asks for a gradient."""
    loaded = load(config_only(tmp_path, transformers.LlamaConfig(**SIZES)), skip_loading_weights=True)
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.config.hidden_size == 32
    assert loaded.name == str(tmp_path)


def test_demo_loads_with_tokenizer() -> None:
    """The model of the package comes with a tokenizer and the token that ends a text."""
    loaded = load("demo")
    assert loaded.tokenizer is not None
    assert loaded.eos_token_ids == (loaded.tokenizer.eos_token_id,)


@pytest.mark.parametrize("random", [False, True], ids=["checkpoint", "random"])
@pytest.mark.parametrize(
    ("saved", "asked", "found"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtype(tmp_path: Path, random: bool, saved: str, asked: str, found: torch.dtype) -> None:
    """auto takes the checkpoint's dtype, anything else is converted to."""
    config = transformers.LlamaConfig(**SIZES, dtype=saved)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=asked, skip_loading_weights=random)
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {found}


@pytest.mark.parametrize("random", [False, True], ids=["checkpoint", "random"])
def test_attention_code_is_passed_on(random: bool) -> None:
    """attn_implementation decides which attention of transformers is exported."""
    loaded = load("demo", attn_implementation="eager", skip_loading_weights=random)
    module: Any = loaded.module
    assert module.config._attn_implementation == "eager"


def test_random_weights_are_the_same_each_time(tmp_path: Path) -> None:
    """The same config gives the same weights, whatever was drawn before, and draws nothing else."""
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    torch.manual_seed(1)
    first = load(tmp_path, skip_loading_weights=True)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    second = load(tmp_path / "config.json", skip_loading_weights=True)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Mixtral", "GPTNeoX"])
def test_random_weights_write_varied_text(tmp_path: Path, kind: str, tied: bool) -> None:
    """Greedy text from random weights is not one token for ever, which would hide errors."""
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, tie_word_embeddings=tied, eos_token_id=None, bos_token_id=None, pad_token_id=None
    )
    loaded = load(config_only(tmp_path, config), skip_loading_weights=True)
    assert loaded.eos_token_ids == ()
    tokens = greedy(loaded.module, IDS, 32)
    assert len(set(tokens)) >= 3
    assert tokens != greedy(loaded.module, IDS.flip(1), 32)


def test_model_kwargs_change_the_module(tmp_path: Path) -> None:
    """An override of config.json reaches the module."""
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    loaded = load(tmp_path, skip_loading_weights=True, model_kwargs={"num_hidden_layers": 1})
    module: Any = loaded.module
    assert len(module.model.layers) == 1


def test_initializer_range_is_respected_if_given(tmp_path: Path) -> None:
    """Who sets initializer_range gets it."""
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    loaded = load(tmp_path, skip_loading_weights=True, model_kwargs={"initializer_range": 0.5})
    module: Any = loaded.module
    assert 0.4 < module.model.embed_tokens.weight.std() < 0.6


def test_overrides_must_fit_the_checkpoint(tmp_path: Path) -> None:
    """With weights, an override that changes shapes is an error, not new weights."""
    AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"must have shape \[32, 128\], found \[32, 64\]"):
        load(tmp_path, model_kwargs={"intermediate_size": 128})


@pytest.mark.parametrize(
    ("generation", "found"),
    [(None, (7,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 6]}, (5, 6))],
    ids=["config", "one", "several"],
)
def test_eos_of_generation_config_wins(
    tmp_path: Path, generation: dict[str, Any] | None, found: tuple[int, ...]
) -> None:
    """generation_config.json decides which tokens end a text, else config.json."""
    config = transformers.LlamaConfig(**SIZES, eos_token_id=7)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.unlink()
    if generation is not None:
        file.write_text(json.dumps(generation))
    assert load(tmp_path).eos_token_ids == found


def test_tokenizer_may_be_missing(tmp_path: Path) -> None:
    """Without a vocabulary there is no tokenizer, where transformers would make an empty one."""
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert load(tmp_path, skip_loading_weights=True).tokenizer is None


def test_damaged_tokenizer_is_an_error(tmp_path: Path) -> None:
    """A tokenizer that is there and cannot be read is not taken as missing."""
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="the tokenizer cannot be read"):
        load(tmp_path, skip_loading_weights=True)


def test_tokenizer_of_its_own(tmp_path: Path) -> None:
    """``tokenizer`` names another directory than the model's."""
    demo = load("demo")
    assert demo.tokenizer is not None
    demo.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config_only(tmp_path, transformers.LlamaConfig(**SIZES))
    loaded = load(tmp_path, tokenizer=str(tmp_path / "tokenizer"), skip_loading_weights=True)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a story")["input_ids"] == demo.tokenizer("a story")["input_ids"]


def test_refuses_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    """A tokenizer that was asked for must exist."""
    with pytest.raises(ConfigError, match="tokenizer '/no/such': no such directory"):
        load("demo", tokenizer="/no/such")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json is there"):
        load("demo", tokenizer=str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:77"])
def test_refuses_device(device: str) -> None:
    """A device that is not there is refused before anything is read."""
    with pytest.raises(ConfigError, match="device") as caught:
        load("demo", device=device)
    assert "\n" not in str(caught.value)


def test_refuses_quantized_weights(tmp_path: Path) -> None:
    """A quantized checkpoint is refused with its method; its architecture alone is fine."""
    config = transformers.LlamaConfig(**SIZES).to_dict()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"quantized .*'gptq'"):
        load(tmp_path)
    assert load(tmp_path, skip_loading_weights=True).module is not None


def test_leaves_the_log_of_transformers_as_it_was() -> None:
    """Who watches transformers' log still does after loading."""
    before = transformers.logging.get_verbosity()
    load("demo")
    assert transformers.logging.get_verbosity() == before
    assert transformers.logging.is_progress_bar_enabled()
