from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from ad_flashinfer_pass.runtime.detokenize import TextDecoder, TextStream, find_stop
from tests.runtime import toy_tokenizers

TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "byte_level": toy_tokenizers.byte_level(),
    "byte_fallback": toy_tokenizers.byte_fallback(),
    "metaspace": toy_tokenizers.metaspace(),
}
DECODERS = {name: TextDecoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
MANY = settings(max_examples=300, deadline=None, derandomize=True)
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def decode(name: str, token_ids: Sequence[int]) -> str:
    return str(TOKENIZERS[name].decode(list(token_ids), skip_special_tokens=True))


def pieces_of(name: str, token_ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """One piece a token, and the rest."""
    stream = TextStream(DECODERS[name], stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.add(token_id))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()]


def draw_tokens(data: st.DataObject, name: str) -> list[int]:
    """Any ids, special and unknown ones included."""
    return data.draw(st.lists(st.integers(0, len(TOKENIZERS[name]) + 2), max_size=40))


@each_tokenizer
@MANY
@given(data=st.data())
def test_pieces_of_random_tokens_join_to_the_decoded_text(name: str, data: st.DataObject) -> None:
    """Whatever the tokens, also invalid bytes, the pieces are exactly what decoding all gives."""
    token_ids = draw_tokens(data, name)
    assert "".join(pieces_of(name, token_ids)) == decode(name, token_ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@MANY
@given(text=st.text(max_size=20))
def test_no_piece_holds_part_of_a_character(name: str, text: str) -> None:
    """Streaming encoded text gives back the text, and no replacement character on the way."""
    token_ids = [
        token for char in text for token in TOKENIZERS[name](char, add_special_tokens=False)["input_ids"]
    ]
    pieces = pieces_of(name, token_ids)
    assert "".join(pieces) == decode(name, token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@MANY
@given(text=st.text(max_size=20).filter(lambda t: "\ufffd" not in t))
def test_a_character_is_out_with_its_last_byte(text: str) -> None:
    """A byte-level stream is never behind by a whole character."""
    stream = TextStream(DECODERS["byte_level"])
    tokenizer = TOKENIZERS["byte_level"]
    vocab = tokenizer.get_vocab()
    byte_ids = [vocab[char] for char in _byte_level_chars(text.encode())]
    emitted = ""
    for count, token_id in enumerate(byte_ids, 1):
        emitted += stream.add(token_id)
        assert emitted == text.encode()[:count].decode(errors="ignore")


def _byte_level_chars(data: bytes) -> str:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(b) if b in printable else chr(256 + others.index(b)) for b in data)


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_spaces_are_those_of_the_whole_text(name: str) -> None:
    """Only the first word loses its space, although each piece is decoded from a few tokens."""
    tokens = ["\u2581the", "\u2581dog", "s", ",", "\u2581", "\u2581the", "dog"]
    vocab = TOKENIZERS[name].get_vocab()
    assert pieces_of(name, [vocab[token] for token in tokens]) == [
        "the",
        " dog",
        "s",
        ",",
        " ",
        " the",
        "dog",
        "",
    ]


@each_tokenizer
@MANY
@given(data=st.data())
def test_stop_strings_end_the_text_wherever_the_token_borders_are(name: str, data: st.DataObject) -> None:
    """A stop string, from the text or made up, ends the pieces where brute force does."""
    token_ids = draw_tokens(data, name)
    text = decode(name, token_ids)
    cut = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 5))
    cuts = data.draw(st.lists(cut, max_size=3))
    stop = [text[start : start + length] for start, length in cuts if text]
    stop += data.draw(st.lists(st.sampled_from(["e", "the", " d", ", ", "\ufffd\ufffd"])))
    expected = next((text[:start] for start in _ends_of_growing(text, stop)), text)
    assert "".join(pieces_of(name, token_ids, stop)) == expected


def _ends_of_growing(text: str, stop: Sequence[str]) -> list[int]:
    """Where the text would end, looking at one more character at a time."""
    return [
        end - max(len(s) for s in stop if text[:end].endswith(s))
        for end in range(1, len(text) + 1)
        if any(text[:end].endswith(s) for s in stop)
    ]


def test_holds_back_what_may_become_a_stop_string() -> None:
    """The beginning of a stop string is not streamed before it is known not to be one."""
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(DECODERS["byte_level"], ["dog sleeps"])
    seen = ""
    for token_id in tokenizer("the dog slept", add_special_tokens=False)["input_ids"]:
        seen += stream.add(token_id)
        assert seen in ("the dog slept", "the dog slep") or "d" not in seen
    assert seen + stream.finish() == "the dog slept"
    assert not stream.is_stopped


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(["cd", "abcd"], 0), (["bc", "abcd"], 1), (["zz"], None), ([], None), (["d", "a"], 0)],
    ids=["longest-of-one-end", "complete-first", "absent", "none", "single-characters"],
)
def test_find_stop_takes_the_string_that_is_complete_first(stop: list[str], expected: int | None) -> None:
    """As if the text had been read character by character."""
    assert find_stop("abcd", stop) == expected
