"""``check``: the cached model beside its source, on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import LIMITS, OUTPUT, PROG, option

EXAMPLES = f"""
[bold]Examples[/bold]

The demo model, and a model of yours on a GPU with its own kernels:

[green]{PROG} check[/green]

[green]{PROG} check -m PATH --device cuda --reproducer wrong/[/green]

An architecture without its weights, of which few layers stand for all:

[green]{PROG} check -m config.json --random-weights --dtype float32[/green]

Which transform broke it: the graph before the insertion, and the one without fusions:

[green]{PROG} check -m PATH --stage check_packing[/green]

[green]{PROG} check -m PATH --stage insert_cached_attention[/green]
"""


@inspecting("skip_loading_weights")
def check(
    given: Given,
    layers: Annotated[
        int | None,
        option(
            LIMITS,
            "N",
            "Only the first N. Default: all; with random weights, the fewest with each kind of layer twice.",
        ),
    ] = None,
    reproducer: Annotated[
        Path | None,
        option(
            OUTPUT,
            "FOLDER",
            "If an attention is wrong, write its tensors and a script that runs it alone here.",
            "--reproducer",
        ),
    ] = None,
) -> Answer:
    """Compare the cached model with its source, and name the first attention that is wrong.

    Three sequences go through prefill, mixed, decode, padded and captured steps. Each attention is compared
    with float64 over its own queries, keys and values, so that an error is found where it is; the logits are
    compared with those of the source. Exit code 0 if all agrees, 1 if not.
    """
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.check.check import as_tables

    found = inspection.check(
        given.config,
        graph=given.graph,
        stage=given.stage,
        layers=layers,
        reproducer_dir=reproducer,
        on_event=given.on_event,
    )
    return Answer(found, lambda: as_tables(found), failed=not found.is_ok)
