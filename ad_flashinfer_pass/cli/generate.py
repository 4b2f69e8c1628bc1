"""``generate``: continue texts, or answer chats."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ad_flashinfer_pass.cli.generation import Job, run
from ad_flashinfer_pass.cli.options import (
    BUILDING,
    PROG,
    PROMPTS,
    SAMPLING,
    DebugOption,
    JsonOption,
    Keys,
    OutputOption,
    PromptFileOption,
    QuietOption,
    option,
    taking,
)
from ad_flashinfer_pass.cli.output import Stdout
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.cli.prompts import read_prompts
from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.files import OutputFile

HELP = (
    "Continue texts, or answer chats.\n\n"
    "The model is exported, its attention is replaced by paged, cached attention, and all prompts "
    "run together in a batch that is kept full. A single prompt on a terminal is written as it comes.\n\n"
    "Results go to stdout unless --output names a file. The file appears when all are done; Ctrl-C leaves "
    "what is finished in FILE.partial. With --json, and in a .jsonl file, a result is one line: an object "
    "with index, prompt, text, token_ids, finish_reason and error."
)
EXAMPLES = f"""
[bold]Examples[/bold]

Continue a text with the demo model:

[green]{PROG} generate "Once upon a time"[/green]

Many prompts, one a line, with a model of yours; results as JSON lines:

[green]{PROG} generate -m PATH -f prompts.txt -o results.jsonl[/green]

Ask a chat model:

[green]{PROG} generate -m PATH --chat --system "Be brief." "Why is the sky blue?"[/green]

Sample instead of taking the most likely token each time:

[green]{PROG} generate --temperature 0.8 --top-p 0.95 --seed 1 "The dog"[/green]

Try an architecture without its weights, from config.json alone:

[green]echo '{{"prompt_token_ids": [1, 2, 3]}}' > ids.jsonl[/green]

[green]{PROG} generate -m config.json --random-weights -f ids.jsonl --json[/green]
"""

# Where an option is not given, generation_config.json of the model decides, and then:
_DEFAULT = "Default: the model's, or"


@taking(*BUILDING, "skip_loading_weights", "max_batch_size", "max_num_tokens")
def generate(
    *,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to continue. - stands for the lines of stdin, which are also read if stdin "
            "is piped in and nothing else is given.",
            show_default=False,
        ),
    ] = None,
    prompt_file: PromptFileOption = None,
    chat: Annotated[
        bool,
        option(PROMPTS, None, "Put each text into the model's chat template, as a user's.", "--chat"),
    ] = False,
    system: Annotated[str | None, option(PROMPTS, "TEXT", "System message of each --chat.")] = None,
    keys: Keys,
    max_new_tokens: Annotated[
        int | None,
        option(
            SAMPLING,
            "N",
            f"Tokens to generate for a prompt, at most. {_DEFAULT} 256.",
            "--max-new-tokens",
            "-n",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        option(SAMPLING, "T", f"0 takes the most likely token, 1 samples as the model says. {_DEFAULT} 0."),
    ] = None,
    top_k: Annotated[
        int | None,
        option(SAMPLING, "K", f"Sample from the K most likely tokens; 0: from all. {_DEFAULT} 0."),
    ] = None,
    top_p: Annotated[
        float | None,
        option(
            SAMPLING, "P", f"Sample from the fewest likely tokens with P of the probability. {_DEFAULT} 1."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        option(SAMPLING, "P", f"Sample from tokens at least P times as likely as the first. {_DEFAULT} 0."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        option(SAMPLING, "X", f"Above 1 makes tokens that already occurred less likely. {_DEFAULT} 1."),
    ] = None,
    generation_config: Annotated[
        str | None,
        option(
            SAMPLING,
            "auto|none",
            "none leaves generation_config.json aside, but for its end tokens. Default: auto.",
            "--generation-config",
        ),
    ] = None,
    seed: Annotated[int | None, option(SAMPLING, "N", "The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None,
        option(SAMPLING, "TEXT", "End before this text; can be given several times."),
    ] = None,
    ignore_eos: Annotated[
        bool,
        option(SAMPLING, None, "Go on after the model's end-of-text token.", "--ignore-eos"),
    ] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue texts, or answer chats."""
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
    }
    if system is not None and not chat:
        raise ConfigError("--system needs --chat; in a .jsonl file give it among the messages.")
    given = read_prompts(prompts or [], prompt_file, sys.stdin)
    deploy = keys.config(generation_config=generation_config)
    with OutputFile(output) if output is not None else Stdout() as out:
        given_sampling = {name: value for name, value in sampling.items() if value is not None}
        _check_sampling(given_sampling)
        job = Job(
            prompts=given,
            chat=chat,
            system=system,
            sampling=given_sampling,
            json_lines=as_json or (output is not None and output.suffix == ".jsonl"),
        )
        live = not isinstance(out, Stdout) or not sys.stdout.isatty()
        with Reporter(quiet=quiet, live=live, debug=debug) as reporter:
            num_refused = run(job, deploy, out, reporter, debug)
    if num_refused:
        raise typer.Exit(1)


def _check_sampling(values: dict[str, Any]) -> None:
    """Refuse wrong values before the model is built."""
    from ad_flashinfer_pass.runtime.sampling import SamplingParams

    try:
        SamplingParams(**values)
    except RequestError as err:
        raise ConfigError(str(err)) from None
