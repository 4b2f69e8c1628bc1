"""Captured graphs: equal to eager at every replay, and no byte changes that the step does not own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.metadata import METADATA_ARGS, SequenceInfo, SequenceStep
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from tests.gpu.paged import DEVICE

HEADS, KV_HEADS, DIM, PAGE, PAGES, MAX_LEN, BATCH = 8, 2, 128, 32, 80, 512, 8
SCALE = DIM**-0.5


class TwoLayers(nn.Module):
    """Metadata, then append and attend twice; the tokens of the step choose q, k and v from a table."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        width = (HEADS + 2 * KV_HEADS) * DIM
        self.table = nn.Buffer(torch.randn(2, 97, width, device=DEVICE).bfloat16())

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, token_gather_indices: Tensor, **inputs: Tensor
    ) -> Tensor:
        """[1, rows, features] of the gathered tokens."""
        metadata = [inputs[name] for name in METADATA_ARGS]
        info, cu_seqlen, input_pos, seq_len, cache_loc, cu_num_pages = metadata
        table, slots = ops.prepare_metadata(
            position_ids, info, cu_seqlen, input_pos, cache_loc, cu_num_pages, MAX_LEN // PAGE, PAGE
        )
        outs = []
        for layer in range(2):
            qkv = self.table[layer][input_ids].unflatten(-1, (-1, DIM))
            q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
            cache = inputs[f"kv_cache_{layer}"]
            ops.append_kv(k, v, slots, cache)
            outs.append(
                ops.cached_attention(
                    q,
                    cache,
                    info,
                    cu_seqlen,
                    seq_len,
                    table,
                    SCALE,
                    DIM,
                    sliding_window=self.window,
                    decode_kernel="xqa",
                )
            )
        return torch.stack(outs, -1).flatten(0, 1).flatten(1)[token_gather_indices][None]


def random_step(rng: random.Random, size: int) -> list[SequenceStep]:
    pages = rng.sample(range(1, PAGES), PAGES - 1)
    steps = []
    for _ in range(size):
        past = rng.choice([0, PAGE - 1, PAGE, rng.randrange(MAX_LEN - 1), rng.randrange(100)])
        count = -(-(past + 1) // PAGE)
        if count > len(pages):
            past, count = 0, 1
        steps.append(SequenceStep([rng.randrange(97)], past, [pages.pop() for _ in range(count)]))
    return steps


@pytest.mark.parametrize("window", [None, 12])
def test_every_replay_equals_eager_and_keeps_to_its_pages(window: int | None) -> None:
    """150 steps of random composition, lengths, pages and padding, through all buckets."""
    torch.manual_seed(0)
    rng = random.Random(0)
    module = CudaGraphModule(TwoLayers(window), [1, 2, 4, BATCH])
    info = SequenceInfo(MAX_LEN, BATCH, 64, PAGE, DEVICE)
    shape = (PAGES, 2, KV_HEADS, PAGE, DIM)
    caches = {f"kv_cache_{i}": torch.randn(shape, device=DEVICE).bfloat16() for i in range(2)}
    kept = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode():
        module.capture(info, caches)
        for name, cache in caches.items():
            assert torch.equal(cache[1:], kept[name][1:]), "capture wrote to a page"
        for _ in range(150):
            before = {name: cache.clone() for name, cache in caches.items()}
            steps = random_step(rng, rng.randint(1, BATCH))
            info.nest_sequences(steps, pad_to=module.bucket(steps))
            inputs = {**info.named_args(), **caches}
            replayed = module(**inputs)
            after = {name: cache.clone() for name, cache in caches.items()}
            for name, cache in caches.items():
                cache.copy_(before[name])
            eager = module.eager(**inputs)
            n = len(steps)
            assert bool(torch.isfinite(replayed[0, :n]).all())
            assert torch.equal(replayed[0, :n], eager[0, :n])
            for name, cache in caches.items():
                assert torch.equal(cache[1:], after[name][1:])
                changed = (after[name] != before[name]).any(-1).any(1).any(1)
                for s in steps:
                    changed[s.pages[s.input_pos // PAGE], s.input_pos % PAGE] = False
                changed[0] = False
                assert not changed.any(), "a slot outside the step changed"
    assert module.num_replays == 150
    assert not module.fallbacks


def test_a_moved_cache_is_noticed() -> None:
    """A pool at another address is not read at the old one: the step is eager, and counted with its name."""
    module = CudaGraphModule(TwoLayers(None), [1])
    info = SequenceInfo(MAX_LEN, BATCH, 64, PAGE, DEVICE)
    caches = {
        f"kv_cache_{i}": torch.zeros(PAGES, 2, KV_HEADS, PAGE, DIM, device=DEVICE).bfloat16()
        for i in range(2)
    }
    module.capture(info, caches)
    caches["kv_cache_1"] = caches["kv_cache_1"].clone()
    steps = [SequenceStep([3], 0, [5])]
    info.nest_sequences(steps, pad_to=module.bucket(steps))
    with torch.inference_mode():
        module(**info.named_args(), **caches)
    assert module.fallbacks == {"moved since capture: kv_cache_1": 1}
    assert caches["kv_cache_1"][5].any()
