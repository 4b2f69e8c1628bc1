"""Every file that a command reads, damaged: bytes flipped, cut off, taken out and put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ad_flashinfer_pass import exported
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.graph.text_format import to_text
from ad_flashinfer_pass.inspection.stages import read_graph
from ad_flashinfer_pass.kernels import measure, prebuilt
from ad_flashinfer_pass.kernels.prebuilt import Manifest
from ad_flashinfer_pass.saved_program import load, load_module
from tests import saved_programs
from tests.faults.harness import TIMES, Runner, assert_no_bug, assert_one_line, damaged, refusal_of


@cache
def dumps(folder: Path) -> dict[str, bytes]:
    # The seeds hit the same bytes wherever the folder lies.
    graph = read_graph(saved_programs.write(folder / "small.pt2")).model_copy(update={"title": "small"})
    return {".txt": to_text(graph).encode(), ".json": graph.model_dump_json().encode()}


class Input(NamedTuple):
    """A file that a command reads."""

    args: tuple[str, ...]
    name: str
    content: bytes
    seeds: int


MIGRATED = b"""# of a benchmark
args:
  attn_page_size: 24  # tokens
  transforms:
    insert_cached_attention: {backend: trtllm, cache_config: {dtype: float8_e4m3fn}}
    resize_kv_cache:
      free_mem_ratio: 0.9
  cuda_graph_batch_sizes: [1, 2, 4]
"""
PROMPTS = b"""{"prompt": "once"}
{"prompt_token_ids": [1, 2, 3]}
{"messages": [{"role": "user", "content": "why"}]}
"""
INPUTS = {
    "migrate": Input(("migrate", "{}", "-q", "--check"), "config.yaml", MIGRATED, 60),
    "prompts": Input(("generate", "-q", "-f", "{}"), "prompts.jsonl", PROMPTS, 40),
}


@pytest.mark.parametrize(
    ("name", "seed"), [(n, s) for n, i in INPUTS.items() for s in range(i.seeds * TIMES)]
)
def test_damaged_input(name: str, seed: int, run: Runner, tmp_path: Path) -> None:
    """It is read as what it now says, or refused with its name."""
    given = INPUTS[name]
    file = tmp_path / given.name
    file.write_bytes(damaged(given.content, seed))
    ended = run(*(str(file) if arg == "{}" else arg for arg in given.args))
    assert_no_bug(ended.err)
    if ended.code not in (0, 1) or ended.err:
        assert_one_line(ended, (1, 2), str(file))


@pytest.mark.parametrize("seed", range(40 * TIMES))
def test_damaged_program(seed: int, tmp_path: Path) -> None:
    """The file as it is on the disk: its checksums see nearly all."""
    file = saved_programs.write(tmp_path / "small.pt2")
    file.write_bytes(damaged(file.read_bytes(), seed))
    refusal_of(lambda: load_module(file), str(file))


@pytest.mark.parametrize("seed", range(60 * TIMES))
def test_program_with_other_content(seed: int, tmp_path: Path) -> None:
    """Damage that the checksums do not see, as whoever wrote the file wanted it."""
    parts = ("models/model.json", "data/weights/model_weights_config.json")
    part = parts[seed % 2]
    changed = damaged(saved_programs.parts()[part], seed)
    file = saved_programs.write(tmp_path / "small.pt2", {part: changed})
    refusal_of(lambda: load_module(file), str(file))


@pytest.mark.parametrize("ending", [".txt", ".json"])
@pytest.mark.parametrize("seed", range(30 * TIMES))
def test_damaged_dump(
    seed: int, ending: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    content = dumps(tmp_path_factory.getbasetemp())[ending]
    file = tmp_path / f"graph{ending}"
    file.write_bytes(damaged(content, seed))
    refusal_of(lambda: read_graph(file), str(file))


@pytest.mark.parametrize("seed", range(30 * TIMES))
def test_damaged_manifest(seed: int, tmp_path: Path) -> None:
    made = Manifest(sm=90, flashinfer="0.7.2", nvcc="12", modules=[], notes=["a note"])
    (tmp_path / prebuilt.MANIFEST).write_bytes(damaged(made.model_dump_json(indent=1).encode(), seed))
    refusal_of(lambda: prebuilt.read_manifest(tmp_path), str(tmp_path))


@pytest.mark.parametrize("seed", range(20 * TIMES))
def test_damaged_choices(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is measured again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure.write_choices({"fa2": {"split": 3}, "xqa": [1, 2]})
    file = measure.cache_file()
    assert file is not None
    file.write_bytes(damaged(file.read_bytes(), seed))
    assert isinstance(measure.read_choices(), dict)


BAD_FILES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(1000)),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "utf-16": lambda file: file.write_bytes("key: value".encode("utf-16")),
    "folder": lambda file: file.mkdir(),
    "missing": lambda file: None,
    "dangling link": lambda file: file.symlink_to("none"),
    "loop": lambda file: file.symlink_to(file),
    "list": lambda file: file.write_text("[1, 2]"),
    "number": lambda file: file.write_text("1"),
    "null": lambda file: file.write_text("null"),
    "deep": lambda file: file.write_text("[" * 5_000),
    "deep map": lambda file: file.write_text('{"a":' * 5_000),
    "zip": lambda file: file.write_bytes(b"PK\x05\x06" + bytes(18)),
    "pickle": lambda file: torch.save({"a": 1}, file),
}
READERS = {
    "migrate": (("migrate", "{}", "-q", "--check"), "config.yaml"),
    "explain --graph": (("explain", "-q", "--graph", "{}"), "graph.pt2"),
    "check --graph": (("check", "-q", "--graph", "{}"), "graph.pt2"),
    "diff text": (("diff", "-q", "{}", "{}"), "graph.txt"),
    "diff json": (("diff", "-q", "{}", "{}"), "graph.json"),
    "diff program": (("diff", "-q", "{}", "{}"), "graph.pt2"),
}
VALID = {("migrate", "empty"), ("migrate", "null")}


@pytest.mark.parametrize("bad", BAD_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_no_such_thing(reader: str, bad: str, run: Runner, tmp_path: Path) -> None:
    """Whatever else may stand under the name of a file."""
    args, name = READERS[reader]
    file = tmp_path / name
    BAD_FILES[bad](file)
    ended = run(*(str(file) if arg == "{}" else arg for arg in args))
    if (reader, bad) not in VALID:
        assert_one_line(ended, (1, 2), str(file))


def test_a_missing_file_is_no_stage(run: Runner, tmp_path: Path) -> None:
    """Whatever has a folder is a file's name."""
    assert_one_line(
        run("diff", "-q", tmp_path / "old", "export"), (1, 2), f"{tmp_path / 'old'}: no such file"
    )


@pytest.mark.parametrize("call", [load, load_module, exported.restore])
@pytest.mark.parametrize(
    "given",
    [None, 3, 1.5, [], {}, object(), b"a.pt2", torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_a_program_of_a_wrong_type(call: Callable[[Any], Any], given: object) -> None:
    """A TypeError, as of any function that takes a path; of what users call, an error of ours."""
    with pytest.raises((TypeError, LoadError, ConfigError)):
        call(given)


@pytest.mark.parametrize("part", sorted(name for name in saved_programs.parts() if "/" in name))
def test_a_program_that_lacks_a_part(part: str, tmp_path: Path) -> None:
    """What is not needed is not missed; what is, is named."""
    file = saved_programs.write(tmp_path / "small.pt2", {part: b""})
    said = refusal_of(lambda: load_module(file), str(file))
    needed = part.endswith(".json")
    assert (said is not None) == needed, said


def _leaves(data: Any) -> list[tuple[Any, Any]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [pair for key, value in items for pair in [(data, key), *_leaves(value)]]


@pytest.mark.parametrize("value", [None, {}, [], -1, 10**30, "x", True, 1.5], ids=repr)
@pytest.mark.parametrize("share", range(8 * TIMES))
def test_a_program_with_a_wrong_value(share: int, value: object, tmp_path: Path) -> None:
    """One value of its JSON, at many places, is of another type."""
    data = json.loads(saved_programs.parts()["models/model.json"])
    places = _leaves(data)
    place, key = places[((share * len(places)) // (8 * TIMES) + len(repr(value))) % len(places)]
    place[key] = value
    changed = {"models/model.json": json.dumps(data).encode()}
    file = saved_programs.write(tmp_path / "small.pt2", changed)
    refusal_of(lambda: load_module(file), str(file))
