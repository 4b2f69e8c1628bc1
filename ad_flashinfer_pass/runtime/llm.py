"""Text generation: prompts in, results out, over the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from ad_flashinfer_pass.collector import new_objects_alone
from ad_flashinfer_pass.config import check_type, nearest
from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.chat import Messages, apply_template, require_template
from ad_flashinfer_pass.runtime.engine import (
    Completion,
    Engine,
    FinishReason,
    Metrics,
    StepOutput,
)
from ad_flashinfer_pass.runtime.foreign import foreign_code
from ad_flashinfer_pass.runtime.generation_config import default_sampling as sampling_of
from ad_flashinfer_pass.runtime.generation_config import end_tokens
from ad_flashinfer_pass.runtime.sampling import SamplingKeywords, SamplingParams, TokenLogprobs
from ad_flashinfer_pass.runtime.values import as_token_ids, plain

if TYPE_CHECKING:
    # Not from transformers itself, for which pyright reads the modules of all models, half a minute long.
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
_Given = TypeVar("_Given")
"""A prompt or a chat: what an ``encode`` takes."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The continuation of one prompt."""

    index: int
    """Position of the prompt among those given."""
    prompt: str | None
    """None if the prompt was given as token ids or as messages."""
    prompt_token_ids: list[int]
    """Empty if the prompt could not be read."""
    token_ids: list[int]
    """Generated tokens, the one that stopped generation included."""
    text: str | None
    """Without special tokens, stop strings and stop tokens; None without tokenizer."""
    finish_reason: FinishReason
    """``stop`` (an end token or stop string), ``length``, ``error`` or ``cancelled``."""
    error: str | None
    """Why the prompt was refused or its generation failed; None if neither."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were not computed, because K and V of the same beginning were in pages."""
    logprobs: list[TokenLogprobs] | None = None
    """Of ``token_ids``, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Of ``prompt_token_ids``, if they were asked for; None for the first."""
    is_cut: bool = False
    """Whether max_seq_len ended it before max_new_tokens; ``finish_reason`` is ``length`` in both cases."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a call of ``generate``, ``generate_iter`` or ``chat`` stands."""

    num_finished: int
    """Prompts that ended, failed or were refused."""
    num_total: int
    """Prompts of the call."""
    num_new_tokens: int
    """Generated tokens of all prompts."""
    pages_in_use: int
    """Pages of the cache that sequences have, those of other calls included."""
    num_pages: int
    num_preemptions: int
    """How often, during the call, a sequence lost its pages and was computed anew."""


@dataclass(frozen=True)
class _Job:
    """One continuation of a prompt."""

    index: int
    """Position of the prompt among those of the call."""
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams

    def result(self, completion: Completion) -> GenerationResult:
        return GenerationResult(
            index=self.index,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            token_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
            error=completion.error,
            num_cached_tokens=completion.num_cached_tokens,
            logprobs=completion.logprobs,
            prompt_logprobs=completion.prompt_logprobs,
            is_cut=_is_cut(completion, self.params),
        )


@dataclass
class _Call:
    """One call of ``generate``, ``generate_iter`` or ``chat``."""

    num_total: int
    num_preemptions_before: int
    num_new_tokens: int = 0
    inbox: list[StepOutput] = field(default_factory=list)
    jobs: dict[int, tuple[int, _Job]] = field(default_factory=dict)
    """What has not ended, with its place among the results, by request id."""
    results: dict[int, GenerationResult] = field(default_factory=dict)
    """What has ended and was not yielded, by place."""

    def progress(self, metrics: Metrics) -> Progress:
        return Progress(
            num_finished=self.num_total - len(self.jobs),
            num_total=self.num_total,
            num_new_tokens=self.num_new_tokens,
            pages_in_use=metrics.pages_in_use,
            num_pages=metrics.num_pages,
            num_preemptions=metrics.num_preemptions - self.num_preemptions_before,
        )


class LLM:
    """A model with its tokenizer, ready to generate.

    Several calls and iterators (``generate_iter``, ``stream``) may be open at once, in one thread or in
    several. Whichever of them advances runs the next step for all.

    Args:
        model: what the pass returns.
        tokenizer: without one (None), prompts and results are token ids only.
        eos_token_ids: tokens that end generation. Default: those that the model's generation_config.json, if
            there is one, and the tokenizer name.
        reports: what each transform did to the graph.
        default_sampling: for calls without ``sampling_params``. Default: what the model's
            generation_config.json says, as transformers reads it; give ``SamplingParams()`` to ignore the
            file.
        prefill_chunk_tokens: see ``Engine``.
        steps_ahead: see ``Engine``.
        enable_block_reuse: see ``Engine``.

    Raises:
        LoadError: the model's generation_config.json asks for what is not supported.
        ConfigError: see ``Engine``, or an argument is of a wrong type.
    """

    def __init__(
        self,
        model: CachedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos_token_ids: Sequence[int] | None = None,
        reports: Sequence[Any] = (),
        *,
        default_sampling: SamplingParams | None = None,
        prefill_chunk_tokens: int | None = None,
        steps_ahead: int = 0,
        enable_block_reuse: bool = True,
    ) -> None:
        if isinstance(model, str | PathLike):
            raise ConfigError(
                f"model must be CachedModel, got {str(model)!r:.80}; "
                "build_model(AutoDeployConfig(model=...)) makes an LLM from a checkpoint."
            )
        check_type("model", model, CachedModel)
        check_type("default_sampling", default_sampling, SamplingParams, NoneType)
        self.model = model
        self.tokenizer = tokenizer
        self.reports = tuple(reports)
        self.default_sampling = default_sampling or sampling_of(model.generation_config)
        """What holds for calls without ``sampling_params``."""
        if eos_token_ids is None:
            eos_token_ids = end_tokens(model.generation_config, tokenizer)
        self.engine = Engine(
            model,
            tokenizer,
            eos_token_ids,
            prefill_chunk_tokens=prefill_chunk_tokens,
            steps_ahead=steps_ahead,
            enable_block_reuse=enable_block_reuse,
        )
        self._inboxes: dict[int, list[StepOutput]] = {}

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> list[GenerationResult]:
        """Continue prompts, in one batch as far as the pages of the cache allow.

        An exception on the way, such as Ctrl-C, cancels the prompts that are not finished.

        Args:
            prompts: one text, one list of token ids, or a sequence of them. The tokenizer adds its special
                tokens to a text.
            sampling_params: for all prompts, or one for each. Default: ``default_sampling``.
            on_progress: called after each step.
            keywords: fields of ``SamplingParams``, such as ``max_new_tokens=64``, which override those of
                ``sampling_params``.

        Returns:
            One result for each prompt, or as many as ``n`` says, in the order of the prompts. If a prompt is
            refused or fails, its result has ``error``, and no text if it was refused; the other prompts are
            not affected.

        Raises:
            RequestError: ``sampling_params`` and ``prompts`` differ in length, a keyword is unknown or its
                value is out of range, or an argument has a wrong type. Nothing has run then.
        """
        return list(self.generate_iter(prompts, sampling_params, on_progress=on_progress, **keywords))

    def generate_iter(
        self,
        prompts: str | Sequence[int] | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Generator[GenerationResult, None, None]:
        """Like ``generate``, but lazy: nothing runs until the iterator advances; closing it cancels the rest.

        Yields:
            Results in the order of the prompts, each as soon as it and those before it are ready.

        Raises:
            RequestError: as for ``generate``, at the call, before the iterator advances.
        """
        return self._generate(_as_list(prompts), self.encode, sampling_params, on_progress, keywords)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> list[GenerationResult]:
        """Answer chats, by the tokenizer's chat template. To stream one: ``stream(encode_chat(messages))``.

        Args:
            messages: one chat, such as ``[{"role": "user", "content": "Hello"}]``, or a list of chats.
            sampling_params: as in ``generate``, one for each chat.
            on_progress: as in ``generate``.
            keywords: as in ``generate``.

        Returns:
            One result for each chat, in the order of the chats. If a chat is not a list of messages, or the
            template refuses it, its result has ``error``; the other chats are not affected.

        Raises:
            RequestError: as for ``generate``, or the model has no chat template.
        """
        require_template(self.tokenizer)
        chats = _as_chats(messages)
        return list(self._generate(chats, self.encode_chat, sampling_params, on_progress, keywords))

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **keywords: Unpack[SamplingKeywords],
    ) -> Generator[str, None, None]:
        """Continue one prompt, piece by piece; closing the iterator cancels it.

        Args:
            prompt: as in ``generate``.
            sampling_params: default: ``default_sampling``.
            keywords: as in ``generate``.

        Yields:
            Pieces of text. None is empty, and none contains a part of a character or of a stop string.

        Raises:
            RequestError: on the first advance, if the request is refused; later, if it fails.
        """
        (params,) = self._params_of_each(1, sampling_params, keywords)
        inbox: list[StepOutput] = []
        request_id = self._open(self.encode(prompt), params, inbox, stream=True)
        try:
            while True:
                for output in self._next_outputs(inbox):
                    if output.text:
                        yield output.text
                    if output.completion is not None:
                        if output.completion.error is not None:
                            raise RequestError(output.completion.error)
                        self._warn_of_cut(int(_is_cut(output.completion, params)), 1)
                        return
        finally:
            self._close(request_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
            RequestError: the prompt is neither text nor token ids; it is text and there is no tokenizer; or
                the tokenizer fails.
        """
        if not isinstance(prompt, str):
            with foreign_code("this prompt cannot be read"):  # of a class that raises, or a tensor on meta
                return as_token_ids(prompt)
        if self.tokenizer is None:
            raise RequestError("a prompt given as text needs a tokenizer. Give token ids.")
        # A tokenizer is not made for several threads either.
        with self.engine.turns, foreign_code("the tokenizer cannot encode this prompt"):
            prompt.encode()  # of half a character tokenizers say less
            return list(self.tokenizer(prompt)["input_ids"])

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of a chat, up to where the answer begins, by the tokenizer's chat template.

        Raises:
            RequestError: there is no template, these are not messages, or the template refuses them.
        """
        with self.engine.turns, foreign_code("these messages cannot be read"):
            return apply_template(messages, self.tokenizer)

    def _generate(
        self,
        prompts: Sequence[_Given],
        encode: Callable[[_Given], list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        on_progress: Callable[[Progress], None] | None,
        keywords: SamplingKeywords,
    ) -> Generator[GenerationResult, None, None]:
        """What is wrong with the arguments is raised at once; the rest waits for the first advance."""
        given = self._params_of_each(len(prompts), sampling_params, keywords)
        places = [index for index, p in enumerate(given) for _ in range(p.n)]
        params = [each for p in given for each in _of_each_continuation(p)]
        if on_progress is not None and not callable(on_progress):
            raise RequestError(f"on_progress must be a function, got {on_progress!r:.80}.")
        return self._results(prompts, places, encode, params, on_progress)

    def _results(
        self,
        prompts: Sequence[_Given],
        places: Sequence[int],
        encode: Callable[[_Given], list[int]],
        params: Sequence[SamplingParams],
        on_progress: Callable[[Progress], None] | None,
    ) -> Generator[GenerationResult, None, None]:
        """Of the prompt at each of ``places``."""
        call = _Call(len(places), self.engine.metrics.num_preemptions)
        num_cut = 0
        try:
            with new_objects_alone():
                for order, index in enumerate(places):
                    self._submit(call, order, index, prompts[index], encode, params[order])
                for index in range(len(places)):
                    while index not in call.results:
                        self._advance(call)
                        if on_progress is not None:
                            on_progress(call.progress(self.engine.metrics))
                    num_cut += call.results[index].is_cut
                    yield call.results.pop(index)
            self._warn_of_cut(num_cut, len(places))
        finally:
            with ExitStack() as stack:  # which closes all, whatever happens at one
                for request_id in call.jobs:
                    stack.callback(self._close, request_id)

    def _submit(
        self,
        call: _Call,
        order: int,
        index: int,
        prompt: _Given,
        encode: Callable[[_Given], list[int]],
        params: SamplingParams,
    ) -> None:
        """Open a request for a prompt; a refusal is its result."""
        job = _Job(index, prompt if isinstance(prompt, str) else None, [], params)
        try:
            job = replace(job, token_ids=encode(prompt))
            call.jobs[self._open(job.token_ids, params, call.inbox)] = (order, job)
        except RequestError as err:
            call.results[order] = job.result(Completion([], None, "error", str(err)))

    def _advance(self, call: _Call) -> None:
        """Take in what a step brought."""
        for output in self._next_outputs(call.inbox):
            call.num_new_tokens += output.token_id is not None
            if output.completion is not None:
                order, job = call.jobs.pop(output.request_id)
                self._close(output.request_id)
                call.results[order] = job.result(output.completion)

    def _open(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        inbox: list[StepOutput],
        stream: bool = False,
    ) -> int:
        """Add a request whose outputs go to ``inbox``."""
        with self.engine.turns:
            request_id = self.engine.add_request(token_ids, params, stream=stream)
            self._inboxes[request_id] = inbox
            return request_id

    def _close(self, request_id: int) -> None:
        """Stop listening to a request, and cancel it if it has not ended."""
        with self.engine.turns:
            self._inboxes.pop(request_id, None)
            self.engine.cancel(request_id)

    def _next_outputs(self, inbox: list[StepOutput]) -> list[StepOutput]:
        """What came for this inbox, after a step of the engine if nothing had."""
        with self.engine.turns:
            if not inbox:
                assert self.engine.has_work, "outputs were taken by another caller of engine.step()"
                for output in self.engine.step():
                    if output.request_id in self._inboxes:
                        self._inboxes[output.request_id].append(output)
            outputs = inbox[:]
            inbox.clear()
            return outputs

    def _params_of_each(
        self,
        num_prompts: int,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        keywords: SamplingKeywords,
    ) -> list[SamplingParams]:
        given = self.default_sampling if sampling_params is None else sampling_params
        if isinstance(given, SamplingParams):
            params = [given] * num_prompts
        else:
            params = list(given) if isinstance(given, Iterable) else []
            if not isinstance(given, Iterable) or not all(isinstance(p, SamplingParams) for p in params):
                raise RequestError(
                    f"sampling_params must be SamplingParams, one or several, got {given!r:.80}."
                )
        if len(params) != num_prompts:
            raise RequestError(
                f"sampling_params must be one SamplingParams or one for each of the {num_prompts} prompts, "
                f"got {len(params)}."
            )
        known = ["sampling_params", *(each.name for each in fields(SamplingParams))]
        for name in keywords:
            if name not in known[1:]:
                raise RequestError(f"unknown keyword {name!r}; {nearest(name, known)}")
        return [replace(p, **keywords) for p in params] if keywords else params

    def _warn_of_cut(self, num_cut: int, num_texts: int) -> None:
        if num_cut:
            logger.warning(
                "%d of %d texts ended at max_seq_len=%d, short of max_new_tokens; raise max_seq_len "
                "(--max-seq-len) for longer ones.",
                num_cut,
                num_texts,
                self.model.sequence_info.max_seq_len,
            )


def _of_each_continuation(params: SamplingParams) -> list[SamplingParams]:
    seeds = [None if params.seed is None else params.seed + i for i in range(params.n)]
    return [params] if params.n == 1 else [replace(params, n=1, seed=seed) for seed in seeds]


def _is_cut(completion: Completion, params: SamplingParams) -> bool:
    return completion.finish_reason == "length" and len(completion.token_ids) < params.max_new_tokens


def _as_list(prompts: str | Sequence[int] | Sequence[Prompt]) -> list[Prompt]:
    """One prompt a place; what is in it is looked at later.

    Raises:
        RequestError: it is neither a prompt nor a collection of prompts.
    """
    if isinstance(prompts, str):
        return [prompts]
    items: Any = plain(prompts)
    if not isinstance(items, Iterable) or isinstance(items, bytes | bytearray | Mapping):
        raise RequestError(f"prompts must be texts or token ids, one or several, got {prompts!r:.80}.")
    items = list(items)
    # Token ids have no length; of prompts at least one has.
    is_one_prompt = bool(items) and not any(hasattr(item, "__len__") for item in items)
    return [items] if is_one_prompt else items


def _as_chats(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """One chat a place; what is in it is looked at later.

    Raises:
        RequestError: it is no list.
    """
    items: Any = messages
    if not isinstance(items, list | tuple):
        raise RequestError(f"messages must be a list of messages, or of such lists, got {messages!r:.80}.")
    return [items] if items and isinstance(items[0], Mapping) else list(items)
