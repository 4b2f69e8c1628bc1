"""Float8 checkpoints from plain ones: read here and by transformers, near to their source, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.deployment.quantize import float8_by_rows, quantize
from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.quantized.modules import QuantizedExperts, QuantizedLinear
from tests import architectures
from tests.models.float8_checkpoints import FORMATS, write

PROMPTS = architectures.random_prompts((9, 14), vocab_size=128)


def source(directory: Path, family: str = "llama", **changes: Any) -> AutoDeployConfig:
    """A plain checkpoint in three files."""
    config = architectures.small_config(family, num_hidden_layers=2, initializer_range=0.2, **changes)
    model: Any = architectures.random_model(config)
    model.to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return AutoDeployConfig(model=str(directory), device="cpu", max_seq_len=64)


@torch.no_grad()
def test_is_read_here_and_by_transformers(tmp_path: Path) -> None:
    """The same logits; every linear but the head is float8, in as many files; the report is of these two."""
    config, made = source(tmp_path / "plain"), tmp_path / "made"
    report = quantize(config, made, PROMPTS)
    assert (report.weights, report.plain, report.num_tokens) == (14, ["lm_head"], 23)
    assert {file.name for file in made.iterdir()} == {file.name for file in (tmp_path / "plain").iterdir()}
    quantized = load_model(config.model_copy(update={"model": str(made)})).module
    plain = load_model(config).module
    assert sum(isinstance(part, QuantizedLinear) for part in quantized.modules()) == 14
    kl, same = [], []
    for prompt in PROMPTS:
        wanted, found = (model(torch.tensor([prompt])).logits[0].float() for model in (plain, quantized))
        kl.append(
            torch.nn.functional.kl_div(
                found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        )
        same.append(wanted.argmax(-1) == found.argmax(-1))
    assert report.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert report.largest_kl == pytest.approx(float(torch.cat(kl).max()), rel=1e-5)
    assert report.same_top_1 == float(torch.cat(same).double().mean())
    assert report.bytes_after < 0.7 * report.bytes_before
    pytest.importorskip("compressed_tensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ours = load_model(config.model_copy(update={"model": str(made), "dtype": "float32"})).module
    ids = torch.tensor(PROMPTS[1:])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_quantizes_experts(tmp_path: Path) -> None:
    """Stored one by one, as their family stores them; routers stay plain."""
    config, made = source(tmp_path / "plain", "qwen3_moe", tie_word_embeddings=True), tmp_path / "made"
    report = quantize(config, made, PROMPTS)
    assert report.plain == ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in (0, 1))]
    module = load_model(config.model_copy(update={"model": str(made)})).module
    assert sum(isinstance(part, QuantizedExperts) for part in module.modules()) == 2
    assert sum(isinstance(part, QuantizedLinear) for part in module.modules()) == 8
    assert report.kl < 0.1


@pytest.mark.parametrize(
    ("family", "number", "plain"),
    [
        ("gpt_oss", 8, ["mlp.router", "mlp.experts"]),
        ("granitemoe", 8, ["block_sparse_moe.router.layer", "block_sparse_moe.experts"]),
        ("mamba", 6, ["mixer.dt_proj"]),
        ("nemotron_h", 16, ["mixer.gate"]),
    ],
)
def test_leaves_plain_what_is_no_float8(tmp_path: Path, family: str, number: int, plain: list[str]) -> None:
    """Experts that are stored together, routers, and weights that a model reads by itself."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    config, made = source(tmp_path / "plain", family, **kinds), tmp_path / "made"
    report = quantize(config, made, PROMPTS)
    assert (report.weights, report.plain[0]) == (number, "lm_head")
    layers = ["lm_head"] + [name for name in report.plain if ".layers." in name]
    assert len(report.plain) == len(layers)
    assert report.kl < 1.0
    assert {name.split(".", 3)[3] for name in layers[1:]} == set(plain)


def test_rounds_to_the_nearest() -> None:
    """No float8 number is nearer, with the scale that is stored; rows of zeros stay so."""
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3] = 0
    weight[5] *= 1e-30
    values, scale = float8_by_rows(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.bfloat16, (40, 1))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    exact = weight.float() / scale.float()
    nearest = (exact[..., None] - every).abs().amin(-1)
    assert torch.equal((exact - values.float()).abs(), nearest)
    assert not values[3].float().any()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the demo on a text, as JSON and in words; then it generates."""
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    for output, option in (("one", ["--json"]), ("two", ["-f", str(tmp_path / "prompts.txt")])):
        with pytest.raises(SystemExit) as stop:
            main(["quantize", "-m", "demo", "-q", "-o", str(tmp_path / output), *option])
        out = capsys.readouterr().out
        assert not stop.value.code
        if option == ["--json"]:
            assert json.loads(out)["same_top_1"] > 0.9
        else:
            assert "nats" in out
    with pytest.raises(SystemExit) as stop:
        main(["generate", "-m", str(tmp_path / "one"), "-q", "--max-new-tokens", "4", "Once upon"])
    assert not stop.value.code
    assert capsys.readouterr().out.strip()


def test_refuses(tmp_path: Path) -> None:
    """An output that is there, weights that are quantized or random, a prompt without tokens."""
    config = source(tmp_path / "plain")
    with pytest.raises(ConfigError, match="is there already"):
        quantize(config, tmp_path)
    with pytest.raises(ConfigError, match=r"its folder .* is not there"):
        quantize(config, tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="needs the weights of a checkpoint"):
        quantize(config.model_copy(update={"skip_loading_weights": True}), tmp_path / "made")
    with pytest.raises(RequestError, match="prompt 2: needs tokens"):
        quantize(config, tmp_path / "made", [[1], []])
    write(tmp_path / "fp8", FORMATS["modelopt"])
    with pytest.raises(ConfigError, match=r"are quantized as modelopt FP8 .* already; give plain ones"):
        quantize(AutoDeployConfig(model=str(tmp_path / "fp8"), device="cpu"), tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
