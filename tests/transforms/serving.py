"""Drives a transformed model through pages, in every kind of step, against the dense model."""

from __future__ import annotations

import torch
from torch import nn

from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.transforms.small_models import context, tokens

PAGE = 5
# Each step: (sequence, tokens before, tokens after, whether logits are asked for).
STEPS = (
    ((0, 0, 5, True),),  # prefill to the edge of a page
    ((1, 0, 3, False), (0, 5, 6, True)),  # a chunk of a prompt beside a decode
    ((1, 3, 9, True), (0, 6, 7, True)),  # the rest of it: extend over a page
    ((2, 0, 6, True), (0, 7, 12, True), (1, 9, 10, True)),  # prefill, extend and decode
    ((0, 12, 13, True), (1, 10, 11, True), (2, 6, 7, True)),  # decode alone
    ((0, 13, 14, True), (1, 11, 12, True), (2, 7, 8, True)),
)
# Pages of the sequences alternate, and are not in order.
PAGES = ((2, 6, 1), (5, 3, 7), (8, 4, 9))


def cached(model: nn.Module) -> CachedModel:
    """The model after the whole pass."""
    return transform_module(model, context().config)[0]


def assert_serves_like(cached_model: CachedModel, model: nn.Module, tolerance: float = 1e-4) -> None:
    """Every step gives the logits of the dense model's last tokens, whatever else is in the batch.

    The default tolerance is a few times what float32 sums in another order differ by.
    """
    prompts = [tokens(1, max(row[2] for step in STEPS for row in step if row[0] == i), i) for i in range(3)]
    dense = [model(ids, positions)[0] for ids, positions in prompts]
    for index, step in enumerate(STEPS):
        sequences = [
            SequenceStep(
                prompts[i][0][0, start:end].tolist(), start, PAGES[i][: -(-end // PAGE)], gather, slot=3 - i
            )
            for i, start, end, gather in step
        ]
        wanted = torch.stack([dense[i][end - 1] for i, _, end, gather in step if gather])
        torch.testing.assert_close(
            cached_model.step(sequences),
            wanted,
            atol=tolerance,
            rtol=tolerance,
            msg=f"step {index}: {{}}".format,
        )
