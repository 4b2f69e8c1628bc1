"""``prebuild``: compile the kernels of a deployment."""

from __future__ import annotations

import sys
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    BUILDING,
    OUTPUT,
    PROG,
    DebugOption,
    JsonOption,
    Keys,
    OutputOption,
    QuietOption,
    SmOption,
    option,
    taking,
)
from ad_flashinfer_pass.cli.output import show
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.errors import ConfigError

KERNELS = "Kernels"
EXAMPLES = f"""
[bold]Examples[/bold]

What an H100 or H200 needs for a model, compiled where there is nvcc and no GPU, used where there is no nvcc:

[green]{PROG} prebuild -c llama.yaml --sm 90 -o kernels[/green]

[green]{PROG} generate -c llama.yaml --kernel-dir kernels "Once upon a time"[/green]

Only the list; then without the providers that are slow to compile, whose sites the next one takes:

[green]{PROG} prebuild -c llama.yaml --sm 90 --list[/green]

[green]{PROG} prebuild -c llama.yaml --sm 90 --skip fmha_v2 --skip fa3 -o kernels[/green]
"""


@taking(*BUILDING, without=["device", "kernel_dir"])
def prebuild(
    *,
    sm: SmOption,
    keys: Keys,
    skip: Annotated[
        list[str] | None,
        option(KERNELS, "NAME", "Leave this provider out; can be given several times."),
    ] = None,
    jobs: Annotated[
        int | None, option(KERNELS, "N", "Modules compiled at once. Default: the number of processors.")
    ] = None,
    list_only: Annotated[
        bool, option(OUTPUT, None, "Compile nothing, say what is needed.", "--list")
    ] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile exactly the kernels that a model needs on a kind of GPU, into a folder for another machine.

    It needs nvcc and flashinfer-python, but no GPU and no weights. The modules go to the folder --output,
    which keeps those that it has. It serves machines with the same version of flashinfer-python, where
    --kernel-dir names it. On 2 cores XQA takes about 20 s a module, FA2 one to three minutes, FA3 about
    twelve, FMHA v2 forty; on 16 cores all that a Llama needs takes four minutes.
    """
    from ad_flashinfer_pass.cli.generation import libraries_quiet

    if (output is None) != list_only:
        raise ConfigError("give --output FOLDER, or --list to compile nothing.")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}.")
    config = keys.config()
    with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
        reporter.phase("load_libraries")
        from ad_flashinfer_pass.deployment import prebuild as building

        if output is None:
            _, found, notes = building.needed_modules(config, sm, skip or (), reporter.phase)
        else:
            made = building.prebuild(
                config,
                sm,
                output,
                skip=skip or (),
                jobs=jobs,
                on_event=reporter.phase,
                on_line=reporter.line,
            )
            found, notes = made.modules, made.notes
    if as_json:
        print(building.as_json(sm, found, notes))
        return
    show(building.as_tables(found, notes))
    if output is not None:
        print(
            f"On the machine with the GPU: --kernel-dir {output}, or kernel_dir in the config.",
            file=sys.stderr,
        )
