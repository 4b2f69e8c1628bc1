"""``prebuild``: compile the kernels of a deployment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    MODEL,
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DtypeOption,
    JsonOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    option,
    settings,
)
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.errors import ConfigError

KERNELS = "Kernels"
EXAMPLES = f"""
[bold]Examples[/bold]

What an H100 or H200 needs for a model, compiled where there is nvcc and no GPU, used where there is no nvcc:

[green]{PROG} prebuild -c llama.yaml --sm 90 -o kernels[/green]

[green]echo 'kernel_dir: kernels' >> llama.yaml; {PROG} generate -c llama.yaml "Once upon a time"[/green]

Only the list; then without the providers that are slow to compile, whose sites the next one takes:

[green]{PROG} prebuild -c llama.yaml --sm 90 --list[/green]

[green]{PROG} prebuild -c llama.yaml --sm 90 --skip fmha_v2 --skip fa3 -o kernels[/green]
"""


def prebuild(
    sm: Annotated[
        int,
        option(
            MODEL, "N", "Compute capability of the GPU: 90 (H100, H200), 89 (L40), 80 (A100), 120.", "--sm"
        ),
    ],
    model: ModelOption = None,
    config: ConfigOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    skip: Annotated[
        list[str] | None,
        option(KERNELS, "NAME", "Leave this provider out; can be given several times."),
    ] = None,
    jobs: Annotated[
        int | None, option(KERNELS, "N", "Modules compiled at once. Default: the number of processors.")
    ] = None,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    list_only: Annotated[
        bool, option(OUTPUT, None, "Compile nothing, say what is needed.", "--list")
    ] = False,
    output: Annotated[
        Path | None,
        option(OUTPUT, "FOLDER", "Where modules go. Those that it has are kept.", "--output", "-o"),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile exactly the kernels that a model needs on a kind of GPU, into a folder for another machine.

    Takes a config, nvcc and flashinfer-python, no GPU and no weights. The folder serves machines with the
    same version of flashinfer-python; the key kernel_dir names it there. XQA takes about 20 s a module, FA2
    one to three minutes, FA3 about twelve, FMHA v2 forty.
    """
    keys = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        from ad_flashinfer_pass.cli.generation import libraries_quiet

        if (output is None) != list_only:
            raise ConfigError("give --output FOLDER, or --list to compile nothing.")
        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs must be at least 1, got {jobs}.")
        deploy = settings(config, keys, tokens_per_block)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.deployment import prebuild as building

            if output is None:
                _, found, notes = building.needed_modules(deploy, sm, skip or (), reporter.phase)
            else:
                made = building.prebuild(
                    deploy,
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
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 200).print(*building.as_tables(found, notes))
        if output is not None:
            print(f"On the machine with the GPU, in the config: kernel_dir: {output}", file=sys.stderr)
