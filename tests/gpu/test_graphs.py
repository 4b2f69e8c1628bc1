"""Captured graphs: equal to eager at every replay, and no byte changes that the step does not own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass.kernels import fmha_v2
from ad_flashinfer_pass.metadata import SequenceInfo, SequenceStep
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from tests.gpu.paged import DEVICE
from tests.runtime.two_layers import Sizes, TwoLayers, changed_slots, random_step

SIZES = Sizes()


def graphs(
    sizes: Sizes, window: int | None, batch_sizes: list[int], token_buckets: list[int]
) -> tuple[CudaGraphModule, SequenceInfo, dict[str, Tensor]]:
    torch.manual_seed(0)
    kernel = "fmha_v2" if token_buckets else "reference"
    model = TwoLayers(
        sizes, DEVICE, torch.bfloat16, window=window, prefill_kernel=kernel, decode_kernel="xqa"
    )
    return CudaGraphModule(model, batch_sizes, token_buckets), model.info(), model.caches()


def check_replays(
    module: CudaGraphModule,
    info: SequenceInfo,
    caches: dict[str, Tensor],
    sizes: Sizes,
    *,
    with_prefill: bool,
) -> None:
    """150 steps of random composition, lengths, pages and padding, through all buckets."""
    rng = random.Random(0)
    kept = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode():
        module.capture(info, caches)
        for name, cache in caches.items():
            assert torch.equal(cache[1:], kept[name][1:]), "capture wrote to a page"
        for _ in range(150):
            steps = random_step(rng, sizes, with_prefill=with_prefill)
            n = sum(s.gather for s in steps)
            before = {name: cache.clone() for name, cache in caches.items()}
            info.nest_sequences(steps, pad_to=module.bucket(steps))
            inputs = {**info.named_args(), **caches}
            replayed = module(**inputs)[0, :n].clone()
            after = {name: cache.clone() for name, cache in caches.items()}
            for name, cache in caches.items():
                cache.copy_(before[name])
            eager = module.eager(**inputs)[0, :n]
            assert bool(torch.isfinite(replayed).all())
            assert torch.equal(replayed, eager)
            for name, cache in caches.items():
                assert torch.equal(cache[1:], after[name][1:])
                assert not changed_slots(before[name], cache, steps).any()
            if with_prefill:
                for name, cache in caches.items():
                    cache.copy_(before[name])
                info.nest_sequences(steps)
                unpadded = module.eager(**info.named_args(), **caches)[0, :n]
                torch.testing.assert_close(replayed, unpadded, rtol=2**-7, atol=2**-7)
    assert module.num_replays == 150
    assert not module.fallbacks


@pytest.mark.parametrize("window", [None, 12])
def test_every_decode_replay_equals_eager_and_keeps_to_its_pages(window: int | None) -> None:
    """On XQA."""
    module, info, caches = graphs(SIZES, window, [1, 2, 4, SIZES.max_batch_size], [])
    check_replays(module, info, caches, SIZES, with_prefill=False)


@pytest.mark.skipif(not fmha_v2.is_built(torch.bfloat16), reason="the module of FMHA v2 is not built")
@pytest.mark.parametrize("window", [None, 12])
def test_every_replay_with_prefill_equals_eager_and_keeps_to_its_pages(window: int | None) -> None:
    """On FMHA v2 and XQA within one graph, with prompts, chunks, decodes and padding."""
    module, info, caches = graphs(SIZES, window, [], [64, SIZES.max_num_tokens])
    check_replays(module, info, caches, SIZES, with_prefill=True)


def test_a_moved_cache_is_noticed() -> None:
    """A pool at another address is not read at the old one: the step is eager, and counted with its name."""
    module, info, caches = graphs(SIZES, None, [1], [])
    module.capture(info, caches)
    caches["kv_cache_1"] = torch.zeros_like(caches["kv_cache_1"])
    steps = [SequenceStep([3], 0, [5])]
    info.nest_sequences(steps, pad_to=module.bucket(steps))
    with torch.inference_mode():
        module(**info.named_args(), **caches)
    assert module.fallbacks == {"moved since capture: kv_cache_1": 1}
    assert caches["kv_cache_1"][5].any()
