"""``lint``: capture safety of a graph, before anything is captured."""

from __future__ import annotations

from typing import Annotated

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import OUTPUT, PROG, option

EXAMPLES = f"""
[bold]Examples[/bold]

What keeps a deployment to an H100 from being captured:

[green]{PROG} lint -m PATH --dtype bfloat16 --sm 90[/green]

A graph of yours, as it was exported:

[green]{PROG} lint --graph mine.pt2 --stage export[/green]

All rules, with the reason and the way out of each:

[green]{PROG} lint --rules[/green]
"""


@inspecting("sm")
def lint(
    given: Given,
    sm: int | None,
    suppress: Annotated[
        list[str] | None, option(OUTPUT, "RULE", "Leave out this rule; can be given several times.")
    ] = None,
    rules: Annotated[bool, option(OUTPUT, None, "Show all rules and exit.", "--rules")] = False,
) -> Answer:
    """Find what keeps a CUDA graph of a model from being captured, or makes its replay wrong.

    The graph is read, not run, and no weights are. Exit code 0 if nothing was found, 1 if something was.
    """
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.lint import as_tables, rules_as_data, rules_table

    if rules:
        return Answer(rules_as_data(), lambda: [rules_table()])
    found = inspection.lint(
        given.config,
        graph=given.graph,
        stage=given.stage,
        sm=sm,
        suppress=suppress or (),
        on_event=given.on_event,
    )
    return Answer(found, lambda: as_tables(found), failed=bool(found))
