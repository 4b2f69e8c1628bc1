import json
import logging
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ad_flashinfer_pass import cli
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.weightless import load_weightless

DEMO = Path(str(resources.files("ad_flashinfer_pass.demo")))
QUERY = "model.layers.0.self_attn.q_proj.weight"
PLAIN_CACHE_SCHEME = {
    "quant_method": "compressed-tensors",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8},
}

Edit = Callable[[dict[str, Tensor]], object]


def demo(directory: Path, edit: Edit | None = None, **config: Any) -> Path:
    """The demo's files in a directory, its tensors changed by ``edit``, with further keys in config.json."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, directory)
    if edit is not None:
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return directory


def scaled(dtype: torch.dtype, largest: float, scale: str) -> Edit:
    """Every projection stored divided by its scale, which stands beside it."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            factor = tensors[name].float().abs().max() / largest
            tensors[name] = (tensors[name].float() / factor).to(dtype)
            tensors[name.removesuffix(".weight") + "." + scale] = factor.reshape(1)

    return edit


def expert_in_fp8(tensors: dict[str, Tensor]) -> None:
    """One expert of a mixture, with its scale, among weights that are stored plainly."""
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = torch.ones(8, 8).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(())


def in_fp8_without_scales(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def beside_query(name: str, tensor: Tensor) -> Edit:
    return lambda tensors: tensors.update({QUERY.replace("weight", name): tensor})


def refusal(directory: Path) -> str:
    with pytest.raises(LoadError, match="the weights are quantized as ") as caught:
        load_model(AutoDeployConfig(model=str(directory)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (scaled(torch.float8_e4m3fn, 448, "weight_scale"), "fp8 .*_proj.weight', F8_E4M3"),
        (scaled(torch.float8_e5m2, 57344, "weight_scale"), "fp8 .*F8_E5M2"),
        (scaled(torch.float8_e4m3fn, 448, "weight_scale_inv"), "block fp8 .*weight_scale_inv"),
        (scaled(torch.int8, 127, "weight_scale"), "integers of at most 8 bits .*_proj.weight', I8"),
        (scaled(torch.int8, 127, "SCB"), "bitsandbytes .*SCB"),
        (scaled(torch.bfloat16, 1, "weight_scale"), "scales .*weight_scale"),
        (beside_query("input_scale", torch.ones(())), "scales .*input_scale"),
        (beside_query("qweight", torch.zeros(8, 8, dtype=torch.int32)), "AWQ or GPTQ .*q_proj.qweight"),
        (beside_query("g_idx", torch.zeros(8, dtype=torch.int32)), "GPTQ .*g_idx"),
        (beside_query("weight_packed", torch.zeros(8, 8, dtype=torch.int32)), "compressed-tensors.*packed"),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.mlp.experts.up_blocks": torch.zeros(2, 2).byte()}
            ),
            "MXFP4 .*up_blocks",
        ),
        (expert_in_fp8, "fp8 .*experts.3.up_proj.weight', F8_E4M3"),
        (in_fp8_without_scales, "fp8 .*_proj.weight', F8_E4M3"),
    ],
)
def test_refuses_quantized_tensors(tmp_path: Path, edit: Edit, message: str) -> None:
    """Without a word in any config, the tensors say it: the error names the format and one of them."""
    assert re.search(message, refusal(demo(tmp_path, edit)))


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "block fp8 [128, 128]"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ int4"),
        ({"quant_method": "awq", "bits": 4}, "AWQ int4"),
        ({"load_in_4bit": True}, "bitsandbytes 4-bit"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors pack-quantized",
        ),
        (
            {"config_groups": {"group_0": {}}, "format": "float-quantized"},
            "compressed-tensors float-quantized",
        ),
        ({"quant_method": "hqq"}, "hqq"),
        ({"anything": 1}, "an unknown format"),
        ("fp8", "an unknown format"),
        ([1], "an unknown format"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_refuses_quantized_config(tmp_path: Path, key: str, settings: Any, form: str) -> None:
    """The format is named with the file and the key that say so."""
    message = refusal(demo(tmp_path, None, **{key: settings}))
    assert f"quantized as {form} ({tmp_path / 'config.json'}: {key}" in message


def test_sees_quantization_of_the_text_stack(tmp_path: Path) -> None:
    """The part of a vision-language model may be quantized alone."""
    text: Any = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    assert "AWQ int4" in refusal(demo(tmp_path, text_config=text))
    assert "config.json: text_config.quantization_config" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt FP8"),
        ("quantize_config.json", {"bits": 8, "group_size": 128, "desc_act": False}, "GPTQ int8"),
        ("quant_config.json", {"w_bit": 4, "zero_point": True, "q_group_size": 128}, "AWQ int4"),
        ("quantize_config.json", {"quant_method": "awq", "bits": 4}, "AWQ int4"),
    ],
)
def test_reads_files_of_quantizers(tmp_path: Path, name: str, content: Any, form: str) -> None:
    """A file beside config.json says it as well."""
    (demo(tmp_path) / name).write_text(json.dumps(content))
    assert f"quantized as {form} ({tmp_path / name}" in refusal(tmp_path)


@pytest.mark.parametrize("command", [["generate", "Once"], ["check"]], ids=lambda command: command[0])
def test_no_command_computes_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """As modelopt writes FP8: unscaled weights would give a text, and agree with themselves."""
    demo(tmp_path, scaled(torch.float8_e4m3fn, 448, "weight_scale"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "-m", str(tmp_path), "-q"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1)
    assert "quantized as modelopt FP8" in err


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": PLAIN_CACHE_SCHEME},
    ],
    ids=["without", "null", "empty", "cache_alone"],
)
def test_takes_plain_weights(tmp_path: Path, config: dict[str, Any]) -> None:
    """Neither an empty section nor a quantized cache makes weights quantized."""
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    module = load_model(AutoDeployConfig(model=str(demo(tmp_path, **config)))).module
    stored = load_file(DEMO / "model.safetensors")[QUERY]
    torch.testing.assert_close(module.state_dict()[QUERY], stored.float(), rtol=0, atol=0)


def test_commands_that_read_no_weights_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose answer is that of the unquantized model, said before it."""
    model = demo(tmp_path, quantization_config={"quant_method": "fp8"})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", "-m", str(model), "--max-seq-len", "64", "--json", "-q"])
    assert isinstance(json.loads(capsys.readouterr().out), dict | list)
    assert not stop.value.code


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, "fp8"], ids=str)
def test_works_without_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Any) -> None:
    """What reads no weights shows the unquantized model, and says so; so do random weights."""
    config = AutoDeployConfig(model=str(demo(tmp_path, quantization_config=settings)))
    module, _ = load_weightless(config)
    assert module.state_dict()[QUERY].dtype == torch.float32
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "quantized as " in warning
    assert "describes the unquantized model, with weights of float32" in warning
    caplog.clear()
    drawn = load_model(config.model_copy(update={"skip_loading_weights": True}))
    assert {parameter.dtype for parameter in drawn.module.parameters()} == {torch.float32}
    assert "quantized as " in caplog.text
