"""``initialize_cache``: how many pages there are, what they take, and when there are too few."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from torch import nn

from ad_flashinfer_pass import records, registry
from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.records import KvCacheResource, TransformContext
from ad_flashinfer_pass.transforms import initialize_cache
from tests.transforms.small_models import context

PAGE = 5
RESOURCES = [
    KvCacheResource("kv_cache_0", num_kv_heads=2, head_dim=8, page_size=PAGE, dtype=torch.float32),
    KvCacheResource("kv_cache_1", num_kv_heads=4, head_dim=6, page_size=PAGE, dtype=torch.bfloat16),
]
# K and V, heads, tokens, head size, bytes of an element.
PAGE_BYTES = 2 * 2 * PAGE * 8 * 4 + 2 * 4 * PAGE * 6 * 2


def planned(
    free: int | None, monkeypatch: pytest.MonkeyPatch, **config: object
) -> tuple[TransformContext, list[str]]:
    """The context after the transform on a device with ``free`` bytes, and its notes."""
    if free is not None:
        monkeypatch.setattr(initialize_cache, "free_bytes", lambda device: free)
    ctx = context(kv_cache_config={"tokens_per_block": PAGE, "free_gpu_memory_fraction": 0.5, **config})
    ctx.resources += RESOURCES
    _, report = registry.get("initialize_cache")(nn.Module(), ctx)
    assert report.num_matches == len(RESOURCES)
    return ctx, report.notes


def test_pools_hold_every_sequence_at_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default max_batch_size sequences of max_seq_len tokens fit, beside the scratch page."""
    ctx, notes = planned(None, monkeypatch)
    pages = 6 * 13  # six sequences of 64 tokens, each in pages of its own
    assert ctx.num_pages == pages + 1
    assert {name: tuple(pool.shape) for name, pool in ctx.caches.items()} == {
        "kv_cache_0": (pages + 1, 2, 2, PAGE, 8),
        "kv_cache_1": (pages + 1, 2, 4, PAGE, 6),
    }
    assert [pool.dtype for pool in ctx.caches.values()] == [torch.float32, torch.bfloat16]
    assert not any(pool.any() for pool in ctx.caches.values())
    mib = (pages + 1) * PAGE_BYTES / 2**20
    assert notes == [
        f"{pages} pages of 5 tokens: {pages * 5} tokens, {mib:.1f} MiB in 2 pools, "
        f"{PAGE_BYTES // 5} bytes a token"
    ]


@pytest.mark.parametrize(("max_tokens", "pages"), [(10, 2), (11, 3), (1, 1), (10_000, 78)])
def test_max_tokens_bounds_the_pools(max_tokens: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """max_tokens is rounded up to pages, and never gives more than all sequences need."""
    ctx, _ = planned(None, monkeypatch, max_tokens=max_tokens)
    assert ctx.num_pages == pages + 1


def test_memory_bounds_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools, scratch page included, take at most their share of the free memory, and the report says so."""
    ctx, notes = planned(2 * 10 * PAGE_BYTES + 5, monkeypatch)
    assert ctx.num_pages == 10
    assert sum(pool.nbytes for pool in ctx.caches.values()) == 10 * PAGE_BYTES
    assert notes[1] == "memory limits it: 78 pages were wanted"


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the scratch page and one more, the error has both numbers and the way out."""
    free = 2 * 2 * PAGE_BYTES - 2
    with pytest.raises(CapacityError) as raised:
        planned(free, monkeypatch)
    assert str(raised.value) == (
        f"the KV cache needs at least {2 * PAGE_BYTES} bytes, {free // 2} are free on cpu "
        "(free_gpu_memory_fraction=0.5). Free memory or lower tokens_per_block."
    )


def test_free_bytes_of_the_cpu_is_what_the_system_has() -> None:
    """The CPU's free memory is a number of bytes below its total."""
    assert 2**20 < initialize_cache.free_bytes(torch.device("cpu")) < 2**50


def test_memory_that_the_cpu_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ulimit -v, or where memory must not be overcommitted."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(records, "mmap", refuse)
    with pytest.raises(CapacityError, match=r"kv_cache_0: .* not give \d+ bytes for 3 pages .*Lower"):
        RESOURCES[0].allocate(3, torch.device("cpu"))
