"""``lint``: capture safety of a graph, before anything is captured."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import (
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    GraphOption,
    JsonOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    SmOption,
    StageOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    option,
    settings,
)
from ad_flashinfer_pass.progress import Reporter

EXAMPLES = f"""
[bold]Examples[/bold]

What keeps a deployment to an H100 from being captured:

[green]{PROG} lint -m PATH --dtype bfloat16 --sm 90[/green]

All rules, with the reason and the way out of each:

[green]{PROG} lint --rules[/green]
"""


def lint(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    sm: SmOption = None,
    suppress: Annotated[
        list[str] | None, option(OUTPUT, "RULE", "Leave out this rule; can be given several times.")
    ] = None,
    rules: Annotated[bool, option(OUTPUT, None, "Show all rules and exit.", "--rules")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find what keeps a CUDA graph of a model from being captured, or makes its replay wrong.

    The graph is read, not run, and no weights are. Exit code 0 if nothing was found, 1 if something was.
    """
    keys = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        from rich.console import Console

        from ad_flashinfer_pass.generation import libraries_quiet

        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
        deploy = settings(config, keys, tokens_per_block)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import capture_lint

            if rules:
                console.print(capture_lint.rules_table())
                return
            found = capture_lint.lint_model(
                deploy, graph=graph, stage=stage, sm=sm, suppress=suppress or (), on_event=reporter.phase
            )
        if as_json:
            print(json.dumps([asdict(each) for each in found], indent=2))
        else:
            for part in capture_lint.as_tables(found):
                console.print(part)
        if found:
            raise typer.Exit(1)
