"""``report``: what the pass did, as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    LIMITS,
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    GraphOption,
    MaxSeqLenOption,
    MemoryOption,
    ModelOption,
    QuietOption,
    SmOption,
    TokensPerBlockOption,
    TrustOption,
    error_border,
    memory_bytes,
    option,
    settings,
)
from ad_flashinfer_pass.progress import Reporter

EXAMPLES = f"""
[bold]Examples[/bold]

A page on the demo model, and one on a deployment to H200s:

[green]{PROG} report -o demo.html[/green]

[green]{PROG} report -c configs/llama3_8b.yaml --memory 141GB --sm 90 -o llama.html[/green]
"""


def report(
    model: ModelOption = None,
    graph: GraphOption = None,
    config: ConfigOption = None,
    memory: MemoryOption = None,
    sm: SmOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_batch_size: Annotated[
        int | None, option(LIMITS, "N", "Sequences that run at once. Default: 8.")
    ] = None,
    max_seq_len: MaxSeqLenOption = None,
    tokens_per_block: TokensPerBlockOption = None,
    output: Annotated[
        Path, option(OUTPUT, "FILE", "The file; - stands for stdout.", "--output", "-o")
    ] = Path("report.html"),
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one HTML file that shows what the pass did to a model.

    Attention sites, a layer before and after as a picture, kernels, the memory plan, what is captured, the
    evidence of each transform, and all changes of the graph. It needs no network and no other file.
    """
    keys = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_batch_size": max_batch_size,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        from ad_flashinfer_pass.generation import libraries_quiet

        deploy = settings(config, keys, tokens_per_block)
        limit = memory_bytes(memory)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import html_report

            found = html_report.report(deploy, graph=graph, memory=limit, sm=sm, on_event=reporter.phase)
            page = html_report.to_html(found)
        if str(output) == "-":
            sys.stdout.write(page)
            return
        output.write_text(page, encoding="utf-8")
        if not quiet:
            print(f"wrote {output}", file=sys.stderr)
