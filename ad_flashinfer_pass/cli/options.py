"""What the commands share: options, the config that they make, and how errors end."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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


# Options of several commands.
ModelOption = Annotated[
    str | None,
    option(
        MODEL,
        "PATH|ID",
        "Directory of config.json and safetensors, hub id, or demo. Default: demo.",
        "--model",
        "-m",
    ),
]
ConfigOption = Annotated[
    Path | None,
    option(
        MODEL,
        "FILE",
        "YAML with the keys of AutoDeployConfig; options given here win over it.",
        "--config",
        "-c",
    ),
]
RandomWeightsOption = Annotated[
    bool,
    option(
        MODEL,
        None,
        "Draw weights (seed 0) in place of reading them; config.json is enough.",
        "--random-weights",
    ),
]
DtypeOption = Annotated[
    str | None,
    option(MODEL, "TYPE", "auto (the checkpoint's), float32, bfloat16, float16. Default: auto."),
]
DeviceOption = Annotated[str | None, option(MODEL, "cpu|cuda|cuda:N", "Where it runs. Default: cpu.")]
TrustOption = Annotated[
    bool,
    option(
        MODEL,
        None,
        "Run the Python code of the checkpoint. Read it first.",
        "--trust-remote-code",
    ),
]
MaxSeqLenOption = Annotated[
    int | None,
    option(
        LIMITS,
        "N",
        "Tokens of a prompt and its continuation. Default: the positions of the model, at most 4096.",
    ),
]
TokensPerBlockOption = Annotated[
    int | None, option(LIMITS, "N", "Tokens of a page of the KV cache. Default: 32.")
]
GraphOption = Annotated[
    Path | None,
    option(
        MODEL,
        "FILE",
        "A graph in place of a model: an ExportedProgram that torch.export.save wrote. Nothing of it is run.",
        "--graph",
        "-g",
    ),
]
StageOption = Annotated[
    str | None,
    option(
        MODEL,
        "NAME",
        "Stop after this transform (match_attention) or after the last of this stage (export, "
        "pattern_matcher, cache_init). Default: run all. A wrong name gets the list.",
        "--stage",
        "-s",
    ),
]
MaxBatchSizeOption = Annotated[int | None, option(LIMITS, "N", "Sequences that run at once. Default: 8.")]
MemoryOption = Annotated[
    str | None,
    option(
        LIMITS,
        "SIZE",
        "Memory of the device: 141GB (10**9), 80GiB (2**30). Default: no limit; what the config wants.",
    ),
]
SmOption = Annotated[
    int | None,
    option(
        MODEL,
        "N",
        "For a GPU of this compute capability, which need not be here: 90 (H100, H200), 100 (B200), 120. "
        "Default: for the device of the config.",
    ),
]
JsonOption = Annotated[bool, option(OUTPUT, None, "One JSON object.", "--json")]


def _no_notes(quiet: bool) -> bool:
    """The notes that a config logs are no errors."""
    logging.getLogger("ad_flashinfer_pass").setLevel(logging.ERROR if quiet else logging.NOTSET)
    return quiet


QuietOption = Annotated[
    bool,
    option(OUTPUT, None, "Nothing but errors on stderr.", "--quiet", "-q", callback=_no_notes),
]
DebugOption = Annotated[
    bool,
    option(OUTPUT, None, "Tracebacks with errors, and the libraries' logs.", "--debug"),
]


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


def settings(file: Path | None, keys: dict[str, Any], tokens_per_block: int | None) -> AutoDeployConfig:
    """The file's keys, under those that were given as options (not None)."""
    from ad_flashinfer_pass.config import AutoDeployConfig, read_yaml

    data = read_yaml(file) if file is not None else {}
    data.update({key: value for key, value in keys.items() if value is not None})
    if tokens_per_block is not None:
        cache = data.setdefault("kv_cache_config", {})
        if isinstance(cache, dict):  # otherwise AutoDeployConfig says what it must be
            cache["tokens_per_block"] = tokens_per_block
    return AutoDeployConfig(**data)


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
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"--memory must be a size such as 141GB or 80GiB, got {text!r}.") from None
