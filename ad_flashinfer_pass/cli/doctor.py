"""``doctor``: look at the machine."""

from __future__ import annotations

import warnings
from pathlib import Path

from ad_flashinfer_pass.cli.options import PROG, DebugOption, JsonOption, KernelDirOption, error_border
from ad_flashinfer_pass.cli.output import show

EXAMPLES = f"""
[bold]Examples[/bold]

[green]{PROG} doctor[/green]

[green]{PROG} doctor --kernel-dir kernels[/green]

[green]{PROG} doctor --json | jq '.checks[] | select(.state == "missing") | .remedy'[/green]
"""


def doctor(
    kernel_dir: KernelDirOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what this machine can run, what is missing and the command that gets it.

    It names the kernels that run attention on each GPU and why the others do not. It says whether FlashInfer
    can compile here, whether a folder of prebuilt kernels can be used here, what this package has never been
    run on, and whether TensorRT-LLM's AutoDeploy imports the plugin. Nothing is compiled or installed.
    """
    with error_border(debug):
        from ad_flashinfer_pass.deployment import doctor as examining

        with warnings.catch_warnings():  # what works without transformers, which may be broken or too old
            if not debug:
                warnings.simplefilter("ignore")
            found = examining.diagnose(None if kernel_dir is None else Path(kernel_dir))
        if as_json:
            print(found.model_dump_json(indent=2))
            return
        show(examining.as_tables(found))
