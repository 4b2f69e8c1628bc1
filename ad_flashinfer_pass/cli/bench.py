"""``bench``: throughput and latency, beside the floor of the memory."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from ad_flashinfer_pass.cli.options import (
    LIMITS,
    MODEL,
    OUTPUT,
    PROG,
    ConfigOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    RandomWeightsOption,
    TokensPerBlockOption,
    TrustOption,
    check_folder,
    error_border,
    option,
    settings,
)
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.errors import ConfigError

_LOAD = "Load"
EXAMPLES = f"""
[bold]Examples[/bold]

The demo model, one and eight requests at a time:

[green]{PROG} bench --concurrency 1,8[/green]

The shape of a model without its weights, on a GPU, with a picture of step time by batch:

[green]{PROG} bench -m config.json --random-weights --dtype bfloat16 --device cuda
--compile-backend torch-opt --input-len 1024 --concurrency 1,8,32,128 --plot steps.svg[/green]

How fast prompts are read:

[green]{PROG} bench -m PATH --device cuda --output-len 1 --json | jq '.rows[].prompt_tokens_per_s'[/green]
"""


def bench(
    model: ModelOption = None,
    config: ConfigOption = None,
    random_weights: RandomWeightsOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    compile_backend: Annotated[
        str | None,
        option(MODEL, "NAME", "torch-simple, torch-cudagraph, torch-opt. Default: torch-simple."),
    ] = None,
    input_len: Annotated[int, option(_LOAD, "N", "Random tokens of each prompt.")] = 128,
    output_len: Annotated[int, option(_LOAD, "N", "Tokens generated for each prompt.")] = 64,
    concurrency: Annotated[str, option(_LOAD, "N,N", "Requests that run at once; a row for each.")] = "1,8",
    requests_each: Annotated[
        int,
        option(_LOAD, "N", "Requests one after the other in each of those places."),
    ] = 1,
    max_num_tokens: Annotated[
        int | None, option(LIMITS, "N", "Tokens of a step; longer prompts go in chunks. Default: 512.")
    ] = None,
    tokens_per_block: TokensPerBlockOption = None,
    plot: Annotated[
        Path | None,
        option(OUTPUT, "FILE", "Draw step time by concurrency, with the floor; .png or .svg."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure throughput and latency of a model, beside the floor of the device's memory.

    Random prompts, greedy, a fixed number of new tokens. The floor of a decode step is the time in which
    a large copy, measured in the same run, moves as many bytes as the step must read.
    """
    with error_border(debug):
        places = _numbers(concurrency)
        for name, number in (("--input-len", input_len), ("--output-len", output_len)):
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}.")
        if plot is not None:
            _check_plot(plot)
        keys = {
            "model": model,
            "skip_loading_weights": random_weights or None,
            "trust_remote_code": trust_remote_code or None,
            "dtype": dtype,
            "device": device,
            "compile_backend": compile_backend,
            "max_batch_size": max(places),
            "max_seq_len": input_len + output_len,
            "max_num_tokens": max_num_tokens,
            "generation_config": "none",
        }
        deploy = settings(config, keys, tokens_per_block)
        from ad_flashinfer_pass.cli.generation import libraries_quiet

        with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
            reporter.phase("load_libraries")
            from ad_flashinfer_pass import build
            from ad_flashinfer_pass.deployment import bench as measure

            llm = build.build_model(deploy, on_event=reporter.phase)
            result = measure.bench(
                llm,
                input_len=input_len,
                output_len=output_len,
                concurrencies=places,
                requests_each=requests_each,
                on_progress=lambda number, done, total: reporter.phase(
                    f"measure: {done} of {total} requests, {number} at once"
                ),
            )
            if plot is not None:
                measure.draw(result, plot)
        _show(result.as_dict() if as_json else measure.as_table(result))


def _show(result: Any) -> None:
    if isinstance(result, dict):
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(result)


def _check_plot(file: Path) -> None:
    """Refuse a file that could not be drawn, before anything is measured."""
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {file}: must end in .png or .svg.")
    check_folder("--plot", file)
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'ad-flashinfer-pass[plot]'.")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--concurrency must be positive numbers with commas between, got {text!r}.")
    return numbers
