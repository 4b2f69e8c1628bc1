"""``explain``: show every attention of a model."""

from __future__ import annotations

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import PROG
from ad_flashinfer_pass.errors import TransformError

EXAMPLES = f"""
[bold]Examples[/bold]

The attention of the demo model:

[green]{PROG} explain[/green]

An architecture without its weights, on an H100, as data:

[green]{PROG} explain -m config.json --sm 90 --json | jq '.sites[0]'[/green]

What was matched in a model whose masks the pass refuses:

[green]{PROG} explain -m PATH --stage match_attention[/green]
"""


@inspecting("sm")
def explain(given: Given, sm: int | None) -> Answer:
    """Show every attention of a model, and what the pass does with it.

    Where it stands in the source, how it was matched, the class of its mask with the evidence, what
    was folded away, the kernel of each phase, and the bytes of its cache. Of a model that the pass
    refuses: the node, its shapes and source, the first place where a mask differs, and what can be
    done; the exit code is then 1. No weights are read.
    """
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.explain import as_tables

    found = inspection.explain(
        given.config, graph=given.graph, stage=given.stage, sm=sm, on_event=given.on_event
    )
    error = None if found.refusal is None else TransformError(found.refusal.message)
    return Answer(found, lambda: as_tables(found), error=error)
