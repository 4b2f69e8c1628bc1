"""``plan``: the memory of a deployment, before anything is allocated."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

from ad_flashinfer_pass.cli.options import (
    LIMITS,
    PROG,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    GraphOption,
    JsonOption,
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

What fits on an H200, from a config alone:

[green]{PROG} plan -c configs/llama3_8b.yaml --memory 141GB --sm 90[/green]

How long sequences may be if 64 of them run at once:

[green]{PROG} plan -m PATH --max-batch-size 64 --max-seq-len 32768 --memory 80GiB --sm 90[/green]
"""


def plan(
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
    max_num_tokens: Annotated[int | None, option(LIMITS, "N", "Tokens of a step. Default: 512.")] = None,
    tokens_per_block: TokensPerBlockOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a deployment takes of a device's memory, and how many tokens fit, with the arithmetic.

    Weights, pools by layer, workspaces and intermediate results, from config.json alone. The pages are
    counted by the function that allocates them.
    """
    keys = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_batch_size": max_batch_size,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
    }
    with error_border(debug):
        from ad_flashinfer_pass.generation import libraries_quiet

        deploy = settings(config, keys, tokens_per_block)
        limit = memory_bytes(memory)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.inspection import memory_plan

            found = memory_plan.plan(deploy, graph=graph, memory=limit, sm=sm, on_event=reporter.phase)
        if as_json:
            derived: dict[str, Any] = {
                name: getattr(found, name) for name in ("tokens", "sequences", "total", "left")
            }
            print(json.dumps({**found.model_dump(), **derived}, indent=2))
            return
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
        for part in memory_plan.as_tables(found):
            console.print(part)
