"""``dump``: the graph before or after any transform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    LIMITS,
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DtypeOption,
    GraphOption,
    JsonOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    StageOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    option,
    settings,
)
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.progress import Reporter

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


def dump(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    layer: Annotated[int | None, option(LIMITS, "N", "Only this layer, and what it reads.")] = None,
    around: Annotated[
        str | None,
        option(LIMITS, "NODE", "Only what is near this node: its name here or in FX, or the end of it."),
    ] = None,
    hops: Annotated[int, option(LIMITS, "N", "How near, for --around.")] = 2,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    output_format: Annotated[
        str | None,
        option(
            OUTPUT,
            "FORMAT",
            "text, json, graphml, dot, svg or model-explorer. Default: by the ending of --output, else text.",
            "--format",
        ),
    ] = None,
    output: Annotated[
        Path | None, option(OUTPUT, "FILE", "Write here and not to stdout.", "--output", "-o")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the graph before or after any transform.

    As text, a line is a node with its type, its call, the source line that made it and the transform that
    inserted it. Names are stable: a node is called after its module, so that a change in one layer renames
    nothing in another and two dumps can be compared with diff. No weights are read.
    """
    keys = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        from ad_flashinfer_pass.generation import libraries_quiet

        deploy = settings(config, keys, tokens_per_block)
        name = output_format or (
            "json" if as_json else _BY_SUFFIX.get(output.suffix if output else "", "text")
        )
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import dump as dumping
            from ad_flashinfer_pass.inspection.formats import FORMATS

            if name not in FORMATS:
                raise ConfigError(f"--format {name}: must be one of {', '.join(FORMATS)}.")
            found = dumping.dump(
                deploy,
                graph=graph,
                stage=stage,
                layer=layer,
                around=around,
                hops=hops,
                on_event=reporter.phase,
            )
            text = FORMATS[name](found)
        if output is None:
            print(text, end="" if text.endswith("\n") else "\n")
        else:
            output.write_text(text, encoding="utf-8")
