"""The import hook, as a wheel installs it, in processes that import nothing of this package themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ad_flashinfer_pass.autodeploy_hook import PACKAGES, PTH, VARIABLE, Finder, install

ROOT = Path(__file__).parent.parent.parent

AUTO_DEPLOY = """
import sys
from tests.autodeploy import standin
from tests.autodeploy.standin import capture, insertion, interface, source_ops
NEWEST = standin.GENERATIONS[-1]
"""
FILES = {
    "__init__.py": AUTO_DEPLOY + "library = source_ops.define(True)\n",
    "custom_ops/__init__.py": "",
    "custom_ops/attention_interface.py": AUTO_DEPLOY
    + "globals().update(interface.attention_interface(NEWEST))\n",
    "transform/library/kvcache.py": AUTO_DEPLOY + "globals().update(insertion.kvcache(NEWEST))\n",
    "compile/piecewise_utils.py": AUTO_DEPLOY + "globals().update(capture.piecewise_utils(NEWEST))\n",
    "export/library/unified_attn.py": AUTO_DEPLOY
    + "HF_ATTN_KWARGS_MAPPING = dict(source_ops.HF_ATTN_KWARGS_MAPPING)\n",
}
WORKER = """
import {package}.custom_ops.attention_interface as interface
import sys, ad_flashinfer_pass
print("flashinfer_trtllm" in interface.AttentionRegistry._attention_registry, ad_flashinfer_pass.__file__)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel and an AutoDeploy."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("ad_flashinfer_pass", "transforms", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(work)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    venv.create(work / "venv", with_pip=False)
    site = next((work / "venv/lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = sysconfig.get_path("purelib")
    # Dependencies of this environment; the .pth files in it are not read from there.
    (site / "zz_dependencies.pth").write_text(f"{here}\n{ROOT}\n")
    for package in PACKAGES:
        for name, text in FILES.items():
            path = site / package.replace(".", "/") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return work / "venv/bin/python"


def run(python: Path, code: str, value: str | None) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in (VARIABLE, "PYTHONPATH")}
    environment |= {} if value is None else {VARIABLE: value}
    command = [str(python), "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_worker_registers_the_backend_if_the_variable_is_set(python: Path, package: str) -> None:
    """With the variable, importing AutoDeploy is enough, on its own, too; the package is the wheel's."""
    registered, _, file = run(python, WORKER.format(package=package), "1").partition(" ")
    assert registered == "True"
    assert file.startswith(str(python.parent.parent))


def test_a_worker_registers_nothing_by_default(python: Path) -> None:
    """Without the variable, AutoDeploy is as it was."""
    assert run(python, WORKER.format(package=PACKAGES[0]), None).split()[0] == "False"


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_python_starts_without_importing_torch(python: Path, value: str | None) -> None:
    """What Python reads at every start costs next to nothing, with the hook and without."""
    code = f"import sys; print(sorted({{'torch', 'transformers', 'typer'}} & set(sys.modules)), '{PTH}')"
    assert run(python, code, value) == f"[] {PTH}"


def test_doctor_is_told_whether_the_hook_is_active(python: Path) -> None:
    """Where the file is, what the variable says, and what follows."""
    code = "from ad_flashinfer_pass.deployment.doctor import _autodeploy; print(*_autodeploy(), sep='\\n')"
    assert "is imported with AutoDeploy" not in run(python, code, None)
    installed, active = run(python, code, "1").splitlines()
    assert installed.endswith(f"site-packages/{PTH}")
    assert active == f"{VARIABLE}: 1; in this process the plugin is imported with AutoDeploy"
    assert (
        run(python, code, None).splitlines()[1].endswith("not set; in this process the plugin is not active")
    )


@pytest.mark.parametrize(
    ("value", "want"), [("1", True), ("true", True), ("0", False), ("off", False), ("", False)]
)
def test_values_of_the_variable(monkeypatch: pytest.MonkeyPatch, value: str, want: bool) -> None:
    """Only what means no is no."""
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    install()
    assert any(isinstance(finder, Finder) for finder in sys.meta_path) is want


def test_the_package_without_autodeploy_says_what_to_do() -> None:
    """Importing the plugin where there is no TensorRT-LLM is an error that names it."""
    code = "import ad_flashinfer_pass.autodeploy"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "TensorRT-LLM's AutoDeploy is not installed, none of tensorrt_llm." in result.stderr
