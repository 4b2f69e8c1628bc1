"""Text out of a growing list of tokens, in pieces that never have to be taken back.

Joined, the pieces are ``tokenizer.decode(all tokens, skip_special_tokens=True)``, cut before the
first stop string. Decoding one token alone would be wrong: a character can span tokens, and a
leading space is written or not depending on what precedes it. So each piece is the difference of
two decodings of the last few tokens, and is held back until nothing that follows can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.runtime.foreign import foreign_code

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDecoder:
    """What all requests share: the tokenizer, and which of its tokens cannot end a piece.

    Raises:
        RequestError: the tokenizer fails.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        with foreign_code("the tokenizer cannot tell its tokens"):
            self._num_known = len(tokenizer)
            byte_ids: Any = tokenizer.convert_tokens_to_ids(byte_tokens)
            special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
            # A run of byte tokens is valid or invalid as a whole, also across special tokens inside it.
            self._inconclusive = special | (set(byte_ids) - {tokenizer.unk_token_id})

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, without special ones.

        Raises:
            RequestError: the tokenizer fails.
        """
        with foreign_code("the tokenizer cannot decode the new tokens"):
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def is_conclusive(self, token_id: int) -> bool:
        """Whether text that ends with this token and in a whole character is final."""
        return token_id not in self._inconclusive and token_id < self._num_known


class TextStream:
    """The text of one request.

    Args:
        decoder: the tokenizer's side.
        stop: strings that end the text.
    """

    def __init__(self, decoder: TextDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = stop
        self._token_ids: list[int] = []
        """Those of the last piece, for context, and those after it."""
        self._num_context = 0
        self._context = ""
        """The text of the last piece's tokens when decoded on their own."""
        self._held = ""
        """Decoded text that may be the beginning of a stop string."""
        self._pieces: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def add(self, token_id: int) -> str:
        """Append a token.

        Returns:
            The text that became final, possibly none; what precedes a stop string once found.
        """
        self._token_ids.append(token_id)
        if not self._decoder.is_conclusive(token_id):
            return ""
        text = self._decoder.decode(self._token_ids)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._context):
            return ""
        piece = text[len(self._context) :]
        self._token_ids = self._token_ids[self._num_context :]
        self._num_context = len(self._token_ids)
        self._context = self._decoder.decode(self._token_ids)
        return self._release(piece, is_last=False)

    def finish(self) -> str:
        """The rest of the text: no token follows."""
        if self.is_stopped:
            return ""
        text = self._decoder.decode(self._token_ids)
        return self._release(text[len(self._context) :], is_last=True)

    def _release(self, piece: str, is_last: bool) -> str:
        """Pass on what cannot be part of a stop string."""
        text = self._held + piece
        end = find_stop(text, self._stop)
        self.is_stopped = end is not None
        if end is None:
            end = len(text) if is_last else len(text) - _num_held(text, self._stop)
        self._held = text[end:]
        self._pieces.append(text[:end])
        return text[:end]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first; None if there is none.

    Of those that are complete at the same character, the longest: the result is the same whether
    the text is searched whole or as it grows.
    """
    starts = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(starts)[1] if starts else None


def _num_held(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
