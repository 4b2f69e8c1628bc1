"""``explain``: show every attention of a model."""

from __future__ import annotations

import json
import sys

from ad_flashinfer_pass.cli.options import (
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
    SmOption,
    StageOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    settings,
)
from ad_flashinfer_pass.errors import TransformError
from ad_flashinfer_pass.progress import Reporter

EXAMPLES = f"""
[bold]Examples[/bold]

The attention of the demo model:

[green]{PROG} explain[/green]

An architecture without its weights, on an H100, as data:

[green]{PROG} explain -m config.json --sm 90 --json | jq '.sites[0]'[/green]

What was matched in a model whose masks the pass refuses:

[green]{PROG} explain -m PATH --stage match_attention[/green]
"""


def explain(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    stage: StageOption = None,
    sm: SmOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show every attention of a model, and what the pass does with it.

    Where it stands in the source, how it was matched, the class of its mask with the evidence, what
    was folded away, the kernel of each phase, and the bytes of its cache. Of a model that the pass
    refuses: the node, its shapes and source, the first place where a mask differs, and what can be
    done; the exit code is then 1. No weights are read.
    """
    keys = {
        "model": model,
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
            from ad_flashinfer_pass import explain as explaining

            found = explaining.explain(deploy, graph=graph, stage=stage, sm=sm, on_event=reporter.phase)
        if as_json:
            print(json.dumps(found.as_dict(), indent=2))
        else:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 200)
            for table in explaining.as_tables(found):
                console.print(table)
        if found.refusal is not None:
            raise TransformError(found.refusal.message)
