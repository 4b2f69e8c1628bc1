"""The messages of a chat, and what the model's chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.foreign import foreign_code

Messages = Sequence[Mapping[str, str]]
"""Of one chat, each with ``role`` and ``content``."""

MUST_BE = "a list of objects with role and content, both strings, at least one"


def is_messages(value: object) -> bool:
    """Whether this is one chat: other keys, or content in parts, many templates would leave out unsaid."""
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(
            isinstance(message, Mapping)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        )
    )


def require_template(tokenizer: Any) -> None:
    """Refuse chats of a model that has no chat template.

    Raises:
        RequestError: there is none, or no tokenizer.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise RequestError("the model has no chat template; give text as it stands, without chat.")


def apply_template(messages: Messages, tokenizer: Any) -> list[int]:
    """The token ids of a chat, up to where the model's answer begins.

    Raises:
        RequestError: there is no template, the messages are none, or the template refuses them.
    """
    require_template(tokenizer)
    if not is_messages(messages):
        raise RequestError(f"messages must be {MUST_BE}, got {messages!r:.80}.")
    return render([dict(message) for message in messages], tokenizer)


def render(chat: Sequence[Mapping[str, Any]], tokenizer: Any, /, **variables: Any) -> list[int]:
    """The token ids of a chat whatever is in it, up to where the model's answer begins.

    Args:
        chat: messages as the template takes them.
        tokenizer: with a template.
        variables: of the template, such as ``tools``.

    Raises:
        RequestError: the template refuses the chat.
    """
    from jinja2 import TemplateError

    refusal = "the model's chat template refuses this chat"
    with foreign_code(refusal):
        try:
            return list(
                tokenizer.apply_chat_template(
                    list(chat), add_generation_prompt=True, tokenize=True, return_dict=False, **variables
                )
            )
        except TemplateError as err:  # what a template says itself needs no name of a class
            raise RequestError(f"{refusal}: {err}") from None
