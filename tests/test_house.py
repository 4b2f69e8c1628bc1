"""Imports of the package point one way: down, from the doors to the ground, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import networkx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ad_flashinfer_pass"

# A room is a module or a folder of them. Those of a line may not import one another; each may import any of a
# line above. What is only imported to check types, or within a function, counts too.
ROOMS = """
errors, autodeploy_keys, autodeploy_hook, configs, demo
collector, config, files, known_code
graph
masks, kernels
ops, matching
experts, saved_program
models, runtime, saved_graph
records, states, export_cache, heads
registry
transforms
pipeline
exported, build, torch_compile, autodeploy
inspection, follow
deployment, serving
cli
__init__
__main__
"""
FLOORS = [[room.strip() for room in line.split(",")] for line in ROOMS.strip().splitlines()]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


class Arrow(NamedTuple):
    """An import of one module of the package by another."""

    importer: str
    imported: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.importer} imports {self.imported}"


def files_of(package: Path) -> dict[str, Path]:
    """Modules by name within the package; the folders that are links count as folders."""
    files = {*package.rglob("*.py"), *package.glob("*/*.py")}
    return {
        ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(files)
    }


def arrows_of(package: Path) -> list[Arrow]:
    modules = files_of(package)
    return [arrow for name, file in modules.items() for arrow in _arrows(name, file, set(modules), package)]


def _arrows(importer: str, file: Path, modules: set[str], package: Path) -> Iterator[Arrow]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: an import of the package has its name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] != package.name:
                continue
            # What is no module is something that the module around it has.
            short = name.removeprefix(f"{package.name}").removeprefix(".")
            imported = short if short in modules else short.rpartition(".")[0] or "__init__"
            # The root has nothing of its own but this, which stands before all that it imports.
            if imported != importer and name != f"{package.name}.__version__":
                yield Arrow(importer, imported, f"{file.relative_to(package.parent)}:{node.lineno}")


def room_of(module: str) -> str:
    return module.partition(".")[0]


def upward(arrows: list[Arrow]) -> list[Arrow]:
    """Those that do not lead to a lower floor."""
    return [
        arrow
        for arrow in arrows
        if room_of(arrow.importer) != room_of(arrow.imported)
        and LEVEL[room_of(arrow.importer)] <= LEVEL[room_of(arrow.imported)]
    ]


def circles(arrows: list[Arrow]) -> list[list[Arrow]]:
    """The arrows of each knot of modules that import one another."""
    graph = networkx.DiGraph((arrow.importer, arrow.imported) for arrow in arrows)
    knots = [knot for knot in networkx.strongly_connected_components(graph) if len(knot) > 1]
    return [[arrow for arrow in arrows if {arrow.importer, arrow.imported} <= knot] for knot in knots]


def test_every_module_has_a_room() -> None:
    """A new folder, or a new file beside the folders, is entered in ROOMS, which says what it may import."""
    assert {room_of(module) for module in files_of(ROOT / PACKAGE)} == set(LEVEL)


def test_no_import_leads_upward() -> None:
    """Move what both need to a lower floor; the order of the floors is ROOMS."""
    found = upward(arrows_of(ROOT / PACKAGE))
    assert not found, "\n" + "\n".join(map(str, found))


def test_no_modules_import_one_another() -> None:
    """Within a room, too."""
    found = circles(arrows_of(ROOT / PACKAGE))
    assert not found, "\n" + "\n\n".join("\n".join(map(str, circle)) for circle in found)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("graph/edit.py", "from ad_flashinfer_pass import pipeline"),
        ("graph/edit.py", "import ad_flashinfer_pass.pipeline as p"),
        ("graph/edit.py", "from ad_flashinfer_pass.pipeline import run"),
        ("graph/edit.py", "def f():\n    from ad_flashinfer_pass.pipeline import run"),
        ("graph/edit.py", "if TYPE_CHECKING:\n    from ad_flashinfer_pass.pipeline import run"),
        ("kernels/home.py", "import ad_flashinfer_pass.masks"),
        ("config.py", "from ad_flashinfer_pass import LLM"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, importer: str, line: str) -> None:
    """In any form; also one to the same floor."""
    write(tmp_path, {importer: line, "pipeline.py": "def run(): ...", "masks/__init__.py": ""})
    (found,) = upward(arrows_of(tmp_path / PACKAGE))
    assert found.place == f"{PACKAGE}/{importer}:{1 + line.count(chr(10))}"


def test_a_circle_is_found(tmp_path: Path) -> None:
    """Of three modules in a room, one import within a function; what they only lead to is no part of it."""
    write(
        tmp_path,
        {
            "cli/a.py": "from ad_flashinfer_pass.cli import b, d",
            "cli/b.py": "from ad_flashinfer_pass.cli.c import x",
            "cli/c.py": "x = 1\ndef f():\n    import ad_flashinfer_pass.cli.a",
            "cli/d.py": "",
        },
    )
    (circle,) = circles(arrows_of(tmp_path / PACKAGE))
    assert [arrow.place for arrow in circle] == [
        f"{PACKAGE}/cli/{place}" for place in ("a.py:1", "b.py:1", "c.py:3")
    ]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def kept(source: str) -> set[str]:
    """Names of a module in which it keeps something: containers that start empty, and what is ``global``."""
    found = set()
    tree = ast.parse(source)
    for node in tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        made = ast.unparse(value) if value is not None else ""
        if made in ("{}", "[]", "dict()", "list()", "set()", "Counter()") or made.startswith("ContextVar("):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
            found |= {ast.unparse(target) for target in targets}
    return found | {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}


def test_what_a_process_keeps_is_listed() -> None:
    """In docs/design.md, each with the file and the reason; nothing is listed that is not there."""
    section = (
        (ROOT / "docs" / "design.md").read_text().split("## The state of a process")[1].split("\n## ")[0]
    )
    rows = [row for row in section.splitlines() if row.startswith("| `") or row.startswith("| |")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    found = {name: path for path in (ROOT / PACKAGE).rglob("*.py") for name in kept(path.read_text())}
    assert found.keys() == listed
    for path in found.values():
        assert f"`{path.relative_to(ROOT / PACKAGE)}`" in section


def test_state_is_seen() -> None:
    """A container, a context and a counter; not a table, and not what a function has."""
    source = "a: dict = {}\nb = ContextVar('b')\nc = 0\ndef f():\n    global c\n    d = {}\ne = {1: 2}\n"
    assert kept(source) == {"a", "b", "c"}
