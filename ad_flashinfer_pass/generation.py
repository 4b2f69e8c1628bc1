"""What the sub-commands do, once their options are read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ad_flashinfer_pass.output import OutputFile, Stdout, as_json, as_text
from ad_flashinfer_pass.progress import Reporter
from ad_flashinfer_pass.prompts import GivenPrompt, model_inputs

if TYPE_CHECKING:
    from ad_flashinfer_pass.config import AutoDeployConfig
    from ad_flashinfer_pass.runtime.llm import LLM
    from ad_flashinfer_pass.runtime.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate and how to show it."""

    prompts: list[GivenPrompt]
    chat: bool
    """Put text prompts into the chat template."""
    system: str | None
    sampling: SamplingParams
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
        reporter.generating()
        is_shown_as_it_comes = len(inputs) == 1 and not job.json_lines and llm.tokenizer is not None
        if is_shown_as_it_comes and isinstance(out, Stdout) and sys.stdout.isatty():
            _stream(job, llm, inputs[0], out, reporter)
            return 0
        return _generate(job, llm, inputs, out, reporter)


def _stream(job: Job, llm: LLM, model_input: str | list[int], out: Stdout, reporter: Reporter) -> None:
    """Write one continuation to the terminal as it comes, after the text that it continues."""
    if isinstance(model_input, str):
        out.write(model_input)
    try:
        for piece in llm.stream(model_input, sampling=job.sampling):
            out.write(piece)
    finally:
        out.write("\n")
    _report_end(llm, reporter)


def _generate(
    job: Job,
    llm: LLM,
    inputs: list[str | list[int]],
    out: Stdout | OutputFile,
    reporter: Reporter,
) -> int:
    encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
    ascii_only = isinstance(out, Stdout) and encoding != "utf8"
    num_done = num_refused = 0
    try:
        for result in llm.generate(inputs, sampling=job.sampling, on_progress=reporter.step):
            prompt = job.prompts[result.index]
            if job.json_lines:
                out.write(as_json(result, prompt, ascii_only=ascii_only))
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


def _report_end(llm: LLM, reporter: Reporter) -> None:
    metrics = llm.engine.metrics
    reporter.done(metrics.num_generated_tokens, metrics.num_pages, metrics.num_preemptions)
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
