from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch

pytest.importorskip("xgrammar")

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.engine import Completion, Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.structure import (
    GuidedDecodingParams,
    mask_by_bits,
    new_bits,
)
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import ToyModel, greedy_alone

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]
FORMS = ["(ab|cd){2,5}x?", "[a-f]{3}", "hello|help", "(q[a-z])*z"]
END = 0


def guided(regex: str, **more: Any) -> SamplingParams:
    return SamplingParams(guided_decoding=GuidedDecodingParams(regex=regex), max_new_tokens=20, **more)


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
    ids = [engine.add_request(prompt, params) for prompt, params in asked]
    completions: dict[int, Completion] = {}
    while engine.has_work:
        completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
    return [completions[i] for i in ids]


def engine_of(steps_ahead: int, **model: Any) -> Engine:
    return Engine(ToyModel(**model), toy_tokenizers.chatting(), [END], steps_ahead=steps_ahead)


@pytest.mark.parametrize("num_pages", [8, 100])
def test_texts_have_their_form_whatever_is_ahead(num_pages: int) -> None:
    """Greedy and drawn, beside requests without a form, with and without preemption: the same tokens."""
    asked = [
        (prompt, guided(regex, temperature=temperature, seed=index))
        for index, (prompt, regex) in enumerate(zip(PROMPTS, FORMS, strict=True))
        for temperature in (0.0, 1.5)
    ]
    asked.insert(3, (PROMPTS[0], SamplingParams(max_new_tokens=18, ignore_eos=True)))
    found, num_preemptions = [], 0
    for steps_ahead in (0, 1, 3):
        engine = engine_of(steps_ahead, num_pages=num_pages, has_states=False, with_graphs=True)
        completions = run(engine, asked)
        found.append([completion.token_ids for completion in completions])
        assert engine.metrics.pages_in_use == 0
        num_preemptions += engine.metrics.num_preemptions
        for (_, params), completion in zip(asked, completions, strict=True):
            form = params.guided_decoding
            if form is not None and completion.finish_reason == "stop":
                assert re.fullmatch(form.regex or "", completion.text or "")
        assert sum(completion.finish_reason == "stop" for completion in completions) >= 6
    assert (num_preemptions > 0) == (num_pages == 8)
    assert found[0] == found[1] == found[2]
    assert found[0][3] == greedy_alone(PROMPTS[0], 18)


def test_a_form_that_is_none_is_the_error_of_its_request() -> None:
    """The others go on."""
    bad = SamplingParams(guided_decoding=GuidedDecodingParams(grammar="no grammar ::="))
    wrong, right = run(engine_of(1), [(PROMPTS[0], bad), (PROMPTS[1], guided("[a-f]{3}"))])
    assert (wrong.finish_reason, right.finish_reason) == ("error", "stop")
    assert "guided_decoding cannot be compiled" in (wrong.error or "")


def test_an_error_names_what_left_no_token() -> None:
    """A text that is whole can only end, which is too early; the model's logits are as good as before."""
    engine = engine_of(0, has_states=False)
    whole, other = run(
        engine, [(PROMPTS[0], guided("[a-f]{3}", min_tokens=9)), (PROMPTS[0], SamplingParams())]
    )
    assert len(whole.token_ids) == 3
    assert whole.error == (
        "the logits after 6 tokens hold NaN or +inf, or only -inf, or min_tokens and guided_decoding left no "
        "token: forbid fewer."
    )
    assert other.error is None


def test_a_grammar_is_compiled_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its request can be cancelled before."""
    engine, gate = engine_of(1), Event()
    compile_now = engine.grammars._compile
    monkeypatch.setattr(engine.grammars, "_compile", lambda form: gate.wait() and compile_now(form))
    slow = engine.add_request(PROMPTS[1], guided("[a-f]{3}"))
    gone = engine.add_request(PROMPTS[1], guided("hello"))
    other = engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=5, ignore_eos=True))
    ended: dict[int, Completion] = {}
    while other not in ended:
        ended.update({o.request_id: o.completion for o in engine.step() if o.completion})
    assert engine.metrics.num_waiting == 2
    assert engine.cancel(gone)
    gate.set()
    while engine.has_work:
        ended.update({o.request_id: o.completion for o in engine.step() if o.completion})
    assert ended[other].token_ids == greedy_alone(PROMPTS[0], 5)
    assert (ended[slow].finish_reason, ended[gone].finish_reason) == ("stop", "cancelled")
    assert engine.grammars.compile(GuidedDecodingParams(regex="[a-f]{3}")).done(), "compiled once"


def test_who_asks_for_a_grammar_does_not_wait_for_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read for the first one, which takes seconds; the engine asks between two steps."""
    grammars = engine_of(0).grammars
    has_begun, may_end, make = Event(), Event(), grammars._new_compiler

    def slow() -> Any:
        has_begun.set()
        may_end.wait()
        return make()

    monkeypatch.setattr(grammars, "_new_compiler", slow)
    first = grammars.compile(GuidedDecodingParams(regex="a"))
    has_begun.wait()
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(grammars.compile, GuidedDecodingParams(regex="b"))
        try:
            second = asked.result(timeout=5)
        finally:
            may_end.set()
    assert None not in (first.result(), second.result())


def test_ctrl_c_leaves_a_text_where_it_was() -> None:
    """Its matcher has taken in the tokens that the request has."""
    model = ToyModel()
    engine = Engine(model, toy_tokenizers.chatting(), [END], steps_ahead=1)
    (expected,) = run(engine, [(PROMPTS[0], guided(FORMS[0]))])
    engine.add_request(PROMPTS[0], guided(FORMS[0]))
    engine.step()
    engine.step()
    model.fail_next = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    while not (outputs := engine.step()) or outputs[-1].completion is None:
        pass
    assert outputs[-1].completion.token_ids == expected.token_ids


@pytest.mark.parametrize(
    "fields", [{}, {"regex": "a", "json_object": True}, {"regex": 3}, {"json": {"a": {1}}}]
)
def test_a_form_is_exactly_one(fields: Any) -> None:
    """Of the right type."""
    with pytest.raises(RequestError, match="guided_decoding"):
        GuidedDecodingParams(**fields)


def test_a_form_needs_an_end_token() -> None:
    """Nothing else ends a text that is whole."""
    with pytest.raises(RequestError, match="ignore_eos must be False"):
        engine_of(0).add_request([1], guided("a", ignore_eos=True))
    (completion,) = run(Engine(ToyModel(), toy_tokenizers.chatting()), [([1], guided("a"))])
    assert "needs a tokenizer and an end token" in (completion.error or "")


def test_bits_are_tokens() -> None:
    """As xgrammar numbers them: 32 a word, the lowest bit first; more than there are tokens do no harm."""
    scores = torch.randn(2, 70)
    bits = new_bits(2, 70)
    assert torch.equal(mask_by_bits(scores, bits), scores)
    bits[1] = 0
    bits[1, 1], bits[1, 2] = 1 << 3, -(2**31)
    masked = mask_by_bits(scores, bits)
    assert torch.equal(masked[0], scores[0])
    assert masked[1].isfinite().nonzero().flatten().tolist() == [35]
