"""The prompts of the command: from arguments, a file or stdin, checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ad_flashinfer_pass.config import nearest
from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.runtime.chat import MUST_BE, apply_template, is_messages

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_KEYS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class GivenPrompt:
    """One prompt as the user gave it."""

    content: Any
    """Text, token ids, or the messages of a chat; anything at all if it is refused."""
    where: str
    """For error messages: ``prompt 0`` or ``prompts.jsonl:3``."""
    error: str | None = None
    """Why it is refused; None if it is not."""

    @property
    def is_chat(self) -> bool:
        """Whether it is the messages of a chat."""
        return isinstance(self.content, list) and isinstance(self.content[0], dict)


def read_prompts(
    arguments: Sequence[str], prompt_file: Path | None, stdin: TextIO | None
) -> list[GivenPrompt]:
    """All prompts of one call, in order. One that is empty or no text is refused, and the others are not.

    ``-`` among the arguments stands for the lines of stdin, which are also read if nothing is given
    and stdin is not a terminal. There and in a file each line that is not blank is a prompt; a
    .jsonl file has an object a line with ``prompt``, ``prompt_token_ids`` or ``messages``.

    Raises:
        ConfigError: there is no prompt, or none that is not refused, or the file cannot be read.
    """
    if arguments and prompt_file is not None:
        raise ConfigError("give prompts as arguments or as --prompt-file, not both.")
    if prompt_file is not None:
        prompts = list(_from_file(prompt_file))
    elif not arguments and stdin is not None and not stdin.isatty():
        prompts = list(_from_stdin(stdin))
    else:
        prompts = list(_from_arguments(arguments, stdin))
    if not prompts:
        problem = f"{prompt_file} holds no prompt" if prompt_file is not None else "no prompt"
        raise ConfigError(f"{problem}; give text as an argument, in --prompt-file FILE, or on stdin.")
    prompts = [replace(prompt, error=prompt.error or _problem(prompt)) for prompt in prompts]
    if all(prompt.error is not None for prompt in prompts):
        raise ConfigError(f"{prompts[0].where}: {prompts[0].error}")
    return prompts


def model_inputs(
    prompts: Sequence[GivenPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat: bool,
    system: str | None,
) -> list[str | list[int] | RequestError]:
    """What the model is given: text as it is, chats as the token ids of the chat template.

    Args:
        prompts: as read.
        tokenizer: needed for chats.
        chat: make a chat of each text prompt, as its user's message.
        system: the system message of those chats.

    Returns:
        One for each prompt; why, where it is refused: a chat needs a template that takes it.

    Raises:
        ConfigError: all are refused; or there is no tokenizer, and nothing but text.
    """
    if tokenizer is None and not chat and all(isinstance(prompt.content, str) for prompt in prompts):
        raise ConfigError(
            "the model has no tokenizer; give token ids, by --prompt-file FILE.jsonl with lines such as "
            '{"prompt_token_ids": [1, 2, 3]}.'
        )
    inputs: list[str | list[int] | RequestError] = []
    for prompt in prompts:
        try:
            inputs.append(_model_input(prompt, tokenizer, chat, system))
        except RequestError as err:
            inputs.append(err)
    if all(isinstance(given, RequestError) for given in inputs):
        raise ConfigError(f"{prompts[0].where}: {inputs[0]}")
    return inputs


def _model_input(
    prompt: GivenPrompt, tokenizer: PreTrainedTokenizerBase | None, chat: bool, system: str | None
) -> str | list[int]:
    if prompt.error is not None:
        raise RequestError(prompt.error)
    content: Any = prompt.content
    if chat and isinstance(content, str):
        content = [{"role": "user", "content": content}]
        if system is not None:
            content.insert(0, {"role": "system", "content": system})
    elif chat and not prompt.is_chat:
        raise RequestError("--chat needs text, got token ids.")
    model_input: str | list[int] = content
    return apply_template(content, tokenizer) if isinstance(content[0], dict) else model_input


def _from_arguments(arguments: Sequence[str], stdin: TextIO | None) -> Iterator[GivenPrompt]:
    for index, text in enumerate(arguments):
        if text == "-" and stdin is not None:
            yield from _from_stdin(stdin)
        else:
            yield GivenPrompt(text, f"prompt {index}")


def _from_stdin(stdin: TextIO) -> Iterator[GivenPrompt]:
    try:
        text = stdin.read()
    except UnicodeDecodeError as err:
        raise ConfigError(f"stdin: must be UTF-8 text (byte {err.start}: {err.reason}).") from None
    for number, line in _lines(text):
        yield GivenPrompt(line, f"stdin:{number}")


def _from_file(path: Path) -> Iterator[GivenPrompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ConfigError(f"--prompt-file {path}: {err.strerror}.") from None
    except UnicodeDecodeError as err:
        raise ConfigError(
            f"--prompt-file {path}: must be UTF-8 text (byte {err.start}: {err.reason})."
        ) from None
    for number, line in _lines(text):
        where = f"{path}:{number}"
        yield _from_json(line, where) if path.suffix == ".jsonl" else GivenPrompt(line, where)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): it also splits at characters that a prompt may contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _from_json(line: str, where: str) -> GivenPrompt:
    """A line of a file. One that is no record says that the file is of another kind; a value is one prompt's.

    Raises:
        ConfigError: it is no record.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{where}: not valid JSON ({err}).") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: must be an object, got {type(record).__name__}.")
    for key in record:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, list(_KEYS))}")
    if len(record) != 1:
        raise ConfigError(f"{where}: must have one of {', '.join(_KEYS)}, got {len(record)} keys.")
    ((key, value),) = record.items()
    return GivenPrompt(value, where, None if _IS_VALID[key](value) else f"{key} must be {_MUST_BE[key]}.")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


_IS_VALID = {
    "prompt": lambda value: isinstance(value, str),
    "prompt_token_ids": _is_token_ids,
    "messages": is_messages,
}
_MUST_BE = {
    "prompt": "a string",
    "prompt_token_ids": "a list of integers, at least one",
    "messages": MUST_BE,
}


def _problem(prompt: GivenPrompt) -> str | None:
    """What is wrong with the text of a prompt."""
    content: Any = prompt.content
    texts = [content]
    if not isinstance(content, str):
        texts = [message["content"] for message in content] if prompt.is_chat else []
    if not all(text.strip() for text in texts):
        return "the prompt is empty; give some text."
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return "must be UTF-8 text."
    return None
