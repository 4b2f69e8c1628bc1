"""The step loop: requests in, tokens and text out.

The engine ties the model to the scheduler, the sampler and the detokeniser, and owns every request
from ``add_request`` to its ``Completion``. Threads take turns: each call is whole before the next begins.

Steps may be enqueued before the tokens of those before them are known: the scheduler needs only their number.
A request that turns out to have ended is left out of the next step that is scheduled; what the steps
already enqueued computed for it is dropped. Its pages can be given away at once, because whatever their next
owner writes is enqueued later. With ``steps_ahead=0`` each step is read before the next one is made.

A model with a drafter verifies drafts in steps in which all sequences decode, as long as that pays
(``drafts.payoff``). How many tokens such a step gives the device alone knows: as long as the same sequences
go on in their pages, the next one is enqueued all the same; else those that are ahead are read first.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor

from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError, RequestError
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.detokenize import TextDecoder, TextStream
from ad_flashinfer_pass.runtime.drafts.payoff import Payoff
from ad_flashinfer_pass.runtime.page_pool import PagePool
from ad_flashinfer_pass.runtime.sampling import SamplingParams, TokenLogprobs
from ad_flashinfer_pass.runtime.scheduler import Scheduler, SequenceState
from ad_flashinfer_pass.runtime.sequence_info import IDLE, SequenceStep
from ad_flashinfer_pass.runtime.step_runner import FindBits, PendingTokens, StepRunner, Wanted
from ad_flashinfer_pass.runtime.structure import Grammars, Matcher, new_bits
from ad_flashinfer_pass.runtime.turns import Turns
from ad_flashinfer_pass.runtime.values import as_bool, as_int, as_ints, as_token_ids

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "error", "cancelled"]

_FORBIDDING = (
    "no_repeat_ngram_size",
    "suppress_tokens",
    "bad_words_ids",
    "min_tokens",
    "guided_decoding",
)
"""Fields of ``SamplingParams`` by which some tokens cannot be chosen."""
_PAGES_AHEAD = 2
_PATIENCE = 0.05
"""Seconds that a call of ``step`` waits for grammars at most, where there is nothing else to do."""
_USERS: WeakKeyDictionary[CachedModel, tuple[ReferenceType[Engine], int]] = WeakKeyDictionary()
"""By model, the engine that got a request last, and how many steps the model had made without one by then."""

# What kernels, the allocator and the metadata raise; anything else is a bug, not a request's error.
_STEP_ERRORS = (RuntimeError, ValueError, AdFlashinferError)


class Completion(NamedTuple):
    """How a request ended."""

    token_ids: list[int]
    """Generated tokens, the one that stopped it included."""
    text: str | None
    """Without special tokens, stop strings and stop tokens; None without tokenizer."""
    finish_reason: FinishReason
    error: str | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that were not computed, because K and V of the same beginning were in pages."""
    logprobs: list[TokenLogprobs] | None = None
    """Of the generated tokens, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of the tokens of the prompt, if they were asked for; None for the first."""


class StepOutput(NamedTuple):
    """What one step did for one request."""

    request_id: int
    token_id: int | None
    """The new token; None if the request ended without one."""
    text: str = ""
    """Text that became final, if the request is streamed or has stop strings."""
    completion: Completion | None = None
    """Given once, in the last output of the request."""
    logprobs: TokenLogprobs | None = None
    """Of the new token, if they were asked for."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Counters since the engine was made, and its state."""

    num_steps: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Those of them that ended requests have not computed; see ``Completion``."""
    num_generated_tokens: int
    num_preemptions: int
    num_running: int
    num_waiting: int
    pages_in_use: int
    pages_kept: int
    """Pages that no request uses, kept for requests that begin alike."""
    num_pages: int
    """Pages that requests can use: those of the cache without page 0."""
    eager_steps: dict[str, int]
    """Steps that no captured graph could run, by reason; empty if none was captured."""
    num_verify_steps: int = 0
    """Steps that verified drafts."""
    num_verified: int = 0
    """Sequences of those steps, each counted as often as it was in one."""
    num_accepted: tuple[int, ...] = ()
    """How many of those took the first draft, the second one, and so on; empty without a drafter."""

    @property
    def drafts(self) -> Drafts | None:
        """What the drafts were worth; None without a drafter."""
        if not self.num_accepted:
            return None
        return Drafts(self.num_verify_steps, self.num_steps, self.num_verified, self.num_accepted)


class Drafts(NamedTuple):
    """What drafts were worth."""

    num_verify_steps: int
    num_steps: int
    """Those that verified nothing included."""
    num_verified: int
    """See ``Metrics``, as for the next one."""
    num_accepted: tuple[int, ...]

    def since(self, before: Drafts) -> Drafts:
        """What came after an earlier reading."""
        accepted = tuple(now - then for now, then in zip(self.num_accepted, before.num_accepted, strict=True))
        return Drafts(
            self.num_verify_steps - before.num_verify_steps,
            self.num_steps - before.num_steps,
            self.num_verified - before.num_verified,
            accepted,
        )

    @property
    def tokens_a_step(self) -> float:
        """Tokens that a sequence got in a step that verified drafts, in the mean; 1 if there was none."""
        return 1 + sum(self.num_accepted) / max(self.num_verified, 1)

    @property
    def acceptance(self) -> list[float]:
        """How often the first draft was taken, and the second one with it, and so on."""
        return [number / max(self.num_verified, 1) for number in self.num_accepted]

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.acceptance)
        return (
            f"{self.tokens_a_step:.2f} tokens a sequence in the {self.num_verify_steps} of {self.num_steps} "
            f"steps that verified some; taken by position: {shares}"
        )


@dataclass(eq=False, kw_only=True)
class _Request(SequenceState):
    params: SamplingParams
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]
    seed: int
    stream: TextStream | None = None
    detokenize: bool = True
    grammar: Future[Any] | None = None
    """Compiled or being compiled, if its text is to have a form."""
    matcher: Matcher | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By position."""

    @property
    def num_generated(self) -> int:
        """Generated tokens, known or not."""
        return self.num_tokens - self.num_prompt_tokens


class _InFlight(NamedTuple):
    """A step that was enqueued."""

    rows: list[_Request]
    """Those that get a token."""
    tokens: PendingTokens
    wanted: Wanted | None
    """Which log-probabilities are read with them."""
    scored: list[tuple[_Request, int]]
    """Whose prompts' tokens are among those, by position."""
    width: int = 1
    """Tokens that each of ``rows`` may get."""


class Engine:
    """Runs any number of requests, which join and leave at any time, over one model.

    The model's pages and states are all its own while it has requests: several engines take turns.

    Args:
        model: what computes logits.
        tokenizer: turns tokens into text; without it there are no texts and no stop strings.
        eos_token_ids: tokens that end a request unless it ignores them.
        prefill_chunk_tokens: prompt tokens of one sequence in one step, at most; default: what the
            model's max_num_tokens leaves.
        steps_ahead: steps that are enqueued after a step before its tokens are read. The tokens are the same,
            whatever it is.
        enable_block_reuse: keep full pages, and let requests that begin alike share them. The tokens are the
            same. See ``no_block_reuse``.

    Raises:
        ConfigError: prefill_chunk_tokens is not positive, steps_ahead is negative, or one of eos_token_ids is
            no token id.
        CapacityError: the model has no page besides page 0.
    """

    def __init__(
        self,
        model: CachedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_ids: Sequence[int] = (),
        *,
        prefill_chunk_tokens: int | None = None,
        steps_ahead: int = 0,
        enable_block_reuse: bool = True,
    ) -> None:
        try:
            eos = as_ints("eos_token_ids", eos_token_ids)
            steps_ahead = as_int("steps_ahead", steps_ahead)
            enable_block_reuse = as_bool("enable_block_reuse", enable_block_reuse)
            if prefill_chunk_tokens is not None:
                prefill_chunk_tokens = as_int("prefill_chunk_tokens", prefill_chunk_tokens)
        except RequestError as err:
            raise ConfigError(str(err)) from None
        if prefill_chunk_tokens is not None and prefill_chunk_tokens < 1:
            raise ConfigError(
                f"prefill_chunk_tokens must be at least 1, got {prefill_chunk_tokens}. Leave it "
                "out to let max_num_tokens decide."
            )
        if steps_ahead < 0:
            raise ConfigError(f"steps_ahead must be at least 0, got {steps_ahead}.")
        info = model.sequence_info
        self.turns = Turns()
        """Held during each call; hold it for several calls that belong together."""
        self._model = model
        self._steps_ahead = steps_ahead
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(token for token in eos if token < model.vocab_size)
        self._width = 1 if model.drafter is None else 1 + info.num_drafts
        """Tokens of a sequence in a step that verifies drafts."""
        self.may_draft = True
        """Whether steps may verify drafts, if there is a drafter; it can be set between requests."""
        self._payoff = Payoff(model.verify_cost)
        self._num_verify_steps = self._num_verified = 0
        self._num_accepted = [0] * (self._width - 1)
        self._max_seq_len = info.max_seq_len
        self._tokens_per_page = info.tokens_per_block
        self.no_block_reuse = _why_no_reuse(model) if enable_block_reuse else "enable_block_reuse is false"
        """Why requests that begin alike do not share pages; None if they do."""
        self._weights = [each for each in model.module.parameters() if not each.is_inference()]
        self._weights_version = self._version_of_weights()
        self._pool = PagePool(model.num_pages)
        self._scheduler: Scheduler[_Request] = Scheduler(
            self._pool,
            tokens_per_page=info.tokens_per_block,
            max_batch_size=info.max_batch_size,
            max_num_tokens=info.max_num_tokens,
            clear_pages=model.clear_pages,
            prefill_chunk_tokens=prefill_chunk_tokens,
            recompute_at=info.recompute_at,
            tokens_ahead=_PAGES_AHEAD * info.tokens_per_block if steps_ahead else 0,
            shares_pages=self.no_block_reuse is None,
            num_drafts=self._width - 1,
        )
        self._runner = StepRunner(model, runs_ahead=steps_ahead > 0)
        self._in_flight: deque[_InFlight] = deque()
        self._last_rows: list[_Request] = []
        """Those of the step enqueued last."""
        self._last_width = 1
        """Tokens that each of them may get."""
        self._wanted: Wanted | None = None
        """Log-probabilities that are read with it."""
        self._continuable_epoch: int | None = None
        """The scheduler's epoch if the metadata on the device are those of the next step of these rows."""
        self._requests: dict[int, _Request] = {}
        self.grammars = Grammars(tokenizer, model.vocab_size, sorted(self._eos_token_ids))
        self._compiling: list[_Request] = []
        """Those of them whose grammars are not ready yet."""
        self._is_guided = False
        """Whether a row of the step enqueued last has a grammar."""
        self._has_read = False
        """Whether tokens were read since ``step`` was called."""
        self._outputs: list[StepOutput] = []
        """What ``step`` has not returned yet."""
        self._num_requests = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to report."""
        return bool(self._requests or self._outputs)

    @property
    def metrics(self) -> Metrics:
        """A snapshot."""
        return Metrics(
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._compiling),
            pages_in_use=self._pool.num_in_use,
            pages_kept=self._pool.num_kept,
            num_pages=self._pool.capacity,
            eager_steps=self._model.eager_steps,
            num_verify_steps=self._num_verify_steps,
            num_verified=self._num_verified,
            num_accepted=tuple(self._num_accepted),
        )

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        cache_salt: str = "",
        detokenize: bool = True,
    ) -> int:
        """Queue a request; it joins in one of the next steps.

        Args:
            prompt: token ids.
            params: default: ``SamplingParams()``.
            stream: report text with each step.
            cache_salt: the request shares pages with those of the same salt alone, so that by the time that
                it takes nobody else can tell what it holds.
            detokenize: whether its completion has a text.

        Returns:
            The request's id.

        Raises:
            RequestError: the prompt is no sequence of token ids, empty, too long or holds an id outside the
                vocabulary, or stop_token_ids does; the request needs more pages than there are, or it needs
                text and there is no tokenizer; or another engine has requests on the same model.
        """
        with self.turns:
            params = SamplingParams() if params is None else params
            return self._add_request(prompt, params, stream, cache_salt, detokenize)

    def _add_request(
        self, prompt: Sequence[int], params: SamplingParams, stream: bool, cache_salt: str, detokenize: bool
    ) -> int:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, got {params!r:.80}.")
        token_ids = self._checked_prompt(prompt)
        self._check_params(params)
        max_len = min(len(token_ids) + params.max_new_tokens, self._max_seq_len)
        self._check_pages(len(token_ids), max_len)
        text_stream = None
        if stream or params.stop:
            text_stream = TextStream(self._text_decoder, params.stop)
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        request = _Request(
            request_id=self._num_requests,
            token_ids=token_ids,
            params=params,
            num_prompt_tokens=len(token_ids),
            first_len=len(token_ids),
            max_len=max_len,
            stop_token_ids=eos.union(params.stop_token_ids),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stream=text_stream,
            detokenize=detokenize,
            takes_known=params.prompt_logprobs is None,
            salt=sha256(cache_salt.encode()).digest(),
        )
        self._take_over_pages()
        self._num_requests += 1
        self._num_prompt_tokens += len(token_ids)
        self._requests[request.request_id] = request
        if params.guided_decoding is None:
            self._scheduler.add(request)
        else:
            request.grammar = self.grammars.compile(params.guided_decoding)
            self._compiling.append(request)
        return request.request_id

    def _take_over_pages(self) -> None:
        """What is in the model's pages is this engine's, or nothing."""
        user, num_steps = _USERS.get(self._model, (None, 0))
        other = None if user is None else user()
        if other is not None and other is not self and other._requests:
            raise RequestError(
                "another engine has unfinished requests on this model, whose pages both would "
                "write: end or cancel those first, or give them to one engine."
            )
        is_same = other is self or user is None
        # Whoever changes weights does it between requests; to look at all of them takes a while.
        version = self._weights_version if self._requests else self._version_of_weights()
        is_known = num_steps == self._model.num_lone_steps and version == self._weights_version
        self._weights_version = version
        if not (is_same and is_known):
            self._forget_steps()
            self._restart()
        _USERS[self._model] = (ref(self), self._model.num_lone_steps)

    def _version_of_weights(self) -> int:
        """Goes up with each write to one of them, but through ``.data``."""
        return sum(weight._version for weight in self._weights)

    def room_after(self, num_prompt_tokens: int) -> int:
        """New tokens that a request with so long a prompt can have, at most."""
        most = self._pool.capacity * self._tokens_per_page + 1  # the last token is not cached
        return min(self._max_seq_len, most) - num_prompt_tokens

    def cancel(self, request_id: int) -> bool:
        """End a request; the next ``step`` reports its completion, with the tokens it has.

        Returns:
            False if there is no such request, or it has ended.
        """
        with self.turns:
            request = self._requests.get(request_id) if isinstance(request_id, int) else None
            if request is None:
                return False
            try:
                self._outputs.append(self._end(request, "cancelled"))
            except BaseException:
                self._recover()
                raise
            return True

    def step(self) -> list[StepOutput]:
        """Enqueue steps until ``steps_ahead`` are ahead, and take the tokens of the oldest one.

        A failure of the model ends the requests that were in the step, with an error. Whatever else
        is raised, Ctrl-C included, passes through and leaves all requests waiting, without pages,
        as after a preemption: they can be cancelled or stepped on.

        Returns:
            An output for each token that a request got, or if it ended without one; empty if there is nothing
            to do, and after a step in which prompts were only begun.
        """
        with self.turns:
            try:
                self._step()
            except BaseException:
                self._recover()
                raise
            outputs, self._outputs = self._outputs, []
            return outputs

    def _recover(self) -> None:
        """Make the state whole again. What was raised can have struck between any two instructions."""
        self._forget_steps()
        self._restart()

    def _restart(self) -> None:
        for request in self._requests.values():
            if request.matcher is not None and request.grammar is not None:
                request.matcher = Matcher(request.grammar.result())
                for token in request.token_ids[request.num_prompt_tokens :]:
                    request.matcher.accept(token)
        self._scheduler.restart(
            request for request in self._requests.values() if request not in self._compiling
        )

    def _take_in_compiled(self) -> None:
        """Queue requests whose grammars are ready; wait for one if there is nothing else to do."""
        if not (self._scheduler.num_running or self._scheduler.num_waiting or self._outputs):
            wait([each.grammar for each in self._compiling if each.grammar], _PATIENCE, FIRST_COMPLETED)
        for request in list(self._compiling):
            if request.grammar is None or not request.grammar.done():
                continue
            try:
                request.matcher = Matcher(request.grammar.result())
            except RequestError as err:
                self._outputs.append(self._fail(request, str(err)))
                continue
            self._compiling.remove(request)
            self._scheduler.add(request)

    def _step(self) -> None:
        self._has_read = False
        if self._compiling:
            self._take_in_compiled()
        while self._in_flight and not self._is_awaited(self._in_flight[0]):
            self._in_flight.popleft()
        has_settled = False
        while len(self._in_flight) <= self._steps_ahead and not self._has_read:
            plan = self._next_verification()
            if not plan and self._in_flight and self._must_settle():
                has_settled = True
                while self._in_flight:
                    self._read_oldest()
            plan = plan or self._scheduler.schedule()
            if not plan:
                break
            error = self._enqueue(plan)
            if error is not None:
                while self._in_flight:
                    self._read_oldest()
                self._fail_all([request for request, _ in plan], error)
                self._forget_steps()
                break
        if self._in_flight and not (self._has_read or has_settled):
            self._read_oldest()
        self._scheduler.clear_released_pages()

    def _must_settle(self) -> bool:
        """Whether the next step, which the host has to write, needs tokens that are not known yet."""
        if self._in_flight[-1].width > 1:
            return True
        return self._may_verify(self._requests.values()) and self._scheduler.has_decodes_alone

    def _next_verification(self) -> list[tuple[_Request, int]]:
        """The next step, if it is of the sequences of the last one, which verified drafts, in their pages."""
        rows, scheduler = self._last_rows, self._scheduler
        if not (self._in_flight and self._in_flight[-1].width > 1 and self._may_verify(rows)):
            return []
        goes_on = (
            self._continuable_epoch == scheduler.epoch
            and scheduler.is_settled
            and not any(request.is_complete for request in rows)
        )
        return [(request, 1) for request in rows] if goes_on else []

    def _may_verify(self, requests: Iterable[_Request]) -> bool:
        return (
            self._width > 1
            and self.may_draft
            and self._payoff.is_on
            and self._scheduler.num_running * self._width <= self._model.sequence_info.max_num_tokens
            and not any(request.params.is_penalised for request in requests)
        )

    def _enqueue(self, plan: list[tuple[_Request, int]]) -> Exception | None:
        """Start a step. Returns the model's error, if it failed."""
        requests = [request for request, _ in plan]
        rows = [request for request, num_new in plan if request.num_cached + num_new == request.num_tokens]
        scored: list[tuple[_Request, int]] = []
        all_decode = len(rows) == len(plan) and all(num_new == 1 for _, num_new in plan)
        # Of what is in flight only steps that go on by themselves can be followed by one that verifies.
        verifies = all_decode and self._may_verify(rows)
        verifies = verifies and (not self._in_flight or self._in_flight[-1].width > 1)
        width = self._width if verifies else 1
        is_same = self._continuable_epoch == self._scheduler.epoch and requests == self._last_rows
        try:
            if is_same and width == self._last_width:
                tokens = self._runner.run_again(rows, self._find_bits(rows))
            elif verifies:
                places = [index * width + i for index in _asking(rows) for i in range(width)]
                num_top = max((row.params.logprobs or 0 for row in rows), default=0)
                self._wanted = Wanted(places, num_top) if places else None
                self._is_guided = False
                tokens = self._runner.verify([self._verification(row) for row in rows], rows, self._wanted)
            else:
                steps = self._sequence_steps(plan)
                for (request, _), step in zip(plan, steps, strict=True):
                    first = request.num_cached + 1
                    scored += [(request, at) for at in range(first, first + step.num_scored)]
                self._wanted = _wanted(rows, scored)
                self._is_guided = any(request.matcher is not None for request in rows)
                tokens = self._runner.run(steps, rows, self._wanted, self._find_bits(rows))
        except _STEP_ERRORS as err:
            logger.debug("a step of %d sequences failed", len(plan), exc_info=True)
            return err
        self._num_steps += 1
        self._num_verify_steps += verifies
        if all_decode and not verifies:
            self._payoff.note_plain()
        self._continuable_epoch = self._scheduler.epoch if all_decode and self._steps_ahead else None
        self._last_rows, self._last_width = rows, width
        for request, num_new in plan:
            request.num_cached += num_new if width == 1 else width
        if not all_decode:
            for request, num_new in plan:
                if num_new > 1 and request.pages:
                    self._scheduler.name_pages(request)
        for request in rows:
            request.num_pending += width
        self._in_flight.append(_InFlight(rows, tokens, self._wanted, scored, width))
        return None

    def _verification(self, request: _Request) -> SequenceStep:
        """The newest token, which is known, and room for drafts."""
        newest, max_cached = request.token_ids[-1], self._scheduler.max_cached(request)
        tokens = [newest] + [0] * (self._width - 1)
        return SequenceStep(
            tokens,
            request.num_cached,
            request.pages,
            first_len=request.first_len,
            slot=request.slot,
            max_cached=max_cached,
        )

    def _find_bits(self, rows: Sequence[_Request]) -> FindBits | None:
        return partial(self._bits, rows) if self._is_guided else None

    def _bits(self, rows: Sequence[_Request]) -> Tensor | None:
        """The tokens that rows may get; of those with a grammar the tokens so far are read first.

        The device runs the model meanwhile.
        """
        guided = [(index, request) for index, request in enumerate(rows) if request.matcher is not None]
        if not guided:
            return None
        while self._in_flight and any(request.num_pending for _, request in guided):
            self._read_oldest()
            self._has_read = True
        bits = new_bits(len(rows), self._model.vocab_size)
        for index, request in guided:
            if request.matcher is not None and request.request_id in self._requests:
                request.matcher.fill(bits, index)
        return bits

    def _sequence_steps(self, plan: list[tuple[_Request, int]]) -> list[SequenceStep]:
        places = {request.request_id: place for place, request in enumerate(self._last_rows)}
        steps = []
        for request, num_new in plan:
            end = request.num_cached + num_new
            token_ids = request.token_ids[request.num_cached : end]
            # A token that is not known yet is that of the step before: all that decode are in every step.
            new = token_ids or [-1 - places[request.request_id]]
            is_last = end == request.num_tokens
            num_pages = len(request.pages) if is_last else self._scheduler.num_pages_for(end)
            pages = request.pages[:num_pages]
            num_scored = 0
            if request.params.prompt_logprobs is not None:
                num_scored = max(0, min(end, request.num_prompt_tokens - 1) - request.num_cached)
            steps.append(
                SequenceStep(
                    new,
                    request.num_cached,
                    pages,
                    is_last,
                    request.first_len,
                    request.slot,
                    num_scored,
                    next_token=0 if is_last else request.token_ids[end],
                )
            )
        return steps

    def _read_oldest(self) -> None:
        """Take the tokens of the oldest step in flight."""
        step = self._in_flight.popleft()
        if not self._is_awaited(step):
            return
        rows = step.rows
        try:
            tokens = step.tokens.read()
        except _STEP_ERRORS as err:
            self._fail_all([*rows, *{request for request, _ in step.scored}], err)
            return
        logprobs = [None] * len(tokens) if step.wanted is None else self._logprobs(step, step.wanted)
        width, num_given, num_live = step.width, 0, 0
        for index, request in enumerate(rows):
            if request.request_id not in self._requests:
                continue
            places = range(index * width, (index + 1) * width)
            given = [place for place in places if tokens[place] != IDLE] if width > 1 else places
            if width > 1:
                num_given, num_live = num_given + len(given), num_live + 1
                self._scheduler.settle(request, width, len(given))
                for place in range(len(given) - 1):
                    self._num_accepted[place] += 1
            else:
                request.num_pending -= 1
            for place in given:
                if request.request_id in self._requests:
                    self._outputs.append(self._take(request, tokens[place], logprobs[place]))
        if num_live:
            self._num_verified += num_live
            self._payoff.note(num_given, num_live)

    @staticmethod
    def _logprobs(step: _InFlight, wanted: Wanted) -> list[TokenLogprobs | None]:
        """Those of the new tokens, for each row of logits; those of prompts are kept."""
        found = step.tokens.logprobs()
        for (request, position), one in zip(step.scored, found[len(wanted.rows) :], strict=True):
            request.prompt_logprobs[position] = one.cut(request.params.prompt_logprobs)
        of_rows: list[TokenLogprobs | None] = [None] * (len(step.rows) * step.width)
        for row, one in zip(wanted.rows, found, strict=False):
            of_rows[row] = one.cut(step.rows[row // step.width].params.logprobs)
        return of_rows

    def _is_awaited(self, step: _InFlight) -> bool:
        """Whether a request that gets something from it has not ended."""
        return any(request.request_id in self._requests for request in step.rows) or any(
            request.request_id in self._requests for request, _ in step.scored
        )

    def _fail_all(self, requests: list[_Request], error: Exception) -> None:
        for request in requests:
            if request.request_id in self._requests:
                self._outputs.append(self._fail(request, _first_line(error)))

    def _forget_steps(self) -> None:
        """Drop what is in flight, and whatever the device knows of the next step."""
        self._in_flight.clear()
        self._last_rows = []
        self._wanted = None
        self._continuable_epoch = None
        self._runner = StepRunner(self._model, runs_ahead=self._steps_ahead > 0)

    def _take(self, request: _Request, token: int, logprobs: TokenLogprobs | None) -> StepOutput:
        """Append a sampled token and see whether it ends the request."""
        if token < 0:
            num_tokens = len(request.token_ids)
            forbidding = [name for name in _FORBIDDING if getattr(request.params, name)]
            rest = f", or {' and '.join(forbidding)} left no token: forbid fewer" if forbidding else ""
            return self._fail(
                request, f"the logits after {num_tokens} tokens hold NaN or +inf, or only -inf{rest}."
            )
        if request.matcher is not None and not request.matcher.accept(token):
            return self._fail(request, f"the grammar does not allow the token {token}.")
        request.token_ids.append(token)
        if logprobs is not None:
            request.logprobs.append(logprobs)
        self._num_generated_tokens += 1
        if token in request.stop_token_ids:
            return self._end(request, "stop", token)
        text = ""
        if request.stream is not None:
            try:
                text = request.stream.add(token)
            except RequestError as err:
                return self._fail(request, str(err))
            if request.stream.is_stopped:
                return self._end(request, "stop", token, text)
        if len(request.token_ids) == request.max_len:
            return self._end(request, "length", token, text)
        return StepOutput(request.request_id, token, text, None, logprobs)

    def _fail(self, request: _Request, error: str) -> StepOutput:
        return self._end(request, "error", error=error)

    def _end(
        self,
        request: _Request,
        reason: FinishReason,
        token: int | None = None,
        text: str = "",
        error: str | None = None,
    ) -> StepOutput:
        """Forget a request, with its pages, and say how it ended."""
        del self._requests[request.request_id]
        if request in self._compiling:
            self._compiling.remove(request)
        else:
            self._scheduler.remove(request, is_broken=error is not None)
        self._num_cached_tokens += request.num_reused
        generated = request.token_ids[request.num_prompt_tokens :]
        whole_text = None
        try:
            if request.stream is not None:
                text += request.stream.finish()
                whole_text = request.stream.text
                if request.stream.is_stopped and reason == "length":
                    reason = "stop"
            elif self._tokenizer is not None and request.detokenize:
                is_stop_token = token in request.stop_token_ids
                whole_text = self._text_decoder.decode(generated[:-1] if is_stop_token else generated)
        except RequestError as err:
            reason, error = "error", error or str(err)
        params, prompt_logprobs = request.params, None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [request.prompt_logprobs.get(at) for at in range(request.num_prompt_tokens)]
        logprobs = None if params.logprobs is None else request.logprobs
        completion = Completion(
            generated, whole_text, reason, error, request.num_reused, logprobs, prompt_logprobs
        )
        last = logprobs[-1] if logprobs and token is not None else None
        return StepOutput(request.request_id, token, text, completion, last)

    @cached_property
    def _text_decoder(self) -> TextDecoder:
        if self._tokenizer is None:
            raise RequestError(
                "stop strings and streaming need text, and there is no tokenizer. Give the engine "
                "one, or use stop_token_ids."
            )
        return TextDecoder(self._tokenizer)

    def _checked_prompt(self, prompt: Sequence[int]) -> list[int]:
        token_ids = as_token_ids(prompt)
        if not token_ids:
            raise RequestError("the prompt is empty. Give at least one token.")
        self._check_ids("token ids", token_ids, ". Encode the prompt with the model's tokenizer.")
        if len(token_ids) >= self._max_seq_len:
            raise RequestError(
                f"prompt and one new token must fit max_seq_len={self._max_seq_len}, got a prompt "
                f"of {len(token_ids)} tokens. Shorten it or raise max_seq_len."
            )
        return token_ids

    def _check_params(self, params: SamplingParams) -> None:
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", [token for token, _ in params.biases])
        self._check_ids("bad_words_ids", [token for run in params.bad_words_ids for token in run])
        if params.guided_decoding is not None and params.ignore_eos:
            raise RequestError("guided_decoding ends a text by an end token; ignore_eos must be False.")
        if params.n != 1:
            raise RequestError(
                f"a request of the engine has one continuation, got n={params.n}. Add it n times, or use "
                "LLM.generate."
            )

    def _check_ids(self, name: str, token_ids: Sequence[int], way_out: str = ".") -> None:
        vocab_size = self._model.vocab_size
        if min(token_ids, default=0) < 0 or max(token_ids, default=0) >= vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise RequestError(
                f"{name} must lie in 0..{vocab_size - 1}, the model's vocabulary, got {bad} at "
                f"position {token_ids.index(bad)}{way_out}"
            )

    def _check_pages(self, num_prompt_tokens: int, max_len: int) -> None:
        # The last token is not cached: nothing attends to it.
        num_pages = self._scheduler.num_pages_for(max_len - 1)
        if num_pages > self._pool.capacity:
            raise RequestError(
                f"{num_prompt_tokens} prompt tokens and {max_len - num_prompt_tokens} new ones "
                f"need {num_pages} pages of {self._tokens_per_page} tokens, and the KV cache has "
                f"{self._pool.capacity}. Lower max_new_tokens, shorten the prompt, or raise "
                "kv_cache_config.max_tokens."
            )


def _wanted(rows: Sequence[_Request], scored: Sequence[tuple[_Request, int]]) -> Wanted | None:
    """What to read of a step with these rows, and tokens of prompts by position."""
    asking = _asking(rows)
    if not asking and not scored:
        return None
    tops = [rows[index].params.logprobs or 0 for index in asking]
    tops += [request.params.prompt_logprobs or 0 for request, _ in scored]
    return Wanted(asking, max(tops), [request.token_ids[at] for request, at in scored])


def _asking(rows: Sequence[_Request]) -> list[int]:
    """Who wants the log-probabilities of its tokens."""
    return [index for index, request in enumerate(rows) if request.params.logprobs is not None]


def _why_no_reuse(model: CachedModel) -> str | None:
    """Why K and V of a token are not those of every request that begins alike; None if they are."""
    info = model.sequence_info
    if info.has_states:
        return "the model has states, which are after all tokens of a request, and not at the edges of pages"
    if info.has_lengths or info.recompute_at is not None:
        return "the model's ropes depend on the length of the prompt, and so do K and V of its first tokens"
    return None


def _first_line(err: Exception) -> str:
    """What the error says, without the C++ frames that torch appends."""
    message = str(err).strip().partition("\n")[0]
    return f"the model failed: {type(err).__name__}: {message}"
