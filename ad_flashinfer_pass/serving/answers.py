"""What clients get: OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ad_flashinfer_pass.runtime.detokenize import TextStream
from ad_flashinfer_pass.runtime.sampling import SamplingParams, TokenLogprobs
from ad_flashinfer_pass.serving.protocol import ChatRequest, CompletionRequest, SamplingFields
from ad_flashinfer_pass.serving.worker import Ticket

_Body = TypeVar("_Body", bound=SamplingFields)
_Object = dict[str, Any]
_LEAST = -9999.0
"""What OpenAI gives for a token that cannot be: JSON knows no infinity."""


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST else _LEAST


@dataclass
class Choice:
    """One continuation on its way."""

    index: int
    prompt: list[int]
    params: SamplingParams
    ticket: Ticket
    text: TextStream
    num_tokens: int = 0
    offset: int = 0
    """Characters of the tokens whose log-probabilities were given."""


@dataclass
class Piece:
    """What became known of a choice."""

    choice: Choice
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


class Answer(ABC, Generic[_Body]):
    """What has come of all choices, as one object or as chunks.

    Args:
        model: its name.
        request_id: of the request.
        body: the request.
        choices: all of them.
        tokenizer: for the texts of single tokens.
    """

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(
        self, model: str, request_id: str, body: _Body, choices: Sequence[Choice], tokenizer: Any
    ) -> None:
        self.body, self.choices = body, choices
        self._tokenizer = tokenizer
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._pieces: dict[int, list[Piece]] = {choice.index: [] for choice in choices}
        self.reasons: dict[int, str] = {}
        """Why choices have ended, by index."""

    def add(self, piece: Piece) -> None:
        """Take a piece into the whole."""
        self._pieces[piece.choice.index].append(piece)
        if piece.finish_reason is not None:
            self.reasons[piece.choice.index] = piece.finish_reason

    def usage(self) -> _Object:
        """Tokens so far; each prompt counts once."""
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.choices}
        cached: dict[int, int] = {}
        for choice in self.choices:  # of several continuations the first one reads the prompt
            found = [piece.num_cached_tokens for piece in self._pieces[choice.index]]
            cached.setdefault(id(choice.prompt), max(found, default=0))
        num_prompt, num_new = sum(prompts.values()), sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def whole(self) -> _Object:
        """The answer that is not streamed."""
        choices = [self._choice(choice, self._pieces[choice.index]) for choice in self.choices]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def opening(self) -> Iterator[_Object]:
        """Chunks before the first piece."""
        yield from ()

    def chunks(self, piece: Piece) -> Iterator[_Object]:
        """Those of a piece, which becomes part of the whole."""
        self.add(piece)
        if piece.text or piece.logprobs or piece.finish_reason is not None:
            yield self._chunk(self._delta(piece))

    def closing(self) -> Iterator[_Object]:
        """Chunks after the last piece."""
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    def _chunk(self, choice: _Object) -> _Object:
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    @abstractmethod
    def _choice(self, choice: Choice, pieces: Sequence[Piece]) -> _Object:
        """Of the whole."""

    @abstractmethod
    def _delta(self, piece: Piece) -> _Object:
        """Of a chunk."""

    def _text_of(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


class ChatAnswer(Answer[ChatRequest]):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterator[_Object]:
        """The role, as OpenAI sends it."""
        for choice in self.choices:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(
                {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            )

    def _choice(self, choice: Choice, pieces: Sequence[Piece]) -> _Object:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
            "logprobs": self._logprobs([one for piece in pieces for one in piece.logprobs]),
            "finish_reason": self.reasons.get(choice.index),
        }

    def _delta(self, piece: Piece) -> _Object:
        return {
            "index": piece.choice.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, found: Sequence[TokenLogprobs]) -> _Object | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._content(one) for one in found], "refusal": None}

    def _content(self, one: TokenLogprobs) -> _Object:
        top = [self._entry(token, logprob) for token, logprob in one.top]
        return {**self._entry(one.token_id, one.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> _Object:
        text = self._text_of(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


class CompletionAnswer(Answer[CompletionRequest]):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> Iterator[_Object]:
        """The prompts, if they are to be echoed and nothing has to be known of them."""
        for choice in self.choices if self.body.echo and self.body.logprobs is None else ():
            text = self._prompt_text(choice)
            yield self._chunk({"index": choice.index, "text": text, "logprobs": None, "finish_reason": None})

    def chunks(self, piece: Piece) -> Iterator[_Object]:
        """With echo and logprobs all comes at the end, when those of the prompt are known."""
        if not (self.body.echo and self.body.logprobs is not None):
            yield from super().chunks(piece)
            return
        self.add(piece)
        if piece.finish_reason is not None:
            yield self._chunk(self._choice(piece.choice, self._pieces[piece.choice.index]))

    def _choice(self, choice: Choice, pieces: Sequence[Piece]) -> _Object:
        text = "".join(piece.text for piece in pieces)
        found: list[TokenLogprobs | None] = [one for piece in pieces for one in piece.logprobs]
        if self.body.echo:
            text = self._prompt_text(choice) + text
            found = [*(pieces[-1].prompt_logprobs or [] if pieces else []), *found]
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, found),
            "finish_reason": self.reasons.get(choice.index),
        }

    def _delta(self, piece: Piece) -> _Object:
        return {
            "index": piece.choice.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece.choice, list(piece.logprobs)),
            "finish_reason": piece.finish_reason,
        }

    def _prompt_text(self, choice: Choice) -> str:
        return str(self._tokenizer.decode(choice.prompt, skip_special_tokens=True))

    def _logprobs(self, choice: Choice, found: Sequence[TokenLogprobs | None]) -> _Object | None:
        if self.body.logprobs is None:
            return None
        texts = [self._text_of(choice.prompt[0] if one is None else one.token_id) for one in found]
        tops = [
            None if one is None else {self._text_of(token): _finite(logprob) for token, logprob in one.top}
            for one in found
        ]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else _finite(one.logprob) for one in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
