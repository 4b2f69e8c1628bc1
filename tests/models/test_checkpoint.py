import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.checkpoint import load_weights
from ad_flashinfer_pass.models.quiet import quiet_transformers

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = transformers.LlamaConfig(**SIZES)
MIXTRAL = transformers.MixtralConfig(**SIZES, num_local_experts=4)
QUERY = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

Edit = Callable[[dict[str, Tensor]], object]


def save(directory: Path, config: PretrainedConfig, edit: Edit | None = None) -> nn.Module:
    """A checkpoint with random weights, its tensors changed by ``edit``."""
    module = AutoModelForCausalLM.from_config(config).eval()
    module.save_pretrained(directory)
    if edit is not None:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return module


def load(directory: Path, config: PretrainedConfig) -> Any:
    with quiet_transformers() as reports:
        return load_weights(directory, config, reports)[0]


def without(name: str) -> Edit:
    return lambda tensors: tensors.pop(name)


def shortened(name: str) -> Edit:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=lambda config: config.model_type)
def test_loads_what_was_saved(tmp_path: Path, config: PretrainedConfig) -> None:
    """Every tensor comes back bit by bit."""
    saved = save(tmp_path, config)
    assert_same_weights(load(tmp_path, config), saved)


def test_loads_shards(tmp_path: Path) -> None:
    """Weights in several files are one model."""
    module: Any = save(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load(tmp_path, LLAMA), module)


@pytest.mark.parametrize(
    ("config", "edit", "message"),
    [
        (LLAMA, without(QUERY), rf"'{QUERY}' of shape \[32, 32\] is missing"),
        (LLAMA, without("lm_head.weight"), r"'lm_head.weight' of shape \[64, 32\] is missing"),
        (LLAMA, shortened(QUERY), rf"'{QUERY}' must have shape \[32, 32\], found \[31, 32\]"),
        (MIXTRAL, without(EXPERT), rf"'{EXPERT}' of shape \[48, 32\] is missing"),
        (MIXTRAL, shortened(EXPERT), rf"'{EXPERT}' must have shape \[48, 32\], found \[47, 32\]"),
        (LLAMA, lambda tensors: tensors.clear(), r"is missing \(and \d+ more\)"),
    ],
    ids=["missing", "untied_head", "misshapen", "missing_expert", "misshapen_expert", "empty"],
)
def test_refuses_incomplete_weights(
    tmp_path: Path, config: PretrainedConfig, edit: Edit, message: str
) -> None:
    """Nothing is drawn in place of a tensor: the error names it, with shapes."""
    save(tmp_path, config, edit)
    with pytest.raises(LoadError, match=message) as caught:
        load(tmp_path, config)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tied_head_may_be_missing(tmp_path: Path) -> None:
    """With tied embeddings the checkpoint has the matrix once, and the model uses it twice."""
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    save(tmp_path, config)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    module = load(tmp_path, config)
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_warns_of_extra_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tensors that the model does not have are left out and named."""
    save(tmp_path, LLAMA, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    load(tmp_path, LLAMA)
    assert "left out: surplus" in caplog.text


def added(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.1.adapter.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_refuses_tensors_of_modules_that_it_has(tmp_path: Path, name: str) -> None:
    """A model that computes without a tensor that its checkpoint has is not the checkpoint's model."""
    save(tmp_path, LLAMA, added(name, torch.ones(32)))
    with pytest.raises(LoadError, match=f"tensor '{name}' would be left out, though the model has") as caught:
        load(tmp_path, LLAMA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("model.layers.1.self_attn.masked_bias", torch.tensor(-1e9)),
        ("model.layers.1.self_attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()),
        ("model.layers.1.self_attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()),
    ],
    ids=["rotary", "masked_bias", "bool_mask", "uint8_mask"],
)
def test_takes_what_old_versions_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, tensor: Tensor
) -> None:
    """Masks and frequencies that transformers once stored, and now computes, say nothing of the model."""
    saved = save(tmp_path, LLAMA, added(name, tensor))
    assert_same_weights(load(tmp_path, LLAMA), saved)
    assert "left out" not in caplog.text


def test_takes_masks_of_gpt2(tmp_path: Path) -> None:
    """The checkpoint of the first GPT-2, with its names without a prefix and its masks."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)

    def as_first_saved(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()

    saved = save(tmp_path, config, as_first_saved)
    assert_same_weights(load(tmp_path, config), saved)


@pytest.mark.parametrize(
    "name", ["model.mtp.norm.weight", "model.layers.2.norm.weight", "vision_tower.up.weight", "score.weight"]
)
def test_warns_of_modules_that_it_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Heads, towers and layers that are not run change nothing of what is: they are counted and named."""
    saved = save(tmp_path, LLAMA, added(name, torch.ones(2)))
    assert_same_weights(load(tmp_path, LLAMA), saved)
    assert f"1 tensors that the model does not have were left out: {name}" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.int32, "I32"), (torch.int64, "I64")],
)
@pytest.mark.parametrize(
    ("config", "name"), [(LLAMA, QUERY), (LLAMA, "model.norm.weight"), (MIXTRAL, EXPERT)], ids=str
)
def test_refuses_weights_that_are_no_real_numbers(
    tmp_path: Path, config: PretrainedConfig, name: str, dtype: torch.dtype, shown: str
) -> None:
    """transformers casts them without a word; the error names the tensor and what it holds."""
    save(tmp_path, config, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(LoadError, match=f"tensor '{name}' is {shown}, but a weight must be"):
        load(tmp_path, config)


def test_takes_float64(tmp_path: Path) -> None:
    """More digits than needed are real numbers, too."""
    saved = save(tmp_path, LLAMA, lambda tensors: tensors.update({QUERY: tensors[QUERY].double()}))
    assert_same_weights(load(tmp_path, LLAMA), saved)


def test_says_that_a_head_is_not_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A head that differs from embeddings that config.json ties is used, as transformers does, and named."""
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    head = torch.randn(64, 32)
    save(tmp_path, config, added("lm_head.weight", head))
    torch.testing.assert_close(load(tmp_path, config).lm_head.weight, head, rtol=0, atol=0)
    assert "a head of its own that differs from the embeddings" in caplog.text


def sharded(directory: Path, change: Callable[[dict[str, Any], dict[str, dict[str, Tensor]]], object]) -> Any:
    """A checkpoint of two files; ``change`` sees its index and the tensors of each before they are saved."""
    module: Any = save(directory, LLAMA)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {
        "a.safetensors": {name: tensors[name] for name in names[::2]},
        "b.safetensors": {name: tensors[name] for name in names[1::2]},
    }
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    change(index, files)
    for file, held in files.items():
        save_file(held, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return module


@pytest.mark.parametrize("older", ["a.safetensors", "b.safetensors"])
def test_weight_map_says_which_file(tmp_path: Path, older: str) -> None:
    """Of two copies of a tensor, the one in the file that the index names is the tensor."""
    newer = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[older]
    copies: list[str] = []

    def add_older(index: Any, files: Any) -> None:
        copies.extend(files[newer])
        files[older].update({name: torch.zeros_like(tensor) for name, tensor in files[newer].items()})

    module = sharded(tmp_path, add_older)
    assert len(copies) > 5
    found = load(tmp_path, LLAMA)
    assert_same_weights(found, module)
    assert not found.training


def test_index_needs_no_metadata(tmp_path: Path) -> None:
    """weight_map alone is enough."""
    module = sharded(tmp_path, lambda index, files: index.pop("metadata"))
    assert_same_weights(load(tmp_path, LLAMA), module)


def test_refuses_index_beyond_its_files(tmp_path: Path) -> None:
    """A tensor that the index names and its file lacks is an error that names both."""
    sharded(tmp_path, lambda index, files: index["weight_map"].update(extra="b.safetensors"))
    with pytest.raises(LoadError, match=r"b\.safetensors: holds no tensor 'extra', which .*index\.json says"):
        load(tmp_path, LLAMA)


@pytest.mark.parametrize("name", ["../b.safetensors", "/tmp/b.safetensors", "x/../../b.safetensors"])
def test_refuses_index_beyond_its_folder(tmp_path: Path, name: str) -> None:
    """An index reads no file but its own."""
    sharded(tmp_path, lambda index, files: index["weight_map"].update({QUERY: name}))
    with pytest.raises(LoadError, match=f"weight_map: must name files of its own folder, got '{name}'"):
        load(tmp_path, LLAMA)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_refuses_truncated_file(tmp_path: Path, size: int) -> None:
    """A file that was cut anywhere is named before anything is read from it."""
    save(tmp_path, LLAMA)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(LoadError, match=f"{file}: .*incomplete or damaged"):
        load(tmp_path, LLAMA)


def test_refuses_missing_shard(tmp_path: Path) -> None:
    """A file that the index names and that is not there is named."""
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(LoadError, match=f"{shard}: .* is not there"):
        load(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", "[" * 40000, '{"weight_map": null}', '{"weight_map": {"a": 1}}', '{"weight_map": []}'],
)
def test_refuses_unreadable_index(tmp_path: Path, text: str) -> None:
    """A damaged index is named."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(LoadError, match=r"index\.json: must map tensors to files"):
        load(tmp_path, LLAMA)


def test_never_reads_pickles(tmp_path: Path) -> None:
    """A pickled checkpoint is refused unread, with the way to convert it."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(LoadError, match=r"found only pytorch_model.bin, a pickle.*save_pretrained"):
        load(tmp_path, LLAMA)


def test_says_how_to_go_without_weights(tmp_path: Path) -> None:
    """Where there are no weights, the option that does without is named."""
    with pytest.raises(LoadError, match="--random-weights"):
        load(tmp_path, LLAMA)


def test_shows_nothing_of_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No log line and no progress bar of transformers appears."""
    save(tmp_path, LLAMA, without(QUERY))
    capfd.readouterr()
    with pytest.raises(LoadError):
        load(tmp_path, LLAMA)
    assert capfd.readouterr() == ("", "")
