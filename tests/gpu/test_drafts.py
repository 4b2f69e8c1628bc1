"""Drafts on the GPU: kernels within their bounds, captured steps equal to eager ones, and the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig, KvDtype, SpeculativeConfig
from ad_flashinfer_pass.heads.eagle3 import random_eagle3
from ad_flashinfer_pass.heads.load import load_head
from ad_flashinfer_pass.kernels.attention import select, split_decode
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.drafts.head import DraftHead
from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams, most_likely
from ad_flashinfer_pass.runtime.sequence_info import Bucket, RowParams, SequenceStep
from tests.gpu.paged import DEVICE, PagedBatch, Shape, site_of
from tests.gpu.test_conformance import FP8, PLAIN, assert_within_bound, skipped_if_not_built
from tests.gpu.test_end_to_end import COMMON, PROMPTS, assert_same_tokens, model_of
from tests.gpu.test_graphs import SIZES, same_bytes
from tests.models.head_checkpoints import guessed_anew, write_mtp
from tests.runtime.two_layers import NUM_TOKEN_IDS, TwoLayers, changed_slots
from tests.runtime.watched import Watched

SHAPES = [
    PLAIN,
    FP8,
    *(replace(PLAIN, group=group) for group in (1, 5, 8, 16)),
    replace(PLAIN, head_dim=64, group=8, page_size=64),
    replace(PLAIN, head_dim=256, group=2),
    replace(PLAIN, sliding_window=12),
    replace(PLAIN, sliding_window=100, has_sinks=True),
    replace(FP8, sliding_window=100, logit_cap=2.0),
    replace(PLAIN, logit_cap=2.0),
]


@pytest.mark.parametrize("new", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split_decode_verifies_every_shape(shape: Shape, new: int) -> None:
    """Pasts at and beside the edges of pages, short and long: some new tokens see no key of a part."""
    page = shape.page_size
    for pasts in ([1, page - 1, page, page - new], [4096], [8000, 3], [37 * i + 1 for i in range(64)]):
        batch = PagedBatch([(past, new) for past in pasts], shape)
        n = len(pasts)
        bounds, lens = batch.args["cu_seqlen"][: n + 1], batch.args["seq_len_with_cache"][:n]
        args = (batch.query, batch.kv_cache, bounds, lens, batch.block_table[:n], batch.spec)
        out = split_decode.verify(*args, max_len=new)
        assert_within_bound(batch, out)
        for _ in range(3):
            assert torch.equal(split_decode.verify(*args, max_len=new), out)


VERIFY = {
    "xqa": ("xqa", PLAIN),
    "xqa_fp8": ("xqa", FP8),
    "xqa_window": ("xqa", replace(PLAIN, sliding_window=12)),
    "split_decode": ("split_decode", PLAIN),
    "split_decode_window": ("split_decode", replace(PLAIN, sliding_window=12)),
    "split_decode_fp8_cap": ("split_decode", replace(FP8, logit_cap=2.0)),
}


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("case", VERIFY)
def test_every_verification_replayed_equals_eager_and_keeps_to_its_pages(case: str, num_drafts: int) -> None:
    """100 steps of random sequences, lengths and pages, some without pages for all drafts, and padding."""
    kernel, shape = VERIFY[case]
    if kernel not in select.verifiers(site_of(shape), num_drafts, DEVICE):
        pytest.skip(f"{kernel} does not verify this here")
    torch.manual_seed(0)
    sizes = replace(SIZES, kv_heads=shape.num_kv_heads)
    model = TwoLayers(
        sizes,
        DEVICE,
        torch.bfloat16,
        window=shape.sliding_window,
        logit_cap=shape.logit_cap,
        kv_dtype=shape.kv_dtype,
        scales=(shape.k_scale, shape.v_scale),
        decode_kernel="split_decode",
        num_drafts=num_drafts,
        verify_kernel=kernel,
    )
    info, caches, rng = model.info(), model.caches(), random.Random(0)
    module = CudaGraphModule(model, [1, 2, 4, 8], [], drafter=NgramDrafter(info))
    kept = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode(), skipped_if_not_built():
        module.capture(info, caches)
        for name, cache in caches.items():
            assert same_bytes(cache[1:], kept[name][1:]), "capture wrote to a page"
        assert set(module.verify_cost) == {1, 2, 4, 8}
        for _ in range(100):
            steps = random_verification(rng, num_drafts)
            before = {name: cache.clone() for name, cache in caches.items()}
            info.nest_sequences(
                steps,
                pad_to=module.bucket(steps, verifies=True),
                row_params=[RowParams()] * len(steps),
                verifies=True,
            )
            inputs = {**info.named_args(), **caches}
            n = len(steps) * (1 + num_drafts)
            replayed = module(**inputs)[0, :n].clone()
            after = {name: cache.clone() for name, cache in caches.items()}
            for name, cache in caches.items():
                cache[1:] = before[name][1:]  # drafts without a page are on page 0, which stays
            with GraphState().begin_capture():
                eager = module.eager(**inputs)[0, :n]
            rows = torch.tensor(
                [
                    row * (1 + num_drafts) + i
                    for row, step in enumerate(steps)
                    for i in range(1 + num_drafts)
                    if step.input_pos + i < step.max_cached
                ]
            )
            assert bool(torch.isfinite(replayed).all())
            assert torch.equal(replayed[rows], eager[rows])
            owned = [
                step._replace(token_ids=step.token_ids[: step.max_cached - step.input_pos]) for step in steps
            ]
            for name, cache in caches.items():
                assert same_bytes(cache[1:], after[name][1:])
                assert not changed_slots(before[name], cache, owned).any()
    assert module.num_replays == 100
    assert not module.fallbacks


def random_verification(rng: random.Random, num_drafts: int) -> list[SequenceStep]:
    """Sequences whose pages hold the newest token, and all drafts or some."""
    pages = rng.sample(range(1, SIZES.num_pages), SIZES.num_pages - 1)
    steps = []
    for _ in range(rng.randint(1, SIZES.max_batch_size)):
        past = rng.choice([1, SIZES.page_size - 1, SIZES.page_size, rng.randrange(1, SIZES.max_seq_len - 1)])
        num_pages = -(-(past + 1 + rng.choice([0, num_drafts])) // SIZES.page_size)
        if num_pages > len(pages) or num_pages * SIZES.page_size > SIZES.max_seq_len + SIZES.page_size:
            break
        ids = [rng.randrange(NUM_TOKEN_IDS) for _ in range(1 + num_drafts)]
        own = [pages.pop() for _ in range(num_pages)]
        steps.append(SequenceStep(ids, past, own, max_cached=num_pages * SIZES.page_size))
    return steps or [SequenceStep([1] * (1 + num_drafts), 1, [3], max_cached=SIZES.page_size)]


def test_a_step_goes_from_the_metadata_of_one_to_those_of_the_next_as_on_a_cpu() -> None:
    """The tail of a bucket: what is accepted, and what is guessed, against ``accept`` and the reference."""
    torch.manual_seed(0)
    model = TwoLayers(SIZES, DEVICE, torch.bfloat16, decode_kernel="split_decode", num_drafts=3)
    model.verify_kernel = "split_decode"
    info, caches = model.info(), model.caches()
    module = CudaGraphModule(model, [4], [], drafter=NgramDrafter(info))
    module.capture(info, caches)
    on_cpu = TwoLayers(SIZES, torch.device("cpu"), torch.float32, num_drafts=3).info()
    steps = [
        SequenceStep([5, *guess], past, [1 + row], slot=1 + row, max_cached=32)
        for row, (past, guess) in enumerate(((3, [7, 7, 7]), (30, [8, 9, 1]), (12, [0, 0, 0])))
    ]
    params = [RowParams(seed=row) for row in range(3)]
    for each in (info, on_cpu):
        each.nest_sequences(steps, pad_to=Bucket(0, 4, num_drafts=3), row_params=params, verifies=True)
    with torch.inference_mode():
        logits = module(**info.named_args(), **caches)[0]
        on_cpu.accept(most_likely(logits.float().cpu()))
        assert module.sample_and_advance(is_greedy=True)
    assert torch.equal(info.tokens[:16].cpu(), on_cpu.tokens[:16])
    for name in ("position_ids", "input_pos", "seq_len_with_cache", "cache_loc", "is_stopped"):
        assert torch.equal(info.views[name].cpu(), on_cpu.views[name]), name
    assert torch.equal(info.drafts[:, 0].cpu(), on_cpu.drafts[:, 0])


def served(name: str, backend: str, num_drafts: int, kv_dtype: KvDtype = "auto") -> CachedModel:
    config = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        compile_backend=backend,  # type: ignore[arg-type]
        max_batch_size=8,
        max_seq_len=192,
        max_num_tokens=128,
        cuda_graph_batch_sizes=[1, 3, 8] if backend == "torch-cudagraph" else None,
        kv_cache_config=KvCacheConfig(dtype=kv_dtype),
        speculative_config=SpeculativeConfig(drafter="ngram", num_tokens=num_drafts) if num_drafts else None,
    )
    model, reports = transform_module(model_of(name), config)
    print(
        *(note for report in reports for note in report.notes if "draft" in note or "verif" in note), sep="\n"
    )
    return model


def generate(model: CachedModel, params: SamplingParams, steps_ahead: int) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, steps_ahead=steps_ahead)
    tokens: dict[int, list[int]] = {}
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, SamplingParams(**{**vars(params), "max_new_tokens": 48 + 5 * index}))
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                tokens[output.request_id] = output.completion.token_ids
    assert engine.metrics.pages_in_use == 0
    print(engine.metrics)
    return [tokens[index] for index in range(len(PROMPTS))], engine


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph"])
@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Gemma2Config"])
def test_generates_the_tokens_of_the_uncached_model(name: str, backend: str, num_drafts: int) -> None:
    """Captured and op by op, steps ahead or not: each is its best token, or as good within its rounding."""
    with skipped_if_not_built():
        model = served(name, backend, num_drafts)
    model.verify_cost = {1: 0.0}  # drafts always pay, so that they are always verified
    for steps_ahead in (0, 2):
        tokens, engine = generate(model, SamplingParams(), steps_ahead)
        assert_same_tokens(model_of(name), tokens)
        assert engine.metrics.num_verified > 20
        if name == "Gemma2Config":  # of these random weights, those that go in circles
            assert engine.metrics.num_accepted[-1] > 20
        reasons = engine.metrics.eager_steps
        assert (
            not reasons or backend == "torch-simple" or all("reads lengths" in reason for reason in reasons)
        )


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_captured_equals_eager_exactly(kv_dtype: KvDtype) -> None:
    """Every replay of a whole generation with drafts gives the bits of the eager graph on the same inputs."""
    with skipped_if_not_built():
        cached = served("LlamaConfig", "torch-cudagraph", 3, kv_dtype)
    cached.verify_cost = {1: 0.0}
    module = cached.module
    assert isinstance(module, CudaGraphModule)
    replay, num_compared = module.forward, 0

    def both(**inputs: Tensor) -> Tensor:
        nonlocal num_compared
        num_replays, info = module.num_replays, cached.sequence_info
        result = replay(**inputs)
        if module.num_replays > num_replays:
            num_compared += info.num_verified > 0
            with GraphState().begin_capture():
                eager = module.eager(**inputs)
            # Rows without a page for their drafts, and padding, read what others leave on page 0.
            width = 1 + info.num_drafts
            rows = torch.arange(result.shape[1], device=DEVICE)
            if info.num_verified:
                at = info.views["input_pos"][rows // width] + rows % width
                is_padding = info.views["is_stopped"][: len(rows)] > 0
                rows = rows[(at < info.views["max_cached"][rows // width]) & ~is_padding]
            assert torch.equal(result[:, rows], eager[:, rows])
        return result

    module.forward = both  # type: ignore[method-assign]
    generate(cached, SamplingParams(), 1)
    assert num_compared > 10


def test_sampled_requests_give_the_same_tokens_again() -> None:
    """The same seeds, in a run with steps ahead and in one without."""
    with skipped_if_not_built():
        model = served("LlamaConfig", "torch-cudagraph", 3)
    model.verify_cost = {1: 0.0}
    params = SamplingParams(temperature=0.3, top_p=0.9, seed=7)
    first, engine = generate(model, params, 1)
    assert engine.metrics.num_verified > 20
    again, _ = generate(model, params, 1)
    assert again == first


def test_a_model_that_guesses_its_own_tokens() -> None:
    """Captured, the draft's steps within the end of each step: nearly all are taken, and tokens are right."""
    config = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        compile_backend="torch-cudagraph",
        max_batch_size=8,
        max_seq_len=192,
        max_num_tokens=128,
        cuda_graph_batch_sizes=[1, 3, 8],
        speculative_config=SpeculativeConfig(drafter="model", model="given"),
    )
    with skipped_if_not_built():
        model, _ = transform_module(model_of("LlamaConfig"), config, draft=model_of("LlamaConfig"))
    model.verify_cost = {1: 0.0}
    for steps_ahead in (0, 2):
        tokens, engine = generate(model, SamplingParams(), steps_ahead)
        assert_same_tokens(model_of("LlamaConfig"), tokens)
        assert engine.metrics.drafts is not None
        assert engine.metrics.drafts.acceptance[0] > 0.8


def with_head(kind: str, folder: Path) -> tuple[nn.Module, DraftHead]:
    """A model, and a head of random weights for it."""
    if kind == "eagle3":
        model = model_of("LlamaConfig")
        torch.manual_seed(1)
        config = LlamaConfig(**{**COMMON, "num_hidden_layers": 1, "vocab_size": COMMON["vocab_size"] // 2})
        return model, random_eagle3(config, model, torch.bfloat16).to("cuda")
    written = write_mtp(folder, Qwen3Config(**{**COMMON, "head_dim": 128}))
    model = written.model.to("cuda", torch.bfloat16).requires_grad_(False)
    return model, load_head("mtp", str(folder), model)


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph", "torch-opt"])
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_heads_guess_as_they_do_without_a_cache(
    kind: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured, with the end of each step: tokens are right, and so are guesses but for rounding."""
    model, head = with_head(kind, tmp_path)
    config = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        compile_backend=backend,  # type: ignore[arg-type]
        max_batch_size=8,
        max_seq_len=192,
        max_num_tokens=128,
        cuda_graph_batch_sizes=None if backend == "torch-simple" else [1, 3, 8],
        speculative_config=SpeculativeConfig(drafter=kind, model="given"),  # type: ignore[arg-type]
    )
    with skipped_if_not_built():
        cached, _ = transform_module(model, config, draft=head)
    cached.verify_cost = {1: 0.0}
    watched = Watched(cached, monkeypatch)
    for steps_ahead in (0, 2):
        tokens, engine = generate(cached, SamplingParams(), steps_ahead)
        assert_same_tokens(model, tokens)
        assert engine.metrics.num_verified > 20
        assert min(engine.metrics.num_accepted) > 10 or not watched.known
        # Some of the next drafts are these tokens, so that several are kept.
        watched.known = [[*prompt, *after] for prompt, after in zip(PROMPTS, tokens, strict=True)]
        if backend != "torch-simple":
            assert not engine.metrics.eager_steps, engine.metrics.eager_steps
    known = [each for each in watched.found if each[2] and each[1] < len(each[0].token_ids)][::5]
    pairs = [(drafts, guessed_anew(head, model, s.token_ids[: n + 1], len(drafts))) for s, n, drafts in known]
    first, whole = sum(a[0] == b[0] for a, b in pairs), sum(a == b for a, b in pairs)
    print(
        f"{kind} {backend}: {first} first guesses and {whole} whole drafts of {len(pairs)} as without a cache"
    )
    assert first > 0.85 * len(pairs) > 10
