"""``diff``: what changed between two graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import (
    LIMITS,
    PROG,
    ConfigOption,
    DebugOption,
    DtypeOption,
    GraphOption,
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
from ad_flashinfer_pass.progress import Reporter

EXAMPLES = f"""
[bold]Examples[/bold]

All that the pass does to a model, and what one transform does:

[green]{PROG} diff -m PATH[/green]

[green]{PROG} diff match_repeat_kv match_attention -m PATH[/green]

Two dumps, for example of two versions of transformers; exit code 1 if they differ:

[green]{PROG} dump -m PATH -o new.txt && {PROG} diff old.txt new.txt[/green]
"""


def diff(
    before: Annotated[
        str, typer.Argument(metavar="A", help="A transform, a stage, or a dump (.txt, .json) or .pt2 file.")
    ] = "export",
    after: Annotated[
        str | None, typer.Argument(metavar="B", help="Likewise. Default: the last transform.")
    ] = None,
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    batch: Annotated[int, option(LIMITS, "N", "Sequences for which bytes are counted.")] = 1,
    seq: Annotated[int, option(LIMITS, "N", "Tokens of each of them.")] = 2048,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what was removed, added and rewired between two graphs.

    Layer by layer, with layers that changed alike folded into one; then how often each op is called, and the
    bytes of intermediate results. Exit code 0 if the graphs are the same, 1 if they differ or on an error.
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
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import graph_diff, stages

            names = (before, after or stages.transform_order(deploy)[-1])
            files = {name: stages.read_graph(Path(name)) for name in names if stages.is_file_name(name)}
            wanted = [name for name in names if name not in files]
            run = stages.run_stages(deploy, graph, wanted, reporter.phase) if wanted else None
            sides = [
                files[name] if name in files else run.graphs[stages.resolve(name, deploy)]  # type: ignore[union-attr]
                for name in names
            ]
            found = graph_diff.diff(*sides, batch=batch, seq=seq)
        if as_json:
            print(found.model_dump_json(indent=1))
        else:
            from rich.console import Console

            console = Console(soft_wrap=True, highlight=False, markup=False)
            for part in graph_diff.as_tables(found):
                console.print(part)
        if not found.is_empty:
            raise typer.Exit(1)
