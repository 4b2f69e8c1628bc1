"""The command ``ad-flashinfer-pass``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed or a prompt was
refused, 2 wrong usage, 130 Ctrl-C, 141 the reader of stdout went away.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ad_flashinfer_pass import __version__
from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError, RequestError
from ad_flashinfer_pass.generation import Job, explain_model, run
from ad_flashinfer_pass.output import OutputFile, Stdout
from ad_flashinfer_pass.progress import Reporter
from ad_flashinfer_pass.prompts import read_prompts

if TYPE_CHECKING:
    from ad_flashinfer_pass.config import AutoDeployConfig
    from ad_flashinfer_pass.runtime.sampling import SamplingParams

_PROG = "ad-flashinfer-pass"
# UsageError: click's in older versions of typer, typer's own in newer ones, exported by neither.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    command = typer.main.get_command(app)
    args = None if argv is None else list(argv)
    try:
        code = command.main(args=args, prog_name=_PROG, standalone_mode=False)
    except _UsageError as err:
        _print_error(f"{err.format_message().rstrip('.?')}; see {_PROG} --help.")
        code = 2
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Paged, cached attention for exported LLMs, on FlashInfer's TRT-LLM kernels."""
    if version:
        print(f"{_PROG} {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _option(panel: str, metavar: str | None, text: str, *names: str) -> Any:
    """An option under a heading of the help; a flag needs ``names``, or it has a --no-form."""
    return typer.Option(
        *names, metavar=metavar, help=text, rich_help_panel=panel, show_default=metavar is not None
    )


_HELP = (
    "Continue texts, or answer chats.\n\n"
    "The model is exported, its attention is replaced by paged, cached attention, and all prompts "
    "run together in a batch that is kept full. A single prompt on a terminal is written as it comes."
)
_EXAMPLES = f"""
[bold]Examples[/bold]

Continue a text with the demo model:

[green]{_PROG} generate "Once upon a time"[/green]

Many prompts, one a line, with a model of yours; results as JSON lines:

[green]{_PROG} generate -m PATH -f prompts.txt -o results.jsonl[/green]

Ask a chat model:

[green]{_PROG} generate -m PATH --chat --system "Be brief." "Why is the sky blue?"[/green]

Sample instead of taking the most likely token each time:

[green]{_PROG} generate --temperature 0.8 --top-p 0.95 --seed 1 "The dog"[/green]

Try an architecture without its weights, from config.json alone:

[green]echo '{{"prompt_token_ids": [1, 2, 3]}}' > ids.jsonl[/green]

[green]{_PROG} generate -m config.json --random-weights -f ids.jsonl --json[/green]
"""
_EXPLAIN_EXAMPLES = f"""
[bold]Examples[/bold]

The attention of the demo model:

[green]{_PROG} explain[/green]

An architecture without its weights, as data:

[green]{_PROG} explain -m config.json --random-weights --json | jq '.sites[0]'[/green]
"""
_PROMPTS, _MODEL, _SAMPLING, _LIMITS, _OUTPUT = "Prompts", "Model", "Sampling", "Limits", "Output"

# Options of several commands.
_ModelOption = Annotated[
    str | None,
    _option(
        _MODEL,
        "PATH|ID",
        "Directory of config.json and safetensors, hub id, or demo. Default: demo.",
        "--model",
        "-m",
    ),
]
_ConfigOption = Annotated[
    Path | None,
    _option(
        _MODEL,
        "FILE",
        "YAML with the keys of AutoDeployConfig; options given here win over it.",
        "--config",
        "-c",
    ),
]
_RandomWeightsOption = Annotated[
    bool,
    _option(
        _MODEL,
        None,
        "Draw weights (seed 0) in place of reading them; config.json is enough.",
        "--random-weights",
    ),
]
_DtypeOption = Annotated[
    str | None,
    _option(_MODEL, "TYPE", "auto (the checkpoint's), float32, bfloat16, float16. Default: auto."),
]
_DeviceOption = Annotated[str | None, _option(_MODEL, "DEVICE", "cpu, cuda or cuda:N. Default: cpu.")]
_TrustOption = Annotated[
    bool,
    _option(
        _MODEL,
        None,
        "Run the Python code of the checkpoint. Read it first.",
        "--trust-remote-code",
    ),
]
_MaxSeqLenOption = Annotated[
    int | None,
    _option(_LIMITS, "N", "Tokens of a prompt and its continuation. Default: 2048."),
]
_TokensPerBlockOption = Annotated[
    int | None, _option(_LIMITS, "N", "Tokens of a page of the KV cache. Default: 32.")
]
_QuietOption = Annotated[bool, _option(_OUTPUT, None, "Nothing but errors on stderr.", "--quiet", "-q")]
_DebugOption = Annotated[
    bool,
    _option(_OUTPUT, None, "Tracebacks with errors, and the libraries' logs.", "--debug"),
]


@app.command(help=_HELP, epilog=_EXAMPLES)
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to continue. - stands for the lines of stdin, which are also read if stdin "
            "is piped in and nothing else is given.",
            show_default=False,
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        _option(
            _PROMPTS,
            "FILE",
            "One prompt a line; in a .jsonl file one object a line, with prompt, prompt_token_ids "
            "or messages (a chat).",
            "--prompt-file",
            "-f",
        ),
    ] = None,
    chat: Annotated[
        bool,
        _option(_PROMPTS, None, "Put each text into the model's chat template, as a user's.", "--chat"),
    ] = False,
    system: Annotated[str | None, _option(_PROMPTS, "TEXT", "System message of each --chat.")] = None,
    model: _ModelOption = None,
    config: _ConfigOption = None,
    random_weights: _RandomWeightsOption = False,
    dtype: _DtypeOption = None,
    device: _DeviceOption = None,
    trust_remote_code: _TrustOption = False,
    max_new_tokens: Annotated[
        int,
        _option(_SAMPLING, "N", "Tokens to generate for a prompt, at most.", "--max-new-tokens", "-n"),
    ] = 64,
    temperature: Annotated[
        float,
        _option(_SAMPLING, "T", "0 takes the most likely token, 1 samples as the model says."),
    ] = 0.0,
    top_k: Annotated[int, _option(_SAMPLING, "K", "Sample from the K most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float,
        _option(_SAMPLING, "P", "Sample from the fewest likely tokens with P of the probability."),
    ] = 1.0,
    min_p: Annotated[
        float,
        _option(_SAMPLING, "P", "Sample from tokens at least P times as likely as the first."),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, _option(_SAMPLING, "X", "Above 1 makes tokens that already occurred less likely.")
    ] = 1.0,
    seed: Annotated[int | None, _option(_SAMPLING, "N", "The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None,
        _option(_SAMPLING, "TEXT", "End before this text; can be given several times."),
    ] = None,
    ignore_eos: Annotated[
        bool,
        _option(_SAMPLING, None, "Go on after the model's end-of-text token.", "--ignore-eos"),
    ] = False,
    max_batch_size: Annotated[
        int | None, _option(_LIMITS, "N", "Sequences that run at once. Default: 8.")
    ] = None,
    max_seq_len: _MaxSeqLenOption = None,
    max_num_tokens: Annotated[
        int | None,
        _option(_LIMITS, "N", "Tokens of a step; longer prompts go in chunks. Default: 512."),
    ] = None,
    tokens_per_block: _TokensPerBlockOption = None,
    output: Annotated[
        Path | None,
        _option(
            _OUTPUT,
            "FILE",
            "Write results here and not to stdout; JSON lines if it ends in .jsonl. The file "
            "appears when all are done; Ctrl-C leaves what is finished in FILE.partial.",
            "--output",
            "-o",
        ),
    ] = None,
    json_lines: Annotated[
        bool,
        _option(
            _OUTPUT,
            None,
            "One JSON object a line: index, prompt, text, token_ids, finish_reason, error.",
            "--json",
        ),
    ] = False,
    quiet: _QuietOption = False,
    debug: _DebugOption = False,
) -> None:
    """Continue texts, or answer chats."""
    keys = {
        "model": model,
        "skip_loading_weights": random_weights or None,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_batch_size": max_batch_size,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
    }
    with _error_border(debug):
        if system is not None and not chat:
            raise ConfigError("--system needs --chat; in a .jsonl file give it among the messages.")
        given = read_prompts(prompts or [], prompt_file, sys.stdin)
        settings = _config(config, keys, tokens_per_block)
        with OutputFile(output) if output is not None else Stdout() as out:
            params = _sampling_params(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                stop=tuple(stop or ()),
                ignore_eos=ignore_eos,
            )
            job = Job(
                prompts=given,
                chat=chat,
                system=system,
                sampling=params,
                json_lines=json_lines or (output is not None and output.suffix == ".jsonl"),
            )
            live = not isinstance(out, Stdout) or not sys.stdout.isatty()
            with Reporter(quiet=quiet, live=live, debug=debug) as reporter:
                num_refused = run(job, settings, out, reporter, debug)
        if num_refused:
            raise typer.Exit(1)


@app.command(epilog=_EXPLAIN_EXAMPLES)
def explain(
    model: _ModelOption = None,
    config: _ConfigOption = None,
    random_weights: _RandomWeightsOption = False,
    dtype: _DtypeOption = None,
    device: _DeviceOption = None,
    trust_remote_code: _TrustOption = False,
    max_seq_len: _MaxSeqLenOption = None,
    tokens_per_block: _TokensPerBlockOption = None,
    as_json: Annotated[bool, _option(_OUTPUT, None, "One JSON object.", "--json")] = False,
    quiet: _QuietOption = False,
    debug: _DebugOption = False,
) -> None:
    """Show every attention of a model, and what the pass does with it.

    Where it stands in the source, how it was matched, the class of its mask with the evidence, what
    was folded away, the kernel of each phase, and the bytes of its cache. A model that the pass
    refuses is explained by the refusal.
    """
    keys = {
        "model": model,
        "skip_loading_weights": random_weights or None,
        "trust_remote_code": trust_remote_code or None,
        "dtype": dtype,
        "device": device,
        "max_seq_len": max_seq_len,
    }
    with _error_border(debug):
        settings = _config(config, keys, tokens_per_block)
        with Reporter(quiet=quiet, live=True, debug=debug) as reporter:
            explain_model(settings, reporter, as_json=as_json, debug=debug)


@contextmanager
def _error_border(debug: bool) -> Iterator[None]:
    """Make each error one line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as err:
        print(f"interrupted{f': {err}' if str(err) else ''}", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except Exception as err:
        if debug:
            traceback.print_exc()
        _print_error(_message(err))
        code = 2 if isinstance(err, ConfigError) else 1
    else:
        return
    raise typer.Exit(code)


def _message(err: Exception) -> str:
    if isinstance(err, AdFlashinferError):
        return str(err)
    if isinstance(err, OSError) and err.strerror:
        where = f"{err.filename}: " if err.filename else ""
        return f"{where}{err.strerror}."
    return f"{type(err).__name__}: {err} (unexpected; --debug shows where)"


def _print_error(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def _config(file: Path | None, keys: dict[str, Any], tokens_per_block: int | None) -> AutoDeployConfig:
    """The file's keys, under those that were given as options (not None)."""
    from ad_flashinfer_pass.config import AutoDeployConfig, read_yaml

    data = read_yaml(file) if file is not None else {}
    data.update({key: value for key, value in keys.items() if value is not None})
    if tokens_per_block is not None:
        cache = data.setdefault("kv_cache_config", {})
        if isinstance(cache, dict):  # otherwise AutoDeployConfig says what it must be
            cache["tokens_per_block"] = tokens_per_block
    return AutoDeployConfig(**data)


def _sampling_params(**values: Any) -> SamplingParams:
    from ad_flashinfer_pass.runtime.sampling import SamplingParams

    try:
        return SamplingParams(**values)
    except RequestError as err:
        raise ConfigError(str(err)) from None
