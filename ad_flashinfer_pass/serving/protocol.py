"""What clients send, and what of it decides how a request is sampled.

The fields are OpenAI's, and those that vLLM adds where OpenAI has none. A field that is unknown is an error,
because its answer would not be the one that was asked for; what concerns nobody but OpenAI is left aside.
"""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.structure import GuidedDecodingParams

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Tokens = list[StrictInt]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Fields):
    """What a stream holds beside the text."""

    include_usage: StrictBool = False


class JsonSchema(_Fields):
    """That a text must have."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: StrictBool | None = None


class ResponseFormat(_Fields):
    """OpenAI's way to say the form of a text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Fields):
    """vLLM's."""

    json_: Annotated[dict[str, Any] | StrictStr | None, Field(alias="json")] = None
    json_object: StrictBool = False
    regex: StrictStr | None = None
    grammar: StrictStr | None = None


class SamplingFields(_Fields):
    """What both endpoints take. None: as if it were not there."""

    model: StrictStr | None = None
    max_tokens: StrictInt | None = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    n: Annotated[int, Field(strict=True, ge=1, le=128)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: StrictStr | list[StrictStr] | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None
    logit_bias: dict[str, _Number] | None = None
    seed: StrictInt | None = None
    # vLLM's
    top_k: StrictInt | None = None
    min_p: _Number | None = None
    repetition_penalty: _Number | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: _Tokens | None = None
    bad_words: list[StrictStr] | None = None
    cache_salt: StrictStr | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    # Of OpenAI's platform.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def sampling(self, default: SamplingParams, room: int, tokenizer: Any, **more: Any) -> SamplingParams:
        """How a request is continued.

        Args:
            default: for fields that are not given.
            room: tokens that fit after the prompt.
            tokenizer: for bad words.
            more: fields of ``SamplingParams`` that win, where they are not None.

        Raises:
            RequestError: a value is out of range.
        """
        names = "temperature top_p presence_penalty frequency_penalty seed top_k min_p repetition_penalty"
        names += " min_tokens ignore_eos stop_token_ids n"
        fields = {name: getattr(self, name) for name in names.split()}
        if fields["top_k"] == -1:  # off, in vLLM
            fields["top_k"] = 0
        if self.stop is not None:
            fields["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.logit_bias is not None:
            try:
                fields["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError:
                raise RequestError(f"logit_bias must map token ids, got {self.logit_bias!r:.80}.") from None
        if self.bad_words:
            fields["bad_words_ids"] = [
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for word in self.bad_words
                for text in (word, f" {word}")
            ]
        fields["guided_decoding"] = self._form()
        fields.update(more)
        limit = max(room, 1)
        fields["max_new_tokens"] = limit if fields.get("max_new_tokens") is None else fields["max_new_tokens"]
        return replace(default, **{name: value for name, value in fields.items() if value is not None})

    def _form(self) -> GuidedDecodingParams | None:
        wanted, given = self.response_format, self.structured_outputs
        if given is not None:
            return GuidedDecodingParams(
                json=given.json_, json_object=given.json_object, regex=given.regex, grammar=given.grammar
            )
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return GuidedDecodingParams(json_object=True)
        if wanted.json_schema is None:
            raise RequestError("response_format of type json_schema needs json_schema.")
        return GuidedDecodingParams(json=wanted.json_schema.schema_)


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: StrictStr | list[StrictStr] | _Tokens | list[_Tokens]
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return [prompt] if is_one else list(prompt)


class TextPart(_Fields):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class FunctionCall(_Fields):
    """What a model called."""

    name: StrictStr
    arguments: StrictStr | dict[str, Any]


class ToolCall(_Fields):
    """A call in an assistant's message."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: StrictInt | None = None


class Message(_Fields):
    """One of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None

    def for_template(self) -> dict[str, Any]:
        """With its parts joined, and arguments of calls as objects, as templates want them.

        Raises:
            RequestError: arguments are no JSON object.
        """
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        elif self.content is None and not self.tool_calls:
            raise RequestError(f"a message of the role {self.role} must have content.")
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        return message


def _arguments(given: str | dict[str, Any]) -> dict[str, Any]:
    try:
        parsed = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise RequestError(f"the arguments of a tool call must be a JSON object, got {given!r:.80}.")
    return parsed


class Tool(_Fields):
    """That a template may offer to the model."""

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    def variables(self) -> dict[str, Any]:
        """For the chat template.

        Raises:
            RequestError: one would reach more than the template, such as a template of the client's own.
        """
        from transformers import PreTrainedTokenizerBase

        taken = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        if wrong := sorted(taken.keys() & (self.chat_template_kwargs or {}).keys()):
            raise RequestError(f"chat_template_kwargs must be variables of the template, got {wrong[0]!r}.")
        tools = None if self.tool_choice == "none" or not self.tools else self.tools
        given = dict(self.chat_template_kwargs or {})
        return {**given, "tools": [tool.model_dump() for tool in tools]} if tools else given
