"""How few of a model's first layers have each kind of layer twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.models.few_layers import first_layers, kinds_of_layers
from ad_flashinfer_pass.models.layers import Layers
from ad_flashinfer_pass.models.weightless import load_weightless

SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}


def cut(config: transformers.PretrainedConfig, directory: Path, wanted: int | None = None) -> Layers:
    """And what is left has exactly the first layers of the whole."""
    config.save_pretrained(directory)
    deploy = AutoDeployConfig(model=str(directory), max_seq_len=64)
    less, layers = first_layers(deploy, wanted)
    whole = load_weightless(deploy)[0]
    kinds = kinds_of_layers(whole)
    assert len(kinds) == layers.of
    assert kinds_of_layers(load_weightless(less)[0], whole) == kinds[: layers.taken]
    return layers


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        # All alike; five windowed and one full, over and over; three dense layers, then experts.
        (transformers.LlamaConfig(num_hidden_layers=9, **SMALL, **HEADS), 2),
        (transformers.Gemma3TextConfig(num_hidden_layers=26, **SMALL), 12),
        (
            transformers.DeepseekV3Config(
                num_hidden_layers=9,
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                **SMALL,
            ),
            5,
        ),
        # The last layer has a window: one is all that there is of that kind.
        (
            transformers.Qwen2Config(
                num_hidden_layers=5, use_sliding_window=True, max_window_layers=4, **SMALL, **HEADS
            ),
            5,
        ),
        # Another name for the number of layers, and a model that has another beside it, of as many layers.
        (transformers.GPT2Config(n_embd=64, n_layer=6, n_head=4, vocab_size=100), 2),
        (transformers.Gemma3Config(text_config={"num_hidden_layers": 24, **SMALL}), 12),
        # Its config wants a list that is made of another one, and does not follow the number.
        (
            transformers.GPTNeoConfig(
                hidden_size=64,
                num_layers=6,
                num_heads=4,
                vocab_size=100,
                attention_types=[[["global", "local"], 3]],
            ),
            6,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_takes_as_few_as_show_each_kind_twice(
    config: transformers.PretrainedConfig, taken: int, tmp_path: Path
) -> None:
    assert cut(config, tmp_path).taken == taken


def test_takes_what_is_asked_for_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=4, **SMALL, **HEADS)
    assert cut(config, tmp_path, 3) == Layers(3, 4, "asked for")
    with pytest.raises(ConfigError, match=r"--layers 5: .* has 4 layers"):
        cut(config, tmp_path, 5)
    with pytest.raises(ConfigError, match="--layers 0"):
        cut(config, tmp_path, 0)


def test_says_what_was_left_out() -> None:
    assert str(Layers(2, 32, "all are of one kind")) == (
        "the first 2 of 32 layers (all are of one kind; --layers 32 takes all)"
    )
