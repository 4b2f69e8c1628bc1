"""``quantize``: a float8 checkpoint from a plain one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from ad_flashinfer_pass.cli.options import (
    OUTPUT,
    PROG,
    DebugOption,
    JsonOption,
    Keys,
    OutputOption,
    PromptFileOption,
    QuietOption,
    option,
    taking,
)
from ad_flashinfer_pass.cli.output import show
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.cli.prompts import read_prompts
from ad_flashinfer_pass.errors import ConfigError

EXAMPLES = f"""
[bold]Examples[/bold]

Half the bytes, and how near the logits are on random tokens; then text from it:

[green]{PROG} quantize -m PATH -o PATH-FP8[/green]

[green]{PROG} generate -m PATH-FP8 "Once upon a time"[/green]

Compared on typical texts:

[green]{PROG} quantize -m PATH -f prompts.txt -o PATH-FP8[/green]
"""
FORMATS = ("fp8",)


@taking("model", "config", "dtype", "device", "trust_remote_code", "max_seq_len")
def quantize(
    *,
    prompt_file: PromptFileOption = None,
    keys: Keys,
    form: Annotated[
        str, option(OUTPUT, "NAME", f"Of the weights: {', '.join(FORMATS)}.", "--format")
    ] = FORMATS[0],
    output: OutputOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint whose linears and experts are float8, and say how near its logits are.

    Each row of a weight gets a scale, and activations are quantized token by token as they come, so that
    nothing has to be calibrated. The head, embeddings and routers stay as they are. The folder --output holds
    a compressed-tensors checkpoint, which vLLM reads, too, and transformers if it has no experts. The logits
    of both models are compared on the prompts of a file or, without one, on random tokens.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format must be {' or '.join(FORMATS)}, got {form!r}.")
    if output is None:
        raise ConfigError("give --output FOLDER.")
    given = read_prompts([], prompt_file, None) if prompt_file is not None else []
    chat = next((prompt for prompt in given if prompt.is_chat), None)
    if chat is not None:
        raise ConfigError(f"{chat.where}: quantize needs text or token ids, got a chat.")
    config = keys.config()
    with Reporter(quiet=quiet, live=True, debug=debug) as reporter:
        reporter.phase("load_libraries")
        from ad_flashinfer_pass.cli.generation import libraries_quiet
        from ad_flashinfer_pass.deployment import quantize as making

        with libraries_quiet(not debug):
            made = making.quantize(
                config, output, [prompt.content for prompt in given], on_event=reporter.phase
            )
    if as_json:
        import json

        print(json.dumps(asdict(made), indent=2))
        return
    show(
        [
            f"{made.weights} weights in float8, {len(made.plain)} left plain: {made.bytes_after:,} bytes of "
            f"{made.bytes_before:,}",
            f"on {made.num_tokens} tokens: KL {made.kl:.3g} nats (at most {made.largest_kl:.3g}), the same "
            f"most likely token for {made.same_top_1:.1%}",
        ]
    )
