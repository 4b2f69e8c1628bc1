"""Every file that a command writes, with a fault at every step of the way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ad_flashinfer_pass import inspection
from ad_flashinfer_pass.deployment import calibrate
from ad_flashinfer_pass.files import write_file
from ad_flashinfer_pass.graph.data import GraphData
from ad_flashinfer_pass.graph.stage_writer import StageWriter
from ad_flashinfer_pass.inspection import stages
from ad_flashinfer_pass.inspection.stages import read_graph
from tests import saved_programs
from tests.faults import harness
from tests.faults.harness import Runner, assert_one_line, at_step, contents, raising

OLD = "old: 1\n"


class Writer(NamedTuple):
    """A command that writes a file."""

    args: tuple[str, ...]
    """``{}`` stands for the file."""
    name: str
    before: str = OLD
    """What stands there."""


WRITERS = {
    "generate": Writer(("generate", "one", "two", "-q", "-o", "{}"), "out.jsonl"),
    "calibrate": Writer(("calibrate", "one", "-q", "-o", "{}"), "fp8.yaml"),
    "migrate": Writer(("migrate", "{}", "-q"), "config.yaml", "attn_backend: trtllm\nattn_page_size: 64\n"),
    "dump": Writer(("dump", "-q", "-o", "{}"), "graph.txt"),
    "dump --json": Writer(("dump", "-q", "--json", "-o", "{}"), "graph.json"),
    "dump graphml": Writer(("dump", "-q", "-o", "{}"), "graph.graphml"),
    "report": Writer(("report", "-q", "-o", "{}"), "report.html"),
    "report --json": Writer(("report", "-q", "--json", "-o", "{}"), "report.json"),
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphData:
    return read_graph(saved_programs.write(tmp_path_factory.mktemp("graph") / "small.pt2"))


@pytest.fixture
def writing(run: Runner, graph: GraphData, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """The command, with what it would write at hand."""
    scales: dict[str, Any] = {"k_scale": [0.5], "v_scale": [0.5]}
    monkeypatch.setattr(calibrate, "calibrate", lambda *args, **kwargs: scales)
    monkeypatch.setattr(calibrate, "as_yaml", lambda data, scales: f"{data} {scales}\n")
    monkeypatch.setattr(inspection, "dump", lambda *args, **kwargs: graph)
    monkeypatch.setattr(inspection, "report", lambda *args, **kwargs: {"title": "a report"})
    monkeypatch.setattr(
        import_module("ad_flashinfer_pass.inspection.report"),
        "to_html",
        lambda found: f"<html>{found}</html>",
    )
    return run


def run_into(
    writer: Writer, folder: Path, command: Runner, at: Callable[[], Any] = lambda: None
) -> tuple[harness.Ended, Path]:
    file = folder / writer.name
    file.write_text(writer.before)
    file.chmod(0o600)
    at()
    return command(*(str(file) if arg == "{}" else arg for arg in writer.args)), file


@pytest.mark.parametrize("name", WRITERS)
def test_the_commands_of_this_table_write(name: str, writing: Runner, tmp_path: Path) -> None:
    """Without a fault: something new, whole, with the old mode and nothing beside it."""
    ended, file = run_into(WRITERS[name], tmp_path, writing)
    assert (ended.code, ended.err) == (0, "")
    assert file.read_text() != WRITERS[name].before
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(name: str, room: int, writing: Runner, tmp_path: Path) -> None:
    """The kernel refuses what is beyond so many bytes."""
    writer = WRITERS[name]
    file = tmp_path / writer.name
    file.write_text(writer.before)
    with harness.disk_full_after(room):
        ended = writing(*(str(file) if arg == "{}" else arg for arg in writer.args))
    assert_one_line(ended, (1,), str(file), "File too large")
    assert contents(tmp_path) == {writer.name: writer.before.encode()}


@pytest.mark.parametrize("number", harness.ERRORS)
@pytest.mark.parametrize("step", harness.STEPS)
@pytest.mark.parametrize("name", WRITERS)
def test_error_at_a_step(
    name: str, step: str, number: int, writing: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, file = run_into(
        WRITERS[name], tmp_path, writing, lambda: at_step(monkeypatch, step, raising(number))
    )
    assert_one_line(ended, (1, 2), str(file))
    assert contents(tmp_path) == {file.name: WRITERS[name].before.encode()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", harness.STEPS)
@pytest.mark.parametrize("name", ["generate", "migrate", "dump", "calibrate"])
def test_signal_at_a_step(
    name: str,
    step: str,
    number: signal.Signals,
    writing: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old file stands until the new one is complete; its name changes in one step."""

    def fault() -> None:
        signal.raise_signal(number)

    is_int = number == signal.SIGINT
    before = signal.signal(
        number, signal.default_int_handler if is_int else signal.SIG_DFL
    )  # under nohup, too
    try:
        ended, file = run_into(WRITERS[name], tmp_path, writing, lambda: at_step(monkeypatch, step, fault))
    finally:
        signal.signal(number, before)
    assert ended.code == 128 + number
    assert ended.err.startswith("interrupted")
    assert len(ended.err.splitlines()) == 1
    assert contents(tmp_path) == {file.name: WRITERS[name].before.encode()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_where_a_file_should_be(name: str, writing: Runner, tmp_path: Path) -> None:
    writer = WRITERS[name]
    folder = tmp_path / writer.name
    folder.mkdir()
    ended = writing(*(str(folder) if arg == "{}" else arg for arg in writer.args))
    assert_one_line(ended, (1, 2), str(folder))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "migrate"])
@pytest.mark.parametrize("place", ["missing/{}", "file/{}", "n" * 300, "/proc/self/{}", "/dev/full"])
def test_a_place_that_cannot_be_written(
    name: str, place: str, writing: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text(OLD)
    monkeypatch.chdir(tmp_path)
    place = place.format(WRITERS[name].name)
    ended = writing(*(place if arg == "{}" else arg for arg in WRITERS[name].args))
    assert_one_line(ended, (1, 2), place)
    assert contents(tmp_path) == {"file": OLD.encode()}


# What is written without an option that names the file.
LIBRARY: dict[str, Callable[[Path], Any]] = {
    "text": lambda file: write_file(file, "new"),
    "bytes": lambda file: write_file(file, b"new"),
}


@pytest.mark.parametrize("step", harness.STEPS)
@pytest.mark.parametrize("kind", LIBRARY)
def test_files_of_the_library(kind: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text(OLD)
    at_step(monkeypatch, step, raising(28))
    with pytest.raises((OSError, ValueError), match="No space left"):
        LIBRARY[kind](file)
    assert contents(tmp_path) == {"file": OLD.encode()}


@pytest.mark.parametrize("room", [0, 10, 100])
def test_stages_on_a_full_disk(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AD_DUMP_GRAPHS_DIR: the error names the file, and no half of one is left."""
    module = stages.load_module(saved_programs.write(tmp_path / "small.pt2"))
    folder = tmp_path / "graphs"
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(folder))
    writer = StageWriter.from_environment()
    assert writer is not None
    with harness.disk_full_after(room), pytest.raises(OSError, match="File too large") as caught:
        writer.write(module, "export", "export_model")
    assert caught.value.filename == f"AD_DUMP_GRAPHS_DIR: {folder / '000_export_export_model.txt'}"
    assert contents(folder) == {}


@pytest.mark.parametrize("bad", ["file", "file/below", "n" * 300, "/proc/none", "/dev/null"])
def test_stages_into_no_folder(
    bad: str, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text(OLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", bad)
    program = saved_programs.write(tmp_path / "small.pt2")
    ended = run("dump", "--graph", program, "--stage", "eliminate_noops", "-q")
    assert_one_line(ended, (1, 2), bad)
    assert (tmp_path / "file").read_text() == OLD
