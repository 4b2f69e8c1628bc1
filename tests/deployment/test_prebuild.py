"""Which modules a config needs on a GPU that is not here, and the folder that they are compiled into."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from packaging.version import Version

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, KvDtype
from ad_flashinfer_pass.deployment import prebuild
from ad_flashinfer_pass.errors import ConfigError, KernelError
from ad_flashinfer_pass.inspection import stages
from ad_flashinfer_pass.kernels import modules, prebuilt
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site

CONFIG = AutoDeployConfig(dtype="bfloat16")
FP8 = AutoDeployConfig(dtype="bfloat16", kv_cache_config=KvCacheConfig(dtype="fp8"))


class Spec:
    """A module of FlashInfer that compiles at once."""

    compiled: ClassVar[list[str]] = []

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.jit_library_path = folder / "cache" / f"{name}.so"
        self.is_written = False

    def write_ninja(self) -> None:
        """What is compiled, for which architecture."""
        self.is_written = True

    def build(self, verbose: bool) -> None:
        """Make the library, unless its name says that it does not compile."""
        if "broken" in self.name:
            raise RuntimeError("nvcc failed")
        assert self.is_written
        Spec.compiled.append(self.name)
        self.jit_library_path.parent.mkdir(exist_ok=True)
        self.jit_library_path.write_text(self.name)


class CompilationContext:
    """The architectures that FlashInfer compiles for."""

    def __init__(self) -> None:
        self.TARGET_CUDA_ARCHS = set(os.environ.get("FLASHINFER_CUDA_ARCH_LIST", "8.9").split())


@cache
def sites(kv_dtype: KvDtype) -> stages.Stages:
    """Those of the demo model, found once."""
    config = AutoDeployConfig(dtype="bfloat16", kv_cache_config=KvCacheConfig(dtype=kv_dtype))
    return stages.run_stages(config, stages=["insert_cached_attention"])


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A FlashInfer whose modules are named after provider, KV dtype and architecture, and an nvcc."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    both = {"auto": sites("auto"), "fp8": sites("fp8")}
    monkeypatch.setattr(stages, "run_stages", lambda config, **_: both[config.kv_cache_config.dtype])
    monkeypatch.setattr(modules, "problem", lambda: None)
    monkeypatch.setattr(modules, "nvcc", lambda: str(nvcc))
    monkeypatch.setattr(prebuild, "version", lambda name: "0.7.2")
    monkeypatch.setattr(prebuilt, "version", lambda name: "0.7.2")
    core, env = ModuleType("flashinfer.jit.core"), ModuleType("flashinfer.jit.env")
    context = ModuleType("flashinfer.compilation_context")
    context.CompilationContext = CompilationContext  # type: ignore[attr-defined]
    core.current_compilation_context = CompilationContext()  # type: ignore[attr-defined]
    package = SimpleNamespace(core=core, env=env)
    for name, module in {
        "": SimpleNamespace(jit=package),
        ".jit": package,
        ".jit.core": core,
        ".jit.env": env,
        ".compilation_context": context,
    }.items():
        monkeypatch.setitem(sys.modules, f"flashinfer{name}", module)
    for name, provider in select.PROVIDERS.items():

        def make(site: Site, major: int, name: str = name) -> list[Any]:
            return [Spec(f"{name}_{str(site.kv_dtype)[6:]}_{major}", tmp_path)]

        no_modules = dict.fromkeys(("reference", "split_decode", "tile_prefill", "latent"))
        given = {**no_modules, "trtllm_gen": lambda site, major: []}.get(name, make)
        capability = replace(provider.capability, modules=given)
        monkeypatch.setitem(select.PROVIDERS, name, replace(provider, capability=capability))
    Spec.compiled = []


@pytest.mark.parametrize(
    ("config", "sm", "skip", "expected"),
    [
        (CONFIG, 90, (), {"fmha_v2_bfloat16_9": ["prefill"], "xqa_bfloat16_9": ["decode"]}),
        (CONFIG, 90, ("fmha_v2",), {"fa3_bfloat16_9": ["prefill"], "xqa_bfloat16_9": ["decode"]}),
        (CONFIG, 90, ("fmha_v2", "fa3"), {"xqa_bfloat16_9": ["decode"]}),
        (CONFIG, 89, (), {"fa2_bfloat16_8": ["prefill", "decode"]}),
        (FP8, 90, (), {"xqa_float8_e4m3fn_9": ["decode"]}),
        (CONFIG, 100, (), {}),
    ],
    ids=["hopper", "without_fmha_v2", "quick_to_compile", "ada", "hopper_fp8", "blackwell"],
)
def test_needs_are_those_of_the_target(
    config: AutoDeployConfig, sm: int, skip: tuple[str, ...], expected: dict[str, list[str]]
) -> None:
    """The providers of that GPU; each module once for the four layers, with its phases."""
    _, found, notes = prebuild.needed_modules(config, sm, skip)
    assert {module.name: module.phases for module in found} == expected
    assert {module.num_sites for module in found} <= {4}
    assert bool(notes) == (sm == 100 or skip == ("fmha_v2", "fa3") or config is FP8)


def test_needs_are_those_of_the_version_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run will refuse, because FlashInfer is too old for it, is not compiled either."""
    monkeypatch.setattr(modules, "installed", lambda package="flashinfer-python": Version("0.6.16.post4"))
    _, found, notes = prebuild.needed_modules(CONFIG, 90)
    assert [module.name for module in found] == ["fmha_v2_bfloat16_9"]
    assert notes == ["decode by split_decode: a Triton kernel, compiled in seconds by the first call"]
    _, found, notes = prebuild.needed_modules(FP8, 90)
    assert [module.name for module in found] == ["xqa_float8_e4m3fn_9"]


def test_flashinfer_compiles_for_the_target_and_then_again_for_what_is_here() -> None:
    """The set of architectures is changed in place, for FlashInfer's modules hold it by other names."""
    archs = sys.modules["flashinfer.jit.core"].current_compilation_context.TARGET_CUDA_ARCHS
    for sm, expected in ((89, {"8.9"}), (90, {"9.0a"}), (120, {"12.0a"})):
        with prebuild.target(sm):
            assert archs == expected
        assert archs == {"8.9"}


def test_extends_have_modules_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a config that sends them to XQA; of sites that it does not decode there are none."""
    for sm, expected in ((90, ["fmha_v2_bfloat16_9", "xqa_bfloat16_9", "xqa_4"]), (89, ["fa2_bfloat16_8"])):
        run = sites("auto")
        monkeypatch.setattr(run.ctx.sequence_info, "max_extend_len", 4)
        extends = replace(
            select.PROVIDERS["xqa"], extend_modules=lambda site, n: [Spec(f"xqa_{n}", tmp_path)]
        )
        monkeypatch.setitem(select.PROVIDERS, "xqa", extends)
        _, found, _ = prebuild.needed_modules(CONFIG, sm)
        assert [module.name for module in found] == expected


def test_compiles_into_a_folder_and_keeps_what_is_there(tmp_path: Path) -> None:
    """One library a module and a manifest; a second call compiles only what is new."""
    folder = tmp_path / "kernels"
    made = prebuild.prebuild(CONFIG, 90, folder, skip=["fmha_v2"])
    assert sorted(Spec.compiled) == ["fa3_bfloat16_9", "xqa_bfloat16_9"]
    assert prebuilt.read_manifest(folder) == made
    assert (made.sm, made.flashinfer, made.nvcc) == (90, "0.7.2", "release 13.0")
    for name in Spec.compiled:
        assert (folder / name / f"{name}.so").read_text() == name
    assert sorted(path.name for path in folder.iterdir()) == sorted([*Spec.compiled, "manifest.json"])

    Spec.compiled = []
    made = prebuild.prebuild(CONFIG, 90, folder)
    assert Spec.compiled == ["fmha_v2_bfloat16_9"]
    assert len(made.modules) == 3


def test_a_folder_is_of_one_gpu(tmp_path: Path) -> None:
    """Kernels for two GPUs have the same names, so they do not share a folder."""
    prebuild.prebuild(CONFIG, 90, tmp_path / "kernels", skip=["fmha_v2"])
    with pytest.raises(ConfigError, match=r"for compute capability 90 of FlashInfer .*, not 80 of "):
        prebuild.prebuild(CONFIG, 80, tmp_path / "kernels")


def test_what_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's words are in the error, and the other modules in the folder."""
    provider = select.PROVIDERS["xqa"]
    broken = replace(provider.capability, modules=lambda site, major: [Spec("broken", tmp_path)])
    monkeypatch.setitem(select.PROVIDERS, "xqa", replace(provider, capability=broken))
    folder = tmp_path / "kernels"
    with pytest.raises(KernelError, match="module broken does not compile: nvcc failed"):
        prebuild.prebuild(CONFIG, 90, folder, jobs=1)
    assert [module.name for module in prebuilt.read_manifest(folder).modules] == ["fmha_v2_bfloat16_9"]


def test_an_unknown_provider_lists_the_known() -> None:
    """A slip in --skip must not leave everything in."""
    with pytest.raises(ConfigError, match="no kernel provider 'fmha'; there are xqa, trtllm_gen, "):
        prebuild.needed_modules(CONFIG, 90, ["fmha"])


@pytest.mark.parametrize("sm", [9, 900])
def test_no_such_compute_capability(sm: int) -> None:
    """One that no GPU has would be served by the reference alone."""
    with pytest.raises(ConfigError, match=f"without its point, 90 for 9.0, got {sm}"):
        prebuild.needed_modules(CONFIG, sm)


def test_a_folder_is_used_only_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer loads from it on such a GPU; on another the error says how to get one."""
    folder, device = tmp_path / "kernels", torch.device("cuda")
    prebuild.prebuild(CONFIG, 90, folder, skip=["fmha_v2"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    prebuilt.use(folder, device)
    assert folder == sys.modules["flashinfer.jit.env"].FLASHINFER_AOT_DIR

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ConfigError, match=r"here are 89 and 0.7.2: prebuild again, with --sm 89"):
        prebuilt.use(folder, device)
    with pytest.raises(ConfigError, match="not a folder of prebuilt kernels"):
        prebuilt.use(tmp_path, device)


def test_modules_of_another_flashinfer_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.7.2.post1 where 0.7.4 is installed: neither used nor added to, and the folder stays as it is."""
    folder, env = tmp_path / "kernels", sys.modules["flashinfer.jit.env"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(prebuild, "version", lambda name: "0.7.2.post1")
    monkeypatch.setattr(prebuilt, "version", lambda name: "0.7.2.post1")
    made = prebuild.prebuild(CONFIG, 90, folder, skip=["fmha_v2"])
    for name in ("0.7.4", "0.7.2", "0.7.2.post1+local"):
        monkeypatch.setattr(prebuild, "version", lambda package, name=name: name)
        monkeypatch.setattr(prebuilt, "version", lambda package, name=name: name)
        said = f"flashinfer-python 0.7.2.post1, here are 90 and {name}: prebuild again"
        with pytest.raises(ConfigError, match=re.escape(said)):
            prebuilt.use(folder, torch.device("cuda"))
        with pytest.raises(ConfigError, match=re.escape(f"FlashInfer 0.7.2.post1, not 90 of {name}")):
            prebuild.prebuild(CONFIG, 90, folder)
    assert not hasattr(env, "FLASHINFER_AOT_DIR")
    assert prebuilt.read_manifest(folder) == made


def test_the_command_lists_and_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--list compiles nothing; --output does; neither or both is a wrong usage."""
    with pytest.raises(SystemExit) as done:
        main(["prebuild", "--sm", "90", "--dtype", "bfloat16", "--list", "--json"])
    assert not done.value.code
    listed = json.loads(capsys.readouterr().out)
    assert [module["name"] for module in listed["modules"]] == ["fmha_v2_bfloat16_9", "xqa_bfloat16_9"]
    assert not Spec.compiled

    with pytest.raises(SystemExit) as done:
        main(["prebuild", "--sm", "90"])
    assert done.value.code == 2
    assert "--output" in capsys.readouterr().err
