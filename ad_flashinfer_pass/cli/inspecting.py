"""What the commands that look at a model share: its options, the progress, and how an answer is printed.

A command is a function of what was given and of its own options that returns an ``Answer``; ``inspecting``
gives it the options of all.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ad_flashinfer_pass.cli.options import (
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    GraphOption,
    JsonOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    StageOption,
    TokensPerBlockOption,
    TrustOption,
    check_folder,
    error_border,
    settings,
)
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.files import write_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.config import AutoDeployConfig

# Tables are as wide as they are where nobody looks at them, so that grep finds whole rows.
_WIDE = 10_000


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


def _shared(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
) -> None: ...


def _shared_of_output(
    as_json: JsonOption = False, quiet: QuietOption = False, debug: DebugOption = False
) -> None: ...


# Options of some of these commands that are keys of the config too.
_KEYS = ("model", "dtype", "device", "trust_remote_code", "max_seq_len", "skip_loading_weights")
_MORE_KEYS = ("max_batch_size", "max_num_tokens")


def inspecting(*without: str) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Decorator: make a command of a function that takes ``Given`` and its own options.

    Args:
        without: options that mean nothing to it.
    """

    def make(command: Callable[..., Answer]) -> Callable[..., None]:
        own = list(_parameters(command))[1:]
        names = {parameter.name for parameter in own}

        def run(
            graph: Path | None,
            config: Path | None,
            tokens_per_block: int | None,
            as_json: bool,
            quiet: bool,
            debug: bool,
            stage: str | None = None,
            **options: Any,
        ) -> None:
            keys = {name: options[name] for name in (*_KEYS, *_MORE_KEYS) if name in options}
            mine = {name: value for name, value in options.items() if name in names and name not in keys}
            with error_border(debug):
                check_folder("--output", options.get("output"))
                from ad_flashinfer_pass.cli.generation import libraries_quiet

                deploy = settings(
                    config, {k: None if v is False else v for k, v in keys.items()}, tokens_per_block
                )
                with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
                    reporter.phase("load_libraries")
                    answer = command(Given(deploy, graph, stage, as_json, reporter.phase), **mine)
                _show(answer, as_json)
                if answer.file is not None and not quiet:
                    print(f"wrote {answer.file}", file=sys.stderr)
                if answer.error is not None:
                    raise answer.error
                if answer.failed:
                    raise typer.Exit(1)

        shared = [each for each in _parameters(_shared) if each.name not in without]
        parameters = [*shared, *own, *_parameters(_shared_of_output)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

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


def show(parts: Sequence[RenderableType]) -> None:
    """Print tables and lines."""
    from rich.console import Console

    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fits else _WIDE, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
