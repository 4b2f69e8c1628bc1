"""Positions: several sequences packed in one row, and rows that do not start at 0, against transformers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures

LENGTHS = (13, 5, 17)
PAGES = ([1, 2], [3], [4, 5])


@cache
def model_of(name: str) -> nn.Module:
    return architectures.random_model(architectures.CONFIGS[name](num_layers=2))


def cached_model(name: str) -> CachedModel:
    config = AutoDeployConfig(
        max_batch_size=4,
        max_seq_len=128,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16),
    )
    return transform_module(model_of(name), config)[0]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_packed_sequences_are_those_of_transformers(name: str) -> None:
    """A row in which positions begin again is for transformers what a ragged step is here: same logits."""
    model, prompts = model_of(name), architectures.random_prompts(LENGTHS, vocab_size=128)
    row = torch.tensor([[token for prompt in prompts for token in prompt]])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with torch.no_grad():
        packed = model(input_ids=row, position_ids=positions, use_cache=False).logits[0]

    steps = [SequenceStep(prompt, 0, pages) for prompt, pages in zip(prompts, PAGES, strict=True)]
    found = cached_model(name).step(steps)

    assert_close(found, packed[torch.tensor(LENGTHS).cumsum(0) - 1])


@pytest.mark.parametrize(("name", "start"), [("qwen3", 9), ("mistral", 30), ("gemma3_text", 5)])
def test_positions_that_do_not_start_at_0(name: str, start: int) -> None:
    """Positions are the model's matter, pages count tokens: prefill in chunks and decode."""
    model, cached = model_of(name), cached_model(name)
    (prompt,) = architectures.random_prompts((20,), vocab_size=128)
    positions = torch.arange(start, start + 20)
    with torch.no_grad():
        dense = model(input_ids=torch.tensor([prompt]), position_ids=positions[None], use_cache=False).logits[
            0
        ]

    for first, last in [(0, 13), (13, 18), (18, 19), (19, 20)]:
        step = SequenceStep(prompt[first:last], first, [2, 3])
        found = cached.step_with([step], position_ids=positions[first:last])
        assert_close(found[0], dense[last - 1])
