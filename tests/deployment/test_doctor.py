"""``doctor``: what it says about machines that have, lack, or have too old what the kernels need."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.deployment import doctor
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.prebuilt import Manifest, NeededModule


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one H200, FlashInfer, and an nvcc of torch's CUDA; no module is built."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(modules, "problem", lambda: None)
    monkeypatch.setattr(modules, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    said = SimpleNamespace(stdout="Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: said)
    spec = SimpleNamespace(is_aot=False, is_compiled=False)
    for name, provider in select.PROVIDERS.items():
        if provider.capability.modules is not None:
            capability = replace(provider.capability, modules=lambda site, major: [spec])
            monkeypatch.setitem(select.PROVIDERS, name, replace(provider, capability=capability))


def chosen(found: doctor.Diagnosis) -> dict[tuple[str, str], str]:
    (gpu,) = found.gpus
    return {(s.kv_dtype, s.phase): s.name for s in gpu.providers if s.is_chosen}


def test_a_gpu_with_a_compiler_runs_what_compiles_quickly(hopper: None) -> None:
    """FMHA v2 and FA3 are not compiled by a run: the next provider prefills, and the remedy is a command."""
    found = doctor.diagnose()
    assert chosen(found) == {
        ("bfloat16", "prefill"): "tile_prefill",
        ("bfloat16", "decode"): "xqa",
        ("fp8", "prefill"): "tile_prefill",
        ("fp8", "decode"): "xqa",
    }
    for slow in (check for check in found.checks if check.name in ("fmha_v2", "fa3")):
        assert (slow.state, "is not built" in slow.found) == ("note", True)
        assert slow.remedy is not None
        assert slow.remedy.startswith("ad-flashinfer-pass prebuild")
    assert all(state.was_run == (state.name != "trtllm_gen") for state in found.gpus[0].providers)


def test_without_compiler_prebuilt_modules_are_what_is_missing(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No nvcc: nothing can be compiled, the reference runs, and the way out is prebuild."""
    monkeypatch.setattr(modules, "nvcc", lambda: None)
    found = doctor.diagnose()
    assert set(chosen(found).values()) == {"tile_prefill", "split_decode"}, "what needs no FlashInfer"
    (nvcc,) = (check for check in found.checks if check.name == "nvcc")
    assert (nvcc.state, "prebuild" in str(nvcc.remedy)) == ("missing", True)


def test_a_toolkit_of_another_cuda_is_noted(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules made by another major version may not load."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (nvcc,) = (check for check in doctor.diagnose().checks if check.name == "nvcc")
    assert nvcc.state == "note"
    assert nvcc.found.endswith("release 13.0; torch is for CUDA 12.8")


def test_an_old_flashinfer_comes_with_the_command_that_replaces_it(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is installed, what is needed, and how to get it; without a GPU it is only noted."""
    found = "flashinfer-python 0.6.1 is installed, 0.6.11 or newer is needed"
    monkeypatch.setattr(modules, "problem", lambda: found)
    (check,) = (check for check in doctor.diagnose().checks if check.name == "FlashInfer")
    assert check.state == "missing"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (check,) = (check for check in doctor.diagnose().checks if check.name == "FlashInfer")
    assert check.state == "note"
    assert check.found == found
    assert check.remedy == "pip install 'flashinfer-python>=0.6.11'"


def test_each_provider_says_what_it_has_only_with_a_newer_flashinfer(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode goes to the next provider; beside TensorRT-LLM its FlashInfer stays, and the remedy says so."""
    here: dict[str, Version | None] = {"flashinfer-python": Version("0.6.16"), "tensorrt-llm": None}
    monkeypatch.setattr(modules, "installed", lambda package="flashinfer-python": here[package])

    def notes() -> dict[str, doctor.Check]:
        return {c.name: c for c in doctor.diagnose().checks if " lacks " in c.found}

    assert chosen(doctor.diagnose())["bfloat16", "decode"] == "split_decode"
    assert chosen(doctor.diagnose())["fp8", "decode"] == "xqa"
    assert notes().keys() == {"xqa", "fa2"}
    assert notes()["fa2"].found == (
        "flashinfer-python 0.6.16 lacks plans for so many query heads a KV head; 0.7.1 has it"
    )
    assert notes()["fa2"].remedy == "pip install 'flashinfer-python>=0.7.1'"
    here["tensorrt-llm"] = Version("1.3.0")
    assert notes()["fa2"].remedy == (
        "leave it, tensorrt-llm 1.3.0 pins it; or install a tensorrt-llm that pins 0.7.1 or newer"
    )
    here["flashinfer-python"] = Version("0.7.4")
    assert not notes()


def test_too_old_a_transformers_is_noted_and_the_rest_is_said_all_the_same(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside TensorRT-LLM, where the plugin runs without it; so too if transformers cannot be imported."""
    assert "models" not in {check.name for check in doctor.diagnose().checks}
    monkeypatch.delitem(sys.modules, "ad_flashinfer_pass.models", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.5.4"))
    (check,) = (check for check in doctor.diagnose().checks if check.name == "models")
    assert check.state == "note"
    assert "transformers 5.5.4 is installed, 5.17 or newer is needed" in check.found
    monkeypatch.setitem(sys.modules, "transformers", None)
    (check,) = (check for check in doctor.diagnose().checks if check.name == "models")
    assert "import of transformers halted" in check.found


@pytest.mark.parametrize(
    ("cubins", "said"),
    [(None, "is not installed"), ("0.6.13", "0.6.13 is not of flashinfer-python 0.7.4"), ("0.7.4", None)],
)
def test_binaries_of_trtllm_gen_are_of_flashinfers_version(
    hopper: None, monkeypatch: pytest.MonkeyPatch, cubins: str | None, said: str | None
) -> None:
    """PyPI has none for this FlashInfer, so the remedy is FlashInfer's own command."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    here = {"flashinfer-python": "0.7.4", "flashinfer-cubin": cubins}
    monkeypatch.setattr(doctor, "_version", lambda name: here.get(name, "1.0"))
    found = [check for check in doctor.diagnose().checks if check.name == "cubins"]
    assert bool(found) == (said is not None)
    for check in found:
        assert f"flashinfer-cubin {said}: " in check.found
        assert str(check.remedy).startswith(
            "`flashinfer install-cubin-wheel` takes flashinfer-cubin of the same"
        )


def test_torch_is_named_with_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the package leaves out for which CUDA it is."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert doctor.diagnose().packages["torch"] == "2.14.1+cu130"


def test_a_folder_of_prebuilt_kernels_is_looked_at(
    hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether kernel_dir would take it here: GPU, version of FlashInfer, and all that its manifest lists."""
    monkeypatch.setattr(doctor, "_version", lambda name: "0.7.2" if name == "flashinfer-python" else "1.0")

    def check() -> doctor.Check:
        return next(c for c in doctor.diagnose(tmp_path).checks if c.name == "kernel_dir")

    assert "not a folder of prebuilt kernels" in check().found
    module = NeededModule(name="xqa_1", provider="xqa", phases=["decode"], num_sites=4)
    for sm, expected in ((90, "xqa_1 is missing"), (89, "GPU 0 is SM90, xqa_1 is missing")):
        made = Manifest(sm=sm, flashinfer="0.7.2", nvcc="", modules=[module], notes=[])
        (tmp_path / "manifest.json").write_text(made.model_dump_json())
        assert check().found == f"1 modules for SM{sm} of flashinfer-python 0.7.2; {expected}"
        assert check().state == "missing"
    (tmp_path / "manifest.json").write_text(made.model_copy(update={"sm": 90}).model_dump_json())
    (tmp_path / "xqa_1").mkdir()
    (tmp_path / "xqa_1" / "xqa_1.so").touch()
    assert check().state == "ok"


def test_the_command_says_what_never_ran_and_the_state_of_the_hook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU nothing is an error; data has what the tables have."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as done:
            main(["doctor", *arguments])
        assert not done.value.code
        out = capsys.readouterr().out
        assert "trtllm_gen: never run on hardware" in " ".join(out.split())
        assert "FLASHINFER_TRTLLM_AUTODEPLOY" in out
    found = json.loads(out)
    assert found["gpus"] == []
    assert found["packages"]["torch"] == torch.__version__


def test_says_which_gpus_map_no_memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over which several ranks sum; NCCL does it then."""
    for without, state, found in (
        (set(), "ok", "between all 3 GPUs"),
        (
            {(0, 2), (2, 0)},
            "note",
            "not from cuda:0 to cuda:2, cuda:2 to cuda:0: NCCL makes the sums of ranks",
        ),
    ):
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair, no=without: pair not in no)
        (check,) = doctor._peer_checks(3)
        assert (check.state, check.found) == (state, found)
