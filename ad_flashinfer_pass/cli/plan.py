"""``plan``: the memory of a deployment, before anything is allocated."""

from __future__ import annotations

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import PROG, memory_bytes

EXAMPLES = f"""
[bold]Examples[/bold]

What fits on an H200, from a config alone:

[green]{PROG} plan -c configs/llama3_8b.yaml --memory 141GB --sm 90[/green]

How long sequences may be if 64 of them run at once:

[green]{PROG} plan -m PATH --max-batch-size 64 --max-seq-len 32768 --memory 80GiB --sm 90[/green]

What the intermediate results were before the pass touched the attention:

[green]{PROG} plan -m PATH --stage eliminate_noops[/green]
"""


@inspecting("memory", "sm", "max_batch_size", "max_num_tokens")
def plan(given: Given, memory: str | None, sm: int | None) -> Answer:
    """Show what a deployment takes of a device's memory, and how many tokens fit, with the arithmetic.

    Weights, pools by layer, workspaces, intermediate results and CUDA graphs, from config.json alone. The
    pages are counted by the function that allocates them.
    """
    limit = memory_bytes(memory)
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.plan import as_tables

    found = inspection.plan(
        given.config, graph=given.graph, stage=given.stage, memory=limit, sm=sm, on_event=given.on_event
    )
    return Answer(found, lambda: as_tables(found))
