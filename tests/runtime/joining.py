"""Requests that join while others decode, with chunks of prompts: what tests of drafts compare."""

from __future__ import annotations

from collections.abc import Sequence

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams


def run_joining(
    model: CachedModel,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    steps_ahead: int,
    *,
    enable_block_reuse: bool = True,
) -> tuple[list[list[int]], Engine]:
    """The tokens of each; two at once, then one every second step, in chunks of 7."""
    engine = Engine(
        model, steps_ahead=steps_ahead, prefill_chunk_tokens=7, enable_block_reuse=enable_block_reuse
    )
    found: dict[int, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                found[output.request_id] = output.completion.token_ids

    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, params)
        for _ in range(2 if index else 0):
            step()
    while engine.has_work:
        step()
    assert engine.metrics.pages_in_use == 0
    return [found[i] for i in range(len(prompts))], engine
