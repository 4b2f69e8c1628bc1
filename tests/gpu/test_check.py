"""``check`` on a GPU, with its own kernels: it agrees, and finds the planted faults at their site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ad_flashinfer_pass.config import AutoDeployConfig, CompileBackend, KvCacheConfig
from ad_flashinfer_pass.inspection.check.check import Prepared, check, check_prepared
from tests.inspection.check import test_check as cpu
from tests.inspection.check.test_check import FAULTS, Planted, Sizes

pytestmark = pytest.mark.gpu

# What the prebuilt XQA modules have; a window that reaches to the first token of the shortest sequence.
SIZES = Sizes("cuda", torch.bfloat16, page=32, window=25, heads=8, kv_heads=2, head_dim=128)


@pytest.fixture(scope="module")
def gpt_oss() -> Prepared:
    return cpu.prepared(SIZES)


def test_the_planted_model_runs_on_the_gpus_own_kernels(gpt_oss: Prepared) -> None:
    """Without a fault all agrees, and every step is a replay."""
    report = check_prepared(gpt_oss, "whole")
    print([(site.prefill, site.decode, site.errors) for site in report.sites])
    assert report.is_ok
    assert {(site.prefill, site.decode) for site in report.sites} == {("fmha_v2", "xqa")}
    assert not report.eager
    assert report.replayed


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_a_fault_at_its_site(gpt_oss: Prepared, fault: str) -> None:
    planted = Planted(gpt_oss)
    FAULTS[fault](planted)
    cpu.assert_only_the_site_is_wrong(planted.check())


def test_finds_a_doubled_fp8_scale() -> None:
    planted = Planted(cpu.prepared(SIZES, dtype="fp8", k_scale=0.05, v_scale=0.05))
    assert planted.check().is_ok
    cpu.fp8_scale_doubled(planted)
    cpu.assert_only_the_site_is_wrong(planted.check())


def test_the_reproducer_shows_the_error_on_the_gpu(gpt_oss: Prepared, tmp_path: Path) -> None:
    planted = Planted(gpt_oss)
    cpu.scale_dropped(planted)
    report = planted.check(tmp_path)
    assert report.reproducer is not None
    done = subprocess.run([sys.executable, report.reproducer], capture_output=True, text=True, check=True)
    shown = float(done.stdout.split("largest error: ")[1].split()[0])
    assert report.sites[cpu.SITE].tolerance < shown <= 3 * max(report.sites[cpu.SITE].errors.values())


@pytest.mark.parametrize(
    "cache", [{}, {"dtype": "fp8", "k_scale": 0.05, "v_scale": 0.05}], ids=["bf16", "fp8"]
)
@pytest.mark.parametrize("compile_backend", ["torch-simple", "torch-cudagraph", "torch-opt"])
def test_a_llama_of_8b_agrees_in_every_way_of_running_it(
    compile_backend: CompileBackend, cache: dict[str, Any], tmp_path: Path
) -> None:
    """Few layers of its real widths, fused and tuned as it is served, captured."""
    transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    config = AutoDeployConfig(
        model=str(tmp_path),
        skip_loading_weights=True,
        device="cuda",
        compile_backend=compile_backend,
        kv_cache_config=KvCacheConfig(**cache),
    )
    report = check(config, reproducer_dir=tmp_path)
    print([(site.prefill, site.decode, site.errors) for site in report.sites])
    print(report.logits, report.eager)
    assert report.is_ok, report.first
    assert report.layers is not None
    assert report.layers.taken == len(report.sites) == 2
    assert report.replayed
    assert all(site.decode.startswith("xqa") for site in report.sites)
