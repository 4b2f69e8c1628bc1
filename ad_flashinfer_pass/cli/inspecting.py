"""What the commands that look at a model share: its options, the progress, and how an answer is printed.

A command is a function of what was given and of its own options that returns an ``Answer``; ``inspecting``
gives it the options of all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ad_flashinfer_pass.cli.options import (
    BUILDING,
    DebugOption,
    JsonOption,
    Keys,
    QuietOption,
    check_folder,
    taking,
)
from ad_flashinfer_pass.cli.output import show
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.files import write_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.config import AutoDeployConfig


@dataclass(frozen=True)
class Given:
    """What the options of all these commands say."""

    config: AutoDeployConfig
    graph: Path | None
    stage: str | None
    as_json: bool
    on_event: Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a command found."""

    data: object
    """What its Python function returned; --json prints it."""
    parts: Callable[[], Sequence[RenderableType]] = field(default=list)
    """The same for a terminal."""
    text: str | None = None
    """In place of both: what stdout or a file gets as it is."""
    file: Path | None = None
    """Where the text goes; None: to stdout."""
    failed: bool = False
    """Whether the exit code is 1."""
    error: Exception | None = None
    """Said after all else."""


def inspecting(
    *also: str, without: Sequence[str] = ()
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Decorator: make a command of a function that takes ``Given`` and its own options.

    Args:
        also: options of the commands that it takes beside those of all.
        without: options of all that mean nothing to it.
    """

    def make(command: Callable[..., Answer]) -> Callable[..., None]:
        def run(
            *,
            keys: Keys,
            graph: Path | None,
            stage: str | None = None,
            as_json: JsonOption = False,
            quiet: QuietOption = False,
            debug: DebugOption = False,
            **options: Any,
        ) -> None:
            check_folder("--output", options.get("output"))
            from ad_flashinfer_pass.cli.generation import libraries_quiet

            if options.get("sm") is not None:
                keys.given.setdefault("device", "cuda")
            config = keys.config()
            with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
                reporter.phase("load_libraries")
                answer = command(Given(config, graph, stage, as_json, reporter.phase), **options)
            _show(answer, as_json)
            if answer.file is not None and not quiet:
                print(f"wrote {answer.file}", file=sys.stderr)
            if answer.error is not None:
                raise answer.error
            if answer.failed:
                raise typer.Exit(1)

        names = [name for name in (*BUILDING, "graph", "stage", *also) if name not in without]
        own = [each for each in _parameters(command)[1:] if each.name not in names]
        shared = {each.name: each for each in _parameters(run)}
        ends = [shared[name] for name in ("as_json", "quiet", "debug")]
        run.__signature__ = inspect.Signature([shared["keys"], *own, *ends])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return taking(*names)(run)

    return make


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in found]


def _show(answer: Answer, as_json: bool) -> None:
    if answer.text is None and as_json:
        from pydantic_core import to_json

        text: str | None = to_json(answer.data, indent=2).decode()
    else:
        text = answer.text
    if text is not None and answer.file is not None:
        write_file(answer.file, text, f"--output {answer.file}")
    elif text is not None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        show(answer.parts())
    sys.stdout.flush()
