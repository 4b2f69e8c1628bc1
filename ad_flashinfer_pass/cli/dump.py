"""``dump``: the graph before or after any transform."""

from __future__ import annotations

from typing import Annotated

from ad_flashinfer_pass.cli.inspecting import Answer, Given, inspecting
from ad_flashinfer_pass.cli.options import LIMITS, OUTPUT, PROG, OutputOption, option
from ad_flashinfer_pass.errors import ConfigError

EXAMPLES = f"""
[bold]Examples[/bold]

The graph as the pass leaves it, one layer of it, and the same before attention was matched:

[green]{PROG} dump -m PATH --layer 3[/green]

[green]{PROG} dump -m PATH --layer 3 --stage match_repeat_kv[/green]

What stands around a node that an error names:

[green]{PROG} dump -m PATH --stage eliminate_noops --around softmax_3 --hops 4[/green]

A picture (needs Graphviz), and a file for Model Explorer:

[green]{PROG} dump -m PATH --layer 0 -o layer.svg[/green]

[green]{PROG} dump -m PATH --format model-explorer -o llama.json[/green]

Every stage of any command, as text into a directory:

[green]AD_DUMP_GRAPHS_DIR=graphs {PROG} generate -m PATH "Once"[/green]
"""
_BY_SUFFIX = {".txt": "text", ".json": "json", ".graphml": "graphml", ".dot": "dot", ".svg": "svg"}


@inspecting("sm", without=["device"])
def dump(
    given: Given,
    sm: int | None,
    layer: Annotated[int | None, option(LIMITS, "N", "Only this layer, and what it reads.")] = None,
    around: Annotated[
        str | None,
        option(LIMITS, "NODE", "Only what is near this node: its name here or in FX, or the end of it."),
    ] = None,
    hops: Annotated[int, option(LIMITS, "N", "How near, for --around.")] = 2,
    output_format: Annotated[
        str | None,
        option(
            OUTPUT,
            "KIND",
            "text, json, graphml, dot, svg or model-explorer. Default: by the ending of --output, else text.",
            "--format",
        ),
    ] = None,
    output: OutputOption = None,
) -> Answer:
    """Write the graph before or after any transform.

    As text, a line is a node with its type, its call, the source line that made it and the transform that
    inserted it. Names are stable: a node is called after its module, so that a change in one layer renames
    nothing in another and two dumps can be compared with diff. The graph goes to stdout unless --output names
    a file. No weights are read.
    """
    from ad_flashinfer_pass import inspection
    from ad_flashinfer_pass.inspection.formats import FORMATS

    by_suffix = _BY_SUFFIX.get(output.suffix if output else "", "text")
    name = output_format or ("json" if given.as_json else by_suffix)
    if name not in FORMATS:
        raise ConfigError(f"--format {name}: must be one of {', '.join(FORMATS)}.")
    found = inspection.dump(
        given.config,
        graph=given.graph,
        stage=given.stage,
        sm=sm,
        layer=layer,
        around=around,
        hops=hops,
        on_event=given.on_event,
    )
    return Answer(found, text=FORMATS[name](found), file=None if str(output) == "-" else output)
