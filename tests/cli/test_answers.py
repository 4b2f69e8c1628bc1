"""What the command answers to bad input: one line that names it, and the exit code."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ad_flashinfer_pass import pipeline
from ad_flashinfer_pass.cli import main, options
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import CapacityError
from tests.forks import followers_are_forked

COMMANDS = ("explain", "dump", "lint", "check", "plan", "report")
LONG = "x" * 100_000
NO_TEXT = "\udcff\udcfe"  # bytes of argv that are not UTF-8

# Options, the exit code, and what the line says.
OF_ALL = [
    (["-c", "list.yaml"], 2, "config list.yaml: must be a mapping of keys, got list."),
    (["-c", "binary"], 2, "config binary: "),
    (["-c", "folder"], 2, "config folder: Is a directory."),
    (["-c", "none.yaml"], 2, "config none.yaml: No such file or directory."),
    (["-c", LONG], 2, "File name too long"),
    (["-c", "keys.yaml"], 2, "unknown key 'self'; known: "),
    (
        ["-c", "factory.yaml"],
        2,
        "transforms.fuse_gemms.stage: factory comes before the stage of export_model",
    ),
    (["-c", "parallel.yaml"], 2, "world_size: input should be greater than or equal to 1, got -4."),
    (["--max-seq-len", "1000000000000"], 2, "max_seq_len"),
    (["--max-seq-len", "9" * 400], 2, "max_seq_len"),
    (["--max-seq-len", "0"], 2, "max_seq_len: input should be greater than or equal to 1, got 0."),
    (["--tokens-per-block", "1000000000000"], 2, "tokens_per_block must be at most 2147483647"),
    (["--kernel-dir", "none"], 2, "Invalid value for '--kernel-dir': none is no folder; see "),
    (["--kernel-dir", LONG], 2, "is no folder; see "),
    (["--graph", "binary"], 1, "binary is not a zip file"),
    (["--graph", "none"], 1, "none: no such file"),
    (["--graph", "folder"], 1, "folder: is a directory"),
    (["--graph", NO_TEXT], 1, "no such file"),
]
OF_ONE = [
    (["explain", "--device", "gpu"], 2, "device: torch knows no 'gpu'; for example cpu, cuda"),
    (["plan", "--device", ""], 2, "device: torch knows no ''; for example cpu, cuda"),
    (["lint", "--device", "meta"], 2, "device: must be cpu, cuda or cuda:N, got 'meta'."),
    (["report", "--device", "x" * 10_000], 2, "device: torch knows no 'xxx"),
    (["plan", "--max-num-tokens", "1000000000000"], 2, "max_num_tokens must be at most 2147483647"),
    *(
        (
            ["plan", "--memory", size],
            2,
            f"--memory must be a size with a unit (MB, GB, TB, or MiB, GiB, TiB), as in 80GB, got {size!r}.",
        )
        for size in ("nan", "", "141", "80_000", "8e10", "0GB", "-1GB", "GB", "80XB")
    ),
    (["explain", "--sm", "9" * 30], 2, "--sm is a compute capability without its point"),
    (["check", "--layers", "0"], 2, "--layers 0: demo has 4 layers."),
    (["lint", "--suppress", NO_TEXT], 2, "no rule "),
    (["dump", "--format", "nope"], 2, "--format nope: must be one of "),
    (["migrate", "binary"], 2, "binary: must be UTF-8 text."),
    (["migrate", "list.yaml"], 2, "a config must be a mapping of keys to values."),
    (["migrate", NO_TEXT], 1, "No such file or directory."),
    (["prebuild", "--sm", "90", "-o", "out", "--jobs", "-1"], 2, "--jobs must be at least 1, got -1."),
    (["calibrate", NO_TEXT], 2, "must be UTF-8 text."),
    (["calibrate", "a", "-c", "list.yaml"], 2, "config list.yaml: must be a mapping of keys, got list."),
    (["bench", "--input-len", "10000000000000"], 2, "max_seq_len"),
    (["generate", "a", "--tp", "99"], 2, "world_size: input should be less than or equal to 64, got 99."),
    (["generate", "a", "--tp", "3"], 1, "3 ranks cannot have equal parts of this attention's 4 heads"),
    (
        ["check", "--tp", "2", "--reproducer", "x"],
        2,
        "check of 2 ranks (--tp) runs them as threads on the CPU",
    ),
    ([NO_TEXT], 2, "No such command"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are no configs."""
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n")
    Path("binary").write_bytes(bytes(range(256)))
    Path("folder").mkdir()
    Path("keys.yaml").write_text("self: 1\n7: 8\n")
    Path("factory.yaml").write_text("transforms: {fuse_gemms: {stage: factory}}\n")
    Path("parallel.yaml").write_text("world_size: -4\n")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [*((["explain", *args], code, said) for args, code, said in OF_ALL), *OF_ONE],
    ids=lambda value: ascii(" ".join(value)[:50]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That names the option, file or key, and is not taken for a fault of this package."""
    followers_are_forked(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as stop:
        main(args)
    out, err = capsys.readouterr()
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert (stop.value.code, out) == (code, "")
    assert said in line
    assert "unexpected" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_every_command_has_the_same_border(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the options that they share."""
    for args, code, said in (OF_ALL[0], OF_ALL[5], OF_ALL[8], OF_ALL[12]):
        with pytest.raises(SystemExit) as stop:
            main([command, *args])
        assert stop.value.code == code
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_out_of_memory_is_told_as_such(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """With the settings that need less, and not as a fault."""
    with pytest.raises(options.typer.Exit) as stop, options.error_border(debug=False):
        raise error
    assert stop.value.exit_code == 1
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_metadata_that_does_not_fit_is_told_before_it_is_allocated() -> None:
    """The largest sizes that a config takes."""
    config = AutoDeployConfig(
        max_seq_len=2**24, max_batch_size=8192, kv_cache_config=KvCacheConfig(tokens_per_block=1)
    )
    with pytest.raises(CapacityError, match=r"the metadata of a step needs 1\.1e\+12 bytes, .* Lower one"):
        pipeline.context(config)


@pytest.mark.parametrize("columns", ["99999999", "9" * 5000, "0"])
def test_the_help_has_bounds(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the environment says of the terminal."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 40 <= max(map(len, lines)) <= 1000
    assert int(os.environ["COLUMNS"]) <= 1000


def test_notes_of_a_yaml_of_autodeploy_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Without an error, and not with --quiet."""
    Path("registry.yaml").write_text(
        json.dumps({"runtime": "trtllm", "mode": "x", "max_seq_len": 64, "attn_backend": "trtllm"})
    )
    from ad_flashinfer_pass import config

    for quiet in ([], ["-q"]):
        config._tell.cache_clear()
        with pytest.raises(SystemExit) as stop:
            main(["lint", "--rules", "-c", "registry.yaml", *quiet])
        assert not stop.value.code
        said = "note: keys of AutoDeploy that mean nothing here: runtime, mode"
        assert (said in caplog.messages) == (not quiet)
        caplog.clear()
