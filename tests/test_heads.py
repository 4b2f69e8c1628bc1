"""Checkpoints of heads: what is read, and what is refused by name."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, SpeculativeConfig
from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError, LoadError
from ad_flashinfer_pass.heads.load import load_head
from tests import architectures
from tests.models.head_checkpoints import (
    DRAFT_VOCAB,
    VOCAB,
    WIDTH,
    Written,
    eagle3_config,
    guessed_anew,
    write_eagle3,
    write_mtp,
)

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_eagle3(tmp_path_factory.mktemp("eagle3"))


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> Written:
    config = architectures.small_config("deepseek_v3", tie_word_embeddings=False)
    return write_mtp(tmp_path_factory.mktemp("mtp"), config)


def changed(head: Written, folder: Path, change: Change) -> str:
    """A copy of its checkpoint with other tensors."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(head.folder / file, folder / file)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def as_other(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def more(name: str) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(3)})


Q = "midlayer.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("fc.weight"), r"'fc.weight' of shape \[64, 192\] is missing"),
        (without("d2t"), r"'d2t' of shape \[96\] is missing"),
        (without("lm_head.weight"), "'lm_head.weight' is missing"),
        (without("norm.weight"), "'norm.weight' is missing"),
        (without(Q), f"'{Q}' is missing"),
        (
            as_other(Q, lambda q: q[:, :WIDTH].clone()),
            rf"'{Q}' must have shape \[64, 128\], found \[64, 64\]",
        ),
        (as_other("fc.weight", lambda w: w[:, :WIDTH].clone()), r"'fc.weight' must have shape \[64, 192\]"),
        (
            as_other("d2t", lambda d: d + VOCAB),
            "'d2t' leads to tokens 130 to 254, of which the model has 128",
        ),
        (as_other("d2t", Tensor.float), r"'d2t' must have shape \[96\] and be one of I64, I32, found .* F32"),
        (as_other(Q, lambda q: q.to(torch.float8_e4m3fn)), f"'{Q}' is F8_E4M3"),
        (as_other("lm_head.weight", lambda w: w[:9].clone()), r"'lm_head.weight' must have shape \[96, 64\]"),
        (more("fc_norm.weight"), "'fc_norm.weight' is none of a head"),
        (more("midlayer.self_attn.q_norm.weight"), "'midlayer.self_attn.q_norm.weight' is none of a head"),
    ],
)
def test_refuses_tensors_that_are_no_eagle3_head(
    eagle3: Written, change: Change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        load_head("eagle3", changed(eagle3, tmp_path, change), eagle3.model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 96}, "vocab_size is 96, that of the model 128"),
        ({"model_type": "qwen3"}, "must be one layer of model_type llama .* got 'qwen3'"),
        ({"num_hidden_layers": 2}, "must be one layer of model_type llama .* 2 layers"),
        ({"norm_before_residual": True}, "without norm_before_residual"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 6]}}, r"must name layers .* has 6, got"),
        ({"hidden_size": "64"}, r"config\.json: .*hidden_size"),
        ({"hidden_size": 32}, r"'fc.weight' must have shape \[32, 192\]"),
    ],
)
def test_refuses_settings_that_are_of_another_head(
    eagle3: Written, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(eagle3, tmp_path, lambda tensors: None)
    (tmp_path / "config.json").write_text(json.dumps(eagle3_config(**config)))
    with pytest.raises(AdFlashinferError, match=message):
        load_head("eagle3", folder, eagle3.model)


PLACE = "model.layers.3."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{PLACE}enorm.weight"), rf"'{PLACE}enorm.weight' of shape \[64\] is missing"),
        (without(f"{PLACE}eh_proj.weight"), rf"'{PLACE}eh_proj.weight' of shape \[64, 128\] is missing"),
        (without(f"{PLACE}shared_head.norm.weight"), f"'{PLACE}shared_head.norm.weight' is missing"),
        (without(f"{PLACE}self_attn.kv_b_proj.weight"), f"'{PLACE}self_attn.kv_b_proj.weight' is missing"),
        (
            as_other(f"{PLACE}eh_proj.weight", lambda w: w.to(torch.float8_e4m3fn)),
            f"'{PLACE}eh_proj.weight' must have .* F8_E4M3",
        ),
        (
            as_other(f"{PLACE}self_attn.o_proj.weight", lambda w: w.to(torch.float8_e4m3fn)),
            f"'{PLACE}self_attn.o_proj.weight' is F8_E4M3, .* not quantized",
        ),
    ],
)
def test_refuses_tensors_that_are_no_mtp_layer(
    mtp: Written, change: Change, message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=message):
        load_head("mtp", changed(mtp, tmp_path, change), mtp.model)


def test_refuses_checkpoints_without_a_head(mtp: Written, eagle3: Written, tmp_path: Path) -> None:
    """No MTP layer, a file that is cut short, no weights, and a model whose layers are not known."""
    with pytest.raises(ConfigError, match=r"has no MTP layer, neither layers\.6 nor mtp"):
        load_head("mtp", str(eagle3.folder), eagle3.model)
    cut = Path(changed(eagle3, tmp_path, lambda tensors: None)) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(LoadError, match="fetch it again"):
        load_head("eagle3", str(tmp_path), eagle3.model)
    cut.unlink()
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor"):
        load_head("eagle3", str(tmp_path), eagle3.model)
    model: Any = architectures.random_model(architectures.CONFIGS["llama_mha"](num_layers=2))
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has 2 lists of 2 layers"):
        load_head("eagle3", str(eagle3.folder), model)


def test_a_head_has_the_dtype_of_its_model(eagle3: Written) -> None:
    model: Any = architectures.random_model(architectures.CONFIGS["llama_gqa4"](num_layers=6))
    head = load_head("eagle3", str(eagle3.folder), model.to(torch.bfloat16))
    assert {each.dtype for each in head.parameters()} == {torch.bfloat16}
    assert head.token_ids is not None
    assert head.token_ids.dtype == torch.int64
    assert len(head.token_ids) == DRAFT_VOCAB
    assert head.embed is model.get_input_embeddings()


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_builds_a_model_with_the_head_that_a_config_names(
    kind: Any, eagle3: Written, mtp: Written, tmp_path: Path
) -> None:
    """Of MTP, the model's own checkpoint without another name."""
    named = None
    if kind == "eagle3":
        eagle3.model.save_pretrained(tmp_path)  # type: ignore[operator]
        folder, named = tmp_path, str(eagle3.folder)
    else:
        folder = mtp.folder
    keys: dict[str, Any] = {"model": str(folder), "device": "cpu", "max_seq_len": 64}
    spec = SpeculativeConfig(drafter=kind, model=named)
    plain, drafted = (
        build_model(AutoDeployConfig(**keys, speculative_config=each)).generate(
            [[1, 2, 3]], max_new_tokens=12
        )
        for each in (None, spec)
    )
    assert drafted[0].token_ids == plain[0].token_ids


def test_an_mtp_layer_guesses_what_transformers_guesses(
    mtp: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own reader and code of the layer, which lends it the model's embeddings and head."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this version of transformers has none")
    model: Any = mtp.model
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    theirs = layers.MtpModel.from_pretrained(model).eval()
    head = load_head("mtp", str(mtp.folder), model)
    theirs.embed_tokens = head.embed
    theirs.shared_head = head.body.get_submodule("model.lm_head")
    cache = importlib.import_module("transformers.cache_utils").MtpCache
    for prompt in architectures.random_prompts((3, 9, 14, 20), VOCAB):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1]
            guess, *_ = theirs(
                input_ids=ids[:, 1:],
                last_hidden_states=states[:, :-1],
                position_ids=torch.arange(1, len(prompt))[None],
                mtp_cache=cache(config=model.config.get_mtp_config()),
                full_input_ids=ids,
                attention_mask=torch.ones_like(ids[:, 1:]),
                do_sample=False,
                logits_processor=None,
            )
        assert guess.tolist() == [guessed_anew(head, model, prompt, 1)]
