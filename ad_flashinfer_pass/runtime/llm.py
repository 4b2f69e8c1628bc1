"""Text generation: prompts in, results out, over the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.config import check_type
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.cached_model import CachedModel
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
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.values import as_token_ids, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The continuation of one prompt."""

    index: int
    """Position of the prompt among those given."""
    prompt: str | None
    """None if the prompt was given as token ids."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    """Generated tokens, the one that stopped generation included."""
    text: str | None
    """Without special tokens, stop strings and stop tokens; None without tokenizer."""
    finish_reason: FinishReason
    error: str | None
    """Why the prompt was refused or its generation failed; None if neither."""
    is_cut: bool = False
    """Whether max_seq_len ended it, short of max_new_tokens; finish_reason is ``length`` either way."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a call of ``generate`` stands."""

    num_finished: int
    num_total: int
    num_new_tokens: int
    pages_in_use: int
    num_pages: int
    num_preemptions: int


@dataclass(frozen=True)
class _Job:
    """One prompt of a call of ``generate``."""

    index: int
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
            is_cut=_is_cut(completion, self.params),
        )


@dataclass
class _Call:
    """One call of ``generate``."""

    num_total: int
    num_preemptions_before: int
    num_new_tokens: int = 0
    inbox: list[StepOutput] = field(default_factory=list)
    jobs: dict[int, _Job] = field(default_factory=dict)
    """What has not ended, by request id."""
    results: dict[int, GenerationResult] = field(default_factory=dict)
    """What has ended and was not yielded, by index."""

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

    Several iterators of ``generate`` and ``stream`` can be open at once, also in several threads: whichever
    is advanced steps the engine for all.

    Args:
        model: what the pass returns.
        tokenizer: None leaves token ids as the only prompts and results.
        eos_token_ids: tokens that end generation; default: those of the model's generation_config.json, as
            far as it is known, and of the tokenizer.
        reports: what each transform did to the graph.
        default_sampling: what holds for calls without ``sampling``; default: what the model's
            generation_config.json says, as transformers reads it. ``SamplingParams()`` leaves the file aside.
        prefill_chunk_tokens: see ``Engine``.
        steps_ahead: see ``Engine``.

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
    ) -> None:
        check_type("model", model, CachedModel)
        check_type("default_sampling", default_sampling, SamplingParams, NoneType)
        self.model = model
        self.tokenizer = tokenizer
        self.reports = tuple(reports)
        self.default_sampling = default_sampling or sampling_of(model.generation_config)
        """What holds for calls without ``sampling``."""
        if eos_token_ids is None:
            eos_token_ids = end_tokens(model.generation_config, tokenizer)
        self.engine = Engine(
            model,
            tokenizer,
            eos_token_ids,
            prefill_chunk_tokens=prefill_chunk_tokens,
            steps_ahead=steps_ahead,
        )
        self._inboxes: dict[int, list[StepOutput]] = {}

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[GenerationResult]:
        """Continue prompts, in one batch as far as pages allow.

        Nothing runs until the iterator is advanced. Closing it, or an exception in the middle
        (Ctrl-C), cancels what is left.

        Args:
            prompts: one text or list of token ids, or a sequence of those. Text is encoded with the
                tokenizer's special tokens.
            max_new_tokens: overrides that of ``sampling``.
            sampling: for all prompts, or one for each; taken whole, as it is. Default: ``default_sampling``.
            on_progress: called after each step.

        Yields:
            A result for each prompt, in their order, each as soon as it and those before it are
            ready. A prompt that is refused or fails gives one with ``error``; the others go on.

        Raises:
            RequestError: ``sampling`` has another length than ``prompts``, max_new_tokens is not positive, or
                an argument is of a wrong type.
        """
        prompt_list = _as_list(prompts)
        params = self._params_of_each(len(prompt_list), sampling, max_new_tokens)
        if on_progress is not None and not callable(on_progress):
            raise RequestError(f"on_progress must be a function, got {on_progress!r:.80}.")
        return self._generate(prompt_list, params, on_progress)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
    ) -> Iterator[str]:
        """Continue one prompt, piece by piece.

        Args:
            prompt: as in ``generate``.
            max_new_tokens: overrides that of ``sampling``.
            sampling: taken whole, as it is. Default: ``default_sampling``.

        Yields:
            Pieces of text, none of them empty, none with a part of a character or of a stop string.

        Raises:
            RequestError: on the first advance, if the request is refused; later, if it fails.
        """
        (params,) = self._params_of_each(1, sampling, max_new_tokens)
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
            RequestError: the prompt is neither text nor token ids, or it is text and there is no
                tokenizer, or that fails.
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

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[GenerationResult]:
        call = _Call(len(prompts), self.engine.metrics.num_preemptions)
        num_cut = 0
        try:
            for index, prompt in enumerate(prompts):
                self._submit(call, index, prompt, params[index])
            for index in range(len(prompts)):
                while index not in call.results:
                    self._advance(call)
                    if on_progress is not None:
                        on_progress(call.progress(self.engine.metrics))
                num_cut += call.results[index].is_cut
                yield call.results.pop(index)
            self._warn_of_cut(num_cut, len(prompts))
        finally:
            with ExitStack() as stack:  # which closes all, whatever happens at one
                for request_id in call.jobs:
                    stack.callback(self._close, request_id)

    def _submit(self, call: _Call, index: int, prompt: Prompt, params: SamplingParams) -> None:
        """Open a request for a prompt; a refusal is its result."""
        job = _Job(index, prompt if isinstance(prompt, str) else None, [], params)
        try:
            job = replace(job, token_ids=self.encode(prompt))
            call.jobs[self._open(job.token_ids, params, call.inbox)] = job
        except RequestError as err:
            call.results[index] = job.result(Completion([], None, "error", str(err)))

    def _advance(self, call: _Call) -> None:
        """Take in what a step brought."""
        for output in self._next_outputs(call.inbox):
            call.num_new_tokens += output.token_id is not None
            if output.completion is not None:
                job = call.jobs.pop(output.request_id)
                self._close(output.request_id)
                call.results[job.index] = job.result(output.completion)

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
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        max_new_tokens: int | None,
    ) -> list[SamplingParams]:
        if sampling is None:
            sampling = self.default_sampling
        if isinstance(sampling, SamplingParams):
            params = [sampling] * num_prompts
        else:
            params = list(sampling) if isinstance(sampling, Iterable) else []
            if not isinstance(sampling, Iterable) or not all(isinstance(p, SamplingParams) for p in params):
                raise RequestError(f"sampling must be SamplingParams, one or several, got {sampling!r:.80}.")
        if len(params) != num_prompts:
            raise RequestError(
                f"sampling must be one SamplingParams or one for each of the {num_prompts} prompts, "
                f"got {len(params)}."
            )
        if max_new_tokens is None:
            return params
        return [replace(p, max_new_tokens=max_new_tokens) for p in params]

    def _warn_of_cut(self, num_cut: int, num_texts: int) -> None:
        if num_cut:
            logger.warning(
                "%d of %d texts ended at max_seq_len=%d, short of max_new_tokens; raise max_seq_len "
                "(--max-seq-len) for longer ones.",
                num_cut,
                num_texts,
                self.model.sequence_info.max_seq_len,
            )


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
