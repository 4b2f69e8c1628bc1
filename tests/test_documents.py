"""What the documents say of the code is what the code says."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import ad_flashinfer_pass
from ad_flashinfer_pass import inspection

ROOT = Path(__file__).parent.parent


def test_the_pages_are_what_the_script_writes() -> None:
    """Whoever changes a key, a public name or its docstring runs ``python docs/generate.py``."""
    script = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert script["updated"]() == (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert script["api"]() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_api_page_has_every_public_name() -> None:
    """With a heading, a place in the tree of errors, or a link to the page of keys."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = [*ad_flashinfer_pass.__all__, *(f"inspection.{name}" for name in inspection.__all__)]
    places = (r"^### {}$", r"-- {} ", r"^`AutoDeployConfig`.*`{}`", r"^`{}`", r"^ +{}$")
    assert [
        name for name in names if not any(re.search(each.format(name), page, re.MULTILINE) for each in places)
    ] == []


def test_the_errors_that_are_explained_are_those_of_the_sources() -> None:
    """A message that is worded anew is worded anew in docs/troubleshooting.md."""
    files = [*(ROOT / "ad_flashinfer_pass").rglob("*.py"), *(ROOT / "transforms").glob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(explained) == page.count("\n### ") > 0
    assert [part for part in explained if not any(part in text for text in texts)] == []


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    """Within the repository."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_hooks_before_a_commit_are_what_ci_runs() -> None:
    """Lint and types, in the same words."""
    (local,) = OmegaConf.load(ROOT / ".pre-commit-config.yaml").repos
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [hook.entry for hook in local.hooks] == [
        "".join(command) for command in re.findall(r'^ +"\$bin/(ruff|mypy)"(.*)$', ci, re.MULTILINE)
    ]


def test_the_diffs_of_the_examples_can_be_applied(tmp_path: Path) -> None:
    """Each to the sources as they are; git counts the lines of every hunk."""
    for diff in re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL):
        for name in re.findall(r"^--- a/(.*)$", diff, re.MULTILINE):
            copy = tmp_path / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text((ROOT / name).read_text())
        subprocess.run(["git", "apply"], input=diff, text=True, check=True, cwd=tmp_path)
