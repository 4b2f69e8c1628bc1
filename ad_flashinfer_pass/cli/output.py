"""What the command writes: results on stdout or in a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ad_flashinfer_pass.cli.prompts import GivenPrompt
    from ad_flashinfer_pass.runtime.llm import GenerationResult


_MAX_HEADING = 72


class Stdout:
    """Results on stdout, each flushed as it comes."""

    def __enter__(self) -> Stdout:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, text: str) -> None:
        """Write and flush.

        Raises:
            OSError: its filename is ``stdout``; a BrokenPipeError if the reader went away.
        """
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as err:
            # Python flushes stdout again when it exits, and would complain if that failed again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise OSError(err.errno, err.strerror, "stdout") from None

    def keep(self) -> None:
        """Nothing is to be kept: what was written is out."""

    def keep_partial(self) -> Path | None:
        """Nothing is to be kept: what was written is out."""
        return None


def show(parts: Sequence[RenderableType]) -> None:
    """Print tables and lines; without a terminal, tables as lines whose cells have a tab between them."""
    from rich.console import Console
    from rich.table import Table

    if sys.stdout.isatty():
        console = Console(highlight=False, markup=False)
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    else:
        for part in parts:
            print(_rows(part) if isinstance(part, Table) else part)


def _rows(table: Table) -> str:
    """The title of a table, if it has one, its header, and its rows, each a line."""
    columns = [[column.header, *column.cells] for column in table.columns]
    lines = ["\t".join(" ".join(str(cell).split()) for cell in row) for row in zip(*columns, strict=True)]
    return "\n".join([*([str(table.title)] if table.title else []), *lines])


def as_json(result: GenerationResult, prompt: GivenPrompt, *, ascii_only: bool = False) -> str:
    """One line of JSON; ``prompt`` is as it was given."""
    record = {
        "index": result.index,
        "prompt": prompt.content,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "error": result.error,
    }
    return json.dumps(record, ensure_ascii=ascii_only) + "\n"


def as_text(result: GenerationResult, prompt: GivenPrompt, num_prompts: int) -> str:
    """The continuation, under a heading if there are several prompts; empty if it was refused."""
    if result.error is not None and not result.token_ids:
        return ""
    text = result.text
    if text is None:  # no tokenizer
        text = _joined(result.token_ids)
    if num_prompts == 1:
        return text + "\n"
    return f"--- {result.index}: {heading(prompt)}\n{text}\n\n"


def heading(prompt: GivenPrompt) -> str:
    """A prompt on one short line."""
    content = prompt.content
    if isinstance(content, list):
        last = content[-1]
        content = last["content"] if isinstance(last, dict) else _joined(content)
    line = " ".join(content.split())
    return line if len(line) <= _MAX_HEADING else line[: _MAX_HEADING - 3] + "..."


def _joined(token_ids: Sequence[object]) -> str:
    return " ".join(map(str, token_ids))
