"""``head_linear`` against einsum: by torch, and by the kernel, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.attention.absorbing import head_linear  # noqa: E402
from ad_flashinfer_pass.kernels.linear import head_linear as kernel  # noqa: E402


def inputs(tokens: int, depth: int, rows: int, beside: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of 3 heads, each a view: a part of a wider query, and rows of a projection that has others."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, 3, depth + beside + 4, generator=generator)
    weight = torch.randn(3, depth + 5, rows, generator=generator)[:, 2 : 2 + depth] / depth**0.5
    return query[..., :depth], weight, query[..., depth : depth + beside] if beside else None


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows_last", "depth_last"])
@pytest.mark.parametrize(("depth", "rows", "beside"), [(16, 32, 8), (40, 72, 0), (600, 24, 5)])
def test_equals_einsum(tokens: int, is_transposed: bool, depth: int, rows: int, beside: int) -> None:
    """Of any sizes and strides."""
    x, weight, rest = inputs(tokens, depth, rows, beside)
    if is_transposed:
        weight = weight.mT.contiguous().mT
    wanted = torch.einsum("thd,hdr->thr", x, weight)
    wanted = wanted if rest is None else torch.cat((wanted, rest), -1)
    torch.testing.assert_close(head_linear(x, weight, rest), wanted)
    half = [None if t is None else t.to(DEVICE, torch.float16) for t in (x, weight, rest)]
    found = kernel.run(*half)  # type: ignore[arg-type]
    assert found.is_contiguous()
    torch.testing.assert_close(found.cpu().float(), wanted, atol=1e-2, rtol=1e-2)
