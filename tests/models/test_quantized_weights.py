"""Checkpoints whose linears are float8: beside models of what their formats state, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ad_flashinfer_pass import LLM, CacheSession, SamplingParams, build_model, cli, restore, to_program
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.inspection import plan
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.quantized.formats import SUPPORTED
from ad_flashinfer_pass.models.quantized.modules import QuantizedLinear
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm
from tests import architectures
from tests.models.float8_checkpoints import (
    FORMATS,
    Format,
    Tensors,
    dequantized_model,
    scale_of,
    small_config,
    stated_model,
    write,
)

NUM_NEW_TOKENS = 64
PROMPTS = architectures.random_prompts((1, 5, 14), vocab_size=128)
Edit = Callable[[Tensors], Any]
formats = pytest.mark.parametrize("name", FORMATS)
arithmetic = pytest.mark.parametrize(
    "name", ["modelopt", "compressed_dynamic", "compressed_weights", "block"]
)
"""Formats that compute otherwise."""


@pytest.fixture(autouse=True)
def _forget_graphs() -> None:
    torch._dynamo.reset()


@cache
def checkpoint(name: str) -> Path:
    return write(Path(mkdtemp()), FORMATS[name])


@cache
def stated_tokens(name: str) -> list[list[int]]:
    model = stated_model(checkpoint(name), FORMATS[name]).double()
    return architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)


def config(name: str, **settings: Any) -> AutoDeployConfig:
    limits = {"max_batch_size": 4, "max_seq_len": 128, "kv_cache_config": {"tokens_per_block": 16}}
    return AutoDeployConfig(model=str(checkpoint(name)), device="cpu", **{**limits, **settings})


def loaded(name: str, **settings: Any) -> nn.Module:
    return load_model(config(name, **settings)).module


@formats
def test_keeps_what_is_stored(name: str) -> None:
    """Each float8 weight and its scales, bit by bit; the rest is as it was, and the head stays tied."""
    state, stored = loaded(name).state_dict(), load_file(checkpoint(name) / "model.safetensors")
    for key, tensor in stored.items():
        kept = state[key.replace("weight_scale_inv", "weight_scale")]
        assert kept.dtype == tensor.dtype
        assert torch.equal(kept.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key
    module: Any = loaded(name)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 14


@formats
@torch.no_grad()
def test_computes_what_the_format_states(name: str) -> None:
    """In float64, where no activation falls on the other side of a rounding."""
    ids = torch.tensor(PROMPTS[2:])
    wanted = stated_model(checkpoint(name), FORMATS[name]).double()(ids).logits
    torch.testing.assert_close(loaded(name).double()(ids).logits, wanted, rtol=1e-9, atol=1e-9)


@arithmetic
def test_generates_as_the_format_states(name: str) -> None:
    """64 greedy tokens of transformers' generate, in a batch, by the pass, in float64."""
    llm = LLM(transform_module(loaded(name).double(), config(name))[0], eos_token_ids=())
    results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    assert [list(result.token_ids) for result in results] == stated_tokens(name)


def test_takes_what_is_ignored_plainly(tmp_path: Path) -> None:
    """By name and by pattern; the others stay float8."""

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.1.mlp" in name or QUERY in name]:
            if name.endswith(".weight"):
                tensors[name] = tensors[name].float() * tensors[name + "_scale"]
            elif name.endswith("weight_scale"):
                del tensors[name]

    form = FORMATS["compressed_dynamic"]
    write(tmp_path, form, edit, ignore=["lm_head", "re:.*layers[.]1[.]mlp[.]", QUERY])
    assert_computes_as_stated(tmp_path, form, 14 - 3 - 1)


def test_takes_groups_of_several_schemes(tmp_path: Path) -> None:
    """The most specific target counts: one name, then patterns, then Linear."""

    def edit(tensors: Tensors) -> None:
        for name in (
            f"{DOWN}.weight",
            *(f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)),
        ):
            scale = torch.tensor([0.002 if name.startswith(DOWN) else 0.003])
            weight = tensors[name].float() * tensors[f"{name}_scale"] / scale
            tensors[name] = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
            if name.startswith(DOWN):
                tensors[f"{DOWN}.input_scale"] = torch.tensor([0.03])

    form, numbers = FORMATS["compressed_dynamic"], {"num_bits": 8, "type": "float"}
    per_tensor = {**numbers, "strategy": "tensor", "dynamic": False}
    per_token = {**numbers, "strategy": "token", "dynamic": True}
    groups = {
        "rest": form.settings["config_groups"]["group_0"],
        "pattern": {
            "targets": ["re:.*o_proj$"],
            "weights": per_tensor,
            "input_activations": per_token,
        },
        "name": {"targets": [DOWN], "weights": per_tensor, "input_activations": per_tensor},
    }
    write(tmp_path, form, edit, config_groups=groups)
    assert_computes_as_stated(tmp_path, form, 14)


def test_takes_a_plain_head_that_nothing_names(tmp_path: Path) -> None:
    """As transformers does for block fp8: the head is quantized only if a list is there and leaves it out."""
    form = FORMATS["block"]
    write(tmp_path, form, modules_to_not_convert=None)
    assert_computes_as_stated(tmp_path, form, 14)
    write(tmp_path, form, modules_to_not_convert=["model.norm"])
    with pytest.raises(LoadError, match=r"'lm_head.weight' is shared .*, though the files say"):
        load_model(AutoDeployConfig(model=str(tmp_path), device="cpu"))


def test_refuses_a_weight_by_which_the_model_itself_multiplies(tmp_path: Path) -> None:
    """Mamba's mixers do not call dt_proj; dequantized it is a weight like any other."""
    form = FORMATS["compressed_dynamic"]
    write(tmp_path, form, config=architectures.small_config("mamba"), ignore=["lm_head"])
    settings = AutoDeployConfig(model=str(tmp_path), device="cpu")
    with pytest.raises(LoadError, match=r"dt_proj\.weight'.* is not that of a linear that its model calls"):
        load_model(settings)
    module = load_model(settings.model_copy(update={"dequantize": True})).module
    assert module(torch.tensor([PROMPTS[1]])).logits.isfinite().all()


@torch.no_grad()
def assert_computes_as_stated(directory: Path, form: Format, quantized: int) -> None:
    module = load_model(AutoDeployConfig(model=str(directory), device="cpu")).module
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == quantized
    ids = torch.tensor(PROMPTS[2:])
    wanted = stated_model(directory, form).double()(ids).logits
    torch.testing.assert_close(module.double()(ids).logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["modelopt", "block"])
def test_generates_by_torch_compile(name: str) -> None:
    """The same tokens through the other door."""
    session = CacheSession(max_batch_size=4, max_seq_len=128, kv_cache_config={"tokens_per_block": 16})
    options: dict[str, Any] = {"session": session, "compile_backend": "torch-simple"}
    compiled = torch.compile(loaded(name).double(), backend=flashinfer_trtllm, options=options)
    steps = []
    with session.prefill(PROMPTS) as batch:
        steps.append(batch.last_logits(compiled(**batch.inputs, use_cache=False).logits).argmax(-1))
    while len(steps) < NUM_NEW_TOKENS:
        with session.decode(steps[-1]) as batch:
            steps.append(batch.last_logits(compiled(**batch.inputs, use_cache=False).logits).argmax(-1))
    assert torch.stack(steps, 1).tolist() == stated_tokens(name)
    assert [record.what for record in session.compiles].count("pass") == 1


def test_by_the_configuration_of_autodeploy(tmp_path: Path) -> None:
    """The first that this package was made for, in its words, but for the graphs, which a CPU has not."""
    directory = shutil.copytree(checkpoint("modelopt"), tmp_path / "model")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 2048}))
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {directory}\n"
        "attn_backend: flashinfer_trtllm\n"
        "compile_backend: torch-simple\n"
        "cuda_graph_batch_sizes: [1, 2, 4, 8, 16, 32]\n"
        "max_batch_size: 32\n"
        "max_seq_len: 2048\n"
        "device: cpu\n"
    )
    llm = LLM(build_model(AutoDeployConfig.from_yaml(file)).model, eos_token_ids=())
    results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    assert [list(result.token_ids) for result in results] == stated_tokens("modelopt")


@pytest.mark.parametrize("name", ["modelopt"])
def test_is_saved_and_restored(tmp_path: Path, name: str) -> None:
    """Float8 weights and scales come back from the file."""
    program = to_program(build_model(config(name)).model)
    torch.export.save(program, tmp_path / "program.pt2")
    llm = LLM(restore(tmp_path / "program.pt2", config(name)), eos_token_ids=())
    results = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NUM_NEW_TOKENS))
    assert [list(result.token_ids) for result in results] == stated_tokens(name)


@pytest.mark.parametrize("name", ["block"])
def test_is_planned_without_weights(name: str) -> None:
    """From the files beside the weights: the ops, and the bytes that the weights have once they are read."""
    graph: Any = transform_module(loaded(name), config(name))[0].module
    found = plan(config(name))
    # Head and embeddings are one tensor.
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*graph.parameters(), *graph.buffers())}
    assert sum(row.bytes for row in found.rows if row.name.startswith("weights ")) == sum(held.values())
    op = torch.ops.ad_flashinfer.quantized_linear.default
    assert graph.graph.find_nodes(op="call_function", target=op)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@formats
@torch.no_grad()
def test_activations_have_any_dtype(name: str, dtype: Any) -> None:
    """The float8 weights stay as they are; what is not quantized is of that dtype."""
    ids, module = torch.tensor(PROMPTS[2:]), loaded(name, dtype=dtype)
    assert {part.weight.dtype for part in module.modules() if isinstance(part, QuantizedLinear)} == {
        torch.float8_e4m3fn
    }
    logits = module(ids).logits
    assert logits.dtype == getattr(torch, dtype)
    wanted = stated_model(checkpoint(name), FORMATS[name]).to(logits.dtype)(ids).logits.float()
    # An activation that falls on the other side of a rounding to float8 makes a difference.
    assert (logits - wanted).norm() < 0.15 * wanted.norm()


def test_reads_scales_of_the_cache_too(tmp_path: Path) -> None:
    """As modelopt writes them beside those of the weights."""

    def edit(tensors: Tensors) -> None:
        for layer in range(2):
            for kind in "kv":
                tensors[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"] = torch.tensor(
                    0.5 + layer
                )

    directory = write(tmp_path, FORMATS["modelopt"], edit)
    cache: Any = {"dtype": "fp8"}
    model = load_model(AutoDeployConfig(model=str(directory), kv_cache_config=cache, device="cpu"))
    assert model.resolved.kv_cache_config.k_scale == [0.5, 1.5]


def test_a_quantized_head_gets_the_wanted_rows_alone(tmp_path: Path) -> None:
    """The gather stands before it."""

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clamp(-1, 1).to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale"] = torch.full((128, 1), 0.5)

    directory = write(tmp_path, FORMATS["compressed_dynamic"], edit, ignore=[])
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    llm = build_model(AutoDeployConfig(model=str(directory), device="cpu", max_seq_len=128))
    gathered = next(each for each in llm.reports if each.name == "gather_logits_before_lm_head")
    assert gathered.notes[0].startswith("before quantized_linear")


@formats
def test_dequantizes(name: str) -> None:
    """Then it is the plain model of the weights times their scales."""
    module: Any = loaded(name, dequantize=True)
    wanted = dequantized_model(checkpoint(name), FORMATS[name])
    for key, tensor in wanted.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], tensor, rtol=0, atol=0)


def test_the_command_dequantizes(capsys: pytest.CaptureFixture[str]) -> None:
    """And dump shows the plain linears that are left then."""
    for option, count in (([], 14), (["--dequantize"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["dump", "-m", str(checkpoint("block")), "--stage", "export_model", "-q", *option])
        assert not stop.value.code
        assert capsys.readouterr().out.count("ad_flashinfer.quantized_linear.default(") == count


@pytest.mark.parametrize(
    "name", ["compressed_static", "compressed_dynamic", "compressed_weights", "compressed_block"]
)
@torch.no_grad()
def test_computes_as_transformers_does(tmp_path: Path, name: str) -> None:
    """Which reads these with the format's own library, if no block is cut."""
    pytest.importorskip("compressed_tensors")
    directory = write(tmp_path, FORMATS[name], config=small_config(256, 128, 4))
    file = directory / "config.json"
    settings = json.loads(file.read_text())
    settings["quantization_config"].pop(
        "kv_cache_scheme"
    )  # transformers 5.17 leaves its scales as memory was
    file.write_text(json.dumps(settings))
    ids = torch.tensor(PROMPTS[2:])
    wanted = transformers.AutoModelForCausalLM.from_pretrained(directory).double()(ids).logits
    module = load_model(AutoDeployConfig(model=str(directory), device="cpu")).module.double()
    torch.testing.assert_close(module(ids).logits, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC"])
@torch.no_grad()
def test_reads_what_compressed_tensors_writes(tmp_path: Path, preset: str) -> None:
    """And computes as its model did before it was written."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model: Any = architectures.random_model(small_config())
    scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    settings = {"config_groups": {"group_0": scheme}, "format": "float-quantized", "ignore": ["lm_head"]}
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(**settings, quantization_status="frozen")
    )
    for part in model.modules():
        if hasattr(part, "quantization_scheme"):
            part.weight_scale.copy_(scale_of(part.weight, "tensor" if preset == "FP8" else "channel"))
            if preset == "FP8":
                part.input_scale.fill_(0.02)
    ids = torch.tensor(PROMPTS[2:])
    wanted = model(ids).logits
    compressor = compressors.ModelCompressor.from_pretrained_model(
        model, quantization_format="float-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 14
    torch.testing.assert_close(module(ids).logits, wanted)


def test_reads_shards(tmp_path: Path) -> None:
    """A weight and its scales may lie in different files."""
    file = write(tmp_path, FORMATS["block"]) / "model.safetensors"
    tensors, shards = load_file(file), ("a.safetensors", "b.safetensors")
    parts: tuple[Tensors, Tensors] = ({}, {})
    for name, tensor in tensors.items():
        parts["scale" in name][name] = tensor
    for shard, part in zip(shards, parts, strict=True):
        save_file(part, tmp_path / shard, metadata={"format": "pt"})
    weight_map = {name: shards["scale" in name] for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module
    for key, tensor in loaded("block").state_dict().items():
        assert torch.equal(module.state_dict()[key].float(), tensor.float()), key


def test_reads_the_first_layers_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Those of further layers are left out, with a word."""
    module = loaded("block", model_kwargs={"num_hidden_layers": 1})
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 7
    assert "tensors that the model does not have were left out: model.layers.1." in caplog.text


QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def change(name: str, tensor: Tensor | None) -> Edit:
    """A tensor replaced, or taken away."""

    def edit(tensors: Tensors) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return edit


def stored_plainly(tensors: Tensors) -> None:
    tensors[f"{QUERY}.weight"] = tensors[f"{QUERY}.weight"].float()
    for scale in ("weight_scale", "weight_scale_inv", "input_scale"):
        tensors.pop(f"{QUERY}.{scale}", None)


def with_a_nan(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"].view(torch.uint8)[7, 3] = 0x7F


FLOAT8 = torch.ones(160, 160).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (
            "modelopt",
            change(f"{QUERY}.weight_scale", None),
            f"'{QUERY}.weight_scale' of shape [1] is missing",
        ),
        ("modelopt", change(f"{DOWN}.input_scale", None), f"'{DOWN}.input_scale' of shape [1] is missing"),
        ("block", change(f"{DOWN}.weight_scale_inv", None), "weight_scale_inv' of shape [2, 2] is missing"),
        (
            "modelopt",
            change(f"{QUERY}.weight_scale", torch.ones(160, 1)),
            "weight_scale' must be a real number of shape [1], found F32 [160, 1]",
        ),
        (
            "compressed_dynamic",
            change(f"{DOWN}.weight_scale", torch.ones(160)),
            "weight_scale' must be a real number of shape [160, 1], found F32 [160]",
        ),
        (
            "block",
            change(f"{DOWN}.weight_scale_inv", torch.ones(2, 3)),
            "must be a real number of shape [2, 2], found F32 [2, 3]",
        ),
        (
            "block",
            change(f"{DOWN}.weight_scale_inv", torch.full((2, 2), 127, dtype=torch.uint8)),
            "must be a real number of shape [2, 2], found U8 [2, 2]",
        ),
        *(
            (
                form,
                change(f"{QUERY}.{scale}", torch.full(shape, value)),
                f"{scale}' must be above 0 and finite",
            )
            for value in (float("nan"), float("inf"), 0.0, -1.0)
            for form, scale, shape in (
                ("modelopt", "weight_scale", ()),
                ("modelopt", "input_scale", ()),
                ("compressed_dynamic", "weight_scale", (160, 1)),
                ("block", "weight_scale_inv", (2, 2)),
            )
        ),
        *(
            (form, stored_plainly, f"'{QUERY}.weight' is F32, though the files say that it is quantized")
            for form in FORMATS
        ),
        (
            "compressed_dynamic",
            change("lm_head.weight", FLOAT8),
            "'lm_head.weight' is F8_E4M3, though the files say that it is not quantized",
        ),
        ("modelopt", with_a_nan, f"'{DOWN}.weight' is not finite everywhere"),
        ("modelopt", change("model.norm.weight", FLOAT8[0]), "'model.norm.weight' is F8_E4M3 of shape [160]"),
        (
            "modelopt",
            lambda tensors: [
                change(f"model.embed_tokens.{part}", value)(tensors)
                for part, value in (
                    ("weight", FLOAT8[:128].clone()),
                    ("weight_scale", torch.ones(())),
                    ("input_scale", torch.ones(())),
                )
            ],
            "'model.embed_tokens.weight' is not that of a linear",
        ),
    ],
)
def test_refuses_what_is_damaged(tmp_path: Path, name: str, edit: Edit, message: str) -> None:
    """In one line that names the tensor."""
    with pytest.raises(LoadError, match="the weights are quantized as ") as caught:
        load_model(AutoDeployConfig(model=str(write(tmp_path, FORMATS[name], edit)), device="cpu"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("compressed_dynamic", "weight_zero_point"),
        ("compressed_dynamic", "input_scale"),
        ("modelopt", "pre_quant_scale"),
        ("block", "activation_scale"),
    ],
)
def test_refuses_what_is_left_over(tmp_path: Path, name: str, tensor: str) -> None:
    """A tensor beside a weight that its format does not have."""
    directory = write(tmp_path, FORMATS[name], change(f"{QUERY}.{tensor}", torch.ones(1)))
    with pytest.raises(LoadError, match=f"{QUERY}.{tensor}' would be left out"):
        load_model(AutoDeployConfig(model=str(directory), device="cpu"))


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
"""A kv_cache_scheme."""


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("modelopt_config", {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "its quant_algo is 'FP8_PER"),
        ("modelopt_config", {"ignore": []}, "hf_quant_config.json says otherwise"),
        ("compressed_dynamic", {"format": "int-quantized"}, "its format is 'int-quantized'"),
        (
            "compressed_dynamic",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "its sparsity_config is ",
        ),
        ("compressed_dynamic", {"transform_config": {"a": 1}}, "its transform_config is "),
        ("compressed_dynamic", {"rotation": "R1"}, "its key rotation is unknown"),
        (
            "compressed_dynamic",
            {"kv_cache_scheme": {**CACHE, "type": "int"}},
            "kv_cache_scheme.type is 'int'",
        ),
        ("compressed_dynamic", {"kv_cache_scheme": {**CACHE, "dynamic": True}}, "kv_cache_scheme.dynamic is"),
        ("modelopt_config", {"kv_cache_scheme": {**CACHE, "num_bits": 4}}, "kv_cache_scheme.num_bits is 4"),
        ("compressed_dynamic", {"ignore": ["re:("]}, "'(' is no pattern"),
        ("block", {"weight_block_size": [64, 128]}, "its weight_block_size.0 is 64"),
        ("block", {"activation_scheme": "static"}, "its activation_scheme is 'static'"),
        ("block", {"scale_fmt": "ue8m0"}, "its scale_fmt is 'ue8m0'"),
        ("block", {"modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert names embeddings"),
    ],
)
def test_refuses_what_it_does_not_understand(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    """A setting that changes what the numbers mean, by its name, with what is supported."""
    with pytest.raises(LoadError, match="which is not supported; give a checkpoint of float32") as caught:
        load_model(AutoDeployConfig(model=str(write(tmp_path, FORMATS[name], **settings)), device="cpu"))
    assert message in str(caught.value)
    assert SUPPORTED in str(caught.value)
