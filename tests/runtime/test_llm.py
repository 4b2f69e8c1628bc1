from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.runtime.llm import LLM, GenerationResult, Progress
from ad_flashinfer_pass.runtime.sampling import SamplingKeywords, SamplingParams
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import NAN_TOKEN, ToyModel, greedy_alone

PROMPTS: list[list[int]] = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]


class _Raises:
    """Of a class whose methods fail."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __iter__ = __len__ = __index__ = __repr__


class LettersTokenizer:
    """Encodes letters a..z as 1..26 and decodes with the byte-level tokenizer."""

    def __init__(self) -> None:
        self._tokenizer = toy_tokenizers.byte_level()

    def __call__(self, text: str) -> dict[str, list[int]]:
        """As a tokenizer does, with ids of the toy model."""
        return {"input_ids": [ord(char) - ord("a") + 1 for char in text]}

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return LettersTokenizer()  # type: ignore[return-value]


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def test_results_come_in_prompt_order_as_soon_as_they_are_ready() -> None:
    """The first result is there before a later, longer one has ended."""
    llm = LLM(ToyModel())
    sampling = [SamplingParams(max_new_tokens=n) for n in (5, 2, 30, 3)]
    results = llm.generate_iter(PROMPTS, sampling_params=sampling)
    first = next(results)
    assert first == GenerationResult(
        index=0,
        prompt=None,
        prompt_token_ids=PROMPTS[0],
        token_ids=greedy_alone(PROMPTS[0], 5),
        text=None,
        finish_reason="length",
        error=None,
    )
    assert llm.engine.metrics.num_running == 1, "only the long one is left"
    rest = list(results)
    assert [result.index for result in rest] == [1, 2, 3]
    assert [result.token_ids for result in rest] == [
        greedy_alone(prompt, p.max_new_tokens) for prompt, p in zip(PROMPTS[1:], sampling[1:], strict=True)
    ]


def test_accepts_one_prompt_or_many_as_text_or_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """A text, a list of ids, and a mixture of both name the same prompts."""
    llm = LLM(ToyModel(), tokenizer)
    expected = greedy_alone([1, 2, 3], 4)
    forms: list[Any] = ["abc", [1, 2, 3], ["abc"], [[1, 2, 3]], ["abc", [1, 2, 3]]]
    for prompts in forms:
        results = llm.generate(prompts, max_new_tokens=4)
        assert {tuple(result.token_ids) for result in results} == {tuple(expected)}
        assert {result.text for result in results} == {decode(tokenizer, expected)}
    assert [result.prompt for result in results] == ["abc", None]
    assert llm.generate([]) == []


def test_a_refused_prompt_is_a_result_and_the_others_go_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Empty, unknown and failing prompts give their errors in their places."""
    llm = LLM(ToyModel(), tokenizer)
    prompts: list[Any] = ["", "abc", [99], [NAN_TOKEN], "b", 7]
    results = llm.generate(prompts, max_new_tokens=3)
    assert [result.finish_reason for result in results] == [
        "error",
        "length",
        "error",
        "error",
        "length",
        "error",
    ]
    assert [(result.error or "")[:25] for result in results] == [
        "the prompt is empty. Give",
        "",
        "token ids must lie in 0..",
        "the logits after 1 tokens",
        "",
        "a prompt must be text or ",
    ]
    assert results[1].token_ids == greedy_alone([1, 2, 3], 3)
    assert (results[0].prompt, results[2].prompt_token_ids) == ("", [99])


def test_a_text_prompt_without_tokenizer_is_refused() -> None:
    """The error says what to give in its place."""
    (result,) = LLM(ToyModel()).generate("abc")
    assert result.error == "a prompt given as text needs a tokenizer. Give token ids."


def test_max_new_tokens_overrides_the_parameters() -> None:
    """Given to generate, it holds for all prompts; else each has its own."""
    llm = LLM(ToyModel())
    sampling = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=3)]
    own = [len(r.token_ids) for r in llm.generate([[1], [2]], sampling_params=sampling)]
    common = [len(r.token_ids) for r in llm.generate([[1], [2]], sampling_params=sampling, max_new_tokens=5)]
    assert (own, common) == ([2, 3], [5, 5])


def test_keywords_are_fields_of_the_parameters() -> None:
    """They override those of the parameters, or else the model's own; what they leave out stands."""
    llm = LLM(ToyModel(), default_sampling=SamplingParams(max_new_tokens=6, repetition_penalty=1.5))
    params = SamplingParams(max_new_tokens=6, temperature=1.5, seed=3)

    def tokens(*args: Any, **keywords: Any) -> list[list[int]]:
        return [result.token_ids for result in llm.generate(PROMPTS, *args, **keywords)]

    own = tokens()
    assert own == tokens(SamplingParams(max_new_tokens=6, repetition_penalty=1.5))
    drawn = tokens(params)
    assert own != drawn == tokens(max_new_tokens=6, temperature=1.5, seed=3, repetition_penalty=1.0)
    assert tokens(params, seed=4) == tokens([replace(params, seed=4)] * len(PROMPTS)) != drawn
    assert tokens(params, temperature=0.0) == [greedy_alone(prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("call", ["generate", "generate_iter", "chat", "stream"])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_tokens": 3}, "unknown keyword 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"sampling": None}, "unknown keyword 'sampling'; did you mean 'sampling_params'?"),
        ({"temperature": -1.0}, "temperature must be 0 "),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None."),
    ],
    ids=str,
)
def test_keywords_are_checked_before_anything_runs(call: str, keywords: Any, message: str) -> None:
    """A keyword of another library, or a value out of range."""
    llm = LLM(ToyModel(), toy_tokenizers.chatting())
    prompt: Any = [{"role": "user", "content": "hi"}] if call == "chat" else "abc"
    with pytest.raises(RequestError) as caught:
        list(getattr(llm, call)(prompt, **keywords))
    assert str(caught.value).startswith(message)
    assert llm.engine.metrics.num_generated_tokens == 0


def test_the_keywords_that_type_checkers_know_are_the_fields() -> None:
    """Written twice, since a type checker reads them: names and types are the same."""
    assert SamplingKeywords.__annotations__.keys() == {field.name for field in fields(SamplingParams)}
    for field in fields(SamplingParams):
        assert str(field.type) in str(SamplingKeywords.__annotations__[field.name])


CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be"}, {"role": "user", "content": "so"}],
]


def test_chat_answers_by_the_template() -> None:
    """Each chat is what transformers' apply_chat_template makes of it, up to the answer."""
    tokenizer = toy_tokenizers.chatting()
    llm = LLM(ToyModel(), tokenizer)
    ids: list[Any] = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS
    ]
    results = llm.chat(CHATS, max_new_tokens=5)
    assert [result.prompt_token_ids for result in results] == ids
    assert [result.token_ids for result in results] == [greedy_alone(each, 5) for each in ids]
    assert [result.text for result in results] == [
        tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in results
    ]
    assert [(result.index, result.prompt) for result in results] == [(0, None), (1, None)]
    assert llm.chat(CHATS[0], SamplingParams(max_new_tokens=5)) == results[:1]
    assert "".join(llm.stream(llm.encode_chat(CHATS[0]), max_new_tokens=5)) == results[0].text
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([{"role": "tool", "content": "hi"}], "the model's chat template refuses this chat: no tools here"),
        ([{"role": "user", "contents": "hi"}], "messages must be a list of objects with role and content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "messages must be a list of objects",
        ),
        ([], "messages must be a list of objects"),
        ("hi", "messages must be a list of objects"),
        (None, "messages must be a list of objects"),
        (_Raises(), "these messages cannot be read: "),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_a_chat_that_is_refused_is_refused_alone(bad: Any, says: str) -> None:
    """By its template, or because many templates would leave out what it holds."""
    llm = LLM(ToyModel(), toy_tokenizers.chatting())
    first, refused, last = llm.chat([CHATS[0], bad, CHATS[1]], max_new_tokens=4)
    assert [first, replace(last, index=1)] == llm.chat(CHATS, max_new_tokens=4)
    assert (refused.finish_reason, refused.text) == ("error", None)
    assert (refused.error or "").startswith(says)
    assert "\n" not in (refused.error or "")


@pytest.mark.parametrize(
    "tokenizer", [None, toy_tokenizers.byte_level()], ids=["no tokenizer", "no template"]
)
def test_chat_needs_a_template(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """No chat could be answered: refused at once."""
    llm = LLM(ToyModel(), tokenizer)
    with pytest.raises(RequestError, match="the model has no chat template"):
        llm.chat(CHATS)
    with pytest.raises(RequestError, match="the model has no chat template"):
        llm.encode_chat(CHATS[0])
    with pytest.raises(
        RequestError, match=r"messages must be a list of messages, or of such lists, got 'hi'."
    ):
        LLM(ToyModel(), toy_tokenizers.chatting()).chat("hi")  # type: ignore[arg-type]


def test_a_wrong_number_of_parameters_is_an_error_at_once() -> None:
    """Before anything runs, without advancing the iterator."""
    with pytest.raises(RequestError, match="one for each of the 2 prompts, got 1"):
        LLM(ToyModel()).generate_iter([[1], [2]], sampling_params=[SamplingParams()])


def test_closing_the_iterator_cancels_the_rest() -> None:
    """No request stays behind, and no page; the next call is not disturbed."""
    llm = LLM(ToyModel())
    results = llm.generate_iter(
        PROMPTS, sampling_params=[SamplingParams(max_new_tokens=n) for n in (2, 9, 9, 9)]
    )
    next(results)
    assert llm.engine.metrics.num_running == 3
    results.close()
    assert llm.engine.metrics.num_running == 0
    assert llm.engine.metrics.pages_in_use == 0
    (result,) = llm.generate([1, 2, 3], max_new_tokens=4)
    assert result.token_ids == greedy_alone([1, 2, 3], 4)


@pytest.mark.parametrize("where", ["model", "progress"])
def test_ctrl_c_cancels_everything(where: str) -> None:
    """Wherever it strikes, no request and no page is left."""
    model = ToyModel()
    llm = LLM(model)

    def interrupt(progress: Progress) -> None:
        if progress.num_new_tokens > 8:
            if where == "progress":
                raise KeyboardInterrupt
            model.fail_next = KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, on_progress=interrupt)
    metrics = llm.engine.metrics
    assert (metrics.num_running, metrics.num_waiting, metrics.pages_in_use) == (0, 0, 0)


def test_an_iterator_that_is_never_advanced_runs_nothing() -> None:
    """generate_iter is lazy: no request is queued before the first result is asked for."""
    llm = LLM(ToyModel())
    llm.generate_iter(PROMPTS)
    assert not llm.engine.has_work


def test_progress_counts_finished_prompts_tokens_and_pages() -> None:
    """Called after each step; the last call has everything, a refused prompt counts as finished."""
    llm = LLM(ToyModel(num_pages=7))
    seen: list[Progress] = []
    results = llm.generate([*PROMPTS, []], max_new_tokens=8, on_progress=seen.append)
    assert [len(result.token_ids) for result in results] == [8, 8, 8, 8, 0]
    assert seen[0].num_finished == 1
    assert (seen[-1].num_finished, seen[-1].num_total, seen[-1].num_new_tokens) == (5, 5, 32)
    assert max(progress.pages_in_use for progress in seen) == seen[0].num_pages == 6
    assert seen[-1].num_preemptions == llm.engine.metrics.num_preemptions > 0


def test_several_iterators_can_be_open_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    """Advanced in turn, each gives what it gives alone."""
    llm = LLM(ToyModel(), tokenizer, eos_token_ids=[])
    alone = list(llm.stream("abc", max_new_tokens=30))
    pieces = []
    stream = llm.stream("abc", max_new_tokens=30)
    for result in llm.generate_iter(PROMPTS, max_new_tokens=12):
        assert result.token_ids == greedy_alone(PROMPTS[result.index], 12)
        pieces.append(next(stream))
    assert [*pieces, *stream] == alone


def test_stream_gives_the_text_in_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    """Joined, the pieces are the text of generate, also with a stop string."""
    llm = LLM(ToyModel(), tokenizer)
    (result,) = llm.generate("abc", max_new_tokens=20)
    pieces = list(llm.stream("abc", max_new_tokens=20))
    assert result.text is not None
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == result.text
    stop = result.text[8:10]
    stopped = list(llm.stream("abc", max_new_tokens=20, sampling_params=SamplingParams(stop=[stop])))
    assert "".join(stopped) == result.text[: result.text.index(stop)]


def test_stream_raises_what_refuses_or_fails_the_request(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """There is no result to carry the error."""
    llm = LLM(ToyModel(), tokenizer)
    with pytest.raises(RequestError, match="the prompt is empty"):
        next(llm.stream(""))
    with pytest.raises(RequestError, match="the logits after 1 tokens hold NaN"):
        next(llm.stream([NAN_TOKEN]))
    with pytest.raises(RequestError, match="there is no tokenizer"):
        next(LLM(ToyModel()).stream([1]))


def test_closing_a_stream_cancels_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """Its pages come back."""
    llm = LLM(ToyModel(), tokenizer)
    stream = llm.stream("abc", max_new_tokens=60)
    next(stream)
    assert llm.engine.metrics.pages_in_use > 0
    stream.close()
    assert llm.engine.metrics.pages_in_use == 0


def test_a_request_cancelled_elsewhere_is_a_result() -> None:
    """engine.cancel gives a result with the tokens so far and reason cancelled."""
    llm = LLM(ToyModel())

    def cancel_second(progress: Progress) -> None:
        if progress.num_new_tokens == 2 * len(PROMPTS):
            llm.engine.cancel(1)

    results = llm.generate(PROMPTS, max_new_tokens=6, on_progress=cancel_second)
    assert [result.finish_reason for result in results] == [
        "length",
        "cancelled",
        "length",
        "length",
    ]
    assert results[1].token_ids == greedy_alone(PROMPTS[1], 2)


PANICS = "a" * 28 + "!"


def panicking_tokenizer() -> PreTrainedTokenizerBase:
    """Its pattern takes too long on PANICS, at which Rust panics."""
    vocab = {"[UNK]": 0, **{char: i for i, char in enumerate("abcdefghijklmnopqrstuvwxyz!", start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("bad", ["\ud800", PANICS], ids=["half a character", "panic"])
def test_a_prompt_that_cannot_be_encoded_is_refused_alone(bad: str) -> None:
    """Whatever the tokenizer raises, a panic of Rust included; stream raises it."""
    llm = LLM(ToyModel(), panicking_tokenizer())
    first, refused, last = llm.generate(["abc", bad, "d"], max_new_tokens=4)
    assert (first.token_ids, last.token_ids) == (greedy_alone([1, 2, 3], 4), greedy_alone([4], 4))
    assert refused.finish_reason == "error"
    assert (refused.error or "").startswith("the tokenizer cannot encode this prompt: ")
    assert "\n" not in (refused.error or "")
    with pytest.raises(RequestError, match="the tokenizer cannot encode this prompt"):
        next(llm.stream(bad))
    assert llm.engine.metrics.pages_in_use == 0


@pytest.mark.parametrize(
    "bad", [_Raises(), [_Raises()], torch.zeros(2, dtype=torch.int64, device="meta")], ids=["0", "1", "meta"]
)
def test_a_prompt_whose_class_fails_is_refused_alone(bad: Any) -> None:
    llm = LLM(ToyModel())
    first, refused, last = llm.generate([[1, 2, 3], bad, [4]], max_new_tokens=4)
    assert (first.token_ids, last.token_ids) == (greedy_alone([1, 2, 3], 4), greedy_alone([4], 4))
    assert (refused.error or "").startswith("this prompt cannot be read: ")
    assert llm.engine.metrics.pages_in_use == 0


class FailingTokenizer(LettersTokenizer):
    """Cannot decode once the tokens hold ``bad``; encodes ``z`` as Ctrl-C."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def __call__(self, text: str) -> dict[str, list[int]]:
        if "z" in text:
            raise KeyboardInterrupt
        return super().__call__(text)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        if self.bad in token_ids:
            raise LookupError("no such token")
        return str(self._tokenizer.decode(token_ids, **options))


@pytest.mark.parametrize("stop", [(), ("never there",)], ids=["at the end", "as it comes"])
def test_a_text_that_cannot_be_decoded_fails_alone(stop: tuple[str, ...]) -> None:
    """Its tokens are kept, its neighbours are right, and no page is lost."""
    expected = [greedy_alone(prompt, 6) for prompt in PROMPTS]
    bad = next(token for token in expected[1] if sum(token in tokens for tokens in expected) == 1)
    llm = LLM(ToyModel(), FailingTokenizer(bad), eos_token_ids=[])  # type: ignore[arg-type]
    results = llm.generate(PROMPTS, sampling_params=SamplingParams(max_new_tokens=6, stop=stop))
    assert [result.error is None for result in results] == [True, False, True, True]
    assert "the tokenizer cannot decode the new tokens: LookupError: no such token" in str(results[1].error)
    length = 6 if not stop else expected[1].index(bad) + 1
    assert results[1].token_ids == expected[1][:length]
    for i in (0, 2, 3):
        assert results[i].token_ids == expected[i]
    assert llm.engine.metrics.pages_in_use == 0
    assert not llm.engine.has_work


def test_ctrl_c_while_a_prompt_is_encoded_closes_the_others() -> None:
    """It is no failure of the tokenizer: it passes through."""
    llm = LLM(ToyModel(), FailingTokenizer(0))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        next(llm.generate_iter(["a", "b", "z"]))
    assert (llm.engine.metrics.num_running, llm.engine.metrics.num_waiting) == (0, 0)


def test_closing_goes_on_where_one_request_cannot_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was raised comes out when all the others are closed."""
    llm = LLM(ToyModel())
    results = llm.generate_iter(
        PROMPTS, sampling_params=[SamplingParams(max_new_tokens=n) for n in (2, 9, 9, 9)]
    )
    next(results)
    cancel = llm.engine.cancel

    def fail_once(request_id: int) -> bool:
        monkeypatch.setattr(llm.engine, "cancel", cancel)
        raise RuntimeError("cannot")

    monkeypatch.setattr(llm.engine, "cancel", fail_once)
    with pytest.raises(RuntimeError, match="cannot"):
        results.close()
    assert llm.engine.metrics.num_running == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts must be texts or token ids, one or several, got None."),
        (5, "prompts must be texts or token ids, one or several, got 5."),
        ({"prompt": "abc"}, "prompts must be texts or token ids, one or several, got {'prompt'"),
        (b"abc", "prompts must be texts or token ids, one or several, got b'abc'."),
    ],
    ids=str,
)
def test_what_holds_no_prompts_is_refused_at_once(prompts: Any, message: str) -> None:
    """Before the iterator is advanced."""
    with pytest.raises(RequestError) as caught:
        LLM(ToyModel()).generate_iter(prompts)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_params": 5},
        {"sampling_params": {"max_new_tokens": 3}},
        {"sampling_params": [None]},
        {"sampling_params": "greedy"},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "3"},
        {"max_new_tokens": True},
        {"on_progress": 3},
    ],
    ids=str,
)
def test_arguments_of_wrong_types_are_refused_at_once(options: dict[str, Any]) -> None:
    """The error names the argument."""
    with pytest.raises(RequestError, match=f"{next(iter(options))} must be"):
        LLM(ToyModel()).generate_iter([[1]], **options)


@pytest.mark.parametrize(
    "bad",
    [None, {"a": 1}, {1: 2}, {1, 2}, b"ab", [1.5], [True], ["1"], [[1]], [None], [2**70], [-1], 7.5, "", []],
    ids=str,
)
def test_a_prompt_of_a_wrong_type_is_refused_alone(bad: Any) -> None:
    """Its neighbours are right; the engine refuses it too."""
    llm = LLM(ToyModel())
    first, refused, last = llm.generate([[1, 2, 3], bad, [4]], max_new_tokens=3)
    assert (first.token_ids, last.token_ids) == (greedy_alone([1, 2, 3], 3), greedy_alone([4], 3))
    assert refused.finish_reason == "error"
    assert refused.error
    assert "\n" not in refused.error
    with pytest.raises(RequestError):
        llm.engine.add_request(bad)
    assert not llm.engine.has_work


def test_arrays_and_tensors_are_prompts() -> None:
    """One, several as rows, and their numbers in a list; max_new_tokens of numpy."""
    llm = LLM(ToyModel())
    expected = greedy_alone([1, 2, 3], 3)
    forms: list[Any] = [np.array([1, 2, 3]), torch.tensor([[1, 2, 3]]), list(np.array([1, 2, 3])), (1, 2, 3)]
    forms += [[np.array([1, 2, 3])], [torch.tensor([1, 2, 3])], range(1, 4)]
    for prompts in forms:
        (result,) = llm.generate(prompts, max_new_tokens=np.int64(3))  # type: ignore[arg-type]
        assert result.token_ids == expected
        assert all(type(token) is int for token in result.prompt_token_ids)


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    """It could never stop anything."""
    (result,) = LLM(ToyModel()).generate([1], sampling_params=SamplingParams(stop_token_ids=[3, 48]))
    assert result.error == "stop_token_ids must lie in 0..47, the model's vocabulary, got 48 at position 1."


def test_a_checkpoint_is_no_model() -> None:
    """Other libraries take its name here; the error says what does."""
    with pytest.raises(ConfigError, match=r"got 'org/name'; build_model\(AutoDeployConfig"):
        LLM("org/name")  # type: ignore[arg-type]


@pytest.mark.parametrize("eos", ["1", [None], 1, [-1]], ids=str)
def test_end_tokens_must_be_token_ids(eos: Any) -> None:
    """Refused when the model is made, not when a text does not end."""
    with pytest.raises(ConfigError, match="eos_token_ids must be integers"):
        LLM(ToyModel(), eos_token_ids=eos)


def test_a_text_cut_by_max_seq_len_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """In its result, and in one line for all; one that has its max_new_tokens does not."""
    llm = LLM(ToyModel(max_seq_len=10), toy_tokenizers.byte_level(), eos_token_ids=[])
    short, long = llm.generate([[1], [1, 2, 3]], max_new_tokens=9)
    assert [(r.finish_reason, r.is_cut) for r in (short, long)] == [("length", False), ("length", True)]
    line = "1 of 2 texts ended at max_seq_len=10, short of max_new_tokens; raise max_seq_len"
    assert [record.getMessage()[: len(line)] for record in caplog.records] == [line]
    caplog.clear()
    list(llm.stream([1, 2, 3], max_new_tokens=8))
    assert "1 of 1 texts ended at max_seq_len=10" in caplog.text
    caplog.clear()
    list(llm.stream([1, 2, 3], max_new_tokens=7))
    assert not caplog.records


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_threads_share_one_llm(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each call gives what it gives alone: 20 rounds of 4 threads, with steps ahead and preemption."""
    sampling = SamplingParams(max_new_tokens=10, temperature=1.5, repetition_penalty=1.2, seed=4)
    for steps_ahead in (0, 1):
        llm = LLM(ToyModel(num_pages=12), tokenizer, steps_ahead=steps_ahead)
        expected = [llm.generate(PROMPTS[i:], sampling_params=sampling) for i in range(3)]
        text = list(llm.stream("abc", sampling_params=sampling))

        def call(number: int, llm: LLM = llm) -> Any:
            if number == 3:
                return list(llm.stream("abc", sampling_params=sampling))
            return llm.generate(PROMPTS[number:], sampling_params=sampling)

        with ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                assert list(pool.map(call, range(4), timeout=60)) == [*expected, text]
        assert llm.engine.metrics.num_preemptions > 0
        assert llm.engine.metrics.pages_in_use == 0


def test_a_thread_that_waits_is_served_while_another_generates() -> None:
    """A lock that a busy thread always gets back would keep the other out until the first has ended."""
    llm = LLM(ToyModel(max_seq_len=2000, num_pages=600))
    begun, served = Event(), Event()

    def stop_once_served(progress: Progress) -> None:
        begun.set()
        if served.is_set():
            raise InterruptedError

    with ThreadPoolExecutor(1) as pool:
        options: dict[str, Any] = {"max_new_tokens": 1900, "on_progress": stop_once_served}
        long = pool.submit(lambda: llm.generate([1], **options))
        begun.wait()
        (result,) = llm.generate([2], max_new_tokens=3)
        served.set()
        assert isinstance(long.exception(), InterruptedError)
    assert result.token_ids == greedy_alone([2], 3)
    assert llm.engine.metrics.pages_in_use == 0


def test_n_continuations_are_n_results_with_seeds_of_their_own() -> None:
    """In the order of the prompts, each as if its seed alone had been asked for; the prompt is read once."""
    llm = LLM(ToyModel(has_states=False))
    params = SamplingParams(max_new_tokens=6, temperature=1.5, seed=3)
    results = llm.generate(PROMPTS[:2], [replace(params, n=3), params])
    alone = [llm.generate(PROMPTS[0], params, seed=seed)[0].token_ids for seed in (3, 4, 5)]
    assert [result.index for result in results] == [0, 0, 0, 1]
    assert [result.token_ids for result in results[:3]] == alone
    with pytest.raises(RequestError, match="one continuation, got n=2"):
        next(llm.stream(PROMPTS[0], n=2))
