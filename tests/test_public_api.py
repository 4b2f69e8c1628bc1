"""What users may import, and what importing costs."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ad_flashinfer_pass
from ad_flashinfer_pass import errors


def python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.mark.parametrize("name", ad_flashinfer_pass.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    """Each name of __all__ is there, has a docstring, and calls itself by that name."""
    value = getattr(ad_flashinfer_pass, name)
    assert value.__name__ == name
    assert value.__doc__


def test_public_names_are_listed_and_sorted_out() -> None:
    """dir() shows the public names though they are loaded late; an unknown one is an AttributeError."""
    assert set(ad_flashinfer_pass.__all__) <= set(dir(ad_flashinfer_pass))
    with pytest.raises(AttributeError, match="module 'ad_flashinfer_pass' has no attribute 'nothing'"):
        ad_flashinfer_pass.nothing  # noqa: B018


def test_importing_the_package_is_lean(tmp_path: Path) -> None:
    """``import ad_flashinfer_pass`` imports no model library and no kernels, not even torch."""
    code = "import sys, ad_flashinfer_pass; print(*(m for m in sys.modules if '.' not in m))"
    loaded = set(python(code, tmp_path).split())
    assert not loaded & {"torch", "transformers", "flashinfer", "tensorrt_llm", "triton", "numpy", "pydantic"}


def test_using_the_config_and_the_pass_leaves_the_gpu_and_the_model_libraries_alone(tmp_path: Path) -> None:
    """Config, transforms and kernels need torch alone; CUDA is not initialised by importing them."""
    code = (
        "import sys, torch, ad_flashinfer_pass.pipeline; ad_flashinfer_pass.AutoDeployConfig()\n"
        "print(torch.cuda.is_initialized(), *(m for m in ('transformers', 'flashinfer') if m in sys.modules))"
    )
    assert python(code, tmp_path) == "False"


def test_every_error_is_public() -> None:
    """Whatever the package raises by design can be caught by a name of the package."""
    classes = inspect.getmembers(
        errors, lambda value: inspect.isclass(value) and issubclass(value, Exception)
    )
    assert {name for name, _ in classes} <= set(ad_flashinfer_pass.__all__)


MYPY = """
[mypy]
strict = true
[mypy-torch.*,transformers.*]
# Whose types a user's program sees little of; to read them takes half a minute.
follow_imports = skip
"""
PYRIGHT = {
    "typeCheckingMode": "standard",
    "reportUnnecessaryTypeIgnoreComment": "error",
    "include": ["user.py"],
}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_read_a_users_program(checker: str, tmp_path: Path) -> None:
    """From another folder, by the installed package: typed_user.py has the types and the errors that it says.

    An editable install must be a path, not a hook: where it is one, ``pip install -e .`` again.
    """
    shutil.copy(Path(__file__).with_name("typed_user.py"), tmp_path / "user.py")
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    options = ["user.py"] if checker == "mypy" else ["--pythonpath", sys.executable]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")
    }
    command = [sys.executable, "-m", checker, *options]
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
