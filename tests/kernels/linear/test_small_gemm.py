"""The kernels for linears of few tokens, against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.linear import float8, quantize, small_gemm  # noqa: E402
from ad_flashinfer_pass.kernels.linear.by_torch import by_torch  # noqa: E402
from ad_flashinfer_pass.kernels.linear.quantized import Quantization  # noqa: E402
from ad_flashinfer_pass.kernels.linear.small_gemm import Around, Config  # noqa: E402
from ad_flashinfer_pass.ops.linear import linear  # noqa: E402

# The interpreter multiplies bfloat16 by its bits.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
CASES = [
    (1, 36, 96, Config(4, 64, 1, 2, 1)),
    (1, 8, 200, Config(2, 128, 1, 2, 1)),
    (2, 36, 128, Config(16, 64, 1, 2, 3)),
    (16, 48, 256, Config(32, 64, 2, 2, 3)),
    (17, 50, 512, Config(16, 128, 4, 4, 3)),
    (64, 34, 128, Config(16, 64, 2, 4, 3)),
]


def random(*shape: int, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DTYPE).to(DEVICE)


def assert_close(
    found: Tensor, x: Tensor, weight: Tensor, around: Around, how: Quantization | None = None
) -> None:
    """Within two roundings to DTYPE of the inputs' products: of the normed x, and of the result."""
    wide: list[Any] = [value.double() if isinstance(value, Tensor) else value for value in around]
    if how is not None:
        weight = float8.dequantized(weight, how.weight_scale, torch.float64, how.zero_point)
    expected = by_torch(x.double(), weight.double(), *wide)
    norm = None if around.norm is None else around.norm.double()
    v = x.double() if norm is None else F.rms_norm(x.double(), norm.shape, norm, around.eps)
    terms = v.abs() @ weight.double().abs().T + 1
    if around.gated:
        gate, up = terms.chunk(2, -1)
        terms = gate * up
    eps = torch.finfo(DTYPE).eps
    assert ((found.double() - expected).abs() <= 2 * eps * expected.abs() + (eps / 8) * terms).all()


@pytest.mark.parametrize("scale", [None, 0.01])
def test_what_is_not_a_number_stays_so_in_float8(scale: float | None) -> None:
    """Else the engine, which looks at logits, would not see it."""
    x = random(3, 40, seed=0)
    x[1, 7] = float("nan")
    given = None if scale is None else torch.tensor([scale], device=DEVICE)
    values, scales = quantize.quantize(x, given)
    assert scales.isfinite().all()
    if DEVICE.type == "cuda":
        assert values.float().isnan().nonzero().tolist() == [[1, 7]]
    else:  # the interpreter keeps the first bits of a NaN, which are 384 in this dtype
        assert abs(float(values[1, 7])) == 384


@pytest.mark.parametrize("parts", ["", "bias", "norm", "residual", "gated", "bias norm residual gated"])
@pytest.mark.parametrize(("tokens", "rows", "depth", "config"), CASES)
def test_products(tokens: int, rows: int, depth: int, config: Config, parts: str) -> None:
    gated = "gated" in parts
    x, weight = random(tokens, depth, seed=0), random(rows, depth, seed=1)
    around = Around(
        bias=random(rows, seed=2) if "bias" in parts else None,
        norm=random(depth, seed=3) if "norm" in parts else None,
        eps=1e-5,
        residual=random(tokens, rows // (1 + gated), seed=4) if "residual" in parts else None,
        gated=gated,
    )
    for _ in range(2):  # the second launch finds the counters as the first one left them
        out = small_gemm.run(x, weight, around, config)
        assert_close(out, x, weight, around)


def test_the_op_takes_a_residual_that_is_part_of_wider_rows() -> None:
    """As that of a head which reads an embedding and a hidden state side by side."""
    x, weight, wide = random(5, 128, seed=0), random(36, 128, seed=1), random(5, 72, seed=2)
    plan = "/".join(map(str, ("small_gemm", *Config(16, 64, 1, 2, 3))))
    out = linear(x, weight, residual=wide[:, 36:], plan=plan)
    assert_close(out, x, weight, Around(residual=wide[:, 36:]))
    around = Around(residual=wide[:, 36:].contiguous())
    assert_close(small_gemm.run(x, weight, around, Config(16, 64, 1, 2, 3)), x, weight, around)


@pytest.mark.parametrize("parts", ["residual", "bias norm gated"])
@pytest.mark.parametrize("group", [32, 64, 384])
@pytest.mark.parametrize("numbers", ["integers", "zero points", "e2m1"])
@pytest.mark.parametrize(
    ("tokens", "config"),
    [
        *[(1, Config(4, 256, 1, 2, 1)), (5, Config(16, 128, 3, 2, 3)), (33, Config(32, 128, 1, 2, 3))],
        (100, Config(16, 128, 3, 4, 3)),
    ],
)
def test_weights_of_4_bits(tokens: int, config: Config, numbers: str, group: int, parts: str) -> None:
    """Against float64; 20 rows are no whole number of tiles, 384 elements none of blocks of 256."""
    gated, rows, depth = "gated" in parts, 20, 384
    draw = torch.Generator().manual_seed(0)
    shape = (rows, depth // group)
    weight = torch.randint(256, (rows, depth // 2), generator=draw, dtype=torch.uint8)
    scale, zero = torch.rand(shape, generator=draw).to(DTYPE) / 8 + 0.01, None
    if numbers == "e2m1":
        scale = torch.randint(115, 126, shape, generator=draw, dtype=torch.uint8)
    elif numbers == "zero points":
        zero = torch.randint(16, shape, generator=draw, dtype=torch.uint8).to(DEVICE)
    how = Quantization(scale.to(DEVICE), None, "none", zero)
    x, weight = random(tokens, depth, seed=0), weight.to(DEVICE)
    around = Around(
        bias=random(rows, seed=2) if "bias" in parts else None,
        norm=random(depth, seed=3) if "norm" in parts else None,
        eps=1e-5,
        residual=random(tokens, rows // (1 + gated), seed=4) if "residual" in parts else None,
        gated=gated,
    )
    out = small_gemm.run(x, weight, around, config, how)
    assert_close(out, x, weight, around, how)


def test_e2m1_of_all_scales() -> None:
    """From 2^-127, which is no normal float32, on."""
    scale = torch.arange(0, 144, dtype=torch.uint8).repeat_interleave(2).view(144, 2).to(DEVICE)
    weight = torch.randint(256, (144, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight, x = weight.to(DEVICE), torch.ones(1, 64, dtype=torch.bfloat16, device=DEVICE)
    how = Quantization(scale, None, "none")
    found = small_gemm.run(x, weight, Around(), Config(4, 64, 1, 2, 1), how)
    expected = float8.dequantized(weight, scale, torch.float64).sum(1).bfloat16()
    normal = expected.abs() >= torch.finfo(torch.bfloat16).tiny
    assert torch.equal(found[0, normal], expected[normal])
    assert (found[0, ~normal].abs() <= torch.finfo(torch.bfloat16).tiny).all()


@pytest.mark.parametrize("numbers", ["integers", "zero points", "e2m1"])
def test_expanded_weights_of_4_bits(numbers: str) -> None:
    """Bit by bit what torch makes of them."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(256, (20, 320), generator=draw, dtype=torch.uint8).to(DEVICE)
    scale, zero = torch.rand(20, 10, generator=draw).to(DTYPE), None
    if numbers == "e2m1":
        scale = torch.randint(115, 126, (20, 20), generator=draw, dtype=torch.uint8)
    elif numbers == "zero points":
        zero = torch.randint(16, (20, 10), generator=draw, dtype=torch.uint8).to(DEVICE)
    found = quantize.expand(weight, scale.to(DEVICE), DTYPE, zero)
    assert torch.equal(found, float8.dequantized(weight, scale.to(DEVICE), DTYPE, zero))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("tokens", "rows"), [(7, 1), (1, 1100), (7, 1100)])
def test_sums_are_multiplied_by_scales(tokens: int, rows: int, has_bias: bool) -> None:
    """Of tokens and rows, or one for all of them; rounded once."""
    sums, bias = random(7, 1100, seed=0), random(1100, seed=1) if has_bias else None
    scale, weight_scale = (torch.rand(n, 1, device=DEVICE) for n in (tokens, rows))
    wanted = sums.float() * scale * weight_scale.T + (0.0 if bias is None else bias.float())
    found = quantize.rescale(sums.clone(), scale, weight_scale, bias)
    torch.testing.assert_close(found, wanted.to(DTYPE))


def test_candidates_of_4_bits_fit_the_group() -> None:
    """32 words are read at once of groups of 128, else 16."""
    for group, depth, read in ((32, 2880, {64}), (64, 4096, {64, 128}), (128, 4096, {128, 256})):
        found = small_gemm.candidates(8, 6144, depth, numbers="w4a16", group=group)
        assert {config.depth for config in found} == read


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 64])
def test_candidates_fit_the_shape(tokens: int, gated: bool) -> None:
    found = small_gemm.candidates(tokens, 6144, 4096, gated)
    assert found
    assert all(4096 % (config.depth * config.split) == 0 for config in found)
    assert small_gemm.candidates(65, 6144, 4096) == []


def test_weights_of_4_bits_have_candidates_for_more_tokens() -> None:
    few = small_gemm.candidates(65, 6144, 4096, numbers="w4a16", group=128)
    assert few == small_gemm.candidates(128, 6144, 4096, numbers="w4a16", group=128) != []
    assert small_gemm.candidates(129, 6144, 4096, numbers="w4a16", group=128) == []


def test_candidates_fit_the_shared_memory() -> None:
    """A GPU with less of it has fewer, and each has some."""
    sizes = (16, 6144, 4096)
    counts = [len(small_gemm.candidates(*sizes, shared_bytes=kib * 1024)) for kib in (220, 156, 92)]
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] < counts[0]
