"""``ad_flashinfer.quantized_linear`` beside a float64 model of its docstring, and other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.linear import float8

ROWS, DEPTH, LARGEST = 200, 300, 448.0
SCALES = {"tensor": (1,), "number": (), "channel": (ROWS, 1), "block": (2, 3)}
scales = pytest.mark.parametrize("scale", SCALES)
activations = pytest.mark.parametrize("activation", float8.ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def arguments(scale: str, activation: str, dtype: torch.dtype, bias: bool = True) -> dict[str, Any]:
    """Neither rows nor depth is a multiple of a block; one row of x is 0, one is far larger than the rest."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, DEPTH, generator=draw)
    x[0, 1] = 0
    x[1, 2] *= 100
    return {
        "x": x.to(dtype),
        "weight": (torch.randn(ROWS, DEPTH, generator=draw) * 100).to(torch.float8_e4m3fn),
        "weight_scale": torch.rand(SCALES[scale], generator=draw) * 1e-3 + 1e-4,
        "input_scale": torch.tensor([0.01]) if activation == "tensor" else None,
        "bias": torch.randn(ROWS, generator=draw).to(dtype) if bias else None,
        "activation": activation,
    }


def in_float64(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the docstring states but for the bias, with sums in float64, and the sum of all magnitudes."""
    x, weight = args["x"].float(), args["weight"].double()
    rounded = torch.empty(x.shape, dtype=torch.float64)
    for place in [(i, j) for i in range(x.shape[0]) for j in range(x.shape[1])]:
        step = 128 if args["activation"] == "block" else DEPTH
        for start in range(0, DEPTH, step):
            part = x[place][start : start + step]
            if args["activation"] == "none":
                rounded[place][start : start + step] = part.double()
                continue
            s = part.abs().max() / LARGEST if args["input_scale"] is None else args["input_scale"][0]
            s = s if s > 0 else torch.tensor(1.0)
            q = (part / s).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            rounded[place][start : start + step] = q.double() * s.double()
    scale = args["weight_scale"].double()
    for row in range(ROWS):
        if scale.numel() == 1:
            weight[row] *= scale.flatten()[0]
        elif len(scale) == ROWS:
            weight[row] *= scale[row, 0]
        else:
            weight[row] *= scale[row // 128][torch.arange(DEPTH) // 128]
    return rounded @ weight.T, rounded.abs() @ weight.abs().T


@dtypes
@activations
@scales
def test_computes_what_it_states(scale: str, activation: str, dtype: torch.dtype) -> None:
    """Up to float32 sums and one rounding to the dtype of x, two where the bias comes after it."""
    args = arguments(scale, activation, dtype)
    out = ops.quantized_linear(**args)
    wanted, magnitude = in_float64(args)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, (2, 7, ROWS), True)
    half, bias = torch.finfo(dtype).eps / 2, args["bias"].double()
    roundings = half * (wanted + bias).abs() + (half * wanted.abs() if activation == "block" else 0)
    assert ((out - wanted - bias).abs() <= 1.01 * roundings + 1e-6 * (magnitude + bias.abs())).all()


def test_computes_in_float64_where_x_is() -> None:
    """As a reference for the others."""
    args = arguments("channel", "token", torch.float32)
    exact = ops.quantized_linear(**{**args, "x": args["x"].double()})
    assert exact.dtype == torch.float64
    q = float8.quantized(args["x"].double().flatten(0, 1), None, "token").view(2, 7, DEPTH)
    weight = args["weight"].double() * args["weight_scale"].double()
    torch.testing.assert_close(exact, F.linear(q, weight, args["bias"].double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["tensor", "token"])
def test_rounds_activations_as_compressed_tensors_does(activation: str) -> None:
    """Bit by bit in float32, a row of zeros included."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    settings = quantization.QuantizationArgs(
        num_bits=8, type="float", strategy=activation, dynamic=activation == "token", symmetric=True
    )
    args = arguments("tensor", activation, torch.float32)
    x, scale = args["x"], args["input_scale"]
    if scale is None:
        scale, _ = helpers.compute_dynamic_scales_and_zp(x, settings, nn.Module())
    wanted = forward.fake_quantize(x, scale, None, settings)
    found = float8.quantized(x.flatten(0, 1), args["input_scale"], activation)
    assert torch.equal(found, wanted.flatten(0, 1))


def test_dequantizes_blocks_as_transformers_does() -> None:
    """Of a size that is no multiple of a block, in float32."""
    theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")
    args = arguments("block", "block", torch.float32)
    weight, scale = args["weight"], args["weight_scale"]
    if not hasattr(theirs, "_dequantize_fp8_weight"):
        pytest.skip("this transformers has no function for it")
    wanted = theirs._dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    assert torch.equal(float8.dequantized(weight, scale, torch.float32), wanted)


@activations
@scales
def test_is_token_by_token(scale: str, activation: str) -> None:
    """Other rows, however large, change nothing but the order of a sum."""
    args = arguments(scale, activation, torch.float32)
    alone = ops.quantized_linear(**{**args, "x": args["x"][1:, 3:4]})
    torch.testing.assert_close(ops.quantized_linear(**args)[1:, 3:4], alone, rtol=1e-5, atol=1e-5)
    assert torch.ops.ad_flashinfer.quantized_linear in ops.TOKEN_BY_TOKEN


@activations
def test_opcheck(activation: str) -> None:
    """Schema, fake and dynamic shapes pass torch's own checks; the fake tells the result's layout."""
    args = arguments("block", activation, torch.bfloat16, bias=activation == "token")
    op = torch.ops.ad_flashinfer.quantized_linear.default
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (), args, test_utils=others)
    # This check compares the arguments before and after by arithmetic, which float8 has not.
    torch.library.opcheck(op, (), args | {"weight": args["weight"].float()}, test_utils="test_schema")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in args.items()}
        fake, real = op(**fakes), ops.quantized_linear(**args)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "rows"}, "activation must be one of none, tensor, token, block.*'rows'"),
        ({"activation": "tensor"}, "input_scale goes with tensor alone, got 'tensor' without one"),
        ({"input_scale": torch.ones(1)}, "got 'token' with one"),
        ({"x": torch.ones(3, DEPTH).to(torch.float8_e4m3fn)}, "x must be of 16, 32 or 64 bits"),
    ],
    ids=["unknown", "no_scale", "a_scale", "float8"],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    """Arguments that do not say what to compute."""
    args = arguments("tensor", "token", torch.float32) | change
    with pytest.raises(ValueError, match=message):
        ops.quantized_linear(**args)


@pytest.mark.parametrize("has_zero_point", [False, True])
@pytest.mark.parametrize("activation", ["none", "token"])
def test_takes_integers_of_4_bits(activation: str, has_zero_point: bool) -> None:
    """As a linear of the plain weights, and by opcheck."""
    draw = torch.Generator().manual_seed(0)
    packed, zero_point = (
        torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        for shape in ((ROWS, DEPTH // 2), (ROWS, 10))
    )
    args = arguments("channel", activation, torch.float32)
    args["weight_scale"] = torch.rand(ROWS, 10, generator=draw)
    args |= {"weight": packed, "zero_point": zero_point & 15 if has_zero_point else None}
    low_first = torch.stack((packed % 16, packed // 16), -1).flatten(1).double()
    zero = (args["zero_point"].double() if has_zero_point else torch.full((ROWS, 10), 8.0)).repeat_interleave(
        30, 1
    )
    weight = (low_first - zero) * args["weight_scale"].double().repeat_interleave(30, 1)
    x = float8.quantized(args["x"].double().flatten(0, 1), None, activation).view(2, 7, DEPTH)
    exact = ops.quantized_linear(**args | {"x": args["x"].double()})
    torch.testing.assert_close(exact, F.linear(x, weight, args["bias"].double()), rtol=1e-12, atol=1e-9)
    torch.library.opcheck(torch.ops.ad_flashinfer.quantized_linear.default, (), args)
