"""The stories of docs/debugging.md, run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from ad_flashinfer_pass.cli import main

_DOCUMENT = Path(__file__).parents[1] / "docs" / "debugging.md"
_TEXT = _DOCUMENT.read_text(encoding="utf-8").split("## Three stories")[1]
_STORIES = re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", _TEXT, re.M | re.S)


@pytest.mark.parametrize(("title", "text"), _STORIES, ids=[title for title, _ in _STORIES])
def test_story(
    title: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command of a console block prints the lines below it, in that order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        dtype="bfloat16",
    ).save_pretrained("llama")
    for language, block in re.findall(r"^```(python|console)\n(.*?)^```", text, re.M | re.S):
        if language == "python":
            Path("model.py").write_text(block)
            subprocess.run([sys.executable, "model.py"], check=True, capture_output=True)
            continue
        for command, expected in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.M):
            program, *args = shlex.split(command)
            if program == "cat":
                Path(args[0]).write_text(expected)
                continue
            with pytest.raises(SystemExit):
                main([*args, "--quiet"])
            shown = capsys.readouterr()
            assert_shows(shown.out + shown.err, expected, f"{title}: {command}")


def assert_shows(shown: str, expected: str, what: str) -> None:
    """The parts between ellipses stand in the output, in order, but for blanks and frames of tables.

    Shares other than all are not compared: they may differ by a token from one torch to the next.
    """
    text, at = _plain(shown), 0
    for part in re.split("\N{HORIZONTAL ELLIPSIS}|\n", expected):
        wanted = _plain(part).strip()
        found = text.find(wanted, at)
        assert found >= 0, f"{what}: {wanted!r} is not in {text[at:]!r}"
        at = found + len(wanted)


def _plain(text: str) -> str:
    without_frames = re.sub(r"[\u2500-\u257f]", " ", text)
    return " ".join(re.sub(r"\b\d\d\.\d%", "N%", without_frames).split())
