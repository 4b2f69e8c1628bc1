"""Hybrid and recurrent models through the whole pass: states go with their sequences, and only with them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import inspection
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.deployment.bench import step_bytes
from ad_flashinfer_pass.errors import CapacityError, UnsupportedError
from ad_flashinfer_pass.exported import restore, to_program
from ad_flashinfer_pass.inspection.check.check import check_prepared, prepare
from ad_flashinfer_pass.kernels.state import ssd_scan
from ad_flashinfer_pass.pipeline import Pipeline, context, transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.transforms.initialize_cache import count_pages
from tests import architectures
from tests.torch_compile import small_models

PROMPTS = architectures.prompts_with_one_end((20, 20, 5, 1, 33), vocab_size=128)
NUM_NEW_TOKENS = 24
SCHEDULES = range(*map(int, os.environ.get("SCHEDULES", "0 6").split()))


def config(**changes: Any) -> AutoDeployConfig:
    given: dict[str, Any] = {
        "max_batch_size": 4,
        "max_seq_len": 64,
        "max_num_tokens": 32,
        "device": "cpu",
        **changes,
    }
    given.setdefault("kv_cache_config", KvCacheConfig(tokens_per_block=16))
    return AutoDeployConfig(**given)


def random_model(family: str, **changes: Any) -> nn.Module:
    return architectures.random_model(architectures.small_config(family, **changes))


@pytest.fixture(scope="module")
def hybrid() -> nn.Module:
    """Layers of Mamba 2, of attention and of experts."""
    return random_model("nemotron_h", time_step_min=1e-30)  # which transformers' cached steps ignore


@pytest.fixture(scope="module")
def recurrent() -> nn.Module:
    """Without attention."""
    return random_model("mamba2")


@pytest.fixture(scope="module")
def expected(hybrid: nn.Module) -> list[list[int]]:
    return architectures.generated_by_transformers(hybrid, PROMPTS, NUM_NEW_TOKENS)


@pytest.fixture(scope="module")
def few_pages(hybrid: nn.Module) -> CachedModel:
    """Twelve pages, so that not all sequences go on at once; steps are padded, as graphs would have them."""
    cache = KvCacheConfig(tokens_per_block=8, max_tokens=96)
    model = transform_module(hybrid, config(kv_cache_config=cache))[0]
    module = CudaGraphModule(model.module, [1, 2, 4], [16, 32])
    module.capture(model.sequence_info, model.caches)
    return CachedModel(module, model.caches, model.sequence_info, model.vocab_size)


def generated(engine: Engine) -> list[list[int]]:
    """Of all prompts, each of which arrives a few steps after the one before."""
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    tokens: dict[int, list[int]] = {}
    waiting = list(PROMPTS)
    while waiting or engine.has_work:
        if waiting:
            engine.add_request(waiting.pop(0), params)
        for output in [*engine.step(), *engine.step()]:
            if output.completion is not None and output.completion.finish_reason != "cancelled":
                assert output.completion.error is None
                tokens[output.request_id] = output.completion.token_ids
    return [tokens[number] for number in sorted(tokens)]


@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_preempted_sequences_start_from_zero(
    few_pages: CachedModel, expected: list[list[int]], steps_ahead: int
) -> None:
    """Chunks of 7, late arrivals, preemption, steps ahead and replays; pools were full of NaN."""
    for name, cache in few_pages.caches.items():
        if "state" in name:
            cache.fill_(float("nan"))
    engine = Engine(few_pages, prefill_chunk_tokens=7, steps_ahead=steps_ahead)

    assert generated(engine) == expected
    assert engine.metrics.num_preemptions > 0
    assert few_pages.num_replays > 0


def test_a_cancelled_request_leaves_nothing(few_pages: CachedModel, expected: list[list[int]]) -> None:
    """Its slot goes to another sequence, which is as alone."""
    engine = Engine(few_pages)
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    cancelled = [engine.add_request(prompt, params) for prompt in PROMPTS[3:]]
    for _ in range(4):
        engine.step()
    for request in cancelled:
        engine.cancel(request)
    assert generated(engine) == expected


def test_random_schedules(hybrid: nn.Module, few_pages: CachedModel) -> None:
    """Requests come and go at random, and each has the tokens that it has alone.

    ``SCHEDULES="1000 2000"`` for other seeds. Pools are full of NaN before each schedule.
    """
    prompts = architectures.random_prompts([1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 17, 20, 23, 29, 8, 16], 128)
    alone = [architectures.generated_by_transformers(hybrid, [prompt], 12)[0] for prompt in prompts]
    for seed in SCHEDULES:
        draw = random.Random(seed)
        for name, cache in few_pages.caches.items():
            if "state" in name:
                cache.fill_(float("nan"))
        chunk, ahead = draw.choice([None, 1, 3, 7]), draw.choice([0, 0, 1, 3])
        engine = Engine(few_pages, prefill_chunk_tokens=chunk, steps_ahead=ahead)
        wanted: dict[int, list[int]] = {}
        num_left = draw.randint(1, 9)
        while num_left or engine.has_work:
            if num_left and draw.random() < 0.5:
                number, num_new = draw.randrange(len(prompts)), draw.randint(1, 12)
                request = engine.add_request(
                    prompts[number], SamplingParams(max_new_tokens=num_new, ignore_eos=True)
                )
                wanted[request] = alone[number][:num_new]
                num_left -= 1
            if wanted and draw.random() < 0.03:
                engine.cancel(draw.choice(list(wanted)))
            for output in engine.step():
                if output.completion is not None:
                    found, tokens = output.completion, wanted.pop(output.request_id)
                    num = len(found.token_ids)
                    assert found.error is None
                    assert found.token_ids == tokens[:num], f"seed {seed}"
                    assert found.finish_reason == "cancelled" or num == len(tokens), f"seed {seed}"
        assert not wanted


def test_steps_by_hand_need_slots(few_pages: CachedModel) -> None:
    """Each its own, and not that of padding."""
    for slots in ((0,), (1, 1), (5,)):
        steps = [SequenceStep([3, 4], 0, [1 + row], slot=slot) for row, slot in enumerate(slots)]
        with pytest.raises(ValueError, match=r"each sequence needs a slot of its own in 1\.\.4"):
            few_pages.step(steps)


def test_a_model_without_attention_is_saved_and_restored(recurrent: nn.Module) -> None:
    """States alone; the file has the graph, and pools are made anew."""
    model = transform_module(recurrent, config())[0]
    wanted = architectures.generated_by_transformers(recurrent, PROMPTS[:3], 8)
    sizes: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 32}

    restored = restore(to_program(model), kv_cache_config={"tokens_per_block": 16}, device="cpu", **sizes)

    of_states = 2 * 3 * sum(cache[0].nbytes for cache in model.caches.values())
    assert step_bytes(model, 3, 10) == model.weights.bytes_at(3) + of_states  # whatever came before
    for served in (model, restored):
        assert {name.rstrip("0123456789") for name in served.caches} == {"conv_state_", "recurrent_state_"}
        assert architectures.generated_by_engine(served, PROMPTS[:3], 8) == wanted


def test_check_finds_a_wrong_state(hybrid: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """All agree; with a state that forgets nothing, the site is named that is wrong first."""
    prepared = prepare(hybrid, config(), stage="gather_logits_before_lm_head")
    report = check_prepared(prepared, "nemotron_h")
    assert report.is_ok
    assert {site.op for site in report.sites} == {"attention", "causal_conv1d", "ssd_scan"}

    chunk = ssd_scan.chunk

    def forgets_less(state: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        result, after = chunk(state, *args)
        return (
            result,
            after + state if state.dtype == torch.float32 else after,
        )  # not in what it is compared with

    monkeypatch.setattr(ssd_scan, "chunk", forgets_less)
    report = check_prepared(prepared, "nemotron_h")
    assert report.first is not None
    assert report.first.startswith("ssd_scan site")


def test_what_inspection_says(tmp_path: Path, recurrent: nn.Module) -> None:
    """Explain has the states, the plan their bytes, and lint knows their pools."""
    recurrent.save_pretrained(tmp_path)  # type: ignore[operator]
    keys = config(model=str(tmp_path))
    explanation = inspection.explain(keys)
    assert explanation.sites == []
    assert {(each.op, each.dtype, each.shape) for each in explanation.states} == {
        ("causal_conv1d", "float32", (144, 3)),
        ("ssd_scan", "float32", (4, 32, 8)),
    }
    a_sequence = sum(each.bytes for each in explanation.states)
    rows = [row.bytes for row in inspection.plan(keys).rows if "of states" in row.name]
    assert sum(rows) == a_sequence * (4 + 1)
    assert inspection.lint(keys) == []


def test_states_come_before_pages(hybrid: nn.Module) -> None:
    """They take their share of the memory, and what is said names what to lower."""
    ctx = context(config())
    Pipeline.of(ctx.config).before("initialize_cache").run(hybrid, ctx)
    per_page = ctx.resources[0].bytes_per_page
    needed = ctx.sequence_info.num_slots * sum(state.bytes_per_slot for state in ctx.states)
    assert count_pages(ctx, int((needed + 3 * per_page) / 0.9) + 1).fitting == 2
    with pytest.raises(
        CapacityError, match=rf"of which {needed} for the states of 4 sequences.*max_batch_size"
    ):
        count_pages(ctx, needed)


def test_refuses_drafts(recurrent: nn.Module) -> None:
    """A state cannot be taken back."""
    drafts = config(transforms={"insert_cached_attention": {"max_extend_len": 4}})
    with pytest.raises(UnsupportedError, match=r"causal_conv1d.* cannot be taken back.*max_extend_len"):
        transform_module(recurrent, drafts)


class Convolution(nn.Module):
    """A language model with a state and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, 4]."""
        logits: Tensor = torch.ops.ad_flashinfer.causal_conv1d(self.table(input_ids), self.weight)
        return logits


def test_a_session_of_torch_compile_refuses_a_state() -> None:
    """By the op's name."""
    of = small_models.session()
    served = small_models.compiled(Convolution().eval(), of)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r"causal_conv1d.* does not keep"),
        of.prefill([[1, 2, 3]]) as batch,
    ):
        served(*batch.inputs.values())
