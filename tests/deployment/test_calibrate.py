"""Scales of an fp8 cache: from the model's own K and V, written to a config that serves with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ad_flashinfer_pass import build
from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.deployment.calibrate import HEADROOM, calibrate
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep

TEXTS = ["Once upon a time there was a dog", "The little girl"]
LARGEST = torch.finfo(torch.float8_e4m3fn).max


CONFIG = AutoDeployConfig(max_num_tokens=5, max_batch_size=2, max_seq_len=64)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The demo model with a float32 cache."""
    return build_model(CONFIG)


def test_scales_fit_what_the_model_caches(llm: LLM) -> None:
    """The largest K and V of each layer, in chunks of 5 tokens, lie at half the range of 8 bits."""
    scales = calibrate(CONFIG, TEXTS)
    assert llm.tokenizer is not None
    largest = torch.zeros(len(scales.k_scale), 2)
    for text in TEXTS:
        ids = llm.tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 5):
            llm.model.step([SequenceStep(ids[start : start + 5], start, [1, 2][: -(-(start + 5) // 32)])])
        caches = llm.model.caches.values()
        largest = torch.maximum(largest, torch.stack([c[1:].abs().amax((0, 2, 3, 4)) for c in caches]))
    for found, column in ((scales.k_scale, 0), (scales.v_scale, 1)):
        expected = largest[:, column] * HEADROOM / LARGEST
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=0)


def test_the_config_that_it_writes_serves_with_its_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], llm: LLM
) -> None:
    """Keys of a config stay; with the fp8 cache and its scales the demo goes on nearly as without."""
    given, made = tmp_path / "given.yaml", tmp_path / "made.yaml"
    given.write_text("max_seq_len: 96\nkv_cache_config: {tokens_per_block: 16}\n")
    with pytest.raises(SystemExit) as done:
        main(["calibrate", "-c", str(given), "-o", str(made), *TEXTS])
    assert not done.value.code, capsys.readouterr().err

    config = AutoDeployConfig.from_yaml(made)
    assert (config.max_seq_len, config.kv_cache_config.tokens_per_block) == (96, 16)
    assert config.kv_cache_config.dtype == "fp8"
    assert made.read_text().startswith("# k_scale and v_scale were measured on ")
    quantized = build_model(config)
    caches = quantized.model.caches.values()
    assert {cache.dtype for cache in caches} == {torch.float8_e4m3fn}
    ours, plain = (m.generate(TEXTS[0], max_new_tokens=8)[0].token_ids for m in (quantized, llm))
    assert ours[:6] == plain[:6]


@pytest.fixture
def built(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not built anew for prompts that are refused."""
    monkeypatch.setattr(build, "build_model", lambda config, on_event: llm)


@pytest.mark.usefixtures("built")
def test_calibration_needs_tokens() -> None:
    """Nothing to measure is an error, not a scale of one."""
    with pytest.raises(RequestError, match="each of at least one token"):
        calibrate(AutoDeployConfig(), [[]])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("token", [-1, 1024])
def test_a_token_that_the_model_does_not_have_gives_no_scales(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], token: int
) -> None:
    """The prompt is named and nothing is written."""
    prompts, made = tmp_path / "prompts.jsonl", tmp_path / "made.yaml"
    prompts.write_text(f'{{"prompt": "The dog"}}\n{{"prompt_token_ids": [5, {token}]}}\n')
    with pytest.raises(SystemExit) as done:
        main(["calibrate", "-q", "-f", str(prompts), "-o", str(made)])
    assert done.value.code == 1
    assert capsys.readouterr().err == f"error: prompt 2: token ids must lie within 0..1023, got {token}.\n"
    assert not made.exists()


def test_check_agrees_with_the_scales_that_were_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that looks for errors finds none in what the other command wrote."""
    made = tmp_path / "made.yaml"
    with pytest.raises(SystemExit):
        main(["calibrate", "-q", "-o", str(made), TEXTS[0]])
    with pytest.raises(SystemExit) as done:
        main(["check", "-q", "-c", str(made)])
    assert not done.value.code, capsys.readouterr()
    assert "every attention agrees" in capsys.readouterr().out
