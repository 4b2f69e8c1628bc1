"""What the sub-commands do, once their options are read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.cli.output import Stdout, as_json, as_text
from ad_flashinfer_pass.cli.progress import Reporter
from ad_flashinfer_pass.cli.prompts import GivenPrompt, model_inputs
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.files import OutputFile

if TYPE_CHECKING:
    from ad_flashinfer_pass.config import AutoDeployConfig
    from ad_flashinfer_pass.runtime.llm import LLM, GenerationResult
    from ad_flashinfer_pass.runtime.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate and how to show it."""

    prompts: list[GivenPrompt]
    chat: bool
    """Put text prompts into the chat template."""
    system: str | None
    sampling: Mapping[str, Any]
    """Fields of SamplingParams that were given; for the others what the model's file says."""
    json_lines: bool


def run(job: Job, config: AutoDeployConfig, out: Stdout | OutputFile, reporter: Reporter, debug: bool) -> int:
    """Make the model, generate, and write a result for each prompt.

    Args:
        job: the prompts.
        config: the model.
        out: where results go. A file is kept if at least one prompt has a continuation.
        reporter: told about each step.
        debug: leave the libraries' logs and warnings on.

    Returns:
        How many prompts were refused or failed.
    """
    reporter.phase("load_libraries")
    with libraries_quiet(not debug):
        from ad_flashinfer_pass import build

        llm = build.build_model(config, on_event=reporter.phase)
        inputs = model_inputs(job.prompts, llm.tokenizer, chat=job.chat, system=job.system)
        sampling = replace(llm.default_sampling, **job.sampling)
        reporter.ready(config.device)
        is_shown_as_it_comes = len(inputs) == 1 and not job.json_lines and llm.tokenizer is not None
        if is_shown_as_it_comes and isinstance(out, Stdout) and sys.stdout.isatty():
            _stream(llm, inputs[0], sampling, out, reporter)
            return 0
        return _generate(job, llm, inputs, sampling, out, reporter)


def _stream(
    llm: LLM,
    model_input: str | list[int] | RequestError,
    sampling: SamplingParams,
    out: Stdout,
    reporter: Reporter,
) -> None:
    """Write one continuation to the terminal as it comes, after the text that it continues."""
    assert not isinstance(model_input, RequestError), "of one prompt that is refused nothing is left"
    if isinstance(model_input, str):
        out.write(model_input)
    try:
        for piece in llm.stream(model_input, sampling):
            out.write(piece)
    finally:
        out.write("\n")
    _report_end(llm, reporter)


def _generate(
    job: Job,
    llm: LLM,
    inputs: Sequence[str | list[int] | RequestError],
    sampling: SamplingParams,
    out: Stdout | OutputFile,
    reporter: Reporter,
) -> int:
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    ascii_only = isinstance(out, Stdout) and encoding != "utf8"
    num_done = num_refused = 0
    try:
        for result in _results(llm, inputs, sampling, reporter):
            prompt = job.prompts[result.index]
            if job.json_lines:
                # Half a character, for which a prompt was refused, can be escaped and nothing else.
                is_refused = result.error is not None
                out.write(as_json(result, prompt, ascii_only=ascii_only or is_refused))
            else:
                out.write(as_text(result, prompt, len(inputs)))
            num_done += 1
            if result.error is not None:
                num_refused += 1
                reporter.refused(prompt.where, result.error)
    except KeyboardInterrupt:
        partial = out.keep_partial() if num_done > num_refused else None
        where = f", kept in {partial}" if partial else ""
        raise KeyboardInterrupt(f"{num_done} of {len(inputs)} prompts done{where}") from None
    if num_done > num_refused:
        out.keep()
    _report_end(llm, reporter)
    return num_refused


def _results(
    llm: LLM,
    inputs: Sequence[str | list[int] | RequestError],
    sampling: SamplingParams,
    reporter: Reporter,
) -> Iterator[GenerationResult]:
    """A result for each input, in order; one that is refused already goes to no model."""
    from ad_flashinfer_pass.runtime.llm import GenerationResult

    taken = [given for given in inputs if not isinstance(given, RequestError)]
    results = llm.generate_iter(taken, sampling, on_progress=reporter.step)
    for index, given in enumerate(inputs):
        if not isinstance(given, RequestError):
            yield replace(next(results), index=index)
            continue
        yield GenerationResult(
            index=index,
            prompt=None,
            prompt_token_ids=[],
            token_ids=[],
            text=None,
            finish_reason="error",
            error=str(given),
        )
    next(results, None)  # at its end it says what there is to say of all


def _report_end(llm: LLM, reporter: Reporter) -> None:
    metrics = llm.engine.metrics
    reporter.done(metrics.num_generated_tokens, metrics.num_pages, metrics.num_preemptions)
    if (drafts := metrics.drafts) is not None:
        reporter.line(f"drafts: {drafts}")
    for reason, count in metrics.eager_steps.items():
        reporter.line(f"{count} steps ran without a CUDA graph: {reason}")


@contextmanager
def libraries_quiet(quiet: bool) -> Iterator[None]:
    """No warnings and logs of torch and transformers: what a user must know, this package says."""
    if not quiet:
        yield
        return
    from transformers.utils import logging as hf_logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_logging.set_verbosity_error()
        yield
