"""``bench``: throughput and latency, beside the floor of the memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    BUILDING,
    OUTPUT,
    PROG,
    DebugOption,
    JsonOption,
    Keys,
    QuietOption,
    check_folder,
    option,
    taking,
)
from ad_flashinfer_pass.cli.output import show
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

Requests of a ShareGPT file that arrive at random, four a second:

[green]{PROG} bench -m PATH --dataset ShareGPT.json --num-prompts 200 --request-rate 4
--concurrency 32[/green]

How fast prompts are read:

[green]{PROG} bench -m PATH --device cuda --output-len 1 --json | jq '.rows[].prompt_tokens_per_s'[/green]
"""


@taking(*BUILDING, "skip_loading_weights", "max_num_tokens", without=["max_seq_len"])
def bench(
    *,
    keys: Keys,
    input_len: Annotated[int, option(_LOAD, "N", "Random tokens of each prompt.")] = 128,
    output_len: Annotated[int, option(_LOAD, "N", "Tokens generated for each prompt.")] = 64,
    concurrency: Annotated[str, option(_LOAD, "N,N", "Requests that run at once; a row for each.")] = "1,8",
    requests_each: Annotated[
        int,
        option(_LOAD, "N", "Requests one after the other in each of those places."),
    ] = 1,
    dataset: Annotated[
        Path | None,
        option(
            _LOAD,
            "FILE",
            "Requests in place of those: ShareGPT's JSON, or lines with prompt_len and output_len.",
        ),
    ] = None,
    num_prompts: Annotated[int, option(_LOAD, "N", "Of a dataset, at most.")] = 1000,
    request_rate: Annotated[
        float,
        option(_LOAD, "R", "Of a dataset, a second; the times between are exponential. inf: all at once."),
    ] = float("inf"),
    plot: Annotated[
        Path | None,
        option(OUTPUT, "FILE", "Draw step time by concurrency, with the floor; .png or .svg."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure throughput and latency of a model, beside the floor of the device's memory.

    Random prompts, greedy, a fixed number of new tokens; or the requests of a dataset, of which conversations
    beyond 1,024 tokens in or 2,048 in all are left out. The floor of a decode step is the time in which
    a large copy, measured in the same run, moves as many bytes as the step must read; of experts, those
    that a batch is expected to choose.
    """
    places = _numbers(concurrency)
    for name, number in (("--input-len", input_len), ("--output-len", output_len)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}.")
    if plot is not None:
        _check_plot(plot)
    if num_prompts < 1 or not request_rate > 0:
        raise ConfigError(
            f"--num-prompts and --request-rate must be positive, got {num_prompts} and {request_rate:g}."
        )
    from ad_flashinfer_pass.deployment import dataset as datasets

    entries = [] if dataset is None else datasets.read(dataset, num_prompts)
    longest = datasets.longest(entries) if entries else input_len + output_len
    config = keys.config(max_batch_size=max(places), max_seq_len=longest, generation_config="none")
    from ad_flashinfer_pass.cli.generation import libraries_quiet

    with Reporter(quiet=quiet, live=True, debug=debug) as reporter, libraries_quiet(not debug):
        reporter.phase("load_libraries")
        from ad_flashinfer_pass import build
        from ad_flashinfer_pass.deployment import bench as measure

        llm = build.build_model(config, on_event=reporter.phase)

        def progress(number: int, done: int, total: int) -> None:
            reporter.phase(f"measure: {done} of {total} requests, {number} at once")

        if entries:
            requests = datasets.requests(entries, llm.tokenizer, llm.model.vocab_size, request_rate)
            result = measure.bench_dataset(
                llm, requests, concurrencies=places, request_rate=request_rate, on_progress=progress
            )
        else:
            result = measure.bench(
                llm,
                input_len=input_len,
                output_len=output_len,
                concurrencies=places,
                requests_each=requests_each,
                on_progress=progress,
            )
        if plot is not None:
            measure.draw(result, plot)
    if as_json:
        print(json.dumps(asdict(result), indent=2, allow_nan=False))
    else:
        show(measure.as_tables(result))


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
