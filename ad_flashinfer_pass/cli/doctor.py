"""``doctor``: look at the machine."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.options import MODEL, PROG, DebugOption, JsonOption, error_border, option

EXAMPLES = f"""
[bold]Examples[/bold]

[green]{PROG} doctor[/green]

[green]{PROG} doctor --kernel-dir kernels[/green]

[green]{PROG} doctor --json | jq '.checks[] | select(.state == "missing") | .remedy'[/green]
"""


def doctor(
    kernel_dir: Annotated[
        Path | None,
        option(MODEL, "FOLDER", "A folder that prebuild made: whether it can be used here.", "--kernel-dir"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what this machine can run, what is missing and the command that gets it.

    Which kernels run attention on each GPU and why the others do not, whether FlashInfer can compile here,
    what this package has never been run on, and whether TensorRT-LLM's AutoDeploy imports the plugin. Nothing
    is compiled or installed.
    """
    with error_border(debug):
        from ad_flashinfer_pass.deployment import doctor as examining

        with warnings.catch_warnings():  # what works without transformers, which may be broken or too old
            if not debug:
                warnings.simplefilter("ignore")
            found = examining.diagnose(kernel_dir)
        if as_json:
            print(found.model_dump_json(indent=2))
            return
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 160)
        for table in examining.as_tables(found):
            console.print(table)
