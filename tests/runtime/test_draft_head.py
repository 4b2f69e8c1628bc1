"""Heads that guess: the tokens are those of plain decoding, and the guesses those of the head computed anew."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, SpeculativeConfig
from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.models.heads.load import load_head
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from tests import architectures
from tests.models.head_checkpoints import Written, write_eagle3, write_mtp

PROMPTS = architectures.random_prompts((1, 9, 20, 5), vocab_size=128)
NUM_NEW_TOKENS = 24
HEADS = ["eagle3", "eagle3_own_embeddings", "deepseek_v3", "glm4_moe", "qwen3_5_text"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head of each layout with its model, each made once."""

    @cache
    def make(name: str) -> Written:
        folder: Path = tmp_path_factory.mktemp(name)
        if name == "eagle3":
            return write_eagle3(folder)
        if name == "eagle3_own_embeddings":
            return write_eagle3(folder, own_embeddings=True, reads=[0, 4])
        return write_mtp(folder, name)

    return make


def drafter_of(name: str) -> Literal["eagle3", "mtp"]:
    return "eagle3" if name.startswith("eagle3") else "mtp"


def served(head: Written, name: str | None, num_tokens: int = 3, **changes: Any) -> CachedModel:
    """Of a head, or without one; with fewer pages than the prompts need."""
    spec = name and SpeculativeConfig(drafter=drafter_of(name), model="given", num_tokens=num_tokens)
    config = AutoDeployConfig(
        device="cpu",
        max_batch_size=4,
        max_seq_len=64,
        max_num_tokens=32,
        kv_cache_config=KvCacheConfig(tokens_per_block=8, max_tokens=9 * 8),
        speculative_config=spec or None,
        **changes,
    )
    draft = load_head(drafter_of(name), str(head.folder), head.model) if name else None
    model, _ = transform_module(head.model, config, draft=draft)
    model.verify_cost = {1: 0.0}  # so that drafts always pay
    return model


class Watched:
    """Notes what a drafter guesses, and after which tokens."""

    def __init__(self, model: CachedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        drafter, self._info = model.drafter, model.sequence_info
        assert drafter is not None
        self._begin, self._propose = drafter.begin, drafter.propose
        monkeypatch.setattr(drafter, "begin", self.begin)
        monkeypatch.setattr(drafter, "propose", self.propose)
        self._by_slot: dict[int, Any] = {}
        self.found: list[tuple[Any, int, list[int]]] = []
        """The sequence, the place of its newest token, and the guesses that have a page."""

    def begin(self, sequences: Any) -> None:
        self._begin(sequences)
        self._by_slot = {sequence.slot: sequence for sequence in sequences}

    def propose(self, accepted: Tensor | None = None) -> None:
        self._propose(accepted)
        info = self._info
        for row, drafts in enumerate(info.drafts[: len(self._by_slot)].tolist()):
            sequence = self._by_slot[int(info.views["slot_idx"][row])]
            place = int(info.views["input_pos"][row])
            if 0 < place < info.max_seq_len - len(drafts):  # else it rests
                num_kept = int(info.views["max_cached"][row]) - place
                self.found.append((sequence, place, drafts[1 : max(num_kept, 1)]))


def run(model: CachedModel, params: SamplingParams, steps_ahead: int) -> tuple[list[list[int]], Engine]:
    """Two at once, then one every second step, in chunks of prompts."""
    engine = Engine(model, steps_ahead=steps_ahead, prefill_chunk_tokens=7, enable_block_reuse=False)
    found: dict[int, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                found[output.request_id] = output.completion.token_ids

    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, params)
        for _ in range(2 if index else 0):
            step()
    while engine.has_work:
        step()
    assert engine.metrics.pages_in_use == 0
    return [found[i] for i in range(len(PROMPTS))], engine


@pytest.mark.parametrize("steps_ahead", [0, 2])
@pytest.mark.parametrize("name", HEADS)
def test_guesses_are_those_of_the_head_and_tokens_those_of_plain_decoding(
    name: str, steps_ahead: int, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks, preemption, neighbours and steps ahead; the oracle computes each sequence anew."""
    head = written(name)
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
    expected = architectures.generated_by_transformers(head.model, PROMPTS, NUM_NEW_TOKENS)
    model = served(head, name)
    watched = Watched(model, monkeypatch)
    found, engine = run(model, params, steps_ahead)
    assert found == expected
    assert engine.metrics.num_preemptions > 0
    assert len(watched.found) > 20
    for sequence, place, guesses in watched.found:
        if guesses and place < len(sequence.token_ids):  # a step ahead may go beyond the end
            assert guesses == head.guesses(sequence.token_ids[: place + 1], len(guesses)), place
    assert sum(len(guesses) == 3 for _, _, guesses in watched.found) > 10
