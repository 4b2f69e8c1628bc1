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
