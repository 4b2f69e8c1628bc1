from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.llm import LLM, GenerationResult, Progress
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import NAN_TOKEN, ToyModel, greedy_alone

PROMPTS: list[list[int]] = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]


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
    results = llm.generate(PROMPTS, sampling=sampling)
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
        results = list(llm.generate(prompts, max_new_tokens=4))
        assert {tuple(result.token_ids) for result in results} == {tuple(expected)}
        assert {result.text for result in results} == {decode(tokenizer, expected)}
    assert [result.prompt for result in results] == ["abc", None]
    assert list(llm.generate([])) == []


def test_a_refused_prompt_is_a_result_and_the_others_go_on(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Empty, unknown and failing prompts give their errors in their places."""
    llm = LLM(ToyModel(), tokenizer)
    prompts: list[Any] = ["", "abc", [99], [NAN_TOKEN], "b", 7]
    results = list(llm.generate(prompts, max_new_tokens=3))
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
    own = [len(r.token_ids) for r in llm.generate([[1], [2]], sampling=sampling)]
    common = [len(r.token_ids) for r in llm.generate([[1], [2]], sampling=sampling, max_new_tokens=5)]
    assert (own, common) == ([2, 3], [5, 5])


def test_a_wrong_number_of_parameters_is_an_error_at_once() -> None:
    """Before anything runs, without advancing the iterator."""
    with pytest.raises(RequestError, match="one for each of the 2 prompts, got 1"):
        LLM(ToyModel()).generate([[1], [2]], sampling=[SamplingParams()])


def test_closing_the_iterator_cancels_the_rest() -> None:
    """No request stays behind, and no page; the next call is not disturbed."""
    llm = LLM(ToyModel())
    results = llm.generate(PROMPTS, sampling=[SamplingParams(max_new_tokens=n) for n in (2, 9, 9, 9)])
    next(results)
    assert llm.engine.metrics.num_running == 3
    results.close()  # type: ignore[attr-defined]
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
        list(llm.generate(PROMPTS, on_progress=interrupt))
    metrics = llm.engine.metrics
    assert (metrics.num_running, metrics.num_waiting, metrics.pages_in_use) == (0, 0, 0)


def test_an_iterator_that_is_never_advanced_runs_nothing() -> None:
    """generate is lazy: no request is queued before the first result is asked for."""
    llm = LLM(ToyModel())
    llm.generate(PROMPTS)
    assert not llm.engine.has_work


def test_progress_counts_finished_prompts_tokens_and_pages() -> None:
    """Called after each step; the last call has everything, a refused prompt counts as finished."""
    llm = LLM(ToyModel(num_pages=7))
    seen: list[Progress] = []
    results = list(llm.generate([*PROMPTS, []], max_new_tokens=8, on_progress=seen.append))
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
    for result in llm.generate(PROMPTS, max_new_tokens=12):
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
    stopped = list(llm.stream("abc", max_new_tokens=20, sampling=SamplingParams(stop=[stop])))
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
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.metrics.pages_in_use == 0


def test_a_request_cancelled_elsewhere_is_a_result() -> None:
    """engine.cancel gives a result with the tokens so far and reason cancelled."""
    llm = LLM(ToyModel())

    def cancel_second(progress: Progress) -> None:
        if progress.num_new_tokens == 2 * len(PROMPTS):
            llm.engine.cancel(1)

    results = list(llm.generate(PROMPTS, max_new_tokens=6, on_progress=cancel_second))
    assert [result.finish_reason for result in results] == [
        "length",
        "cancelled",
        "length",
        "length",
    ]
    assert results[1].token_ids == greedy_alone(PROMPTS[1], 2)
