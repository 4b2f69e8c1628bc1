"""Float8 linears on a GPU, against the stated arithmetic in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.linear import small_gemm
from ad_flashinfer_pass.kernels.linear.float8 import BLOCK, by_torch

assert ops.__name__  # importing it registers the ops
LINEAR, QUANTIZED = torch.ops.ad_flashinfer.linear, torch.ops.ad_flashinfer.quantized_linear
ROWS, DEPTH = 384, 512


def drawn(tokens: int, scaling: str, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, DEPTH, generator=generator).to(torch.float8_e4m3fn)
    sizes = {"tensor": (1,), "row": (ROWS, 1), "block": (ROWS // BLOCK, DEPTH // BLOCK)}[scaling]
    scale = torch.rand(sizes, generator=generator) / 8 + 0.01
    x = torch.randn(tokens, DEPTH, generator=generator)
    return x, weight, scale, torch.tensor([0.01]) if activation == "tensor" else None


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", [1, 3, 64, 200, 600])
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
@pytest.mark.parametrize("activation", ["none", "tensor", "token", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_as_near_as_its_dtype_to_what_is_stated(
    dtype: torch.dtype, activation: str, scaling: str, tokens: int
) -> None:
    """With 16-bit activations in place of float8, too, whose rounding the tolerance leaves room for."""
    x, weight, scale, given = drawn(tokens, scaling, activation)
    x = x.to(dtype)
    bias = torch.linspace(-1, 1, ROWS).to(dtype)
    wanted = by_torch(x.double(), weight, scale, given, bias.double(), activation)
    exact = by_torch(x.double(), weight, scale, None, bias.double(), "none")
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in (x, weight, scale, given, bias)]
    found = QUANTIZED(*on_gpu, activation)
    assert found.dtype == dtype
    # float8 where the op says so and the kernel can, else nearer to the exact product than that.
    assert min(error(found, wanted), error(found, exact)) < 4e-3


@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
@pytest.mark.parametrize("scaling", ["tensor", "row", "block"])
@pytest.mark.parametrize("gated", [False, True])
def test_small_gemm_dequantizes_in_registers(gated: bool, scaling: str, tokens: int) -> None:
    """Each candidate, with a norm, and with a residual or a gate; rows of both halves have scales."""
    x, weight, scale, _ = drawn(tokens, scaling, "none")
    if gated:  # halves of whole blocks
        weight, scale = torch.cat([weight, weight.flip(0)]), torch.cat([scale, scale.flip(0)])
        scale = scale[:1] if scaling == "tensor" else scale
    x, norm = x.bfloat16(), torch.linspace(0.5, 1.5, DEPTH).bfloat16()
    residual = None if gated else torch.linspace(-1, 1, ROWS).bfloat16().repeat(tokens, 1)
    normed = F.rms_norm(x.double(), norm.shape, norm.double(), 1e-6)
    wanted = by_torch(normed, weight, scale, None, None, "none")
    if gated:
        wanted = F.silu(wanted[:, :ROWS]) * wanted[:, ROWS:]
    else:
        assert residual is not None
        wanted = wanted + residual.double()
    configs = small_gemm.candidates(tokens, ROWS, DEPTH, gated, "w8a16", scaling == "block")
    assert configs
    for config in configs:
        kernel = "/".join(map(str, ("small_gemm", *config)))
        args = (x, weight, None, norm, 1e-6, residual, gated, scale)
        found = LINEAR(
            *(a.cuda() if isinstance(a, Tensor) else a for a in args), plan=f"torch {tokens}={kernel}"
        )
        assert error(found, wanted) < 6e-3, config


@pytest.mark.parametrize("tokens", [2, 17, 64])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("activation", ["tensor", "token"])
def test_small_gemm_with_float8_activations(activation: str, scaling: str, tokens: int) -> None:
    """Of a normed x: a number may round to the next float8 where the norm rounds otherwise."""
    x, weight, scale, given = drawn(tokens, scaling, activation)
    x, norm = x.bfloat16(), torch.linspace(0.5, 1.5, DEPTH).bfloat16()
    normed = F.rms_norm(x.double(), norm.shape, norm.double(), 1e-6)
    wanted = by_torch(normed, weight, scale, given, None, activation)
    configs = small_gemm.candidates(tokens, ROWS, DEPTH, False, "w8a8")
    assert configs
    for config in configs:
        kernel = "/".join(map(str, ("small_gemm_w8a8", *config)))
        args = (x, weight, None, norm, 1e-6, None, False, scale, given, activation)
        found = LINEAR(
            *(a.cuda() if isinstance(a, Tensor) else a for a in args), plan=f"torch {tokens}={kernel}"
        )
        assert error(found, wanted) < 6e-3, config
