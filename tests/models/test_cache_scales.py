from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.architectures import random_model, small_config

LAYERS = 11  # enough that 10 comes after 9, not after 1
K = [0.01 * (layer + 1) for layer in range(LAYERS)]
V = [0.02 * (layer + 1) for layer in range(LAYERS)]
PAIRS = {
    "projections": ("k_proj.k_scale", "v_proj.v_scale"),
    "attention": ("k_scale", "v_scale"),
    "nested": ("attn.k_scale", "attn.v_scale"),
    "outputs": ("k_proj.output_scale", "v_proj.output_scale"),
}


def checkpoint(
    directory: Path,
    names: tuple[str, ...],
    edit: Callable[[dict[str, Tensor]], object],
    num_layers: int = LAYERS,
) -> str:
    """A small llama with a scale of each name in every layer."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(num_layers):
        for name, scales in zip(names, (K, V), strict=False):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scales[layer])
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def scales(model: str, cache: dict[str, Any], **keys: Any) -> tuple[Any, Any]:
    found = load_model(
        AutoDeployConfig(model=model, kv_cache_config=KvCacheConfig(**cache), **keys)
    ).resolved.kv_cache_config
    return found.k_scale, found.v_scale


def nothing(tensors: dict[str, Tensor]) -> None:
    """Leave the tensors as they are."""


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_fp8_cache_takes_them(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Each cache gets the scales of its layer, in the order of the layers."""
    found = scales(checkpoint(tmp_path, names, nothing), {"dtype": "fp8"})
    assert found == (pytest.approx(K), pytest.approx(V))


def test_one_scale_for_both(tmp_path: Path) -> None:
    """kv_scale, the oldest name, is that of K and of V."""
    found = scales(checkpoint(tmp_path, ("kv_scale",), nothing), {"dtype": "fp8"})
    assert found == (pytest.approx(K), pytest.approx(K))


def test_they_reach_the_caches(tmp_path: Path) -> None:
    """A cache holds the K of transformers divided by the scale of its layer, rounded to 8 bits."""
    model = checkpoint(tmp_path, PAIRS["projections"], nothing, num_layers=1)
    ids = [5, 9, 2, 44]
    cache = KvCacheConfig(dtype="fp8", tokens_per_block=16)
    llm = build_model(AutoDeployConfig(model=model, kv_cache_config=cache, max_batch_size=1))
    llm.model.step([SequenceStep(ids, 0, range(1, 2))])
    (pool,) = llm.model.caches.values()
    module = load_model(AutoDeployConfig(model=model)).module
    with torch.no_grad():
        keys = module(torch.tensor([ids]), use_cache=True).past_key_values.layers[0].keys[0, 0]
    expected = (keys / K[0]).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(pool[1, 0, 0, : len(ids)].float(), expected, rtol=0.13, atol=1e-3)


@pytest.mark.parametrize(
    ("cache", "found", "message"),
    [
        ({}, (1.0, 1.0), "kv_cache_config.dtype is auto; dtype: fp8 uses them"),
        ({"dtype": "fp8", "k_scale": 1.0}, (1.0, 1.0), "kv_cache_config gives its own"),
    ],
    ids=["plain_cache", "own_scales"],
)
def test_says_that_they_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: dict[str, Any], found: Any, message: str
) -> None:
    """Scales that no cache takes are named, with what would use them."""
    assert scales(checkpoint(tmp_path, PAIRS["projections"], nothing), cache) == found
    assert "(model.layers.0.self_attn.k_proj.k_scale, ...) are not used, because " + message in caplog.text


def test_scales_of_keys_are_not_taken_for_a_latents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is cached is not what they were measured on, or nobody knows."""
    random_model(small_config("deepseek_v3")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for kind in "kv":
        tensors[f"model.layers.0.self_attn.{kind}_scale"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert scales(str(tmp_path), {"dtype": "fp8"}) == (1.0, 1.0)
    assert "a latent may be cached; `ad-flashinfer-pass calibrate` makes its k_scale" in caplog.text


def test_fewer_layers_take_fewer(tmp_path: Path) -> None:
    """A model that is cut takes the scales of the layers that it has."""
    model = checkpoint(tmp_path, PAIRS["projections"], nothing)
    found = scales(model, {"dtype": "fp8"}, model_kwargs={"num_hidden_layers": 2})
    assert found == (pytest.approx(K[:2]), pytest.approx(V[:2]))


@pytest.mark.parametrize(
    "value", [torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(torch.nan), torch.ones(2)]
)
def test_refuses_what_is_no_scale(tmp_path: Path, value: Tensor) -> None:
    """A scale is one number above 0."""
    name = "model.layers.3.self_attn.k_proj.k_scale"
    model = checkpoint(tmp_path, PAIRS["projections"], lambda tensors: tensors.update({name: value}))
    with pytest.raises(LoadError, match=f"{name}' must be one number above 0"):
        scales(model, {"dtype": "fp8"})


def test_refuses_half_a_pair(tmp_path: Path) -> None:
    """A layer with a scale for K alone is not completed by a guess."""
    name = "model.layers.3.self_attn.v_proj.v_scale"
    model = checkpoint(tmp_path, PAIRS["projections"], lambda tensors: tensors.pop(name))
    with pytest.raises(LoadError, match=r"layers\.3\.self_attn\.k_proj\.k_scale' has no v_scale beside it"):
        scales(model, {"dtype": "fp8"})


def test_refuses_to_guess_which_cache(tmp_path: Path) -> None:
    """With scales of other layers than those that have a cache, nothing is taken by its place."""

    def first_left_out(tensors: dict[str, Tensor]) -> None:
        for name in PAIRS["attention"]:
            del tensors[f"model.layers.0.self_attn.{name}"]

    model = checkpoint(tmp_path, PAIRS["attention"], first_left_out, num_layers=2)
    with pytest.raises(ConfigError, match=r"2 caches, got 1; the checkpoint's are taken"):
        build_model(AutoDeployConfig(model=model, kv_cache_config=KvCacheConfig(dtype="fp8")))
