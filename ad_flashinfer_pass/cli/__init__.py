"""The command ``ad-flashinfer-pass``: one file a sub-command.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed or a prompt was
refused, 2 wrong usage, 129 hung up, 130 Ctrl-C, 141 the reader of stdout went away, 143 terminated.
"""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from ad_flashinfer_pass import __version__
from ad_flashinfer_pass.cli import (
    bench,
    calibrate,
    check,
    diff,
    doctor,
    dump,
    explain,
    generate,
    lint,
    migrate,
    plan,
    prebuild,
    quantize,
    report,
    serve,
)
from ad_flashinfer_pass.cli.options import PROG, print_error
from ad_flashinfer_pass.collector import rare_collection

# UsageError: click's in older versions of typer, typer's own in newer ones, exported by neither.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help=generate.HELP, epilog=generate.EXAMPLES)(generate.generate)
for _command, _examples in (
    (explain.explain, explain.EXAMPLES),
    (dump.dump, dump.EXAMPLES),
    (diff.diff, diff.EXAMPLES),
    (lint.lint, lint.EXAMPLES),
    (check.check, check.EXAMPLES),
    (plan.plan, plan.EXAMPLES),
    (report.report, report.EXAMPLES),
    (calibrate.calibrate, calibrate.EXAMPLES),
    (quantize.quantize, quantize.EXAMPLES),
    (prebuild.prebuild, prebuild.EXAMPLES),
    (bench.bench, bench.EXAMPLES),
    (serve.serve, serve.EXAMPLES),
    (doctor.doctor, doctor.EXAMPLES),
    (migrate.migrate, migrate.EXAMPLES),
):
    # Its paragraphs fill the terminal, however long their lines are in the source.
    _paragraphs = inspect.cleandoc(_command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(each.split()) for each in _paragraphs), epilog=_examples)(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    # The help takes time and memory for each column, and of none it shows nothing.
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit():
        os.environ["COLUMNS"] = str(min(max(int(columns[:5]), 40), 1000))
    command = typer.main.get_command(app)
    args = None if argv is None else list(argv)
    _make_streams_safe()
    with rare_collection(), _interrupted_by_signals() as received:
        try:
            code = command.main(args=args, prog_name=PROG, standalone_mode=False)
            sys.stdout.flush()  # here, and not where Python does it and complains
        except _UsageError as err:
            where = err.ctx.command_path if err.ctx is not None else PROG
            print_error(f"{err.format_message().rstrip('.?')}; see {where} --help.")
            code = 2
        except typer.Abort:
            print("interrupted", file=sys.stderr)
            code = 130
        except OSError as err:
            code = 141
            if not isinstance(err, BrokenPipeError):
                print_error(f"stdout: {err.strerror}.")
                code = 1
        except SystemExit as err:
            if not isinstance(err.__context__, BrokenPipeError):
                raise
            code = 141  # of rich, which ends so when it prints
        if received:
            code = 128 + received[0]
        if code:
            _drop_stdout()
    sys.exit(code)


def _make_streams_safe() -> None:
    """Where the process was started without some of them, or stdout lacks characters that a model writes."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.BytesIO()))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """What could not be written is not tried again by Python when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interrupted_by_signals() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does; yields those that came."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_IGN)  # a second one would disturb the clean-up
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup
    try:
        for number in before:
            signal.signal(number, stop)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Paged, cached attention for exported LLMs, on FlashInfer's TRT-LLM kernels."""
    if version:
        print(f"{PROG} {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
