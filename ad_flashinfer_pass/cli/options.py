"""What the commands share: options, the config that they make, and how errors end."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError, is_out_of_memory

if TYPE_CHECKING:
    from ad_flashinfer_pass.config import AutoDeployConfig

PROG = "ad-flashinfer-pass"
PROMPTS, MODEL, SAMPLING, LIMITS, OUTPUT = "Prompts", "Model", "Sampling", "Limits", "Output"


def option(panel: str, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option under a heading of the help; a flag needs ``names``, or it has a --no-form."""
    return typer.Option(
        *names,
        metavar=metavar or "",
        help=text,
        rich_help_panel=panel,
        show_default=metavar is not None,
        **more,
    )


def _no_notes(quiet: bool) -> bool:
    """The notes that a config logs are no errors."""
    logging.getLogger("ad_flashinfer_pass").setLevel(logging.ERROR if quiet else logging.NOTSET)
    return quiet


def _existing_folder(folder: str | None) -> str | None:
    if folder is not None and not os.path.isdir(folder):  # of any text
        raise typer.BadParameter(f"{folder} is no folder")
    return folder


# Options of several commands.
PromptFileOption = Annotated[
    Path | None,
    option(
        PROMPTS,
        "FILE",
        "One prompt a line; in a .jsonl file one object a line, with prompt, prompt_token_ids or messages "
        "(a chat).",
        "--prompt-file",
        "-f",
    ),
]
OutputOption = Annotated[
    Path | None,
    option(OUTPUT, "PATH", "Where the result goes. Default: as said above.", "--output", "-o"),
]
JsonOption = Annotated[bool, option(OUTPUT, None, "Print JSON.", "--json")]
QuietOption = Annotated[
    bool, option(OUTPUT, None, "Print nothing but errors on stderr.", "--quiet", "-q", callback=_no_notes)
]
DebugOption = Annotated[
    bool, option(OUTPUT, None, "Print tracebacks of errors, and the libraries' logs.", "--debug")
]
KernelDirOption = Annotated[
    str | None,
    option(
        MODEL,
        "FOLDER",
        "Folder that prebuild made. FlashInfer loads its kernels from it and need not compile them.",
        "--kernel-dir",
        callback=_existing_folder,
    ),
]
_SM = option(
    MODEL,
    "N",
    "For a GPU of this compute capability, which need not be here: 80 (A100), 89 (L40), 90 (H100, H200), "
    "100 (B200), 120.",
    "--sm",
)
SmOption = Annotated[int, _SM]

# Those of them that say which model is built and how, by their keys in AutoDeployConfig where they are one,
# in the order in which the help shows them.
_MODEL_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        option(
            MODEL,
            "PATH|ID",
            "Directory with config.json and safetensors, hub id, or demo. Default: demo.",
            "--model",
            "-m",
        ),
    ],
    "graph": Annotated[
        Path | None,
        option(
            MODEL,
            "FILE",
            "A graph in place of a model: an ExportedProgram that torch.export.save wrote. It is not run.",
            "--graph",
            "-g",
        ),
    ],
    "config": Annotated[
        Path | None,
        option(
            MODEL,
            "FILE",
            "YAML with keys of AutoDeployConfig. Options on the command line win over it.",
            "--config",
            "-c",
        ),
    ],
    "stage": Annotated[
        str | None,
        option(
            MODEL,
            "NAME",
            "Stop after this transform (match_attention), or after the last one of this stage (export, "
            "pattern_matcher, cache_init). Default: run all. A wrong name gets the list.",
            "--stage",
            "-s",
        ),
    ],
    "sm": Annotated[int | None, _SM],
    "skip_loading_weights": Annotated[
        bool,
        option(
            MODEL,
            None,
            "Draw random weights (seed 0) and read none; config.json is enough.",
            "--random-weights",
        ),
    ],
    "dequantize": Annotated[
        bool,
        option(
            MODEL,
            None,
            "Read quantized weights as plain ones of the model's dtype.",
            "--dequantize",
        ),
    ],
    "dtype": Annotated[
        str | None,
        option(
            MODEL,
            "TYPE",
            "Of weights and activations: auto (the checkpoint's), float32, bfloat16, float16. Default: auto.",
        ),
    ],
    "device": Annotated[
        str | None,
        option(MODEL, "cpu|cuda|cuda:N", "Where the model runs. Default: cuda if there is a GPU, else cpu."),
    ],
    "world_size": Annotated[
        int | None,
        option(
            MODEL,
            "N",
            "Ranks that compute the model together, each on a GPU of its own; they are started here. "
            "Default: 1.",
            "--tp",
        ),
    ],
    "trust_remote_code": Annotated[
        bool,
        option(
            MODEL,
            None,
            "Run the Python code that comes with the checkpoint. Read it first.",
            "--trust-remote-code",
        ),
    ],
    "compile_backend": Annotated[
        str | None,
        option(
            MODEL,
            "NAME",
            "How the graph is run: torch-simple, torch-cudagraph, or torch-opt, the fastest on a GPU. "
            "Default: torch-simple.",
        ),
    ],
    "kv_cache_dtype": Annotated[
        str | None,
        option(
            MODEL,
            "TYPE",
            "Of the KV cache: auto (the model's), fp8, bfloat16, float16, float32. Default: auto.",
            "--kv-cache-dtype",
        ),
    ],
    "kernel_dir": KernelDirOption,
    "max_batch_size": Annotated[int | None, option(LIMITS, "N", "Sequences that run at once. Default: 8.")],
    "max_seq_len": Annotated[
        int | None,
        option(
            LIMITS,
            "N",
            "Tokens of a prompt and its continuation. Default: the model's positions, at most 4096.",
        ),
    ],
    "max_num_tokens": Annotated[
        int | None, option(LIMITS, "N", "Tokens of a step; longer prompts go in chunks. Default: 512.")
    ],
    "tokens_per_block": Annotated[
        int | None, option(LIMITS, "N", "Tokens of a page of the KV cache. Default: 32.")
    ],
    "memory": Annotated[
        str | None,
        option(
            LIMITS,
            "SIZE",
            "Memory of the device, with its unit: 80GB (10**9 bytes), 80GiB (2**30). Default: no limit.",
        ),
    ],
}
_NO_KEYS = ("graph", "stage", "sm", "memory")
_CACHE_KEYS = {"kv_cache_dtype": "dtype", "tokens_per_block": "tokens_per_block"}
# Of every command that builds or shows a graph.
BUILDING = (
    "model config dequantize dtype device world_size trust_remote_code compile_backend kv_cache_dtype "
    "kernel_dir max_seq_len tokens_per_block"
).split()


@dataclass(frozen=True)
class Keys:
    """What the options of a command say about the config."""

    file: Path | None
    given: dict[str, Any]
    """Those that were given as options."""

    def config(self, **more: Any) -> AutoDeployConfig:
        """The file's keys, under those given as options, under those of ``more`` that are not None."""
        from ad_flashinfer_pass.config import AutoDeployConfig

        return AutoDeployConfig(**self.merged(**more))

    def merged(self, **more: Any) -> dict[str, Any]:
        """The keys of ``config``."""
        from ad_flashinfer_pass.config import read_yaml

        data = read_yaml(self.file) if self.file is not None else {}
        given = {**self.given, **{key: value for key, value in more.items() if value is not None}}
        ours = {key: given.pop(name) for name, key in _CACHE_KEYS.items() if name in given}
        cache = data.get("kv_cache_config", {})
        if ours and isinstance(cache, dict):  # otherwise AutoDeployConfig says what it must be
            given["kv_cache_config"] = {**cache, **ours}
        return {**data, **given}


def taking(
    *options: str, without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: give a command these options of ``_MODEL_OPTIONS``, and a border for its errors.

    They stand where its parameter ``keys`` does, a ``Keys``. Those that are no keys of the config are
    passed by their names.
    """
    names = [name for name in _MODEL_OPTIONS if name in options and name not in without]

    def make(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(
                name, kind, default=False if made.__args__[0] is bool else None, annotation=made
            )
            for name in names
            for made in [_MODEL_OPTIONS[name]]
        ]
        parameters = [
            new for each in own for new in (shared if each.name == "keys" else [each.replace(kind=kind)])
        ]

        def run(debug: bool, config: Path | None = None, **options: Any) -> None:
            given = {name: options.pop(name) for name in names if name in options and name not in _NO_KEYS}
            given = {name: value for name, value in given.items() if value is not None and value is not False}
            with error_border(debug):
                command(keys=Keys(config, given), debug=debug, **options)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return make


@contextmanager
def error_border(debug: bool) -> Iterator[None]:
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
        print_error(_message(err))
        code = 2 if isinstance(err, ConfigError) else 1
    else:
        return
    finally:
        _no_notes(False)
    raise typer.Exit(code)


def _message(err: Exception) -> str:
    if isinstance(err, AdFlashinferError):
        return str(err)
    if isinstance(err, OSError) and err.strerror:
        # Who writes a file names it; print names nothing.
        where = err.filename or ("stdout" if err.errno in (ENOSPC, EDQUOT, EFBIG, EIO) else "")
        return f"{where}: {err.strerror}." if where else f"{err.strerror}."
    if is_out_of_memory(err):
        what = str(err).partition(". ")[0] or "Python could not allocate"
        way_out = "Lower max_batch_size, max_seq_len or max_num_tokens, or take a smaller model or dtype."
        return f"out of memory: {what}. {way_out}"
    return f"{type(err).__name__}: {err} (unexpected; --debug shows where)"


def print_error(message: str) -> None:
    """Write ``error: `` and the message, in one line, to stderr; what is no text in it as escapes."""
    line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
    print(f"error: {line}", file=sys.stderr)


def check_folder(option_name: str, file: Path | None) -> None:
    """Refuse a file whose folder is not there, before the work and not after it."""
    if file is not None and not file.parent.is_dir():
        raise ConfigError(f"{option_name} {file}: there is no folder {file.parent}.")


def memory_bytes(text: str | None) -> int | None:
    """The value of --memory in bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    if text is None:
        return None
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if not size or not text.strip()[-1].isalpha():
        raise ConfigError(
            f"--memory must be a size with a unit (MB, GB, TB, or MiB, GiB, TiB), as in 80GB, got {text!r}."
        )
    return size
