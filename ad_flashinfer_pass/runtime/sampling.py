"""From logits to tokens, on the device, for the whole batch at once.

The filters have transformers' semantics and order: bias, repetition penalty, OpenAI's two penalties,
repeated n-grams, bad words, the least length, suppressed tokens, temperature, top-k, top-p, min-p. A draw
inverts the cumulative distribution at one uniform number, which is a hash of the request's seed and of how
many tokens it has generated. There is no generator state, so neither the rest of the batch nor a preemption
can disturb a request's tokens. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.structure import GuidedDecodingParams, mask_by_bits
from ad_flashinfer_pass.runtime.values import as_bool, as_float, as_int, as_ints

# Beyond these a number vanishes in float32, or becomes infinite.
_SMALLEST, _LARGEST = 1e-6, 1e6
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_MAX_SIZE = 2**31 - 1
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_GAMMA = -0x61C8864680B583EB


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued, and when it ends.

    Values are checked, and kept as plain numbers, bools or tuples; numbers of numpy are accepted.

    Raises:
        RequestError: a value is of a wrong type or out of range.
    """

    max_new_tokens: int = 256
    """Tokens to generate, at most."""
    temperature: float = 0.0
    """0 takes the most likely token, whatever the filters are; a higher one flattens the distribution."""
    top_k: int = 0
    """Keep this many of the most likely tokens (more if they tie); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Keep the tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the continuation become less likely; below 1, more likely."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the continuation holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the continuation holds it; -2 to 2."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    """Added to the logits of these tokens; kept as pairs."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice in prompt and continuation; 0 is off."""
    suppress_tokens: Sequence[int] = ()
    """Tokens that are never chosen."""
    bad_words_ids: Sequence[Sequence[int]] = ()
    """Runs of tokens that never occur: the last one of each is not chosen after the others."""
    min_tokens: int = 0
    """Before so many tokens none is chosen that ends generation; strings in ``stop`` do end it."""
    logprobs: int | None = None
    """Give the log-probability of each token, and those of this many most likely ones; of the model's own
    distribution, before any of the above."""
    prompt_logprobs: int | None = None
    """Likewise for the tokens of the prompt but the first, which are all computed then."""
    guided_decoding: GuidedDecodingParams | None = None
    """The form of the text, which ends when it is whole; needs xgrammar."""
    n: int = 1
    """Continuations of each prompt, with the seeds from ``seed`` on; ``LLM`` makes them, not ``Engine``."""
    seed: int | None = None
    """The same seed gives the same tokens; None draws a seed for each request."""
    stop: Sequence[str] = ()
    """Generation ends when the text contains one of these; the text ends before it."""
    stop_token_ids: Sequence[int] = ()
    """Generation ends with one of these tokens, which is not part of the text."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens."""

    @property
    def biases(self) -> Sequence[tuple[int, float]]:
        """``logit_bias`` as it is kept."""
        assert not isinstance(self.logit_bias, Mapping)
        return self.logit_bias

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the most likely token of the unchanged logits is taken."""
        return self.temperature == 0 and not self.is_penalised

    @cached_property
    def is_penalised(self) -> bool:
        """Whether some tokens are made less likely, be the choice greedy or not."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.no_repeat_ngram_size
            or self.suppress_tokens
            or self.bad_words_ids
            or self.min_tokens
            or self.guided_decoding
        )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "no_repeat_ngram_size", "min_tokens", "n"):
            self._keep(name, as_int(name, getattr(self, name)))
        for name in _FLOATS:
            self._keep(name, as_float(name, getattr(self, name)))
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            self._keep(name, None if number is None else as_int(name, number))
            _require((number or 0) >= 0, f"{name} must be at least 0, or None, which is off", number)
        self._keep("logit_bias", _biases(self.logit_bias))
        self._keep("bad_words_ids", _runs(self.bad_words_ids))
        for name in ("suppress_tokens", "stop_token_ids"):
            self._keep(name, as_ints(name, getattr(self, name)))
        self._keep("seed", None if self.seed is None else as_int("seed", self.seed))
        self._keep("ignore_eos", as_bool("ignore_eos", self.ignore_eos))
        self._keep("stop", _stop_strings(self.stop))
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens)
        _require(
            self.temperature == 0 or _SMALLEST <= self.temperature <= _LARGEST,
            f"temperature must be 0 (the most likely token) or, up to {_LARGEST:g}, at least {_SMALLEST}",
            self.temperature,
        )
        _require(self.top_k >= 0, "top_k must be 0 (off) or positive", self.top_k)
        _require(0 <= self.top_p <= 1, "top_p must lie in 0..1, 1 being off", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p must lie in 0..1, 0 being off", self.min_p)
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty must be positive, 1 being off", penalty)
        _require(
            _SMALLEST <= penalty <= _LARGEST,
            f"repetition_penalty must lie in {_SMALLEST}..{_LARGEST:g}, 1 being off",
            penalty,
        )
        size = self.no_repeat_ngram_size
        _require(size >= 0, "no_repeat_ngram_size must be 0 (off) or positive", size)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(
                abs(getattr(self, name)) <= 2, f"{name} must lie in -2..2, 0 being off", getattr(self, name)
            )
        guided = self.guided_decoding
        _require(
            guided is None or isinstance(guided, GuidedDecodingParams),
            "guided_decoding must be GuidedDecodingParams",
            guided,
        )
        least, most = self.min_tokens, self.max_new_tokens
        _require(0 <= least <= most, f"min_tokens must lie in 0..max_new_tokens={most}", least)
        _require(self.n >= 1, "n must be at least 1", self.n)

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


class SamplingKeywords(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keywords of a call, for type checkers and editors."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    no_repeat_ngram_size: int
    suppress_tokens: Sequence[int]
    bad_words_ids: Sequence[Sequence[int]]
    min_tokens: int
    logprobs: int | None
    prompt_logprobs: int | None
    guided_decoding: GuidedDecodingParams | None
    n: int
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool


def _stop_strings(stop: Any) -> tuple[str, ...]:
    is_some = isinstance(stop, Iterable) and not isinstance(stop, str | Mapping)
    strings = tuple(stop) if is_some else (None,)
    valid = all(isinstance(string, str) and string for string in strings)
    _require(valid, "stop must be a sequence of strings, none of them empty", stop)
    return strings


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    pairs = list(pairs) if isinstance(pairs, Iterable) else [None]
    valid = all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
    _require(valid, "logit_bias must map token ids to numbers", given)
    biases = {as_int("logit_bias", token): as_float("logit_bias", bias) for token, bias in pairs}
    for token, bias in biases.items():
        _require(
            token >= 0 and abs(bias) <= _LARGEST_FLOAT32,
            "logit_bias must be finite in float32, of token ids",
            {token: bias},
        )
    return tuple(biases.items())


def _runs(given: Any) -> tuple[tuple[int, ...], ...]:
    is_some = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    runs = tuple(as_ints("bad_words_ids", run) for run in given) if is_some else ((),)
    _require(all(runs), "bad_words_ids must be lists of token ids, none of them empty", given)
    return runs


def _require(condition: bool, what: str, value: object) -> None:
    if not condition:
        raise RequestError(f"{what}, got {value!r:.80}.")


class SampledSequence(Protocol):
    """What the sampler reads of a sequence."""

    params: SamplingParams
    seed: int
    token_ids: list[int]
    """Prompt and generated tokens, as far as they are known."""
    num_prompt_tokens: int
    stop_token_ids: frozenset[int]
    """After one of them the sequence ends."""

    @property
    def num_generated(self) -> int:
        """Generated tokens, known or not."""

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, known or not."""


@dataclass
class BatchParams:
    """Parameters of the rows as tensors [n, 1] on the device; None where no row needs them."""

    seeds: Tensor | None = None
    """int64 [n]."""
    num_generated: Tensor | None = None
    """int64 [n]; goes up with each draw."""
    temperature: Tensor | None = None
    """1 for rows that take the most likely token."""
    is_drawn: Tensor | None = None
    """bool [n]: rows that do not take the most likely token."""
    top_k: Tensor | None = None
    max_top_k: int = 0
    tail_mass: Tensor | None = None
    min_p: Tensor | None = None
    penalty: Tensor | None = None
    seen: Tensor | None = None
    """bool [n, vocab_size]: tokens that occurred."""
    presence: Tensor | None = None
    frequency: Tensor | None = None
    counts: Tensor | None = None
    """float32 [n, vocab_size]: how often the continuation holds each token."""
    bias: Tensor | None = None
    """float32 [n, vocab_size]."""
    suppressed: Tensor | None = None
    """bool [n, vocab_size]: tokens that are never chosen."""
    min_left: Tensor | None = None
    """int64 [n, 1]: tokens before which none may end the continuation; goes down with each one."""
    ends: Tensor | None = None
    """bool [n, vocab_size]: those that would."""
    bad_words: BadWords | None = None
    ngram_sizes: tuple[int, ...] = ()
    """The sizes other than 0, each once."""
    ngram_size: Tensor | None = None
    """int64 [n]."""
    history: Tensor | None = None
    """int64 [n, longest]: all tokens, the newest last, with -1 before the first. As long as a row asks for
    no_repeat_ngram_size or bad_words_ids; a step then reads it once for each token of each size, and copies
    it."""

    @classmethod
    def of(
        cls,
        rows: Sequence[SampledSequence],
        vocab_size: int,
        device: torch.device,
        carried: Container[int] = (),
    ) -> BatchParams:
        """Collect the parameters of these sequences.

        Args:
            rows: the sequences.
            vocab_size: width of the logits.
            device: where they are.
            carried: by ``id``, those whose tokens are not looked at, because ``_carry_over`` brings them.
        """
        params = [row.params for row in rows]
        texts = [[] if id(row) in carried else row.token_ids for row in rows]
        longest = max((row.num_tokens for row in rows), default=0)

        def column(values: list[float]) -> Tensor:
            return on_device(torch.tensor(values, dtype=torch.float32), device).unsqueeze(1)

        batch = cls()
        if any(p.repetition_penalty != 1 for p in params):
            batch.penalty = column([p.repetition_penalty for p in params])
            batch.seen = _marked(texts, vocab_size, device)
        if any(p.presence_penalty or p.frequency_penalty for p in params):
            batch.presence = column([p.presence_penalty for p in params])
            batch.frequency = column([p.frequency_penalty for p in params])
            continuations = [text[row.num_prompt_tokens :] for text, row in zip(texts, rows, strict=True)]
            generated = [[(token, 1.0) for token in text] for text in continuations]
            batch.counts = _summed(generated, vocab_size, device)
        if any(p.logit_bias for p in params):
            batch.bias = _summed([p.biases for p in params], vocab_size, device)
        if any(p.min_tokens for p in params):
            left = [p.min_tokens - row.num_generated for p, row in zip(params, rows, strict=True)]
            batch.min_left = on_device(torch.tensor(left), device).unsqueeze(1)
            batch.ends = _marked([sorted(row.stop_token_ids) for row in rows], vocab_size, device)
        if any(p.bad_words_ids for p in params):
            batch.bad_words = BadWords.of([p.bad_words_ids for p in params], device)
            batch.history = on_device(_history(texts, longest), device)
        if any(p.suppress_tokens for p in params):
            suppressed = [[t for t in p.suppress_tokens if t < vocab_size] for p in params]
            batch.suppressed = _marked(suppressed, vocab_size, device)
        sizes = [min(p.no_repeat_ngram_size, _MAX_SIZE) for p in params]
        if any(sizes):
            batch.ngram_sizes = tuple(sorted(set(sizes) - {0}))
            batch.ngram_size = on_device(torch.tensor(sizes), device)
            batch.history = on_device(_history(texts, longest), device)
        is_drawn = [p.temperature > 0 for p in params]
        if not any(is_drawn):
            return batch
        batch.is_drawn = on_device(torch.tensor(is_drawn), device)
        batch.seeds = on_device(torch.tensor([as_int64(row.seed) for row in rows]), device)
        batch.num_generated = on_device(torch.tensor([row.num_generated for row in rows]), device)
        batch.temperature = column([p.temperature or 1 for p in params])
        top_k = [min(p.top_k, vocab_size) for p in params]
        if any(top_k):
            batch.top_k = on_device(torch.tensor(top_k), device).unsqueeze(1)
            batch.max_top_k = max(top_k)
        if any(p.top_p < 1 for p in params):
            batch.tail_mass = column([1 - p.top_p if p.top_p < 1 else -1 for p in params])
        if any(p.min_p > 0 for p in params):
            batch.min_p = column([p.min_p for p in params])
        return batch

    def penalise(self, scores: Tensor) -> Tensor:
        """Apply what greedy rows ask for, too, to scores, floating [n, vocab_size]."""
        if self.bias is not None:
            scores = scores.float() + self.bias
        if self.penalty is not None and self.seen is not None:
            scores = apply_repetition_penalty(scores.float(), self.seen, self.penalty)
        if self.counts is not None and self.presence is not None and self.frequency is not None:
            scores = scores.float() - self.counts * self.frequency - (self.counts > 0) * self.presence
        if self.history is not None and self.ngram_size is not None:
            for size in self.ngram_sizes:
                scores = ban_repeated(scores, self.history, self.ngram_size == size, size)
        if self.history is not None and self.bad_words is not None:
            scores = self.bad_words.ban(scores, self.history)
        if self.min_left is not None and self.ends is not None:
            scores = scores.masked_fill(self.ends & (self.min_left > 0), -math.inf)
        if self.suppressed is not None:
            scores = scores.masked_fill(self.suppressed, -math.inf)
        return scores

    def filter(self, scores: Tensor) -> Tensor:
        """Scores of the distribution from which tokens are drawn, float32 [n, vocab_size]."""
        scores = scores.float()
        if self.temperature is not None:
            scores = scores / self.temperature
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k, self.max_top_k)
        if self.tail_mass is not None:
            scores = keep_top_p(scores, self.tail_mass)
        if self.min_p is not None:
            scores = keep_min_p(scores, self.min_p)
        return scores


class Sampler:
    """Chooses one token a row; keeps the parameter tensors while the rows stay the same."""

    def __init__(self) -> None:
        self._rows: Sequence[SampledSequence] = []
        self._batch = BatchParams()

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[SampledSequence],
        bits: Tensor | None = None,
        num_generated: Tensor | None = None,
    ) -> Tensor:
        """Choose the next token of each row.

        Each call is for one token more of its rows; whether the last ones are known by then does not matter.

        Args:
            logits: floating [n, vocab_size]; not written.
            rows: the n sequences, as a list that the caller does not change afterwards.
            bits: which tokens may be chosen, as ``structure.new_bits`` makes them; None: all.
            num_generated: int64 [n], how many tokens each row has, if calls are for other numbers of them.

        Returns:
            int64 [n] on the device: token ids; -1 for a row that holds NaN or +inf, or only -inf.
        """
        scores = self.penalise(logits, rows, bits)
        batch = self._batch
        tokens = most_likely(scores)
        if batch.is_drawn is not None and batch.seeds is not None and batch.num_generated is not None:
            numbers = uniforms(batch.seeds, batch.num_generated if num_generated is None else num_generated)
            batch.num_generated += 1
            drawn = _draw(batch.filter(scores), numbers.unsqueeze(1))
            tokens = torch.where(batch.is_drawn & (tokens >= 0), drawn, tokens)
        self.note(tokens)
        return tokens

    def penalise(self, logits: Tensor, rows: Sequence[SampledSequence], bits: Tensor | None = None) -> Tensor:
        """The first half of ``sample``: the logits as ``BatchParams.penalise`` leaves them, and the bits."""
        if rows != self._rows:
            known = {id(row) for row in self._rows}
            batch = BatchParams.of(rows, logits.shape[1], logits.device, known)
            _carry_over(self._batch.seen, self._rows, batch.seen, rows)
            _carry_over(self._batch.counts, self._rows, batch.counts, rows)
            _carry_over(self._batch.history, self._rows, batch.history, rows)
            self._batch, self._rows = batch, rows
        scores = self._batch.penalise(logits)
        return scores if bits is None else mask_by_bits(scores, on_device(bits, logits.device))

    def note(self, tokens: Tensor) -> None:
        """The end of ``sample``: remember tokens, int64 [n], that were chosen; negative ones are none."""
        if self._batch.seen is not None:
            self._batch.seen.scatter_(1, tokens.clamp(min=0).unsqueeze(1), True)
        if self._batch.counts is not None:
            ones = (tokens >= 0).unsqueeze(1).float()
            self._batch.counts.scatter_add_(1, tokens.clamp(min=0).unsqueeze(1), ones)
        if self._batch.min_left is not None:
            self._batch.min_left -= 1
        if self._batch.history is not None:
            self._batch.history = torch.cat([self._batch.history, tokens.unsqueeze(1)], 1)


class BadWords(NamedTuple):
    """Runs of tokens that must not occur, of all rows."""

    rows: Tensor
    """int64 [w]."""
    before: Tensor
    """int64 [w, longest - 1]: all tokens of a run but the last, with -1 before the first."""
    last: Tensor
    """int64 [w]."""

    @classmethod
    def of(cls, words: Sequence[Sequence[Sequence[int]]], device: torch.device) -> BadWords:
        """Collect the runs of these rows."""
        pairs = [(row, run) for row, runs in enumerate(words) for run in runs]
        before = torch.full((len(pairs), max(len(run) for _, run in pairs) - 1), -1)
        for index, (_, run) in enumerate(pairs):
            before[index, before.shape[1] - len(run) + 1 :] = torch.tensor(run[:-1], dtype=torch.int64)
        rows, last = torch.tensor([[row, run[-1]] for row, run in pairs]).T
        return cls(*(on_device(each.contiguous(), device) for each in (rows, before, last)))

    def ban(self, scores: Tensor, history: Tensor) -> Tensor:
        """Set the scores of tokens that would end a run to -inf; shapes as in ``BatchParams``."""
        width, vocab_size = self.before.shape[1], scores.shape[1]
        newest = F.pad(history, (max(width - history.shape[1], 0), 0), value=-1)
        newest = newest[self.rows, newest.shape[1] - width :]
        is_next = ((self.before == -1) | (self.before == newest)).all(1)
        ends = self.last.where(is_next & (self.last < vocab_size), vocab_size)
        banned = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        banned.view(-1).index_fill_(0, self.rows * (vocab_size + 1) + ends, 1)
        return scores.masked_fill(banned[:, :-1], -math.inf)


class TokenLogprobs(NamedTuple):
    """How likely a token was, in the distribution of the model itself."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens and their log-probabilities, as many as were asked for."""

    def cut(self, num_top: int | None) -> TokenLogprobs:
        """The same with fewer of the most likely tokens."""
        return self._replace(top=self.top[:num_top])


class Logprobs:
    """Log-probabilities of some rows of logits.

    Args:
        logits: floating [n, vocab_size].
        tokens: int64 [n], on the same device; negative ones are none.
        num_top: how many of the most likely tokens are wanted.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, num_top: int) -> None:
        logprobs = logits.float().log_softmax(-1)
        own = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
        top, ids = logprobs.topk(min(num_top, logits.shape[1]))
        self.tensors = [tokens, own, top, ids]

    def read(self) -> list[TokenLogprobs]:
        """Of each row, once ``tensors`` are on the host."""
        tokens, own, top, ids = (tensor.tolist() for tensor in self.tensors)
        return [
            TokenLogprobs(token, logprob, list(zip(best, values, strict=True)))
            for token, logprob, values, best in zip(tokens, own, top, ids, strict=True)
        ]


def apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative scores of tokens that occurred.

    Args:
        scores: float32 [n, vocab_size].
        seen: bool [n, vocab_size].
        penalty: float32 [n, 1].
    """
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalised, scores)


def ban_repeated(scores: Tensor, history: Tensor, has_size: Tensor, size: int) -> Tensor:
    """Set the scores of tokens that would end a run of ``size`` tokens that occurred before to -inf.

    Args:
        scores: floating [n, vocab_size].
        history: int64 [n, longest]; see ``BatchParams.history``.
        has_size: bool [n]: the other rows are left as they are.
        size: at least 1.
    """
    if history.shape[1] < size:
        return scores
    runs = history.unfold(1, size, 1)
    last = history[:, history.shape[1] - size + 1 :].unsqueeze(1)
    repeats = (runs[..., :-1] == last).all(-1) & has_size.unsqueeze(1)
    vocab_size = scores.shape[1]
    ends = runs[..., -1].where(repeats & (runs[..., -1] >= 0), vocab_size)
    banned = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
    return scores.masked_fill(banned.scatter_(1, ends, True)[:, :-1], -math.inf)


def keep_top_k(scores: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """Set all scores below the k-th largest to -inf.

    Args:
        scores: float32 [n, vocab_size].
        top_k: int64 [n, 1]; 0 keeps all.
        max_top_k: the largest value in ``top_k``, at most vocab_size.
    """
    kth = scores.topk(max_top_k).values.gather(1, (top_k - 1).clamp(min=0))
    return scores.masked_fill((scores < kth) & (top_k > 0), -math.inf)


def keep_top_p(scores: Tensor, tail_mass: Tensor) -> Tensor:
    """Set the scores of the least likely tokens that together have this probability to -inf.

    Args:
        scores: float32 [n, vocab_size].
        tail_mass: float32 [n, 1], 1 - top_p; negative keeps all.
    """
    ascending, order = scores.sort(dim=-1)
    in_tail = ascending.softmax(-1).cumsum(-1) <= tail_mass
    in_tail[:, -1] = False
    return scores.masked_fill(in_tail.scatter(1, order, in_tail), -math.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Set the scores of tokens less likely than min_p times the most likely one to -inf.

    Args:
        scores: float32 [n, vocab_size].
        min_p: float32 [n, 1]; 0 keeps all.
    """
    probs = scores.softmax(-1)
    return scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)


def _draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [n]: where the cumulative distribution passes uniforms, float64 [n, 1] in [0, 1)."""
    # float64, so that a different order of summation in another batch size does not move a border.
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Strictly above: a token without probability is never the first to pass.
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).squeeze(1)


def uniforms(seeds: Tensor, indices: Tensor) -> Tensor:
    """Numbers in [0, 1) of 48 bits, so that their product with a float64 stays below that.

    The ``indices``-th outputs of generators whose states are hashes of ``seeds``.

    Args:
        seeds: int64 [n].
        indices: int64 [n], from 0.

    Returns:
        float64 [n].

    Source: SplitMix64 in Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = _mixed(seeds + _GAMMA)
    return ((_mixed(state + (indices + 1) * _GAMMA) >> 16) & (2**48 - 1)).double() / 2**48


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64; int64 wraps like uint64, and its right shift is made logical."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))


def as_int64(value: int) -> int:
    """Any integer, modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def most_likely(scores: Tensor) -> Tensor:
    """int64 [n]: the first largest score of each row of [n, vocab_size], -1 if it is not finite."""
    # The largest is NaN if any is: one value tells of NaN and infinity in the whole row.
    if scores.device.type == "cpu":
        # numpy's argmax is vectorised, torch's on a CPU is not: ten times slower at 32,000 tokens.
        values = scores.float().numpy()
        indices = values.argmax(-1)
        indices[~np.isfinite(values.max(-1))] = -1
        return torch.from_numpy(indices)
    tokens = scores.argmax(-1)
    best = scores.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.where(best.abs() < math.inf, -1)


def _marked(token_ids: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """bool [n, vocab_size]: the tokens of each row."""
    rows = [np.asarray(row, dtype=np.int64) + index * vocab_size for index, row in enumerate(token_ids)]
    places = on_device(torch.from_numpy(np.concatenate(rows)), device)
    marked = torch.zeros(len(rows) * vocab_size, dtype=torch.bool, device=device)
    return marked.index_fill_(0, places, 1).view(len(rows), vocab_size)


def _summed(values: Sequence[Sequence[tuple[int, float]]], vocab_size: int, device: torch.device) -> Tensor:
    """float32 [n, vocab_size]: the sum of what is given for each token of each row."""
    places = [index * vocab_size + token for index, row in enumerate(values) for token, _ in row]
    numbers = [number for row in values for _, number in row]
    summed = torch.zeros(len(values) * vocab_size, device=device)
    summed.index_add_(
        0,
        on_device(torch.tensor(places, dtype=torch.int64), device),
        on_device(torch.tensor(numbers, dtype=torch.float32), device),
    )
    return summed.view(len(values), vocab_size)


def _history(texts: Sequence[list[int]], longest: int) -> Tensor:
    """``BatchParams.history`` of these texts, with room for tokens that are not known yet."""
    history = torch.full((len(texts), longest), -1)
    for index, text in enumerate(texts):
        history[index, longest - len(text) :] = torch.tensor(text)
    return history


def _carry_over(
    old: Tensor | None,
    old_rows: Sequence[SampledSequence],
    new: Tensor | None,
    rows: Sequence[SampledSequence],
) -> None:
    """Take what is known of rows that stay from where tokens not known to the host have been noted.

    Of histories the newest columns are those that both have.
    """
    if old is None or new is None:
        return
    places = {id(row): index for index, row in enumerate(old_rows)}
    pairs = [(places[id(row)], index) for index, row in enumerate(rows) if id(row) in places]
    if pairs:
        sources, targets = (on_device(torch.tensor(side), new.device) for side in zip(*pairs, strict=True))
        width = min(old.shape[1], new.shape[1])
        new[targets, new.shape[1] - width :] = old[sources, old.shape[1] - width :]
