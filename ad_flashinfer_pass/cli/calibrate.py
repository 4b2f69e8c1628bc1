"""``calibrate``: scales for a KV cache of 8 bits."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ad_flashinfer_pass.cli.options import (
    BUILDING,
    PROG,
    DebugOption,
    Keys,
    OutputOption,
    PromptFileOption,
    QuietOption,
    taking,
)
from ad_flashinfer_pass.cli.output import Stdout
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.cli.prompts import read_prompts
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import OutputFile

EXAMPLES = f"""
[bold]Examples[/bold]

A config for an fp8 cache, from a file with a few typical prompts; then text from it:

[green]{PROG} calibrate -m PATH -f prompts.txt -o fp8.yaml[/green]

[green]{PROG} generate -c fp8.yaml "Once upon a time"[/green]

Into a config that exists:

[green]{PROG} calibrate -c llama.yaml -f prompts.txt -o llama-fp8.yaml[/green]
"""


@taking(*BUILDING, without=["kv_cache_dtype", "world_size"])
def calibrate(
    *,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Typical texts. - stands for the lines of stdin.")
    ] = None,
    prompt_file: PromptFileOption = None,
    keys: Keys,
    output: OutputOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure K and V for a few prompts, and write a config whose KV cache is fp8 with scales to fit.

    Each cache gets a scale for K and one for V, with room for values twice as large as those seen. Without
    scales (1.0, the default of dtype: fp8) whatever lies beyond 448 saturates. Prompts are texts or token
    ids, not chats. The config goes to stdout unless --output names a file.
    """
    given = read_prompts(prompts or [], prompt_file, sys.stdin)
    chat = next((prompt for prompt in given if prompt.is_chat), None)
    if chat is not None:
        raise ConfigError(f"{chat.where}: calibrate needs text or token ids, got a chat.")
    config = keys.config()
    with OutputFile(output) if output is not None else Stdout() as out:
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter:
            reporter.phase("load_libraries")
            from ad_flashinfer_pass.cli.generation import libraries_quiet
            from ad_flashinfer_pass.deployment import calibrate as calibration

            with libraries_quiet(not debug):
                scales = calibration.calibrate(
                    config, [prompt.content for prompt in given], on_event=reporter.phase
                )
            reporter.ready(config.device)
        out.write(calibration.as_yaml(keys.merged(), scales))
        out.keep()
