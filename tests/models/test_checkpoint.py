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


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
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
