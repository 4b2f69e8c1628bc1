"""Checkpoints whose experts are quantized: beside models of what their formats state, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from ad_flashinfer_pass import CacheSession, SamplingParams, build_model
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.quantized.modules import QuantizedExperts, QuantizedLinear
from ad_flashinfer_pass.models.quantized.weights import QuantizedWeights
from ad_flashinfer_pass.models.weightless import load_weightless
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm
from tests import architectures
from tests.models.float8_checkpoints import FORMATS, Tensors, dequantized, stated_model, write

NUM_NEW_TOKENS = 24
PROMPTS = architectures.random_prompts((1, 5, 14), vocab_size=128)
LAYER = "model.layers.1.mlp.experts"
IGNORED: dict[str, Any] = {"compressed_dynamic": {"ignore": ["lm_head", "re:.*mlp.gate$"]}}
formats = pytest.mark.parametrize("name", ["modelopt", "compressed_dynamic", "block"])


def moe(width: int = 72) -> transformers.PretrainedConfig:
    """By default, rows of gate and up do not end with a block."""
    sizes = {"hidden_size": 160, "moe_intermediate_size": width, "num_hidden_layers": 2}
    return architectures.small_config("qwen3_moe", initializer_range=0.2, **sizes)


def apart(tensors: Tensors) -> None:
    """As modelopt leaves experts: each with scales of its own."""
    for name in tensors:
        if name.endswith("input_scale") and "experts" in name:
            number = int(name.split("experts.")[1].split(".")[0])
            tensors[name] = tensors[name] * (1 + number / 10 + (0.5 if "down" in name else 0))


@cache
def checkpoint(name: str) -> Path:
    return write(
        Path(mkdtemp()),
        FORMATS[name],
        apart if name == "modelopt" else None,
        config=moe(),
        **IGNORED.get(name, {}),
    )


@cache
def stated(name: str) -> nn.Module:
    return stated_model(checkpoint(name), FORMATS[name], moe())


@cache
def stated_tokens(name: str) -> list[list[int]]:
    return architectures.generated_by_transformers(stated(name), PROMPTS, NUM_NEW_TOKENS)


def config(directory: Path, **settings: Any) -> AutoDeployConfig:
    limits = {"max_batch_size": 4, "max_seq_len": 128, "kv_cache_config": {"tokens_per_block": 16}}
    return AutoDeployConfig(model=str(directory), device="cpu", **{**limits, **settings})


def loaded(directory: Path, **settings: Any) -> Any:
    return load_model(config(directory, **settings)).module


@formats
@torch.no_grad()
def test_computes_what_the_format_states(name: str) -> None:
    """In float64, where no activation falls on the other side of a rounding; stored bits are kept."""
    module, ids = loaded(checkpoint(name)), torch.tensor(PROMPTS[2:])
    experts: list[Any] = [part for part in module.modules() if isinstance(part, QuantizedExperts)]
    assert len(experts) == 2
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 8
    stored = load_file(checkpoint(name) / "model.safetensors")
    for part, weight in (("gate", experts[1].gate_up_proj[:, :72]), ("down", experts[1].down_proj)):
        assert weight.dtype == torch.float8_e4m3fn
        for expert, found in enumerate(weight.view(torch.uint8)):
            assert torch.equal(found, stored[f"{LAYER}.{expert}.{part}_proj.weight"].view(torch.uint8))
    wanted = stated_model(checkpoint(name), FORMATS[name], moe()).double()(ids).logits
    torch.testing.assert_close(module.double()(ids).logits, wanted, rtol=1e-9, atol=1e-9)


def test_generates_as_the_format_states() -> None:
    """Greedy tokens of transformers' generate on the stated model, in a batch, by the pass."""
    llm = build_model(config(checkpoint("modelopt")))
    results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    assert [list(result.token_ids) for result in results] == stated_tokens("modelopt")


def test_generates_by_torch_compile() -> None:
    """As torch.compile takes the same module, with no word to transformers."""
    assert by_torch_compile(loaded(checkpoint("modelopt"))) == stated_tokens("modelopt")


def by_torch_compile(module: nn.Module) -> list[list[int]]:
    torch._dynamo.reset()
    session = CacheSession(max_batch_size=4, max_seq_len=128)
    options: dict[str, Any] = {"session": session, "compile_backend": "torch-simple"}
    compiled = torch.compile(module, backend=flashinfer_trtllm, options=options)
    steps = []
    with session.prefill(PROMPTS) as batch:
        steps.append(batch.last_logits(compiled(**batch.inputs, use_cache=False).logits).argmax(-1))
    while len(steps) < NUM_NEW_TOKENS:
        with session.decode(steps[-1]) as batch:
            steps.append(batch.last_logits(compiled(**batch.inputs, use_cache=False).logits).argmax(-1))
    return torch.stack(steps, 1).tolist()


@formats
def test_never_holds_the_dequantized_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are replaced, weights that transformers has loaded are one number each."""
    found = []

    def put_into(weights: QuantizedWeights, model: nn.Module) -> None:
        found.append({name: p.untyped_storage().nbytes() for name, p in model.named_parameters()})
        original(weights, model)

    original = QuantizedWeights.put_into
    monkeypatch.setattr(QuantizedWeights, "put_into", put_into)
    loaded(checkpoint(name))
    (sizes,) = found
    assert {key for key, size in sizes.items() if size == 4} == {key for key in sizes if "_proj" in key}


def test_refuses_what_transformers_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded must be what is stored."""
    monkeypatch.setattr(QuantizedWeights, "_read_for_transformers", lambda self, name: self.read(name) + 1)
    with pytest.raises(LoadError, match=r"was changed by transformers before it came to 'model.layers.0"):
        loaded(checkpoint("block"))


@pytest.mark.parametrize("width", [72, 128])
@formats
def test_is_as_planned_without_weights(tmp_path: Path, name: str, width: int) -> None:
    """Each parameter has its shape and dtype; gate and up are in one where no block would be of both."""
    directory = write(tmp_path, FORMATS[name], config=moe(width), **IGNORED.get(name, {}))
    planned = load_weightless(config(directory))[0].state_dict()
    held = loaded(directory).state_dict()
    shapes = [{key: (t.shape or (1,), t.dtype) for key, t in each.items()} for each in (planned, held)]
    assert shapes[0] == shapes[1]
    assert (f"{LAYER}.up_proj" in held) == (name == "block" and width == 72)


def test_takes_names_of_mixtral(tmp_path: Path) -> None:
    """w1, w2 and w3 of block_sparse_moe."""
    mixtral = architectures.small_config("mixtral", num_hidden_layers=1)
    ignored: dict[str, Any] = {"ignore": ["lm_head", "re:.*gate$"]}
    directory = write(tmp_path, FORMATS["compressed_weights"], config=mixtral, **ignored)
    stored = load_file(directory / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight_scale" in stored
    experts = loaded(directory).model.layers[0].mlp.experts
    w3 = stored["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(experts.gate_up_proj[1, len(w3) :].view(torch.uint8), w3.view(torch.uint8))


@formats
def test_dequantizes(name: str) -> None:
    """Each expert is stored by itself and stacked by transformers."""
    form, state = FORMATS[name], loaded(checkpoint(name), dequantize=True).state_dict()
    stored = load_file(checkpoint(name) / "model.safetensors")
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            weights = [
                dequantized(stored, f"{base}.{expert}.{part}_proj", form) for part in ("gate", "up", "down")
            ]
            assert torch.equal(state[f"{base}.gate_up_proj"][expert], torch.cat(weights[:2]))
            assert torch.equal(state[f"{base}.down_proj"][expert], weights[2])


def change(name: str, tensor: Tensor | None) -> Callable[[Tensors], None]:
    """A tensor replaced, or taken away."""

    def edit(tensors: Tensors) -> None:
        tensors.pop(f"{LAYER}.{name}", None)
        if tensor is not None:
            tensors[f"{LAYER}.{name}"] = tensor

    return edit


def one_is_plain(tensors: Tensors) -> None:
    base = f"{LAYER}.2.up_proj"
    tensors[f"{base}.weight"] = tensors[f"{base}.weight"].float()
    del tensors[f"{base}.weight_scale"]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("block", change("3.up_proj.weight_scale_inv", None), "weight_scale_inv' of shape [1, 2] is missing"),
        (
            "modelopt",
            change("0.down_proj.weight", None),
            "experts.down_proj' must have shape [4, 160, 72], found [3, 160, 72]",
        ),
        (
            "modelopt",
            change("1.up_proj.input_scale", torch.tensor(0.5)),
            "experts.1.up_proj.weight' has another input_scale than its gate",
        ),
        (
            "compressed_dynamic",
            change("1.up_proj.weight_scale", torch.ones(2, 1)),
            "must be a real number of shape [72, 1], found F32 [2, 1]",
        ),
        ("compressed_dynamic", one_is_plain, "but not all of expert 2 of 'model.layers.1.mlp.experts'"),
    ],
)
def test_refuses_what_is_damaged(
    tmp_path: Path, name: str, edit: Callable[[Tensors], None], message: str
) -> None:
    """In one line that names the tensor."""

    def edits(tensors: Tensors) -> None:
        if name == "modelopt":
            apart(tensors)
        edit(tensors)

    directory = write(tmp_path, FORMATS[name], edits, config=moe(), **IGNORED.get(name, {}))
    with pytest.raises(LoadError) as caught:
        loaded(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
