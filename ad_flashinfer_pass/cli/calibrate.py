"""``calibrate``: scales for a KV cache of 8 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ad_flashinfer_pass.cli.options import (
    OUTPUT,
    PROG,
    PROMPTS,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    MaxSeqLenOption,
    ModelOption,
    QuietOption,
    TrustOption,
    error_border,
    option,
    settings,
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


def calibrate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Typical texts. - stands for the lines of stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        option(
            PROMPTS,
            "FILE",
            "One prompt a line; in a .jsonl file one object a line, with prompt or prompt_token_ids.",
            "--prompt-file",
            "-f",
        ),
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    max_seq_len: MaxSeqLenOption = None,
    output: Annotated[
        Path | None, option(OUTPUT, "FILE", "Write the YAML here and not to stdout.", "--output", "-o")
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure K and V for a few prompts, and write a config whose KV cache is fp8 with scales to fit.

    Each cache gets a scale for K and one for V, with room for values twice as large as those seen. Without
    scales (1.0, the default of dtype: fp8) whatever lies beyond 448 saturates.
    """
    keys: dict[str, Any] = {
        "model": model,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_seq_len": max_seq_len,
    }
    with error_border(debug):
        given = read_prompts(prompts or [], prompt_file, sys.stdin)
        chat = next((prompt for prompt in given if prompt.is_chat), None)
        if chat is not None:
            raise ConfigError(f"{chat.where}: calibrate needs text or token ids, got a chat.")
        deploy = settings(config, keys, None)
        with OutputFile(output) if output is not None else Stdout() as out:
            with Reporter(quiet=quiet, live=True, debug=debug) as reporter:
                reporter.phase("load_libraries")
                from ad_flashinfer_pass.cli.generation import libraries_quiet
                from ad_flashinfer_pass.config import read_yaml
                from ad_flashinfer_pass.deployment import calibrate as calibration

                contents: list[Any] = [prompt.content for prompt in given]
                with libraries_quiet(not debug):
                    scales = calibration.calibrate(deploy, contents, on_event=reporter.phase)
                reporter.generating()
            data = read_yaml(config) if config is not None else {}
            data.update({key: value for key, value in keys.items() if value is not None})
            out.write(calibration.as_yaml(data, scales))
            out.keep()
