"""The prompts of the command: from arguments, a file or stdin, checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ad_flashinfer_pass.config import nearest
from ad_flashinfer_pass.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = ("prompt", "prompt_token_ids", "messages")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class GivenPrompt:
    """One prompt as the user gave it."""

    content: str | list[int] | Messages
    """Text, token ids, or the messages of a chat."""
    where: str
    """For error messages: ``prompt 0`` or ``prompts.jsonl:3``."""

    @property
    def is_chat(self) -> bool:
        """Whether it is the messages of a chat."""
        return isinstance(self.content, list) and isinstance(self.content[0], dict)


def read_prompts(
    arguments: Sequence[str], prompt_file: Path | None, stdin: TextIO | None
) -> list[GivenPrompt]:
    """All prompts of one call, in order, none of them empty.

    ``-`` among the arguments stands for the lines of stdin, which are also read if nothing is given
    and stdin is not a terminal. There and in a file each line that is not blank is a prompt; a
    .jsonl file has an object a line with ``prompt``, ``prompt_token_ids`` or ``messages``.

    Raises:
        ConfigError: there is no prompt, an empty one, or the file cannot be read.
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
        raise ConfigError(f"{problem}; give text as an argument, --prompt-file FILE, or pipe it in.")
    for prompt in prompts:
        _check(prompt)
    return prompts


def model_inputs(
    prompts: Sequence[GivenPrompt],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    chat: bool,
    system: str | None,
) -> list[str | list[int]]:
    """What the model is given: text as it is, chats as the token ids of the chat template.

    Args:
        prompts: as read.
        tokenizer: needed for chats.
        chat: make a chat of each text prompt, as its user's message.
        system: the system message of those chats.

    Raises:
        ConfigError: there is a chat, and no chat template or one that refuses it; or there is no tokenizer,
            and nothing but text.
    """
    if tokenizer is None and not chat and all(isinstance(prompt.content, str) for prompt in prompts):
        raise ConfigError(
            "the model has no tokenizer; give token ids, by --prompt-file FILE.jsonl with lines such as "
            '{"prompt_token_ids": [1, 2, 3]}.'
        )
    inputs: list[str | list[int]] = []
    for prompt in prompts:
        content: Any = prompt.content
        if chat and isinstance(content, str):
            content = [{"role": "user", "content": content}]
            if system is not None:
                content.insert(0, {"role": "system", "content": system})
        elif chat and not prompt.is_chat:
            raise ConfigError(f"{prompt.where}: --chat needs text, got token ids.")
        if isinstance(content[0], dict):
            content = _templated(content, tokenizer, prompt.where)
        inputs.append(content)
    return inputs


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
        raise ConfigError(f"stdin: must be UTF-8 text ({err.reason} at byte {err.start}).") from None
    for number, line in _lines(text):
        yield GivenPrompt(line, f"stdin:{number}")


def _from_file(path: Path) -> Iterator[GivenPrompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ConfigError(f"--prompt-file {path}: {err.strerror}.") from None
    except UnicodeDecodeError as err:
        raise ConfigError(
            f"--prompt-file {path}: must be UTF-8 text ({err.reason} at byte {err.start})."
        ) from None
    for number, line in _lines(text):
        where = f"{path}:{number}"
        yield GivenPrompt(_from_json(line, where) if path.suffix == ".jsonl" else line, where)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): it also splits at characters that a prompt may contain, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _from_json(line: str, where: str) -> str | list[int] | Messages:
    try:
        record = json.loads(line)
    except ValueError as err:
        raise ConfigError(f"{where}: not valid JSON ({err}).") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: must be an object, got {type(record).__name__}.")
    for key in record:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, list(_KEYS))}")
    if len(record) != 1:
        raise ConfigError(f"{where}: must have one of {', '.join(_KEYS)}, got {len(record)} keys.")
    ((key, value),) = record.items()
    if not _IS_VALID[key](value):
        raise ConfigError(f"{where}: {key} must be {_MUST_BE[key]}.")
    return value


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        )
    )


_IS_VALID = {
    "prompt": lambda value: isinstance(value, str),
    "prompt_token_ids": _is_token_ids,
    "messages": _is_messages,
}
_MUST_BE = {
    "prompt": "a string",
    "prompt_token_ids": "a list of integers, at least one",
    "messages": "a list of objects with role and content, both strings, at least one",
}


def _check(prompt: GivenPrompt) -> None:
    content: Any = prompt.content
    texts = [content]
    if not isinstance(content, str):
        texts = [message["content"] for message in content] if prompt.is_chat else []
    if not all(text.strip() for text in texts):
        raise ConfigError(f"{prompt.where}: the prompt is empty; give some text.")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{prompt.where}: must be UTF-8 text.") from None


def _templated(messages: Messages, tokenizer: Any, where: str) -> list[int]:
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise ConfigError(f"{where}: the model has no chat template; give text as it stands, without --chat.")
    try:
        return list(
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except TemplateError as err:
        raise ConfigError(f"{where}: the model's chat template refuses this chat: {err}") from None
