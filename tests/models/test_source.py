import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.models.source import (
    Source,
    build_settings,
    check_architecture,
    find_source,
    read_config,
    with_max_seq_len,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def find(model: str) -> Source:
    with ExitStack() as stack:
        return find_source(AutoDeployConfig(model=model), stack)


def written(tmp_path: Path, keys: Any, name: str = "config.json") -> Source:
    file = tmp_path / name
    file.write_text(keys if isinstance(keys, str) else json.dumps(keys))
    return Source(tmp_path, file)


def read(source: Source, **keys: Any) -> PretrainedConfig:
    return read_config(source, AutoDeployConfig(model=str(source.directory), **keys))


def test_finds_directory_and_config_file_alike(tmp_path: Path) -> None:
    """A directory and the path of the config.json in it name the same model."""
    source = written(tmp_path, LLAMA)
    assert find(str(tmp_path)) == source
    assert find(str(tmp_path / "config.json")) == source


def test_finds_demo() -> None:
    """``demo`` is the model that the package carries."""
    assert find("demo").config_file.name == "config.json"


@pytest.mark.parametrize("model", ["/no/such", "./x", "no such", "", "a/b/c"])
def test_refuses_what_is_neither_directory_nor_id(model: str) -> None:
    """The error names what was given, on one line."""
    with pytest.raises(ConfigError, match="no such directory, and not a hub id") as caught:
        find(model)
    assert repr(model) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shortens_what_is_no_name() -> None:
    """A prompt given as the model does not fill the screen."""
    with pytest.raises(ConfigError, match=r"^model 'a+\.\.\.'") as caught:
        find("a" * 5000)
    assert len(str(caught.value)) < 300


def test_names_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that cannot be reached is one line with the cause, without retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nosuch/model'.*hub id that could be read: ") as caught:
        find("nosuch/model")
    assert "\n" not in str(caught.value)


def test_refuses_directory_without_config(tmp_path: Path) -> None:
    """A directory that is no checkpoint is named."""
    with pytest.raises(ConfigError, match=f"no config.json in {tmp_path}"):
        find(str(tmp_path))


def test_refuses_other_files(tmp_path: Path) -> None:
    """A weights file is not a model; its directory is."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="give the directory that holds it"):
        find(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object, got list"),
        ("{}", "has no model_type"),
        ('{"model_type": "nosuch"}', "'nosuch' is unknown to transformers"),
        (json.dumps({**LLAMA, "hidden_size": "x"}), "hidden_size"),
        (json.dumps({**LLAMA, "hidden_size": 30}), "not a multiple of the number of attention"),
    ],
    ids=["truncated", "list", "untyped", "unknown", "mistyped", "inconsistent"],
)
def test_refuses_unreadable_config(tmp_path: Path, text: str, message: str) -> None:
    """The file and what is wrong with it are named on one line."""
    with pytest.raises(LoadError, match=message) as caught:
        read(written(tmp_path, text))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("torch.bfloat16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16 ", torch.float16),
        ("half", torch.float16),
        ("auto", None),
        (None, None),
    ],
)
def test_reads_dtype_as_it_is_meant(tmp_path: Path, key: str, value: Any, found: torch.dtype | None) -> None:
    """The names that people write for a dtype are the dtype."""
    assert read(written(tmp_path, {**LLAMA, key: value})).dtype == found


@pytest.mark.parametrize("value", ["float8_e4m3fn", "int8", "x", "", 5, True, ["bfloat16"], "nn"])
def test_refuses_dtype_of_no_weights(tmp_path: Path, value: Any) -> None:
    """What is no dtype of weights is told with the file, the key and those that are."""
    with pytest.raises(LoadError, match=r"config\.json: dtype: must be auto or one of float32") as caught:
        read(written(tmp_path, {**LLAMA, "dtype": value}))
    assert f"got {value!r}" in str(caught.value)


def test_refuses_weights_of_another_name(tmp_path: Path) -> None:
    """transformers would read a file whose tensors nobody has checked."""
    with pytest.raises(
        LoadError, match=r"transformers_weights: only model\.safetensors and its index are read"
    ):
        read(written(tmp_path, {**LLAMA, "transformers_weights": "other.safetensors"}))


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "num_local_experts"])
def test_refuses_endless_models(tmp_path: Path, key: str) -> None:
    """A count that no model has is told at once, where transformers would make modules for ever."""
    with pytest.raises(LoadError, match=f"{key}: must be at most 10,000, got 10000000000000"):
        read(written(tmp_path, {**LLAMA, key: 10**13}))
    with pytest.raises(LoadError, match="num_hidden_layers: must be at most 10,000"):
        read(written(tmp_path, LLAMA), model_kwargs={"num_hidden_layers": 10**6})


def test_reads_config_under_any_name(tmp_path: Path) -> None:
    """A JSON file need not be called config.json."""
    assert read(written(tmp_path, LLAMA, "llama_tiny.json")).hidden_size == 32


def test_model_kwargs_act_as_if_in_the_file(tmp_path: Path) -> None:
    """Values that are derived from overridden keys follow them."""
    config = read(written(tmp_path, LLAMA), model_kwargs={"hidden_size": 64})
    assert config.head_dim == 16


def test_model_kwargs_merge_mappings(tmp_path: Path) -> None:
    """A mapping changes the keys that it names and leaves the others."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    source = written(tmp_path, {**LLAMA, "rope_parameters": rope})
    config = read(source, model_kwargs={"rope_parameters": {"factor": 4.0}})
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["rope_theta"] == 500.0


def test_fewer_layers_shorten_lists_of_layers(tmp_path: Path) -> None:
    """num_hidden_layers alone is enough to cut a model whose config lists its layers."""
    kinds = ["sliding_attention", "full_attention"] * 2
    keys = {**LLAMA, "model_type": "gemma2", "num_hidden_layers": 4, "layer_types": kinds}
    config = read(written(tmp_path, keys), model_kwargs={"num_hidden_layers": 3})
    assert config.layer_types == kinds[:3]


def test_a_cap_that_sdpa_leaves_out_is_kept(tmp_path: Path) -> None:
    """Whichever attention this version of transformers would pick for Gemma 2."""
    source = written(tmp_path, {**LLAMA, "model_type": "gemma2"})
    hf_config = read(source)
    settings = build_settings(hf_config, AutoDeployConfig(model="demo"))
    assert settings["attn_implementation"] == "eager"
    with pytest.raises(ConfigError, match=r"sdpa of transformers has no attn_logit_softcapping.*50\.0"):
        build_settings(hf_config, AutoDeployConfig(model="demo", attn_implementation="sdpa"))
    assert "attn_implementation" not in build_settings(
        read(written(tmp_path, LLAMA)), AutoDeployConfig(model="demo")
    )


def test_model_kwargs_refuse_unknown_keys(tmp_path: Path) -> None:
    """A misspelt key is an error with the nearest known one."""
    with pytest.raises(ConfigError, match=r"'num_layer'.*did you mean 'num_hidden_layers'"):
        read(written(tmp_path, LLAMA), model_kwargs={"num_layer": 1})


def test_model_kwargs_refuse_unknown_nested_keys(tmp_path: Path) -> None:
    """The config of a part of the model is checked like the whole."""
    keys = {"model_type": "gemma3", "text_config": {"hidden_size": 32}}
    with pytest.raises(ConfigError, match=r"model_kwargs.text_config: unknown key 'hidden_sise'"):
        read(written(tmp_path, keys), model_kwargs={"text_config": {"hidden_sise": 8}})


@pytest.mark.parametrize("value", ["x", 30])
def test_model_kwargs_refuse_values_of_the_model(tmp_path: Path, value: object) -> None:
    """A value that the model refuses is the user's error, on one line."""
    with pytest.raises(ConfigError, match=r"^model_kwargs: .*hidden.size") as caught:
        read(written(tmp_path, LLAMA), model_kwargs={"hidden_size": value})
    assert "\n" not in str(caught.value)


def test_refuses_remote_code_unless_trusted(tmp_path: Path) -> None:
    """A checkpoint that brings Python code says so, and what runs it."""
    keys = {**LLAMA, "model_type": "their_own", "auto_map": {"AutoConfig": "theirs.TheirConfig"}}
    (tmp_path / "theirs.py").write_text("raise SystemExit('ran')")
    with pytest.raises(LoadError, match="--trust-remote-code"):
        read(written(tmp_path, keys))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), "'bert' is an encoder,"),
        (transformers.RobertaConfig(), "'roberta' is an encoder,"),
        (transformers.T5Config(), "'t5' is an encoder-decoder"),
        (transformers.BartConfig(), "'bart' is an encoder-decoder"),
        (transformers.ViTConfig(), "'vit' has no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_refuses_what_has_no_paged_cache(config: PretrainedConfig, message: str) -> None:
    """Each kind is told apart, and what is supported is said."""
    with pytest.raises(LoadError, match=f"{message}.*supported are decoder-only") as caught:
        check_architecture(config, AutoDeployConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(),
        transformers.GPTNeoXConfig(),  # its config has an is_decoder, which is false and unused
        transformers.GPT2Config(),  # names its heads n_head
        transformers.BertConfig(is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
def test_takes_decoders(config: PretrainedConfig) -> None:
    """Decoders pass, however their config says it."""
    check_architecture(config, AutoDeployConfig())


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (transformers.GPT2Config(), 1024),
        (transformers.LlamaConfig(max_position_embeddings=512), 512),
        (transformers.LlamaConfig(max_position_embeddings=131072), 4096),
        (transformers.BloomConfig(), 4096),
        (transformers.MptConfig(max_seq_len=300), 300),
    ],
    ids=["table", "rotary", "long", "without", "alibi"],
)
def test_max_seq_len_defaults_to_what_the_model_allows(
    config: PretrainedConfig, found: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No default refuses a model: its own positions, at most 4,096."""
    assert with_max_seq_len(config, AutoDeployConfig()).max_seq_len == found
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(max_position_embeddings=100),
        transformers.ZambaConfig(max_position_embeddings=100),
    ],
    ids=["rotary", "no positions"],
)
def test_warns_past_the_positions_of_a_model(
    config: PretrainedConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """More than the model knows can be computed; a table is refused where it is seen, in the graph."""
    with_max_seq_len(config, AutoDeployConfig(max_seq_len=100))
    assert not caplog.records
    with_max_seq_len(config, AutoDeployConfig(max_seq_len=101))
    assert "101 is above the 100 positions" in caplog.text
