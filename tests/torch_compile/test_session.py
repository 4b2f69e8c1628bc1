"""What a session keeps: sequences, their lengths and pages; a refusal changes none of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass import CacheSession
from ad_flashinfer_pass.errors import AdFlashinferError, CapacityError, ConfigError, SessionError
from tests.torch_compile.small_models import Net, compiled, session


class Loop:
    """A compiled model of one layer with a session; logits of whole texts are its oracle."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.net, self.session = Net(1), session()
        self._model = compiled(self.net, self.session)

    def run(self, schedule: list[tuple[int | None, list[int]]]) -> Tensor:
        """[number of sequences, vocab]."""
        with self.session.step(schedule) as batch:
            return batch.last_logits(self._model(*batch.inputs.values()))

    def assert_last(self, found: Tensor, *texts: list[int]) -> None:
        """The logits are those of the last tokens of these texts."""
        with torch.no_grad():
            wanted = [self.net(torch.tensor([text]), torch.arange(len(text))[None])[0, -1] for text in texts]
        torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def shared() -> Loop:
    return Loop()


@pytest.fixture
def loop(shared: Loop) -> Loop:
    shared.session.free()
    return shared


def test_prompts_chunks_and_single_tokens_in_one_step(loop: Loop) -> None:
    loop.run([(None, [1, 2, 3]), (None, [4, 5])])
    first, second = loop.session.lengths
    found = loop.run([(None, [7, 8]), (second, [9, 10, 11]), (first, [6])])
    loop.assert_last(found, [7, 8], [4, 5, 9, 10, 11], [1, 2, 3, 6])
    assert list(loop.session.lengths.values()) == [4, 5, 2]


def test_a_step_may_be_given_in_any_order(loop: Loop) -> None:
    """Results are in the order given."""
    loop.run([(None, [1, 2, 3]), (None, [4, 5])])
    first, second = loop.session.lengths
    schedule = [(first, [6]), (second, [9, 10]), (None, [8]), (None, [7, 8])]
    with loop.session.step(schedule, sort=True) as batch:
        found = batch.last_logits(loop._model(*batch.inputs.values()))
    loop.assert_last(found, [1, 2, 3, 6], [4, 5, 9, 10], [8], [7, 8])
    assert batch.sequences == [first, second, second + 1, second + 2]


def test_prefill_takes_prompts_in_any_form_and_order(loop: Loop) -> None:
    """One token, which is a decode, among longer ones: results and ids are in the order given."""
    prompts = [[9], [1, 2, 3], [8], [4, 5]]
    with loop.session.prefill(prompts) as batch:
        logits = loop._model(*batch.inputs.values())
        found = batch.last_logits(logits)
        tokens = batch.inputs["input_ids"][0].tolist()
        assert [tokens[start:end] for start, end in batch.spans] == prompts
    loop.assert_last(found, *prompts)
    assert list(loop.session.lengths) == batch.sequences
    assert list(loop.session.lengths.values()) == [1, 3, 1, 2]
    assert loop.session.prefill(torch.tensor([1, 2])).entries == [(None, [1, 2])]
    assert loop.session.prefill(torch.tensor([[1, 2], [3, 4]])).entries == [(None, [1, 2]), (None, [3, 4])]
    assert loop.session.prefill([1, 2]).entries == [(None, [1, 2])]


def test_a_sequence_may_be_as_long_as_the_session_says(loop: Loop) -> None:
    """Its last token too, which is alone on no new page."""
    loop.run([(None, [7] * 63)])
    (sequence,) = loop.session.lengths
    loop.assert_last(loop.run([(sequence, [8])]), [7] * 63 + [8])
    with pytest.raises(CapacityError, match="64 and 1 more tokens is longer"):
        loop.session.decode([9])
    assert loop.session.lengths == {sequence: 64}


def test_a_session_is_neither_copied_nor_saved(loop: Loop) -> None:
    for of in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(SessionError, match=r"neither copied nor saved.*compile the copy"):
            of(loop.session)


def test_truncated_tokens_are_forgotten(loop: Loop) -> None:
    """Drafts that were refused: the next token stands where the first of them stood."""
    loop.run([(None, list(range(1, 16)))])
    (sequence,) = loop.session.lengths
    loop.run([(sequence, [20, 21, 22, 23])])
    assert loop.session.num_free_pages == 16 - 2
    loop.session.truncate(sequence, 16)
    assert loop.session.num_free_pages == 16 - 1
    found = loop.run([(sequence, [30])])
    loop.assert_last(found, [*range(1, 16), 20, 30])
    with pytest.raises(SessionError, match=r"can be cut to 1\.\.17 tokens, got 18"):
        loop.session.truncate(sequence, 18)


def test_pages_of_freed_sequences_are_used_again_and_are_empty(loop: Loop) -> None:
    for start in range(6):
        loop.run([(None, [start + 1] * 40)])
        (sequence,) = loop.session.lengths
        loop.session.free([sequence])
    assert loop.session.num_free_pages == 16
    assert all(not cache[1:].any() for cache in loop.session._caches.values())


def test_an_error_within_a_batch_undoes_it(loop: Loop) -> None:
    """Also after the model ran: the sequences are as before, and the next step is right."""
    loop.run([(None, [1, 2, 3])])
    (sequence,) = loop.session.lengths
    batch = loop.session.step([(None, [4, 5]), (sequence, [9])])
    with contextlib.suppress(ZeroDivisionError), batch:
        loop._model(*batch.inputs.values())
        raise ZeroDivisionError
    assert batch.ran
    assert loop.session.lengths == {sequence: 3}
    assert loop.session.num_free_pages == 16 - 1
    loop.assert_last(loop.run([(sequence, [6])]), [1, 2, 3, 6])


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (
            lambda s: s.step([(None, [1]), (None, [1, 2])]),
            SessionError,
            "ordered prefill, .*got decode, prefill",
        ),
        (lambda s: s.step([(0, [1]), (0, [2])]), SessionError, "each once and with one token or more"),
        (lambda s: s.step([]), SessionError, "one sequence or more"),
        (lambda s: s.step("abc"), SessionError, r"list of \(sequence, tokens\), got 'abc'"),
        (lambda s: s.step([(0, 5)]), SessionError, "tokens must be integers, got 5"),
        (lambda s: s.prefill([[1], []]), SessionError, "with one token or more"),
        (lambda s: s.prefill([]), SessionError, "one sequence or more"),
        (lambda s: s.prefill(torch.empty((0, 3), dtype=torch.int64)), SessionError, "one sequence or more"),
        (lambda s: s.prefill([[1, -1]]), SessionError, "token ids must be 0 or more"),
        (lambda s: s.prefill([[1.5]]), SessionError, r"tokens must be integers, got \[1.5\]"),
        (lambda s: s.prefill(torch.tensor(3)), SessionError, "a prompt must be a list of tokens"),
        (lambda s: s.decode(torch.tensor([1.5])), SessionError, "integers, got a tensor of torch.float32"),
        (lambda s: s.decode([1, 2]), SessionError, "one token a sequence, got 2 for 1"),
        (lambda s: s.decode([1], [5]), SessionError, "no sequence 5 in the session; known: 0"),
        (lambda s: s.free([7]), SessionError, "no sequence 7"),
        (
            lambda s: s.prefill([[1] * 65]),
            CapacityError,
            "0 and 65 more tokens is longer than .* max_seq_len=64",
        ),
        (
            lambda s: s.step([(0, [1] * 62)]),
            CapacityError,
            "3 and 62 more tokens is longer than .* max_seq_len=64",
        ),
        (lambda s: s.prefill([[1]] * 5), CapacityError, "max_batch_size=4 sequences .* got 5 and 5"),
        (
            lambda s: s.prefill([[1] * 60] * 4),
            CapacityError,
            "needs 16 more pages of 16 tokens, but 15 are free",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    loop: Loop, step: Callable[[CacheSession], object], error: type[AdFlashinferError], match: str
) -> None:
    """Before anything runs, with what was asked for and the limit."""
    loop.session.sequences._next_id = 0
    loop.run([(None, [1, 2, 3])])
    with pytest.raises(error, match=match):
        step(loop.session)
    assert loop.session.lengths == {0: 3}
    assert loop.session.num_free_pages == 15


def with_gradients(loop: Loop) -> None:
    with loop.session.decode([6]) as batch, torch.enable_grad():
        loop._model(*batch.inputs.values())


def with_old_inputs(loop: Loop) -> None:
    with contextlib.suppress(ZeroDivisionError), loop.session.decode([6]) as batch:
        old = tuple(batch.inputs.values())
        raise ZeroDivisionError
    with loop.session.decode([6]):
        loop._model(*old)


def after_its_batch(loop: Loop) -> None:
    with contextlib.suppress(ZeroDivisionError), loop.session.decode([6]) as batch:
        old = tuple(batch.inputs.values())
        raise ZeroDivisionError
    with torch.no_grad():
        loop._model(*old)


def by_a_model_that_missed_a_step(loop: Loop) -> None:
    other = compiled(Net(1), loop.session)
    with loop.session.decode([6]) as batch:
        other(*batch.inputs.values())


def with_a_token_beyond_the_table(loop: Loop) -> None:
    with loop.session.decode([61]) as batch:
        loop._model(*batch.inputs.values())


def in_training(loop: Loop) -> None:
    other = compiled(Net(1, dropout=0.5).train(), loop.session)
    with loop.session.decode([6]) as batch:
        other(*batch.inputs.values())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (with_gradients, "the KV cache has no gradient"),
        (with_old_inputs, "input_ids is not that of the open batch"),
        (after_its_batch, "called outside a batch"),
        (by_a_model_that_missed_a_step, "has 3 tokens and the caches of layers.0 hold 0"),
        (with_a_token_beyond_the_table, "token 61 is not in the vocabulary of the model, which has 61 rows"),
        (in_training, "training mode"),
    ],
)
def test_a_refused_call_writes_nothing_and_the_next_step_is_right(
    loop: Loop, call: Callable[[Loop], None], match: str
) -> None:
    """No kernel has run: not a byte of the caches has changed."""
    loop.run([(None, [1, 2, 3])])
    (sequence,) = loop.session.lengths
    before = {key: cache.clone() for key, cache in loop.session._caches.items()}
    with pytest.raises(SessionError, match=match):
        call(loop)
    assert all(torch.equal(cache, before.get(key, cache * 0)) for key, cache in loop.session._caches.items())
    assert (loop.session.lengths, loop.session.num_free_pages) == ({sequence: 3}, 15)
    loop.assert_last(loop.run([(sequence, [6])]), [1, 2, 3, 6])


def test_batches_do_not_nest_and_are_entered_once(loop: Loop) -> None:
    with loop.session.prefill([[1, 2]]) as batch:
        with pytest.raises(SessionError, match="a batch is open: leave its context first"):
            loop.session.prefill([[1]])
        with pytest.raises(SessionError, match="a batch is open: leave its context first"):
            loop.session.free()
        loop._model(*batch.inputs.values())
    with pytest.raises(SessionError, match="within its context only"):
        _ = batch.inputs
    with pytest.raises(SessionError, match="entered once"):
        batch.__enter__()


def test_settings_are_those_of_the_config() -> None:
    with pytest.raises(
        ConfigError, match="max_batch_size: input should be greater than or equal to 1, got 0"
    ):
        CacheSession(max_batch_size=0)
    with pytest.raises(ConfigError, match="device: torch knows no 'gpu'; for example cpu, cuda"):
        CacheSession(device="gpu")
    with pytest.raises(ConfigError, match="transforms: unknown transform 'tune'"):
        CacheSession(transforms={"tune": {}})
    assert CacheSession(max_batch_size=2, max_seq_len=100).sequence_info.max_num_tokens == 200
    assert CacheSession(max_batch_size=8, max_seq_len=5000).sequence_info.max_num_tokens == 8192
    assert CacheSession(max_batch_size=8, max_seq_len=9000).sequence_info.max_num_tokens == 9000


@pytest.mark.parametrize("as_tensor", [False, True])
def test_verifies_drafts(loop: Loop, as_tensor: bool) -> None:
    """Guesses that are right, wrong, or right at first: the tokens are those of one token a step."""
    prompts = [[1, 2, 3], [4, 5], [6]]
    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        for _ in range(24):
            with torch.no_grad():
                logits = loop.net(torch.tensor([text]), torch.arange(len(text))[None])
            text.append(int(logits[0, -1].argmax()))
    with loop.session.prefill(prompts) as batch:
        newest = batch.last_logits(loop._model(*batch.inputs.values())).argmax(-1).tolist()
    found = [[token] for token in newest]
    rng = random.Random(0)
    for _ in range(6):
        drafts = []
        for text, prompt, got in zip(texts, prompts, found, strict=True):
            place = len(prompt) + len(got)
            right = rng.randint(0, 3)
            drafts.append([got[-1], *text[place : place + right], *[60] * (3 - right)])
            assert drafts[-1][1 : 1 + right] == text[place : place + right]
        given = torch.tensor(drafts) if as_tensor else [d[: rng.randint(1, 4)] for d in drafts]
        with loop.session.verify(given) as batch:
            accepted = batch.accept(loop._model(*batch.inputs.values()))
        for got, new in zip(found, accepted, strict=True):
            got += new
        lengths = list(loop.session.lengths.values())
        assert lengths == [len(p) + len(got) - 1 for p, got in zip(prompts, found, strict=True)]
    assert [p + got for p, got in zip(prompts, found, strict=True)] == [
        text[: len(p) + len(got)] for text, p, got in zip(texts, prompts, found, strict=True)
    ]
    assert max(map(len, found)) > 7, "some guesses were kept"


def test_verify_refuses_another_number_of_lists(loop: Loop) -> None:
    """Each sequence has a list; nothing changes."""
    loop.run([(None, [1, 2, 3]), (None, [4, 5])])
    with pytest.raises(SessionError, match="verify takes a list of tokens a sequence, got 1 for 2"):
        loop.session.verify([[1, 2]])
    with pytest.raises(SessionError, match="token ids must be 0 or more"):
        loop.session.verify([[1, -1], [2]])
    assert list(loop.session.lengths.values()) == [3, 2]


@pytest.mark.parametrize("length", [3, 15, 16, 17, 48])
def test_a_fork_goes_on_by_itself(loop: Loop, length: int) -> None:
    """Both sequences, and a fork of the fork; what is freed or cut of one stays for the others."""
    text = [1 + token % 50 for token in range(length)]
    loop.run([(None, text)])
    (first,) = loop.session.lengths
    second = loop.session.fork(first)
    num_pages = -(-length // 16)
    assert loop.session.num_free_pages == 16 - num_pages - bool(length % 16)
    loop.assert_last(loop.run([(first, [7]), (second, [8])]), [*text, 7], [*text, 8])
    third = loop.session.fork(second)
    loop.session.free([first])
    loop.session.truncate(third, length)
    loop.assert_last(loop.run([(second, [9]), (third, [5])]), [*text, 8, 9], [*text, 5])
    loop.session.truncate(second, 2)
    loop.assert_last(loop.run([(second, [6]), (third, [4])]), [*text[:2], 6], [*text, 5, 4])
    loop.session.free()
    assert loop.session.num_free_pages == 16


def test_a_fork_needs_a_page(loop: Loop) -> None:
    """And a cut into a page of both; else nothing changes."""
    loop.run([(None, [3] * 17)])
    (first,) = loop.session.lengths
    second = loop.session.fork(first)
    while loop.session.num_free_pages:
        loop.run([(None, [5])])
    with pytest.raises(CapacityError, match="1 pages were asked for, but 0 of 16 are free"):
        loop.session.fork(first)
    loop.session.truncate(first, 16)  # gives one back
    loop.run([(None, [5])])
    with pytest.raises(CapacityError, match="1 pages were asked for"):
        loop.session.truncate(first, 15)
    assert (loop.session.lengths[first], loop.session.lengths[second]) == (16, 17)
    with pytest.raises(SessionError, match="there is no sequence 99"):
        loop.session.fork(99)


def test_accept_refuses_what_are_no_guesses(loop: Loop) -> None:
    """Prompts, logits or tokens of other shapes, and a batch that has ended: nothing is cut silently."""
    with loop.session.prefill([[1, 2, 3], [4, 5]]) as batch:
        logits = loop._model(*batch.inputs.values())
        with pytest.raises(SessionError, match="begins with this batch: its tokens are a prompt"):
            batch.accept(logits)
    with loop.session.verify([[6, 7, 8], [9, 10, 11]]) as batch:
        logits = loop._model(*batch.inputs.values())
        for wrong in (logits[:, -1:], logits[0], logits.view(2, 3, -1)):
            with pytest.raises(
                SessionError, match=r"each of the batch's 6 tokens, got \d from logits of shape"
            ):
                batch.accept(wrong)
        for count in (2, 7):
            with pytest.raises(SessionError, match=f"got {count} from chosen of shape \\({count},\\)"):
                batch.accept(logits, torch.zeros(count, dtype=torch.int64))
        for none in (torch.zeros(6), [0] * 6):
            with pytest.raises(SessionError, match="chosen must be a tensor of int64, got"):
                batch.accept(logits, none)  # type: ignore[arg-type]
        assert batch.accept(logits, torch.tensor([[7, 1, 5], [10, 11, 3]])) == [[7, 1], [10, 11, 3]]
    assert list(loop.session.lengths.values()) == [5, 5]
    with pytest.raises(SessionError, match="within its context only"):
        batch.accept(logits)
