"""Captured graphs: equal to eager at every replay, and no byte changes that the step does not own."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Phase
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.sequence_info import Bucket, Kind, SequenceInfo, SequenceStep
from tests.gpu.paged import DEVICE, Shape, attend, bound, bound_of_8_bits, site_of
from tests.runtime.two_layers import Sizes, TwoLayers, changed_slots, random_step

SIZES = Sizes()
PLAIN = Shape(num_kv_heads=SIZES.kv_heads, page_size=SIZES.page_size)
WINDOW = replace(PLAIN, sliding_window=12)
FP8 = replace(PLAIN, kv_dtype=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.75)
DECODE = {
    "xqa": ("xqa", PLAIN),
    "xqa_window": ("xqa", WINDOW),
    "xqa_fp8": ("xqa", FP8),
    "split_decode": ("split_decode", PLAIN),
    "split_decode_fp8_cap": ("split_decode", replace(FP8, logit_cap=2.0)),
    "fa2": ("fa2", PLAIN),
    "fa2_fp8": ("fa2", FP8),
    "reference": ("reference", replace(PLAIN, logit_cap=2.0)),
}


def graphs(
    shape: Shape,
    kernels: dict[Phase, str],
    batch_sizes: list[int],
    token_buckets: list[int],
    device: torch.device = DEVICE,
) -> tuple[CudaGraphModule, SequenceInfo, dict[str, Tensor]]:
    for phase, kernel in kernels.items():
        refusals = select.PROVIDERS[kernel].capability.refusals(site_of(shape), phase, device)
        if refusals:
            pytest.skip(", ".join(refusals))
    torch.manual_seed(0)
    model = TwoLayers(
        SIZES,
        device,
        torch.bfloat16,
        window=shape.sliding_window,
        logit_cap=shape.logit_cap,
        kv_dtype=shape.kv_dtype,
        scales=(shape.k_scale, shape.v_scale),
        prefill_kernel=kernels.get("prefill", "reference"),
        decode_kernel=kernels["decode"],
    )
    return CudaGraphModule(model, batch_sizes, token_buckets), model.info(), model.caches()


def check_replays(
    module: CudaGraphModule,
    info: SequenceInfo,
    caches: dict[str, Tensor],
    shape: Shape,
    *,
    with_prefill: bool,
) -> None:
    """100 replays of each graph that is reached, with random composition, lengths, pages and padding."""
    rng, num_steps = random.Random(0), Counter[Bucket | None]()
    kept = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode():
        module.capture(info, caches)
        for name, cache in caches.items():
            assert same_bytes(cache[1:], kept[name][1:]), "capture wrote to a page"
        reached = {module.bucket(random_step(rng, SIZES, with_prefill=with_prefill)) for _ in range(500)}
        while num_steps.total() < 100 * len(reached):
            steps = random_step(rng, SIZES, with_prefill=with_prefill)
            bucket = module.bucket(steps)
            if bucket not in reached or num_steps[bucket] == 100:
                continue
            num_steps[bucket] += 1
            n = sum(s.gather for s in steps)
            before = {name: cache.clone() for name, cache in caches.items()}
            info.nest_sequences(steps, pad_to=bucket)
            inputs = {**info.named_args(), **caches}
            replayed = module(**inputs)[0, :n].clone()
            after = {name: cache.clone() for name, cache in caches.items()}
            for name, cache in caches.items():
                cache.copy_(before[name])
            with GraphState().begin_capture():  # its plans are those of a graph
                eager = module.eager(**inputs)[0, :n]
            assert bool(torch.isfinite(replayed).all())
            assert torch.equal(replayed, eager)
            assert_within_bound(module.eager, shape, replayed, steps, after)
            for name, cache in caches.items():
                assert same_bytes(cache[1:], after[name][1:])
                assert not changed_slots(before[name], cache, steps).any()
    assert module.num_replays == 100 * len(reached)
    assert not module.fallbacks


def assert_within_bound(
    model: torch.nn.Module, shape: Shape, out: Tensor, steps: list[SequenceStep], caches: dict[str, Tensor]
) -> None:
    """Compare the last token of each sequence with attention in float64 over what the caches hold."""
    assert isinstance(model, TwoLayers)
    spec = AttentionSpec(SIZES.head_dim**-0.5, shape.sliding_window, shape.logit_cap)
    rows = out.unflatten(1, (SIZES.heads, SIZES.head_dim, 2))
    for row, step in zip(rows, (s for s in steps if s.gather), strict=True):
        past = step.input_pos + len(step.token_ids) - 1
        by_xqa = model.decode_kernel == "xqa" and Kind.of(step.input_pos, len(step.token_ids)) is Kind.DECODE
        rounds = shape.kv_dtype is not None and by_xqa
        for layer in range(2):
            kv = (
                caches[f"kv_cache_{layer}"][torch.tensor(step.pages, device=out.device)]
                .double()
                .transpose(2, 3)
            )
            k = kv[:, 0].flatten(0, 1)[: past + 1] * shape.k_scale
            v = kv[:, 1].flatten(0, 1)[: past + 1] * shape.v_scale
            q = model.table[layer][step.token_ids[-1]].unflatten(-1, (-1, SIZES.head_dim))[
                None, : SIZES.heads
            ]
            q = (q.to(shape.kv_dtype) if rounds else q).double()
            expected, spread = attend(q, k, v, past, spec, None)
            limit = bound(expected, spread, past + 1, shape.dtype)
            if rounds:
                limit += bound_of_8_bits(q, k, v, spread, spec)
            assert bool(((row[..., layer].double() - expected[0]).abs() <= limit[0]).all())


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize("case", DECODE)
def test_every_decode_replay_equals_eager_and_keeps_to_its_pages(case: str) -> None:
    """Each kernel that can decode in a graph, over caches of 16 and 8 bits."""
    kernel, shape = DECODE[case]
    module, info, caches = graphs(shape, {"decode": kernel}, [1, 2, 4, SIZES.max_batch_size], [])
    check_replays(module, info, caches, shape, with_prefill=False)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [("fmha_v2", PLAIN), ("fmha_v2", WINDOW), ("tile_prefill", FP8), ("tile_prefill", WINDOW)],
    ids=["plain", "window", "tile_fp8", "tile_window"],
)
def test_every_replay_with_prefill_equals_eager_and_keeps_to_its_pages(kernel: str, shape: Shape) -> None:
    """Prompts, chunks, decodes and padding within one graph."""
    kernels: dict[Phase, str] = {"prefill": kernel, "decode": "xqa"}
    module, info, caches = graphs(shape, kernels, [], [64, SIZES.max_num_tokens])
    check_replays(module, info, caches, shape, with_prefill=True)


def test_a_moved_cache_is_noticed() -> None:
    """A pool at another address is not read at the old one: the step is eager, and counted with its name."""
    module, info, caches = graphs(PLAIN, {"decode": "xqa"}, [1], [])
    module.capture(info, caches)
    caches["kv_cache_1"] = torch.zeros_like(caches["kv_cache_1"])
    steps = [SequenceStep([3], 0, [5])]
    info.nest_sequences(steps, pad_to=module.bucket(steps))
    with torch.inference_mode():
        module(**info.named_args(), **caches)
    assert module.fallbacks == {"moved since capture: kv_cache_1": 1}
    assert caches["kv_cache_1"][5].any()
