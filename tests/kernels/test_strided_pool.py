"""How FMHA v2, which reads pools by their shape, is given one layer of a larger pool."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass.kernels.attention.fmha_v2 import _pages


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_pages_of_a_layer_are_pages_of_the_pool(layer: int) -> None:
    """Page numbers from the layer's first page on lead to K and V of each page, in the pool's own memory."""
    pool = torch.arange(5 * 3 * 2 * 2 * 4 * 8, dtype=torch.float32).view(5, 3, 2, 2, 4, 8)
    cache = pool[:, layer]
    table = torch.tensor([[4, 2, 0], [0, 1, 3]], dtype=torch.int32)
    seen, numbers = _pages(cache, table)
    assert seen.is_contiguous()
    assert (seen.data_ptr(), seen.shape[1:]) == (cache.data_ptr(), cache.shape[1:])
    assert (numbers.dtype, numbers.shape) == (torch.int32, table.shape)
    assert torch.equal(seen[numbers.long()], cache[table.long()])
    assert seen.storage_offset() + seen.numel() <= pool.numel()


def test_a_pool_that_has_no_whole_blocks_is_refused() -> None:
    """Heads apart from each other, or pages that are no multiple of a page apart."""
    table = torch.zeros(1, 1, dtype=torch.int32)
    heads_apart = torch.zeros(4, 2, 3, 8, 16)[:, :, :2]
    pages_apart = torch.zeros(4096).as_strided((4, 2, 2, 8, 16), (2 * 256 + 16, 256, 128, 16, 1))
    for pool in (heads_apart, pages_apart):
        with pytest.raises(ValueError, match="whole pages apart"):
            _pages(pool, table)
