"""``diff``: what changed between two graphs."""

from __future__ import annotations

from typing import Annotated

import typer

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import LIMITS, PROG, option

EXAMPLES = f"""
[bold]Examples[/bold]

All that the pass does to a model, and what one transform does:

[green]{PROG} diff -m PATH[/green]

[green]{PROG} diff match_repeat_kv match_attention -m PATH[/green]

Two dumps, for example of two versions of transformers; exit code 1 if they differ:

[green]{PROG} dump -m PATH -o new.txt && {PROG} diff old.txt new.txt[/green]
"""


@inspecting("sm", without=["device", "stage"])
def diff(
    given: Given,
    sm: int | None,
    before: Annotated[
        str, typer.Argument(metavar="A", help="A transform, a stage, or a dump (.txt, .json) or .pt2 file.")
    ] = "export",
    after: Annotated[
        str | None, typer.Argument(metavar="B", help="Likewise. Default: the last transform.")
    ] = None,
    batch: Annotated[int, option(LIMITS, "N", "Sequences for which bytes are counted.")] = 1,
    seq: Annotated[int, option(LIMITS, "N", "Tokens of each of them.")] = 2048,
) -> Answer:
    """Show what was removed, added and rewired between two graphs.

    Layer by layer, with layers that changed alike folded into one; then how often each op is called, and the
    bytes of intermediate results. Exit code 0 if the graphs are the same, 1 if they differ or on an error.
    """
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.diff import as_tables

    found = inspection.diff(
        given.config, before, after, graph=given.graph, sm=sm, batch=batch, seq=seq, on_event=given.on_event
    )
    return Answer(found, lambda: as_tables(found), failed=not found.is_empty)
