"""Text stacks of vision-language models: tokens as numbers, and as vectors with positions of their own."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import ExportError
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures

# Where the language model is, and its head.
FAMILIES = ("llava", "gemma3", "qwen2_5_vl")
PROMPTS = architectures.prompts_with_one_end((14, 14, 5), vocab_size=100)
HIDDEN = 64


@cache
def model_of(family: str) -> nn.Module:
    config = architectures.small_vision_config(family)
    return architectures.random_model(config, auto=transformers.AutoModelForImageTextToText)


def cached_model(module: nn.Module) -> CachedModel:
    config = AutoDeployConfig(
        max_batch_size=4,
        max_seq_len=64,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=16),
    )
    return transform_module(module, config)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_continued_as_by_transformers(family: str) -> None:
    """The whole model, called with tokens alone, embeds them itself."""
    model = model_of(family)

    found = architectures.generated_by_engine(cached_model(model), PROMPTS, 16, prefill_chunk_tokens=6)

    expected = architectures.generated_by_transformers(model, PROMPTS, 16)
    assert found == expected
    assert expected[0] != expected[1]  # only attention tells these two apart


class TextStack(nn.Module):
    """What stands after the vision tower: vectors in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config.get_text_config()
        self.stack, self.head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s, vocab]."""
        out = self.stack(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False)
        logits: Tensor = self.head(out.last_hidden_state)
        return logits


def vectors(num_tokens: int, seed: int) -> Tensor:
    """As an image's: no token has them."""
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def check_steps(cached: CachedModel, stack: nn.Module, positions: list[Tensor]) -> None:
    """Two sequences in chunks and decodes, each against the dense stack on it alone.

    Args:
        cached: the model after the pass.
        stack: the model before.
        positions: of each sequence, [tokens] or [n, tokens].
    """
    lengths = [p.shape[-1] for p in positions]
    embeds = [vectors(n, seed) for seed, n in enumerate(lengths)]
    with torch.no_grad():
        dense = [stack(e[None], p[..., None, :])[0] for e, p in zip(embeds, positions, strict=True)]
    pages = [[1, 2], [3, 4]]
    steps: list[list[tuple[int, int]]] = [[(0, 7), (0, 11)], [(7, 9), (11, 13)]]
    steps += [[(9 + i, 10 + i), (13 + i, 14 + i)] for i in range(min(lengths[0] - 9, lengths[1] - 13))]
    for step in steps:
        sequences = [
            SequenceStep([0] * (end - start), start, pages[i]) for i, (start, end) in enumerate(step)
        ]
        found = cached.step_with(
            sequences,
            inputs_embeds=torch.cat([embeds[i][start:end] for i, (start, end) in enumerate(step)]),
            position_ids=torch.cat([positions[i][..., start:end] for i, (start, end) in enumerate(step)], -1),
        )
        wanted = torch.stack([dense[i][end - 1] for i, (_, end) in enumerate(step)])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_vectors_in_place_of_tokens(family: str) -> None:
    """A stack that takes inputs_embeds keeps them as the input of its cached graph."""
    stack = TextStack(model_of(family))

    check_steps(cached_model(stack), stack, [torch.arange(14), torch.arange(18)])


def test_three_positions_a_token() -> None:
    """Qwen2.5-VL's image tokens share a time and differ in row and column; pages count tokens."""
    stack = TextStack(model_of("qwen2_5_vl")).eval()
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        stack,
        (vectors(26, 0).view(2, 13, HIDDEN), torch.arange(13).repeat(3, 2, 1)),
        dynamic_shapes=(dynamic, {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}),
        strict=False,
    )

    def with_image(first: int, height: int, width: int, last: int) -> Tensor:
        text = torch.arange(first).repeat(3, 1)
        grid = torch.stack([torch.zeros(height * width, dtype=torch.int64), *_grid(height, width)]) + first
        end = torch.arange(last).repeat(3, 1) + first + max(height, width)
        return torch.cat([text, grid, end], 1)

    check_steps(cached_model(program.module()), stack, [with_image(3, 2, 4, 3), with_image(5, 3, 3, 4)])


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    index = torch.arange(height * width)
    return index // width, index % width


def test_tokens_given_to_a_graph_of_vectors_are_refused() -> None:
    """The message says what to call."""
    cached = cached_model(TextStack(model_of("llava")))

    with pytest.raises(ValueError, match=r"takes inputs_embeds, not tokens: call step_with"):
        cached.step([SequenceStep([1, 2], 0, [1])])


def test_graph_with_other_inputs_is_refused() -> None:
    """An attention mask as an input, for example: the message says which inputs there must be."""

    class Masked(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            return input_ids + attention_mask + position_ids

    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(
        ExportError, match=r"must have two inputs, input_ids .* or inputs_embeds .*, and position_ids"
    ):
        cached_model(torch.export.export(Masked(), (ids, ids, ids)).module())
