"""Texts of a given form: which tokens may come next, by xgrammar.

A grammar is compiled in a thread, once for all requests that ask for it, and two at a time. Which tokens it
allows is found on the host while the device runs the model, goes there as bits, and is applied before a
token is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock, Semaphore, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.foreign import foreign_code

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_MOST_KEPT, _AT_ONCE = 256, 2
_BITS = 32


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingParams:
    """The form of a text; exactly one of the fields.

    Raises:
        RequestError: none is given, several are, or one is of a wrong type.
    """

    json: str | Mapping[str, Any] | None = None
    """A JSON schema; kept as text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression for the whole text."""
    grammar: str | None = None
    """An EBNF grammar, as of GBNF, whose rule ``root`` is the whole text."""

    def __post_init__(self) -> None:
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError) as err:
                raise RequestError(f"guided_decoding.json must be a JSON schema: {err}.") from None
        texts = (self.json, self.regex, self.grammar)
        if sum(text is not None for text in texts) + bool(self.json_object) != 1 or not all(
            text is None or isinstance(text, str) for text in texts
        ):
            raise RequestError(
                "guided_decoding must have exactly one of json, json_object, regex and grammar, got "
                f"{self!r:.200}."
            )


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of the model.
        vocab_size: width of the logits.
        end_tokens: those that may follow when a text is whole.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, end_tokens: Sequence[int]
    ) -> None:
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, list(end_tokens)
        self._lock, self._turns = Lock(), Semaphore(_AT_ONCE)
        self._making = Lock()
        """Of the compiler, for which a large vocabulary is read: nobody who only asks waits for that."""
        self._compiled: dict[GuidedDecodingParams, Future[Any]] = {}
        self._compiler: Any = None

    def compile(self, params: GuidedDecodingParams) -> Future[Any]:
        """A grammar, in a while. Of the future's errors, ``RequestError`` says what is wrong with it."""
        with self._lock:
            future = self._compiled.pop(params, None)
            if future is None or (future.done() and future.exception() is not None):
                future = Future()
                # No pool, for whose threads a process waits when it ends: a hostile schema takes minutes.
                Thread(target=self._run, args=(params, future), daemon=True, name="grammar").start()
            self._compiled[params] = future  # the last that was asked for is the last to go
            while len(self._compiled) > _MOST_KEPT:
                del self._compiled[next(iter(self._compiled))]
            return future

    def _run(self, params: GuidedDecodingParams, future: Future[Any]) -> None:
        with self._turns:
            try:
                future.set_result(self._compile(params))
            except BaseException as err:  # which is that of whoever asks for the result
                future.set_exception(err)

    def _compile(self, params: GuidedDecodingParams) -> Any:
        with self._making:
            if self._compiler is None:
                self._compiler = self._new_compiler()
        with foreign_code("guided_decoding cannot be compiled"):
            if params.json is not None:
                return self._compiler.compile_json_schema(params.json)
            if params.regex is not None:
                return self._compiler.compile_regex(params.regex)
            if params.grammar is not None:
                return self._compiler.compile_grammar(params.grammar)
            return self._compiler.compile_json_schema('{"type": "object"}')

    def _new_compiler(self) -> Any:
        if self._tokenizer is None or not self._end_tokens:
            raise RequestError(
                "guided_decoding needs a tokenizer and an end token, which ends a text that is whole."
            )
        try:
            import xgrammar
        except ImportError:
            raise RequestError(
                "guided_decoding needs xgrammar: pip install 'ad-flashinfer-pass[serve]'."
            ) from None
        with foreign_code("xgrammar cannot read the tokenizer"):
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._end_tokens
            )
            return xgrammar.GrammarCompiler(info, max_threads=1)


class Matcher:
    """Where the text of one request is in its grammar.

    Args:
        compiled: by ``Grammars``.
    """

    def __init__(self, compiled: Any) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)

    def accept(self, token: int) -> bool:
        """Go on by a token; false if the grammar does not allow it."""
        return bool(self._matcher.accept_token(token))

    def fill(self, bits: Tensor, row: int) -> None:
        """Write the tokens that may follow into a row of ``bits``, as ``new_bits`` makes them."""
        self._matcher.fill_next_token_bitmask(bits, row)


def new_bits(num_rows: int, vocab_size: int) -> Tensor:
    """int32 [num_rows, words] on the host: a bit a token, all set: each may follow."""
    return torch.full((num_rows, -(-vocab_size // _BITS)), -1, dtype=torch.int32)


def mask_by_bits(scores: Tensor, bits: Tensor) -> Tensor:
    """Scores, floating [n, vocab_size], with -inf where the bit of a token is not set."""
    places = torch.arange(_BITS, dtype=torch.int32, device=bits.device)
    is_set = (bits.unsqueeze(-1) >> places) & 1
    return scores.masked_fill(is_set.flatten(1)[:, : scores.shape[1]] == 0, -torch.inf)
