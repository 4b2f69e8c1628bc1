"""Checkpoints of linears of 4 bits: beside transformers with the weights that they stand for, or refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ad_flashinfer_pass import SamplingParams, build_model
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.quantized.modules import QuantizedLinear
from ad_flashinfer_pass.models.quantized.places import Modules
from ad_flashinfer_pass.models.weightless import load_weightless
from tests import architectures
from tests.models.four_bit_checkpoints import INTEGERS, NVFP4, Tensors, llama, write_integers, write_nvfp4
from tests.models.test_quantized_experts import by_torch_compile, config, loaded

NUM_NEW_TOKENS = 24
PROMPTS = architectures.random_prompts((1, 5, 14), vocab_size=128)
QUERY = "model.layers.0.self_attn.q_proj"
formats = pytest.mark.parametrize("name", INTEGERS)


@cache
def checkpoint(name: str) -> Path:
    return write_integers(Path(mkdtemp()), INTEGERS[name])


@cache
def plain(name: str) -> Any:
    model = architectures.random_model(llama())
    model.load_state_dict(torch.load(checkpoint(name) / "plain.pt"), strict=False)
    return model


@formats
@torch.no_grad()
def test_computes_as_plain_weights_do(name: str) -> None:
    """Up to sums; the module has the shapes that a plan without weights has."""
    module, ids = loaded(checkpoint(name)), torch.tensor(PROMPTS[2:])
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 14
    assert module.lm_head.weight is module.model.embed_tokens.weight
    torch.testing.assert_close(module(ids).logits, plain(name)(ids).logits, rtol=1e-4, atol=1e-4)
    planned, held = load_weightless(config(checkpoint(name)))[0].state_dict(), module.state_dict()
    assert {key: tensor.shape for key, tensor in planned.items()} == {
        key: tensor.shape for key, tensor in held.items()
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["gptq", "packed"])
def test_takes_names_that_transformers_changes(tmp_path: Path, name: str) -> None:
    """Nemotron-H is model in transformers and backbone in checkpoints, whose lists say so, too."""
    sizes: dict[str, Any] = {"mamba_num_heads": 8, "mamba_head_dim": 16}
    nemotron = architectures.small_config("nemotron_h", moe_shared_expert_intermediate_size=64, **sizes)
    ignored = "backbone.layers.0.mixer.in_proj"

    def edit(tensors: Tensors) -> None:
        for part in [part for part in tensors if part.startswith(f"{ignored}.")]:
            del tensors[part]
        tensors[f"{ignored}.weight"] = torch.load(tmp_path / "plain.pt")[f"{ignored}.weight"]

    listed = {"ignore": ["lm_head", ignored]} if name == "packed" else {}
    directory = write_integers(tmp_path, INTEGERS[name], edit, nemotron, **listed)
    module, ids = loaded(directory), torch.tensor(PROMPTS[2:])
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 7
    planned = load_weightless(config(directory))[0].state_dict()
    if listed:  # of GPTQ, the tensors alone say which are plain
        assert {key: tensor.shape for key, tensor in planned.items()} == {
            key: tensor.shape for key, tensor in module.state_dict().items()
        }
    stated = tmp_path / "stated"
    nemotron.save_pretrained(stated)
    save_file(torch.load(directory / "plain.pt"), stated / "model.safetensors")
    torch.testing.assert_close(module(ids).logits, loaded(stated)(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_leaves_out_biases_of_zeros(tmp_path: Path) -> None:
    """Libraries of GPTQ give one to each linear; one that is not of zeros is refused."""
    zeros = torch.zeros(128, dtype=torch.float16)
    directory = write_integers(tmp_path, INTEGERS["gptq"], change(f"{QUERY}.bias", zeros))
    ids = torch.tensor(PROMPTS[2:])
    assert torch.equal(loaded(directory)(ids).logits, loaded(checkpoint("gptq"))(ids).logits)
    write_integers(tmp_path, INTEGERS["gptq"], change(f"{QUERY}.bias", zeros + 1))
    with pytest.raises(LoadError, match=rf"'{QUERY}\.bias' would be left out"):
        loaded(directory)


@torch.no_grad()
def test_takes_rows_that_fill_no_word(tmp_path: Path) -> None:
    """Zero points of 4 rows are half of a word."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4}
    small = architectures.small_config("llama", **sizes, **heads)
    module = loaded(write_integers(tmp_path, INTEGERS["packed_zero"], config=small))
    assert module.model.layers[0].self_attn.k_proj.zero_point.shape == (4, 2)
    model, ids = architectures.random_model(small), torch.tensor(PROMPTS[2:])
    model.load_state_dict(torch.load(tmp_path / "plain.pt"), strict=False)
    torch.testing.assert_close(module(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@formats
def test_dequantizes(name: str) -> None:
    """Then it is the plain model, bit by bit."""
    state = loaded(checkpoint(name), dequantize=True).state_dict()
    for key, tensor in plain(name).state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", ["packed", "awq", "gptq_sym"])
@torch.no_grad()
def test_experts_compute_as_plain_weights_do(tmp_path: Path, name: str) -> None:
    """Stored one by one, with zero points or without."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    moe = architectures.small_config("qwen3_moe", initializer_range=0.2, **sizes)
    ignored: dict[str, Any] = {"ignore": ["lm_head", "re:.*mlp.gate$"]} if name == "packed" else {}
    directory = write_integers(tmp_path, INTEGERS[name], config=moe, **ignored)
    module, ids = loaded(directory), torch.tensor(PROMPTS[2:])
    weights = torch.load(directory / "plain.pt")
    architectures.random_model(moe).save_pretrained(tmp_path / "plain")
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    wanted = loaded(tmp_path / "plain")(ids).logits
    torch.testing.assert_close(module(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    planned, held = load_weightless(config(directory))[0].state_dict(), module.state_dict()
    assert {key: tensor.shape for key, tensor in planned.items()} == {
        key: tensor.shape for key, tensor in held.items()
    }
    assert held["model.layers.0.mlp.experts.down_proj"].dtype == torch.uint8


def test_generates_by_both_doors() -> None:
    """Greedy tokens of transformers with the plain weights, in a batch."""
    wanted = architectures.generated_by_transformers(plain("awq"), PROMPTS, NUM_NEW_TOKENS)
    results = build_model(config(checkpoint("awq"))).generate(
        PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    )
    assert [list(result.token_ids) for result in results] == wanted
    assert by_torch_compile(loaded(checkpoint("awq"))) == wanted


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM"])
@torch.no_grad()
def test_reads_what_compressed_tensors_writes(tmp_path: Path, preset: str) -> None:
    """As its own decompression has it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model: Any = architectures.random_model(llama())
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    scheme.weights.group_size = 32
    settings = {"config_groups": {"group_0": scheme}, "format": "pack-quantized", "ignore": ["lm_head"]}
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(**settings, quantization_status="frozen")
    )
    draw = torch.Generator().manual_seed(0)
    for part in model.modules():
        if hasattr(part, "quantization_scheme"):
            part.weight_scale.copy_(torch.rand(part.weight_scale.shape, generator=draw) * 0.05 + 0.01)
            if preset == "W4A16_ASYM":
                zero = torch.randint(-8, 8, part.weight_zero_point.shape, generator=draw)
                part.weight_zero_point.copy_(zero)
    compressor = compressors.ModelCompressor.from_pretrained_model(
        model, quantization_format="pack-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert f"{QUERY}.weight_packed" in load_file(tmp_path / "model.safetensors")
    compressor.decompress_model(model)
    state = loaded(tmp_path, dequantize=True).state_dict()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(state[f"{name}.weight"], module.weight), name


@pytest.mark.parametrize("name", NVFP4)
def test_nvfp4_is_read_as_plain_weights_alone(tmp_path: Path, name: str) -> None:
    """Then bit by bit; without dequantize it is refused."""
    directory = write_nvfp4(tmp_path, name)
    with pytest.raises(LoadError, match=r"numbers that no kernel here computes with; set dequantize \(--deq"):
        loaded(directory)
    state, wanted = loaded(directory, dequantize=True).state_dict(), torch.load(directory / "plain.pt")
    for key, tensor in state.items():
        assert torch.equal(tensor, wanted.get(key, tensor)), key
    assert load_weightless(config(directory))[0].state_dict()[f"{QUERY}.weight"].dtype == torch.float32


def test_reads_nvfp4_as_compressed_tensors_does(tmp_path: Path) -> None:
    """Its own decompression of the same tensors."""
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    directory = write_nvfp4(tmp_path, "nvfp4_compressed")
    stored = load_file(directory / "model.safetensors")
    parts = {
        end: stored[f"{QUERY}.{end}"] for end in ("weight_packed", "weight_scale", "weight_global_scale")
    }
    scheme = quantization.preset_name_to_scheme("NVFP4A16", ["Linear"])
    wanted = nvfp4.NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    found = loaded(directory, dequantize=True).state_dict()[f"{QUERY}.weight"]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-2, atol=0)  # theirs is bfloat16


def change(name: str, tensor: Tensor | None) -> Any:
    """A tensor replaced, or taken away."""

    def edit(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return edit


def test_refuses_what_transformers_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that comes to a module that is not found by its name must not be lost there."""
    own = Modules.linear

    def linear(modules: Modules, name: str) -> str | None:
        return None if name == f"{QUERY}.weight" else own(modules, name)

    monkeypatch.setattr(Modules, "linear", linear)
    monkeypatch.setattr(Modules, "has_layer_of", lambda self, name: False)
    with pytest.raises(LoadError, match=f"'{QUERY}.qweight' came to '{QUERY}' by another name"):
        loaded(checkpoint("gptq"))


def out_of_order(tensors: Tensors) -> None:
    tensors[f"{QUERY}.g_idx"] = tensors[f"{QUERY}.g_idx"].flip(0)


def zero_of_15(tensors: Tensors) -> None:
    tensors[f"{QUERY}.qzeros"][0, 0] = -1


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("packed", change(f"{QUERY}.weight_scale", None), "weight_scale' of shape [128, 2] is missing"),
        ("packed_zero", change(f"{QUERY}.weight_zero_point", None), "weight_zero_point' of shape [16, 2] is"),
        ("awq", change(f"{QUERY}.qzeros", None), "qzeros' of shape [2, 16] is missing"),
        ("gptq", change(f"{QUERY}.scales", None), "scales' of shape [2, 128] is missing"),
        (
            "packed",
            change(f"{QUERY}.weight_shape", torch.tensor([128, 63])),
            "weight_shape' must be [128, 64], found [128, 63]",
        ),
        (
            "packed",
            change(f"{QUERY}.weight_scale", torch.ones(128, 4)),
            "must be a real number of shape [128, 2], found F32 [128, 4]",
        ),
        (
            "gptq",
            change(f"{QUERY}.qzeros", torch.ones(2, 16)),
            "qzeros' must be I32 of shape [2, 16], found F32 [2, 16]",
        ),
        *(
            (form, change(f"{QUERY}.{scale}", torch.full(shape, float("nan"))), f"{scale}' must be finite")
            for form, scale, shape in (
                ("packed", "weight_scale", (128, 2)),
                ("awq", "scales", (2, 128)),
                ("gptq", "scales", (2, 128)),
            )
        ),
        ("gptq", out_of_order, "g_idx' has groups out of order (desc_act, act-order)"),
        (
            "gptq_sym",
            change(f"{QUERY}.qzeros", torch.zeros(2, 16).int()),
            "another zero point than 8, though",
        ),
        ("gptq", zero_of_15, "qzeros' has a zero point of 15, which is stored less 1"),
        ("packed", change(f"{QUERY}.weight_g_idx", torch.zeros(64).int()), "weight_g_idx' would be left out"),
        (
            "packed",
            lambda tensors: [
                change(f"{QUERY}.weight", torch.ones(128, 64))(tensors),
                *(change(name, None)(tensors) for name in list(tensors) if f"{QUERY}.weight_" in name),
            ],
            f"'{QUERY}.weight' is F32, though the files say that it is quantized",
        ),
        (
            "packed",
            lambda tensors: [
                change(name.replace("q_proj", "rotary"), tensors[name].clone())(tensors)
                for name in list(tensors)
                if name.startswith(QUERY)
            ],
            "is not that of a linear",
        ),
        (
            "gptq",
            lambda tensors: [change(n, None)(tensors) for n in list(tensors) if n.endswith("qweight")],
            "no tensor is one of such",
        ),
    ],
)
def test_refuses_what_is_damaged(tmp_path: Path, name: str, edit: Any, message: str) -> None:
    """In one line that names the tensor."""
    with pytest.raises(LoadError) as caught:
        loaded(write_integers(tmp_path, INTEGERS[name], edit))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("awq", {"version": "gemv"}, "its version is 'gemv'"),
        ("awq", {"zero_point": False}, "its zero_point is False"),
        ("awq", {"group_size": 0}, "its group_size is 0"),
        ("gptq", {"bits": 3}, "its bits is 3"),
        ("gptq", {"checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin'"),
        ("gptq", {"dynamic": {"-:.*down": {}}}, "its dynamic is "),
        ("gptq", {"quantizer": "x"}, "its key quantizer is unknown"),
        *(
            (
                "packed",
                {"config_groups": {"g": {"targets": ["Linear"], "weights": {**weights, **change}}}},
                message,
            )
            for weights in (
                {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
            )
            for change, message in (
                ({"actorder": "group"}, "its weights.actorder is 'group'"),
                ({"num_bits": 8}, "its weights.num_bits is 8"),
                ({"group_size": None}, "its group_size is None, but its strategy group"),
                ({"strategy": "tensor"}, "its weights.strategy is 'tensor'"),
            )
        ),
    ],
)
def test_refuses_what_it_does_not_understand(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    """A setting that changes what the numbers mean, by its name."""
    with pytest.raises(LoadError) as caught:
        loaded(write_integers(tmp_path, INTEGERS[name], **settings))
    assert message in str(caught.value)
