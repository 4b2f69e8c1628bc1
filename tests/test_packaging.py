"""The layout: one name for the transforms, a package list that is complete, one version."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ad_flashinfer_pass

ROOT = Path(__file__).parent.parent


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_transforms_have_one_name() -> None:
    """From the repository root ``import transforms`` is refused: it would register everything twice."""
    command = [sys.executable, "-c", "import transforms"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: import ad_flashinfer_pass.transforms, not transforms"
    )


def test_package_list_equals_the_folders_that_hold_python_files() -> None:
    """A folder that setup.cfg forgets would be missing from the wheel only; the links count as folders."""
    listed = setup_cfg()["options"]["packages"].split()
    package = ROOT / "ad_flashinfer_pass"
    # rglob does not enter the links transforms and configs, which lie directly in the package.
    files = [*package.rglob("*.py"), *package.glob("*/*.py")]
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in files}
    assert sorted(listed) == sorted(folders)


def test_an_editable_install_is_a_path(tmp_path: Path) -> None:
    """Of a .pth file, mypy, pyright and editors follow folders alone; that for AutoDeploy is beside it."""
    source = tmp_path / "source"
    for name in ("ad_flashinfer_pass", "transforms", "configs"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})",
    ]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        texts = {name: files.read(name).decode() for name in files.namelist() if "dist-info" not in name}
    hook = texts.pop("ad_flashinfer_pass_autodeploy.pth")
    assert "autodeploy_hook.install()" in hook
    ((name, text),) = texts.items()
    assert name.endswith(".pth")
    assert text.split() == [str(source)]


def test_the_version_has_one_source() -> None:
    """Only __init__.py says the version; setup.cfg reads it there, and the installed package has it."""
    assert setup_cfg()["metadata"]["version"] == "attr: ad_flashinfer_pass.__version__"
    assert metadata.version("ad-flashinfer-pass") == ad_flashinfer_pass.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", ad_flashinfer_pass.__version__)
    assert "version" not in (ROOT / "pyproject.toml").read_text().replace("target-version", "")


# What TensorRT-LLM main pins: both ends of a range, and NVIDIA's build of torch, which its containers have.
PINS = {
    # security_scanning/pyproject.toml at 013ac2b (April 2026); torchvision 0.26 is of torch 2.11.
    "2026-04": {
        "torch": ["2.11.0"],
        "transformers": ["4.57.3"],
        "tokenizers": ["0.22.0"],
        "numpy": ["2.0.0", "2.3.5"],
        "pydantic": ["2.9.1", "2.13.0"],
        "omegaconf": ["2.3.0"],
        "packaging": ["24.0"],
    },
    # requirements.txt as changed by pull requests 14456 (transformers, 2026-05-22), 16530 and 18428
    # (flashinfer-python, 2026-07-17 and 2026-08-31), 18126 and 18743 (torch, 2026-08-24 and 2026-09-14).
    "2026-09": {
        "torch": ["2.12.0a0+nv26.5", "2.13.0", "2.14.0a0+nv26.8"],
        "transformers": ["5.3.0", "5.5.4"],
        "tokenizers": ["0.22.0"],
        "numpy": ["2.0.0", "2.3.5"],
        "pydantic": ["2.9.1", "2.13.0"],
        "omegaconf": ["2.3.0"],
        "packaging": ["24.0"],
        "flashinfer-python": ["0.6.11", "0.6.11.post1", "0.6.12", "0.6.14", "0.6.15", "0.6.16", "0.6.18"],
    },
}


@pytest.mark.parametrize("month", PINS)
def test_nothing_that_tensorrt_llm_pins_changes_beside_it(month: str) -> None:
    """Each of its versions satisfies our requirement, with the extra ``gpu`` too, so that pip leaves it."""
    options = setup_cfg()
    lines = options["options"]["install_requires"] + options["options.extras_require"]["gpu"]
    ours = {r.name: r for r in (Requirement(line) for line in lines.split())}
    assert PINS["2026-09"].keys() <= ours.keys()
    for name, versions in PINS[month].items():
        for version in versions:
            assert ours[name].specifier.contains(version, prereleases=True), (name, version)


def test_what_the_plugin_is_made_of_needs_no_transformers() -> None:
    """Its ops and kernels are imported where transformers is older than the models need, or broken."""
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "import ad_flashinfer_pass.ops, ad_flashinfer_pass.kernels.attention.select, "
        "ad_flashinfer_pass.deployment.doctor"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_say_which_transformers_they_need() -> None:
    """TensorRT-LLM's is older: one line with both versions and the way out, before anything half works."""
    code = "import transformers; transformers.__version__ = '5.5.4'; import ad_flashinfer_pass.models.loading"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip().splitlines()[-1] == (
        "ad_flashinfer_pass.errors.ConfigError: transformers 5.5.4 is installed, 5.17 or newer is needed: "
        "pip install 'transformers>=5.17,<6'. Beside TensorRT-LLM only the plugin runs."
    )
