"""Saved programs are read, and nothing that they hold is run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ad_flashinfer_pass import cli
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.saved_program import load, load_module
from tests import saved_programs
from tests.saved_programs import Change, Small, small

MODEL, WEIGHTS, CONSTANTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def code(marker: Path) -> str:
    """An expression that makes a file."""
    return f"open({str(marker)!r}, 'w')"


def graph(data: Any) -> Any:
    return data["graph_module"]["graph"]


def first_size(data: Any, text: str) -> None:
    """Put a text in the place of an expression for a size."""
    sizes = graph(data)["tensor_values"]["input_ids"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = text


def named(old: str, new: str) -> Callable[[Any], None]:
    """Give a value of the graph another name, wherever it stands."""

    def change(data: Any) -> None:
        def walk(value: Any) -> Any:
            if isinstance(value, dict):
                return {(new if key == old else key): walk(item) for key, item in value.items()}
            if isinstance(value, list):
                return [walk(item) for item in value]
            return new if value == old else value

        data.update(walk(data))

    return change


def with_call(target: str, argument: dict[str, Any] | None = None) -> Change:
    def change(data: Any) -> None:
        node = graph(data)["nodes"][-1]
        node["target"] = target
        if argument is not None:
            node["inputs"] = [{"name": "filename", "arg": argument, "kind": 1}]

    return change


def with_spec(context: Any) -> Change:
    def change(data: Any) -> None:
        spec: dict[str, Any] = {
            "type": "collections.defaultdict" if isinstance(context, dict) else "builtins.dict"
        }
        spec |= {"context": context, "children_spec": []}
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, spec])

    return change


def with_constant_input(text: str) -> Change:
    """A third input that is a string, which torch writes into the source of a guard."""

    def change(data: Any) -> None:
        graph(data)["inputs"].append({"as_string": text})
        data["graph_module"]["signature"]["input_specs"].append(
            {"constant_input": {"name": "flag", "value": {"as_string": text}}}
        )
        signature = data["graph_module"]["module_call_graph"][0]["signature"]
        version, spec = json.loads(signature["in_spec"])
        leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
        spec["children_spec"][0]["children_spec"].append(leaf)
        signature["in_spec"] = json.dumps([version, spec])
        signature["forward_arg_names"].append("flag")

    return change


def pickled(marker: Path, part: str, name: str, prefix: str) -> dict[str, bytes | Change]:
    """A weight or constant that is a pickle."""
    folder, config = part.rpartition("/")[0], part
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)

    def change(data: Any) -> None:
        data["config"][name] |= {"path_name": f"{prefix}9", "use_pickle": True}

    content = pickle.dumps(Evil(marker)) if prefix.startswith("opaque") else buffer.getvalue()
    return {config: change, f"{folder}/{prefix}9": content}


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def attacks(marker: Path) -> dict[str, dict[str, bytes | Change]]:
    """Ways in which a file could have its code run by torch.export.load, or by calling what it makes."""
    run = code(marker)
    return {
        "endless guard": {MODEL: lambda data: data["guards_code"].append("9**9**9**9 > 1")},
        "guard": {MODEL: lambda data: data["guards_code"].append(f"{run} is not None")},
        "size": {MODEL: lambda data: first_size(data, f"Symbol('s70', positive=True) + 0 * len([{run}])")},
        "sample_inputs": {"data/sample_inputs/model.pt": saved((Evil(marker), {}))},
        "weight": pickled(marker, WEIGHTS, "embed.weight", "weight_"),
        "constant": pickled(marker, CONSTANTS, "offsets", "tensor_"),
        "opaque object": pickled(marker, CONSTANTS, "offsets", "opaque_obj_"),
        "old weights": {"data/weights/model.pt": saved(Evil(marker))},
        "name of a node": {MODEL: named("linear", f"x = {run}\n    y")},
        "name of an input": {MODEL: named("input_ids", f"x={run}, y")},
        "name of a parameter": {
            MODEL: named("embed.weight", f'embed"), {run}, getattr(self, "x'),
            WEIGHTS: named("embed.weight", f'embed"), {run}, getattr(self, "x'),
        },
        "function": {MODEL: with_call("torch.load", {"as_string": str(marker)})},
        "file": {MODEL: with_call("torch.ops.aten.from_file.default", {"as_string": str(marker)})},
        "pickle op": {MODEL: with_call("torch.ops.aten.save.default", {"as_string": str(marker)})},
        "enum": {MODEL: with_spec('[{"__enum__": true, "fqn": "antigravity:A", "name": "x"}]')},
        "default": {
            MODEL: with_spec(
                {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
            )
        },
        "flag": {MODEL: with_constant_input(f"' or {run} or '")},
    }


NAMES = tuple(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_file_is_run(name: str, tmp_path: Path) -> None:
    """Neither when it is read nor when what was read is called. What cannot be read so is refused."""
    marker = tmp_path / "marker"
    file = saved_programs.write(tmp_path / "evil.pt2", attacks(marker)[name])
    ids = torch.arange(14).view(2, 7)
    if name in ("sample_inputs", "old weights"):  # they are not needed
        expected = small().module()(ids, ids)
        assert torch.equal(load_module(file)(ids, ids), expected)
    else:
        with pytest.raises(LoadError, match=str(file)) as caught:
            load_module(file)(ids, ids)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["guard", "size", "weight"])
@pytest.mark.parametrize(
    "command", [["explain", "--graph"], ["dump", "--stage", "export", "--graph"], ["diff"]]
)
def test_no_command_runs_it(
    name: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    file = str(saved_programs.write(tmp_path / "evil.pt2", attacks(marker)[name]))
    arguments = [*command, file, file, "-q"] if command == ["diff"] else [*command, file, "-q"]
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {file}: ")
    assert "unexpected" not in err
    assert not marker.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "--graph"],
        ["dump", "--stage", "export", "--graph"],
        ["plan", "--graph"],
        ["diff"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_unpickles_the_examples(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are not needed: what the file holds beside them is read."""
    marker = tmp_path / "marker"
    file = str(saved_programs.write(tmp_path / "evil.pt2", attacks(marker)["sample_inputs"]))
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, file, file, "-q"] if command == ["diff"] else [*command, file, "-q"])
    assert not marker.exists()
    assert not caught.value.code, capsys.readouterr().err


def test_names_that_could_leave_a_comment_or_a_string(tmp_path: Path) -> None:
    """Where a node stands in the source is shown, and goes into a script: it has no quotes."""

    def change(data: Any) -> None:
        for node in graph(data)["nodes"]:
            node["metadata"]["nn_module_stack"] = 'a,b"""\r\nimport os,c'

    file = saved_programs.write(tmp_path / "odd.pt2", {MODEL: change})
    for node in load(file).graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            assert not set(path + kind) & set('"\\\r')


def test_a_good_program_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """The same results, weights that are tied stay tied, and the guards are checked."""
    file = tmp_path / "good.pt2"
    torch.export.save(small(), file)
    found = load_module(file)
    ids = torch.arange(14).view(2, 7)
    assert torch.equal(found(ids, ids), small().module()(ids, ids))
    with pytest.raises(AssertionError, match="Guard failed"):
        found(ids, ids[:, :5])
    assert {name: (p.dtype, p.shape) for name, p in load(file).state_dict.items()} == {
        name: (p.dtype, p.shape) for name, p in Small().state_dict().items()
    }


class Sizes(nn.Module):
    """Expressions over sizes, a tied weight, a strided one, a region without gradients, named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.two = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.two.weight = self.one.weight
        self.strided = nn.Parameter(torch.randn(16, 8).t()[:, ::2])
        self.empty = nn.Parameter(torch.empty(0, 8))

    def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        rows = max(x.shape[0], y.shape[0])
        z = torch.zeros(rows + 3, (x.shape[0] * 3) // 2, x.shape[0] % 5 + 1)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            w = self.two(self.one(x.bfloat16())).float() @ self.strided
        halves = torch.cat([x[: x.shape[0] // 2], y[: y.shape[0] - 1], self.empty])
        return {"z": z, "w": w * scale, "halves": halves}


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_of_all_kinds_are_read(strict: bool, tmp_path: Path) -> None:
    shapes = ({0: Dim.AUTO}, {0: Dim.AUTO})
    given = torch.randn(6, 8), torch.randn(4, 8)
    program = torch.export.export(Sizes(), given, dynamic_shapes=shapes, strict=strict)
    file = tmp_path / "sizes.pt2"
    torch.export.save(program, file)
    assert b"Max(" in zipfile.ZipFile(file).read("sizes/models/model.json")
    again = load(file)
    ranges = [{str(name): limits for name, limits in p.range_constraints.items()} for p in (again, program)]
    assert ranges[0] == ranges[1]
    x, y = torch.randn(8, 8), torch.randn(3, 8)
    found, expected = load_module(file)(x, y), program.module()(x, y)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert again.state_dict["one.weight"].data_ptr() == again.state_dict["two.weight"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MODEL: b"{"}, "JSONDecodeError"),
        ({MODEL: b'{"graph_module": 3}'}, "cannot be read as a saved ExportedProgram"),
        ({MODEL: b"[" * 100_000}, "nested too deeply"),
        ({MODEL: b"\xff"}, "UnicodeDecodeError"),
        ({MODEL: lambda data: data.pop("graph_module")}, "'graph_module'"),
        ({MODEL: lambda data: data["schema_version"].update(major=99)}, "schema version"),
        ({MODEL: with_call("torch.ops.mylib.myop.default")}, "import the module of that op"),
        ({MODEL: lambda data: graph(data)["tensor_values"]["linear"].update(dtype=8)}, "its value linear is"),
        ({MODEL: lambda data: graph(data)["tensor_values"]["b_factor"].update(dtype=8)}, "its factor is"),
        ({WEIGHTS: lambda data: data["config"].pop("embed.weight")}, "embed.weight"),
        ({"data/weights/weight_0": b"123"}, "cannot be read as a saved ExportedProgram"),
        ({WEIGHTS: lambda data: data["config"]["embed.weight"].update(path_name="weight_99")}, "no part"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    change: dict[str, bytes | Change], message: str, tmp_path: Path
) -> None:
    file = saved_programs.write(tmp_path / "damaged.pt2", change)
    with pytest.raises(LoadError) as caught:
        load_module(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zip_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Compressed parts, which could be huge; a zip without a program; one that is cut off; an empty one."""
    compressed, other, empty = tmp_path / "compressed.pt2", tmp_path / "other.pt2", tmp_path / "empty.pt2"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/models/model.json", b" " * 10_000_000)
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a/b", b"c")
    zipfile.ZipFile(empty, "w").close()
    cut = tmp_path / "cut.pt2"
    whole = saved_programs.write(tmp_path / "whole.pt2").read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    for file, message in (
        (compressed, "compressed"),
        (other, "has no part models/model.json"),
        (cut, "not a zip file"),
        (empty, "cannot be read"),
        (tmp_path / "none.pt2", "no such file"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(LoadError, match=message):
            load(file)


@pytest.mark.parametrize(
    "text",
    [
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(9), Integer(999999999))",
        "__import__('os')",
        "Symbol('s0').__class__",
        "(lambda: 1)()",
        "[1 for x in (1,)]",
        "f'{1}'",
        "Symbol('s0; x')",
        "Add(*[1])",
        "Integer(" + "9" * 5000 + ")",
        "(" * 1000 + "1" + ")" * 1000,
        "-" * 9000 + "1",
    ],
)
def test_a_size_is_arithmetic(text: str, tmp_path: Path) -> None:
    file = saved_programs.write(tmp_path / "size.pt2", {MODEL: lambda data: first_size(data, text)})
    with pytest.raises(LoadError):
        load(file)
