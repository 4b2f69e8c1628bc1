"""``report``: what the pass did, as one HTML file."""

from __future__ import annotations

from pathlib import Path

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import PROG, OutputOption, memory_bytes

EXAMPLES = f"""
[bold]Examples[/bold]

A page on the demo model, and one on a deployment to H200s:

[green]{PROG} report -o demo.html[/green]

[green]{PROG} report -c configs/llama3_8b.yaml --memory 141GB --sm 90 -o llama.html[/green]

What the page shows, as data:

[green]{PROG} report -m PATH --json -o - | jq '.captures'[/green]
"""


@inspecting("memory", "sm", "max_batch_size")
def report(given: Given, memory: str | None, sm: int | None, output: OutputOption = None) -> Answer:
    """Write one HTML file that shows what the pass did to a model.

    A layer before and after as a picture, the attention sites, kernels, the memory plan, what is captured,
    the evidence of each transform, and all changes of the graph. The file needs no network and no other file.
    It goes to report.html unless --output names another; --json, and --output -, go to stdout.
    """
    limit = memory_bytes(memory)
    from pydantic_core import to_json

    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.report import to_html

    found = inspection.report(
        given.config, graph=given.graph, stage=given.stage, memory=limit, sm=sm, on_event=given.on_event
    )
    text = to_json(found, indent=2).decode() if given.as_json else to_html(found)
    file = output if output is not None or given.as_json else Path("report.html")
    return Answer(found, text=text, file=None if str(file) == "-" else file)
