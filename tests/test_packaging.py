"""The layout: one name for the transforms, a package list that is complete, one version."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
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


def test_mapped_packages_are_the_linked_folders() -> None:
    """What the build maps and what the checkout links are the same folder."""
    lines = setup_cfg()["options"]["package_dir"].strip().splitlines()
    mapping = {package.strip(): folder.strip() for package, _, folder in (x.partition("=") for x in lines)}
    assert set(mapping) == {"ad_flashinfer_pass.transforms", "ad_flashinfer_pass.configs"}
    for package, folder in mapping.items():
        assert (ROOT / package.replace(".", "/")).resolve() == ROOT / folder


def test_the_version_has_one_source() -> None:
    """Only __init__.py says the version; setup.cfg reads it there, and the installed package has it."""
    assert setup_cfg()["metadata"]["version"] == "attr: ad_flashinfer_pass.__version__"
    assert metadata.version("ad-flashinfer-pass") == ad_flashinfer_pass.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", ad_flashinfer_pass.__version__)
    assert "version" not in (ROOT / "pyproject.toml").read_text().replace("target-version", "")
