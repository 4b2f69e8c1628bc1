"""Captured graphs: equal to eager at every replay, and no byte changes that the step does not own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels import fa, select
from ad_flashinfer_pass.metadata import METADATA_ARGS, SequenceInfo, SequenceStep
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from tests.gpu.paged import DEVICE, Shape, attend, bound, bound_of_8_bits, site_of

HEADS, KV_HEADS, DIM, PAGE, PAGES, MAX_LEN, BATCH = 8, 2, 128, 32, 80, 512, 8
PLAIN = Shape(num_kv_heads=KV_HEADS, page_size=PAGE)
FP8 = replace(PLAIN, kv_dtype=torch.float8_e4m3fn, k_scale=0.02, v_scale=0.75)
CASES = {
    "xqa": ("xqa", PLAIN),
    "xqa_window": ("xqa", replace(PLAIN, sliding_window=12)),
    "xqa_fp8": ("xqa", FP8),
    "fa": ("fa", PLAIN),
    "fa_fp8": ("fa", FP8),
    "reference": ("reference", replace(PLAIN, logit_cap=2.0)),
}


class TwoLayers(nn.Module):
    """Metadata, then append and attend twice; the tokens of the step choose q, k and v from a table."""

    def __init__(self, kernel: str, shape: Shape) -> None:
        super().__init__()
        self.kernel, self.shape = kernel, shape
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
            ops.append_kv(k, v, slots, cache, self.shape.k_scale, self.shape.v_scale)
            outs.append(
                ops.cached_attention(
                    q,
                    cache,
                    info,
                    cu_seqlen,
                    seq_len,
                    table,
                    self.shape.spec.scale,
                    DIM,
                    self.shape.sliding_window,
                    self.shape.logit_cap,
                    decode_kernel=self.kernel,
                    k_scale=self.shape.k_scale,
                    v_scale=self.shape.v_scale,
                )
            )
        return torch.stack(outs, 2).flatten(0, 1).flatten(1)[token_gather_indices][None]

    def assert_within_bound(self, out: Tensor, steps: list[SequenceStep], caches: dict[str, Tensor]) -> None:
        """Compare with attention in float64 over what the caches hold."""
        shape = self.shape
        for row, step in zip(out.unflatten(1, (2, HEADS, DIM)), steps, strict=True):
            for layer in range(2):
                pages = torch.tensor(step.pages, device=DEVICE)
                kv = caches[f"kv_cache_{layer}"][pages].double().transpose(2, 3)
                k = kv[:, 0].flatten(0, 1)[: step.input_pos + 1] * shape.k_scale
                v = kv[:, 1].flatten(0, 1)[: step.input_pos + 1] * shape.v_scale
                q = self.table[layer][step.token_ids[0]].unflatten(-1, (-1, DIM))[None, :HEADS]
                rounds = self.kernel == "xqa" and shape.kv_dtype is not None
                q = q.to(shape.kv_dtype).double() if rounds else q.double()
                expected, spread = attend(q, k, v, step.input_pos, shape.spec, None)
                limit = bound(expected, spread, len(k), shape.dtype)
                if rounds:
                    limit += bound_of_8_bits(q, k, v, spread, shape.spec)
                assert bool(((row[layer].double() - expected[0]).abs() <= limit[0]).all())


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


@pytest.mark.parametrize("case", CASES)
def test_every_replay_equals_eager_and_keeps_to_its_pages(case: str) -> None:
    """150 steps of random composition, lengths, pages and padding, through all buckets."""
    torch.manual_seed(0)
    rng = random.Random(0)
    kernel, shape = CASES[case]
    refusals = select.provider(kernel).CAPABILITY.refusals(site_of(shape), "decode", DEVICE)
    if refusals:
        pytest.skip(", ".join(refusals))
    layers = TwoLayers(kernel, shape)
    module = CudaGraphModule(layers, [1, 2, 4, BATCH])
    info = SequenceInfo(MAX_LEN, BATCH, 64, PAGE, DEVICE)
    caches = random_caches(shape)
    kept = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode():
        module.capture(info, caches)
        for name, cache in caches.items():
            assert same_bytes(cache[1:], kept[name][1:]), "capture wrote to a page"
        for _ in range(150):
            before = {name: cache.clone() for name, cache in caches.items()}
            steps = random_step(rng, rng.randint(1, BATCH))
            info.nest_sequences(steps, pad_to=module.bucket(steps))
            inputs = {**info.named_args(), **caches}
            replayed = module(**inputs)
            after = {name: cache.clone() for name, cache in caches.items()}
            for name, cache in caches.items():
                cache.copy_(before[name])
            with fa.planning():  # its plans are those of a graph
                eager = module.eager(**inputs)
            n = len(steps)
            assert bool(torch.isfinite(replayed[0, :n]).all())
            assert torch.equal(replayed[0, :n], eager[0, :n])
            layers.assert_within_bound(replayed[0, :n], steps, after)
            for name, cache in caches.items():
                assert same_bytes(cache[1:], after[name][1:])
                new, old = after[name].view(torch.uint8), before[name].view(torch.uint8)
                changed = (new != old).any(-1).any(1).any(1)
                for s in steps:
                    changed[s.pages[s.input_pos // PAGE], s.input_pos % PAGE] = False
                changed[0] = False
                assert not changed.any(), "a slot outside the step changed"
    assert module.num_replays == 150
    assert not module.fallbacks


def random_caches(shape: Shape) -> dict[str, Tensor]:
    sizes, dtype = (PAGES, 2, KV_HEADS, PAGE, DIM), shape.kv_dtype or shape.dtype
    return {f"kv_cache_{i}": torch.randn(sizes, device=DEVICE).to(dtype) for i in range(2)}


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_a_moved_cache_is_noticed() -> None:
    """A pool at another address is not read at the old one: the step is eager, and counted with its name."""
    module = CudaGraphModule(TwoLayers("xqa", PLAIN), [1])
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
