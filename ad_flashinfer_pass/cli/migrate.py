"""``migrate``: an AutoDeploy YAML for this backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import OUTPUT, PROG, DebugOption, QuietOption, error_border, option
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import write_file

EXAMPLES = f"""
[bold]Examples[/bold]

Rewrite a config of trtllm-bench or trtllm-serve, and show what changed:

[green]{PROG} migrate config.yaml[/green]

Only show it, or keep it as a patch:

[green]{PROG} migrate config.yaml --check > flashinfer_trtllm.patch[/green]
"""


def migrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML for TensorRT-LLM AutoDeploy.")],
    check: Annotated[
        bool, option(OUTPUT, None, "Leave the file alone; exit code 1 if it would change.", "--check")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Rewrite an AutoDeploy YAML for attn_backend: flashinfer_trtllm.

    The diff goes to stdout, the reasons to stderr. Keys that were renamed
    after 1.2 get their new names, and what only other backends use goes.
    Comments stay.
    """
    with error_border(debug):
        from ad_flashinfer_pass.deployment import migrate as pass_migrate

        try:
            result = pass_migrate.migrate(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: must be UTF-8 text.") from None
        except ConfigError as err:
            raise ConfigError(f"{file}: {err}") from None
        sys.stdout.write(result.diff(str(file)))
        if not quiet:
            for note in result.notes or ["nothing to change"]:
                print(f"{file}: {note}", file=sys.stderr)
        changed = result.after != result.before
        if changed and not check:
            write_file(file, result.after)
        raise typer.Exit(1 if changed and check else 0)
