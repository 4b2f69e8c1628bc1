from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ad_flashinfer_pass.errors import CapacityError, ConfigError, RequestError
from ad_flashinfer_pass.runtime.detokenize import TextStream
from ad_flashinfer_pass.runtime.engine import Completion, Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests.runtime import toy_tokenizers
from tests.runtime.toy_model import NAN_TOKEN, VOCAB_SIZE, ToyModel, greedy_alone, toy_logits

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19, 20]]


def drain(engine: Engine) -> dict[int, Completion]:
    """Step until all requests have ended."""
    completions: dict[int, Completion] = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert output.request_id not in completions, "a request ended twice"
                completions[output.request_id] = output.completion
    return completions


def tokens_of(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    completions = drain(engine)
    return [completions[i].token_ids for i in ids]


def assert_all_returned(engine: Engine, model: ToyModel) -> None:
    assert engine.metrics.pages_in_use == 0
    assert (engine.metrics.num_running, engine.metrics.num_waiting) == (0, 0)
    assert model.num_dirty_pages == 0


@pytest.mark.parametrize("chunk", [None, 1, 2, 7])
@pytest.mark.parametrize("max_num_tokens", [5, 8, 64])
def test_a_batch_gives_the_tokens_of_each_prompt_alone(chunk: int | None, max_num_tokens: int) -> None:
    """Whatever the chunks and the budget, greedy tokens are those of the model by itself."""
    model = ToyModel(max_num_tokens=max_num_tokens)
    engine = Engine(model, prefill_chunk_tokens=chunk)
    actual = tokens_of(engine, PROMPTS, SamplingParams(max_new_tokens=20))
    assert actual == [greedy_alone(prompt, 20) for prompt in PROMPTS]
    assert_all_returned(engine, model)
    chunks = [len(s.token_ids) for step in model.steps for s in step]
    assert max(chunks) <= (chunk or max_num_tokens)


def test_engines_of_one_model_take_turns() -> None:
    """Together they would write the same pages."""
    model = ToyModel()
    first, second = Engine(model), Engine(model)
    request = first.add_request([1, 2], SamplingParams(max_new_tokens=9))
    first.step()
    with pytest.raises(RequestError, match="another engine has unfinished requests on this model"):
        second.add_request([3], SamplingParams(max_new_tokens=9))
    assert drain(first)[request].token_ids == greedy_alone([1, 2], 9)
    for engine in (second, first):
        assert tokens_of(engine, [[3]], SamplingParams(max_new_tokens=9)) == [greedy_alone([3], 9)]
    first.add_request([1, 2])
    del first, engine
    assert tokens_of(second, [[3]], SamplingParams(max_new_tokens=9)) == [greedy_alone([3], 9)]


def test_pages_of_other_weights_are_forgotten() -> None:
    """Weights may be written between requests, as in training; K and V in kept pages are of the old ones."""
    model = ToyModel(has_states=False)
    weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    model.module.register_parameter("weight", weight)
    engine = Engine(model)

    def num_cached() -> int:
        request_id = engine.add_request(list(range(2, 20)))
        return drain(engine)[request_id].num_cached_tokens

    assert (num_cached(), num_cached()) == (0, 16)
    weight.copy_(torch.zeros(3))
    assert (num_cached(), num_cached()) == (0, 16)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24),
        SamplingParams(max_new_tokens=24, temperature=1.2, top_p=0.95, seed=11),
        SamplingParams(max_new_tokens=24, temperature=1.2, repetition_penalty=1.4, seed=3),
    ],
    ids=["greedy", "sampled", "penalty"],
)
def test_preemption_does_not_change_tokens(params: SamplingParams) -> None:
    """A pool that cannot hold all sequences gives the same tokens as one that can."""
    roomy, tight = ToyModel(), ToyModel(num_pages=12)
    engine = Engine(tight)
    assert tokens_of(engine, PROMPTS, params) == tokens_of(Engine(roomy), PROMPTS, params)
    assert engine.metrics.num_preemptions > 0
    assert_all_returned(engine, tight)


def test_requests_join_and_leave_between_any_two_steps() -> None:
    """Each new request joins the running ones, and its tokens are those it has alone."""
    model = ToyModel(max_batch_size=3)
    engine = Engine(model)
    completions: dict[int, Completion] = {}
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, SamplingParams(max_new_tokens=5 + index))
        completions.update({o.request_id: o.completion for o in engine.step() if o.completion})
    completions.update(drain(engine))
    assert [completions[i].token_ids for i in range(len(PROMPTS))] == [
        greedy_alone(prompt, 5 + index) for index, prompt in enumerate(PROMPTS)
    ]
    assert max(len(step) for step in model.steps) == 3


def test_each_step_reports_the_tokens_of_that_step() -> None:
    """Joined over the steps, the reported tokens are those of the completion."""
    engine = Engine(ToyModel())
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=4))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [output.token_id for output in outputs] == greedy_alone([1, 2, 3], 4)
    assert [output.completion is None for output in outputs] == [True, True, True, False]
    assert not engine.has_work
    assert engine.step() == []


def test_middle_chunks_ask_for_no_logits() -> None:
    """Only the step with the last prompt token gathers."""
    model = ToyModel()
    engine = Engine(model, prefill_chunk_tokens=4)
    engine.add_request(list(range(10)), SamplingParams(max_new_tokens=2))
    drain(engine)
    assert [(len(s.token_ids), s.gather) for step in model.steps for s in step] == [
        (4, False),
        (4, False),
        (2, True),
        (1, True),
    ]


def test_ends_at_max_seq_len() -> None:
    """A sequence stops at max_seq_len tokens, prompt included, with reason length."""
    engine = Engine(ToyModel(max_seq_len=10))
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=50))
    assert drain(engine)[0] == Completion(greedy_alone([1, 2, 3], 7), None, "length")


@pytest.mark.parametrize("source", ["eos", "stop_token_ids"])
def test_ends_with_a_stop_token(source: str) -> None:
    """The end-of-sequence tokens of the model and the request's own end it, and are reported."""
    third = greedy_alone([1, 2, 3], 3)[-1]
    assert third not in greedy_alone([1, 2, 3], 2)
    engine = Engine(ToyModel(), eos_token_ids=[third] if source == "eos" else [])
    stop = [third] if source == "stop_token_ids" else []
    engine.add_request([1, 2, 3], SamplingParams(stop_token_ids=stop))
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=9, ignore_eos=True))
    completions = drain(engine)
    assert completions[0] == Completion(greedy_alone([1, 2, 3], 3), None, "stop")
    assert completions[1] == Completion(greedy_alone([1, 2, 3], 9), None, "length")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "the prompt is empty. Give at least one token."),
        ([1] * 30, SamplingParams(), "must fit max_seq_len=30, got a prompt of 30 tokens"),
        ([1, VOCAB_SIZE], SamplingParams(), "must lie in 0..47, .* got 48 at position 1"),
        ([-1], SamplingParams(), "must lie in 0..47, .* got -1 at position 0"),
        ([0.5], SamplingParams(), r"a prompt must be text or token ids, got \[0.5\]"),
        ([1] * 20, SamplingParams(), "20 prompt tokens and 10 new ones need 8 pages of 4 tokens"),
        ([1], SamplingParams(max_new_tokens=2, stop=["a"]), "stop strings and streaming need text"),
    ],
    ids=["empty", "too-long", "id-high", "id-negative", "id-float", "pages", "stop-no-tokenizer"],
)
def test_refuses_what_can_never_run(prompt: list[int], params: SamplingParams, message: str) -> None:
    """The refusal names the limit; the engine is untouched and runs the next request."""
    model = ToyModel(max_seq_len=30, num_pages=8)
    engine = Engine(model)
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, params)
    assert not engine.has_work
    assert tokens_of(engine, [[1]], SamplingParams(max_new_tokens=3)) == [greedy_alone([1], 3)]


def test_accepts_what_just_fits() -> None:
    """The last token needs no page: 29 tokens in 7 pages of 4."""
    engine = Engine(ToyModel(max_seq_len=30, num_pages=8))
    assert tokens_of(engine, [[1] * 20], SamplingParams(max_new_tokens=9)) == [greedy_alone([1] * 20, 9)]


def test_bad_logits_fail_one_request() -> None:
    """NaN after one prompt is that request's error; the batch around it is as without it."""
    model = ToyModel()
    engine = Engine(model)
    prompts = [[1, 2], [3, NAN_TOKEN], [4, 5]]
    ids = [engine.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    completions = drain(engine)
    assert completions[ids[1]] == Completion(
        [], None, "error", "the logits after 2 tokens hold NaN or +inf, or only -inf."
    )
    for i in (0, 2):
        assert completions[ids[i]].token_ids == greedy_alone(prompts[i], 6)
    assert_all_returned(engine, model)


def test_a_failing_step_ends_its_requests_and_no_others() -> None:
    """Requests in the step get the model's error and keep their tokens; waiting ones then run."""
    model = ToyModel(max_batch_size=2)
    engine = Engine(model)
    for prompt in PROMPTS[:3]:
        engine.add_request(prompt, SamplingParams(max_new_tokens=4))
    engine.step()
    model.fail_next = RuntimeError("CUDA out of memory.\nframe #0: somewhere")
    failed = engine.step()
    assert [output.completion for output in failed] == [
        Completion(
            greedy_alone(prompt, 1),
            None,
            "error",
            "the model failed: RuntimeError: CUDA out of memory.",
        )
        for prompt in PROMPTS[:2]
    ]
    assert drain(engine)[2].token_ids == greedy_alone(PROMPTS[2], 4)
    assert_all_returned(engine, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a bug")], ids=["ctrl-c", "bug"])
def test_an_interrupted_step_can_be_continued_or_cancelled(error: BaseException) -> None:
    """It passes through; no page is in use, and all requests still give their tokens, or cancel."""
    model = ToyModel()
    engine = Engine(model)
    params = SamplingParams(max_new_tokens=8, temperature=0.9, repetition_penalty=1.3, seed=5)
    expected = tokens_of(Engine(ToyModel()), PROMPTS[:2], params)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS[:3]]
    engine.step()
    model.fail_next = error
    with pytest.raises(type(error)):
        engine.step()
    assert engine.metrics.pages_in_use == 0
    assert engine.cancel(ids[2])
    completions = drain(engine)
    assert [completions[i].token_ids for i in ids[:2]] == expected
    assert completions[ids[2]].finish_reason == "cancelled"
    assert engine.metrics.pages_in_use == 0


def test_an_interrupt_after_sampling_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was drawn and not yet taken is drawn again, with the penalty as before."""
    params = SamplingParams(max_new_tokens=12, temperature=0.9, repetition_penalty=2.0, seed=5)
    expected = tokens_of(Engine(ToyModel()), PROMPTS[:2], params)
    engine = Engine(ToyModel(), toy_tokenizers.byte_level())
    ids = [engine.add_request(p, params, stream=i == 0) for i, p in enumerate(PROMPTS[:2])]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(TextStream, "add", _press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    completions = drain(engine)
    assert [completions[i].token_ids for i in ids] == expected


def _press_ctrl_c(stream: TextStream, token_id: int) -> str:
    raise KeyboardInterrupt


def test_cancel_reports_the_tokens_so_far() -> None:
    """A running and a waiting request end with the next step; a second cancel does nothing."""
    model = ToyModel(max_batch_size=1)
    engine = Engine(model)
    running, waiting = (engine.add_request(prompt) for prompt in PROMPTS[:2])
    engine.step()
    engine.step()
    assert engine.cancel(running)
    assert engine.cancel(waiting)
    assert not engine.cancel(running)
    assert not engine.cancel(99)
    assert [output.completion for output in engine.step()] == [
        Completion(greedy_alone(PROMPTS[0], 2), None, "cancelled"),
        Completion([], None, "cancelled"),
    ]
    assert not engine.has_work
    assert_all_returned(engine, model)


def test_a_request_without_seed_draws_its_own() -> None:
    """Two equal requests without a seed differ; with one they agree."""
    free = SamplingParams(max_new_tokens=40, temperature=2.0)
    fixed = SamplingParams(max_new_tokens=40, temperature=2.0, seed=1)
    first, second = tokens_of(Engine(ToyModel()), [[1], [1]], free)
    assert first != second
    first, second = tokens_of(Engine(ToyModel()), [[1], [1]], fixed)
    assert first == second


def test_texts_end_before_stop_token_and_stop_string() -> None:
    """The completion's text is the decoded tokens, less what stopped them."""
    tokenizer = toy_tokenizers.byte_level()
    engine = Engine(ToyModel(), tokenizer)
    tokens = greedy_alone([1, 2, 3], 12)
    whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
    stop = whole[5:7]
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=12))
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=12, stop=[stop]))
    engine.add_request([1, 2, 3], SamplingParams(max_new_tokens=12, stop_token_ids=[tokens[3]]))
    completions = drain(engine)
    assert completions[0] == Completion(tokens, whole, "length")
    assert completions[1].text == whole[: whole.index(stop)]
    assert completions[1].finish_reason == "stop"
    assert len(completions[1].token_ids) < 12
    before = tokens[: tokens.index(tokens[3])]
    assert completions[2].text == tokenizer.decode(before, skip_special_tokens=True)
    assert completions[2].token_ids == [*before, tokens[3]]


def test_a_stop_string_in_the_last_piece_counts() -> None:
    """Text that was held to the end, as bytes of one run are, is searched as well."""
    tokenizer = toy_tokenizers.byte_fallback()
    whole = str(tokenizer.decode(greedy_alone([1], 8), skip_special_tokens=True))
    engine = Engine(ToyModel(), tokenizer)
    engine.add_request([1], SamplingParams(max_new_tokens=8, stop=[whole[4]]))
    completion = drain(engine)[0]
    assert (completion.text, completion.finish_reason) == (whole[: whole.index(whole[4])], "stop")


def test_metrics_count() -> None:
    """Steps, prompt and generated tokens, and the pages of a running sequence."""
    engine = Engine(ToyModel(num_pages=11))
    engine.add_request(list(range(9)), SamplingParams(max_new_tokens=3))
    engine.step()
    metrics = engine.metrics
    assert (metrics.num_steps, metrics.num_prompt_tokens, metrics.num_generated_tokens) == (1, 9, 1)
    assert (metrics.pages_in_use, metrics.num_pages, metrics.num_running) == (3, 10, 1)


def test_refuses_a_useless_configuration() -> None:
    """A chunk of no tokens, or a cache of no pages, is an error when the engine is made."""
    with pytest.raises(ConfigError, match="prefill_chunk_tokens must be at least 1, got 0"):
        Engine(ToyModel(), prefill_chunk_tokens=0)
    with pytest.raises(CapacityError, match="2 pages or more"):
        Engine(ToyModel(num_pages=1))


def test_the_toy_model_depends_on_every_token() -> None:
    """The oracle of these tests: another token anywhere, or another order, gives other logits."""
    logits = toy_logits((1, 2, 3))
    for other in [(2, 2, 3), (1, 2), (1, 3, 2), (3, 2, 1)]:
        assert not toy_logits(other).equal(logits)


def test_logprobs_are_those_of_the_model() -> None:
    """Of each token and the likeliest ones, before temperature and penalties; of the prompt's tokens, too."""
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13]]
    params = [
        SamplingParams(max_new_tokens=8, temperature=2.0, repetition_penalty=1.5, seed=1, logprobs=3),
        SamplingParams(max_new_tokens=6, logprobs=0, prompt_logprobs=2),
        SamplingParams(max_new_tokens=6),
    ]
    for steps_ahead in (0, 2):
        for num_pages in (7, 100):
            model = ToyModel(num_pages=num_pages, has_states=False, with_graphs=True, max_num_tokens=12)
            engine = Engine(model, steps_ahead=steps_ahead)
            asked = [(prompt, p) for prompt in prompts for p in params]
            ids = [engine.add_request(prompt, p) for prompt, p in asked]
            completions = drain(engine)
            for request_id, (prompt, p) in zip(ids, asked, strict=True):
                check_logprobs(prompt, p, completions[request_id])


def check_logprobs(prompt: list[int], params: SamplingParams, completion: Completion) -> None:
    assert (completion.logprobs is None) == (params.logprobs is None)
    assert (completion.prompt_logprobs is None) == (params.prompt_logprobs is None)
    sequence = [*prompt, *completion.token_ids]
    found = list(enumerate(completion.logprobs or [], len(prompt)))
    assert len(found) == (0 if params.logprobs is None else len(completion.token_ids))
    for position, one in [*found, *enumerate(completion.prompt_logprobs or [])]:
        if position == 0:
            assert one is None
            continue
        assert one is not None
        assert one.token_id == sequence[position]
        wanted = toy_logits(tuple(sequence[:position])).log_softmax(-1)
        assert one.logprob == pytest.approx(float(wanted[one.token_id]), abs=1e-5)
        num_top = params.logprobs if position >= len(prompt) else params.prompt_logprobs
        values, tokens = wanted.topk(num_top or 0)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_no_token_ends_a_text_before_min_tokens() -> None:
    """Neither the model's own nor the request's."""
    prompt = [1, 2, 3]
    first, _, third = greedy_alone(prompt, 3)
    for steps_ahead in (0, 2):
        for stop, is_eos in ((third, False), (third, True), (first, True)):
            params = SamplingParams(max_new_tokens=9, min_tokens=5, stop_token_ids=[] if is_eos else [stop])
            engine = Engine(ToyModel(), eos_token_ids=[stop] if is_eos else [], steps_ahead=steps_ahead)
            (tokens,) = tokens_of(engine, [prompt], params)
            assert stop not in tokens[:5]
            assert tokens[:2] == greedy_alone(prompt, 2) or stop == first


def test_a_request_of_the_engine_has_one_continuation() -> None:
    """n is the matter of LLM, which makes requests of it."""
    with pytest.raises(RequestError, match="one continuation, got n=2"):
        Engine(ToyModel()).add_request([1], SamplingParams(n=2))


def test_an_engine_says_why_it_does_not_share_pages() -> None:
    """Because it was told, or because the model cannot."""
    assert Engine(ToyModel(has_states=False)).no_block_reuse is None
    assert "states" in (Engine(ToyModel()).no_block_reuse or "")
    told = Engine(ToyModel(has_states=False), enable_block_reuse=False)
    assert told.no_block_reuse == "enable_block_reuse is false"
    model = ToyModel(has_states=False)
    model.sequence_info.has_lengths = True
    assert "ropes" in (Engine(model).no_block_reuse or "")
    for _ in range(2):
        assert tokens_of(told, PROMPTS, SamplingParams(max_new_tokens=9)) == [
            greedy_alone(prompt, 9) for prompt in PROMPTS
        ]
    assert (told.metrics.num_cached_tokens, told.metrics.pages_kept) == (0, 0)
