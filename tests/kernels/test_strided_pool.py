"""How FMHA v2, which reads pools by their shape, is given one layer of a larger pool."""

from __future__ import annotations

import pytest
import torch

from ad_flashinfer_pass.kernels.fmha_v2 import _blocks


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_blocks_of_a_layer_are_its_pages(layer: int) -> None:
    """Block numbers relative to K's first block lead to K and V of each page, in both tensors' memory."""
    pool = torch.arange(5 * 3 * 2 * 2 * 4 * 8, dtype=torch.float32).view(5, 3, 2, 2, 4, 8)
    cache = pool[:, layer]
    table = torch.tensor([[4, 2, 0], [0, 1, 3]], dtype=torch.int32)
    (k, v), blocks = _blocks(cache, table)
    assert k.is_contiguous()
    assert v.is_contiguous()
    assert (v.data_ptr() - k.data_ptr()) == k[0].numel() * k.element_size(), "V is a whole block behind K"
    assert (blocks.dtype, tuple(blocks.shape)) == (torch.int32, (2, 2, 3))
    for row, pages in enumerate(table.tolist()):
        for column, page in enumerate(pages):
            assert torch.equal(k[blocks[row, 0, column]], cache[page, 0])
            assert torch.equal(v[blocks[row, 1, column] - 1], cache[page, 1])
    last = k.untyped_storage().nbytes() // k.element_size()
    assert int(blocks.max()) * k[0].numel() + cache.storage_offset() < last


def test_a_pool_that_has_no_whole_blocks_is_refused() -> None:
    """Heads apart from each other, or pages that are no multiple of a block away."""
    table = torch.zeros(1, 1, dtype=torch.int32)
    heads_apart = torch.zeros(4, 2, 3, 8, 16)[:, :, :2]
    pages_apart = torch.zeros(4096).as_strided((4, 2, 2, 8, 16), (2 * 256 + 16, 256, 128, 16, 1))
    for pool in (heads_apart, pages_apart):
        with pytest.raises(ValueError, match="whole blocks"):
            _blocks(pool, table)
