"""``check``: the cached model beside its source, on the same tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import (
    MODEL,
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
    RandomWeightsOption,
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

The demo model, and a model of yours on a GPU with its own kernels:

[green]{PROG} check[/green]

[green]{PROG} check -m PATH --device cuda --reproducer wrong/[/green]

An architecture without its weights:

[green]{PROG} check -m config.json --random-weights --dtype float32[/green]
"""


def check(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    random_weights: RandomWeightsOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    layers: Annotated[
        int | None,
        option(
            MODEL,
            "N",
            "Only the first N. Default: all; with random weights as few as show each kind of layer twice.",
        ),
    ] = None,
    reproducer: Annotated[
        Path | None,
        option(
            OUTPUT,
            "DIR",
            "If an attention is wrong, write its tensors and a script that runs it alone here.",
            "--reproducer",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the cached model with its source, and name the first attention that is wrong.

    Three sequences go through prefill, mixed, decode, padded and captured steps. Each attention is compared
    with float64 over its own queries, keys and values, so that an error is found where it is; the logits are
    compared with those of the source. Exit code 0 if all agrees, 1 if not.
    """
    keys = {
        "model": model,
        "skip_loading_weights": random_weights or None,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        from ad_flashinfer_pass.generation import libraries_quiet

        deploy = settings(config, keys, tokens_per_block)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import numerics

            found = numerics.check(
                deploy,
                graph=graph,
                stage=stage,
                layers=layers,
                reproducer_dir=reproducer,
                on_event=reporter.phase,
            )
        if as_json:
            print(found.model_dump_json(indent=1))
        else:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
            for part in numerics.as_tables(found):
                console.print(part)
        if not found.is_ok:
            raise typer.Exit(1)
