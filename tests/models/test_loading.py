import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import AdFlashinferError, CapacityError, ConfigError, LoadError
from ad_flashinfer_pass.models.loading import LoadedModel, load_model
from ad_flashinfer_pass.models.weightless import load_weightless

DEMO = Path(str(resources.files("ad_flashinfer_pass.demo")))

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


def demo(directory: Path, name: str, keys: dict[str, Any], without: str | None = None) -> None:
    """The demo's files in a directory, where one of them gets other keys and loses one."""
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".jinja", ".safetensors") and not (directory / file.name).exists():
            shutil.copy(file, directory)
    raw = json.loads((DEMO / name).read_text())
    raw.pop(without, None)
    if name == "generation_config.json":
        raw = {}
    (directory / name).write_text(json.dumps({**raw, **keys}))


def refusal(directory: Path, read: Callable[[AutoDeployConfig], object] = load_model) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(LoadError) as caught:
        read(AutoDeployConfig(model=str(directory)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("config", "tokenizer", "found"),
    [({}, {}, ()), ({"eos_token_id": None}, {}, ()), ({}, {"eos_token": "</s>"}, (1,))],
    ids=["nowhere", "null", "tokenizer"],
)
def test_no_end_token_is_a_default(
    tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], found: tuple[int, ...]
) -> None:
    """LlamaConfig has a default of 2, which no file of this model names."""
    demo(tmp_path, "generation_config.json", {})
    demo(tmp_path, "config.json", config, without="eos_token_id")
    demo(tmp_path, "tokenizer_config.json", tokenizer, without="eos_token")
    assert load(tmp_path).eos_token_ids == found


def test_end_tokens_of_the_text_stack(tmp_path: Path) -> None:
    """A vision-language model may name them for its text stack alone."""
    text = {"model_type": "gemma3_text", **SIZES, "head_dim": 8, "eos_token_id": [7, 8]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load(tmp_path, skip_loading_weights=True).eos_token_ids == (7, 8)


def test_end_tokens_of_the_tokenizer_count_too(tmp_path: Path) -> None:
    """What ends a text for the tokenizer ends it beside what generation_config.json names."""
    demo(tmp_path, "generation_config.json", {"eos_token_id": [5, 6]})
    assert load(tmp_path).eos_token_ids == (5, 6, 1)


@pytest.mark.parametrize("value", ["1", [1, "2"], True, 1.0, {"a": 1}, [None]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_refuses_end_token_that_never_matches(tmp_path: Path, name: str, value: Any) -> None:
    """A token is a number: anything else would end no text, ever."""
    demo(tmp_path, name, {"eos_token_id": value})
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message
    assert "eos_token_id" in message


def test_generation_config_is_the_file(tmp_path: Path) -> None:
    """generation_config.json as transformers reads it, and None without one."""
    demo(tmp_path, "generation_config.json", {"repetition_penalty": 1.5, "do_sample": True, "top_k": 5})
    found, file = load(tmp_path).generation
    assert found is not None
    assert file == tmp_path / "generation_config.json"
    expected = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert found.to_dict() == expected.to_dict()
    (tmp_path / "generation_config.json").unlink()
    without = load(tmp_path).generation
    assert without.file == tmp_path / "config.json"
    assert without.config is not None
    assert (without.config.repetition_penalty, without.config.eos_token_id) == (None, 1)


def test_config_json_says_what_to_generate_where_no_other_file_does(tmp_path: Path) -> None:
    """As in transformers: models of before generation_config.json. A value of no use names config.json."""
    keys = {"repetition_penalty": 1.5, "suppress_tokens": [5, 6]}
    demo(tmp_path, "config.json", keys)
    assert load(tmp_path).generation.config.repetition_penalty is None  # type: ignore[union-attr]
    (tmp_path / "generation_config.json").unlink()
    found, file = load(tmp_path).generation
    assert found is not None
    assert file == tmp_path / "config.json"
    made = transformers.GenerationConfig.from_model_config(json.loads(file.read_text()))
    for key, value in keys.items():
        assert getattr(found, key) == getattr(made, key) == value
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads(file.read_text()), "suppress_tokens": "a"})
    )
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: suppress_tokens: must be ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "1"),
        ("top_k", 0.5),
        ("do_sample", 1),
        ("suppress_tokens", 5),
        ("watermarking_config", 3),
    ],
)
def test_refuses_odd_generation_config(tmp_path: Path, key: str, value: Any) -> None:
    """A value of another type is told with the file."""
    demo(tmp_path, "generation_config.json", {key: value})
    assert f"{tmp_path / 'generation_config.json'}: " in refusal(tmp_path)


def test_fits_a_table_of_positions(tmp_path: Path) -> None:
    """GPT-2 works by default, with the positions that it has."""
    config_only(tmp_path, transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    assert load(tmp_path, skip_loading_weights=True).resolved.max_seq_len == 1024


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "rope_parameters",
            {"rope_type": "foo"},
            "rope_type: 'foo' is unknown to transformers; known: default, ",
        ),
        ("rope_parameters", "x", "rope_parameters"),
        ("hidden_act", "foo", "hidden_act: 'foo' is unknown to transformers"),
        ("num_key_value_heads", 0, "cannot build the model"),
        ("head_dim", 0, "cannot build the model"),
        ("vocab_size", 0, "cannot build the model"),
        ("model_type", {}, "model_type: must be a string"),
        ("model_type", ["llama"], "model_type"),
        ("quantization_config", 5, "quantized as an unknown format"),
    ],
)
@pytest.mark.parametrize("weightless", [False, True], ids=["weights", "weightless"])
def test_config_names_what_is_odd(
    tmp_path: Path, key: str, value: Any, message: str, weightless: bool
) -> None:
    """What transformers stumbles over is one line that names the file, and the key where it is known."""
    demo(tmp_path, "config.json", {key: value})
    if weightless and message.startswith("quantized"):
        assert load_weightless(AutoDeployConfig(model=str(tmp_path)))[0] is not None
        return
    found = refusal(tmp_path, load_weightless if weightless else load_model)
    assert message in found
    assert str(tmp_path) in found


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
@pytest.mark.parametrize("read", [load_model, load_weightless])
def test_out_of_memory_is_said_to_be_that(tmp_path: Path, key: str, read: Any) -> None:
    """A model that is too large is no damaged checkpoint."""
    demo(tmp_path, "config.json", {key: 10**13})
    config = AutoDeployConfig(model=str(tmp_path), skip_loading_weights=True)
    with pytest.raises(CapacityError, match="cannot hold the model") as caught:
        read(config)
    assert "\n" not in str(caught.value)


def test_out_of_memory_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that does not fit while it is read."""
    demo(tmp_path, "config.json", {})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.\nat"
        )

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(CapacityError, match=r"cpu cannot hold the model .*DefaultCPUAllocator"):
        load(tmp_path)


TOKENIZER = json.loads((DEMO / "tokenizer.json").read_text())
DAMAGED = [
    ("tokenizer.json", "", "not valid JSON"),
    ("tokenizer.json", "null", "must hold an object"),
    ("tokenizer.json", "[" * 40000, "not valid JSON"),
    ("tokenizer.json", json.dumps(TOKENIZER)[:2000], "not valid JSON"),
    ("tokenizer.json", json.dumps({**TOKENIZER, "model": None}), "tokenizer.json: "),
    ("tokenizer.json", json.dumps({**TOKENIZER, "added_tokens": 5}), "tokenizer.json: "),
    ("tokenizer.json", json.dumps({**TOKENIZER, "model": {**TOKENIZER["model"], "merges": [["a"]]}}), ""),
    ("tokenizer_config.json", "{", "not valid JSON"),
    ("tokenizer_config.json", '{"eos_token": 5}', "eos_token: must be "),
    ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: must be "),
    ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length: must be "),
    ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side: must be "),
    ("tokenizer_config.json", '{"auto_map": 5}', "the tokenizer cannot be read"),
    ("tokenizer_config.json", '{"extra_special_tokens": 5}', "the tokenizer cannot be read"),
    ("special_tokens_map.json", "[]", "special_tokens_map.json: must hold an object"),
    ("added_tokens.json", "{", "added_tokens.json: not valid JSON"),
    ("generation_config.json", "[]", "must hold an object"),
    ("generation_config.json", "{", "not valid JSON"),
    ("generation_config.json", "[" * 40000, "not valid JSON"),
    ("config.json", "[" * 40000, "not valid JSON"),
    ("hf_quant_config.json", "[]", "must hold an object"),
]


@pytest.mark.parametrize(
    ("name", "text", "message"), DAMAGED, ids=[f"{name}-{text[:20]}" for name, text, _ in DAMAGED]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Each failure of a library behind a file is one line, which names the file."""
    demo(tmp_path, "config.json", {})
    (tmp_path / name).write_text(text)
    found = refusal(tmp_path)
    assert message in found
    assert name in found


def test_chat_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    """A template in another encoding is one line, too."""
    demo(tmp_path, "config.json", {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "the tokenizer cannot be read" in refusal(tmp_path)


def test_panic_of_the_tokenizer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of Rust is no Exception; an interrupt by the user stays one."""

    class PanicException(BaseException):
        """As pyo3 names it."""

    for error, expected in [
        (PanicException("range end"), LoadError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ]:

        def fail(*args: Any, error: BaseException = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(expected):
            load("demo")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_is_taken_or_refused(data: st.DataObject) -> None:
    """Whatever stands under a key of a file, loading works or fails with one line of this package."""
    name = data.draw(st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
    raw = json.loads((DEMO / name).read_text())
    key = data.draw(st.sampled_from(sorted(raw)))
    leaf = st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.text(max_size=4)
    raw[key] = data.draw(
        leaf | st.lists(leaf, max_size=2) | st.dictionaries(st.text(max_size=4), leaf, max_size=2)
    )
    message = ""
    with TemporaryDirectory() as folder:
        demo(Path(folder), name, raw)
        try:
            load(folder, skip_loading_weights=True, model_kwargs={"num_hidden_layers": 1})
        except AdFlashinferError as err:
            message = str(err)
    assert "\n" not in message


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
