"""``ad_flashinfer.quantized_experts`` beside loops of ``quantized_linear``, and plain ``experts``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.experts import quantized
from ad_flashinfer_pass.kernels.experts.by_torch import gated
from ad_flashinfer_pass.kernels.linear import float8

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 160, 192, 5, 2, 11
KINDS = {
    "tensor": ("tensor", "tensor"),
    "row": ("row", "token"),
    "block": ("block", "block"),
    "weights": ("row", "none"),
    "mxfp4": ("mxfp4", "none"),
    "integers": ("integers", "token"),
    "zero_points": ("integers", "none"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def weight_of(scale: str, rows: int, columns: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weight of all experts and its scales."""
    if scale in ("mxfp4", "integers"):
        weight = torch.randint(0, 256, (EXPERTS, rows, columns // 2), generator=draw, dtype=torch.uint8)
        if scale == "mxfp4":
            shape = (EXPERTS, rows, columns // 32)
            return weight, torch.randint(115, 124, shape, generator=draw, dtype=torch.uint8)
        return weight, torch.rand(EXPERTS, rows, columns // 32, generator=draw) * 1e-2 + 1e-3
    shapes = {"tensor": (1, 1), "row": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}
    weight = (torch.randn(EXPERTS, rows, columns, generator=draw) * 100).to(torch.float8_e4m3fn)
    return weight, torch.rand(EXPERTS, *shapes[scale], generator=draw) * 1e-3 + 1e-4


def arguments(kind: str, dtype: torch.dtype = torch.float32, biases: bool = False) -> dict[str, Any]:
    """No token goes to the last expert."""
    draw = torch.Generator().manual_seed(0)
    scale, quantization = KINDS[kind]
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw)
    weights, index = torch.rand(TOKENS, EXPERTS - 1, generator=draw).topk(TOP_K)
    gate_up, gate_up_scale = weight_of(scale, 2 * WIDTH, HIDDEN, draw)
    down, down_scale = weight_of(scale, HIDDEN, WIDTH, draw)
    given: dict[str, Any] = {
        "hidden_states": hidden.to(dtype),
        "top_k_index": index,
        "top_k_weights": weights.to(dtype),
        "gate_up_proj": gate_up,
        "down_proj": down,
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "input_quantization": quantization,
    }
    if kind == "zero_points":
        for part in ("gate_up", "down"):
            shape = given[f"{part}_scale"].shape
            given[f"{part}_zero_point"] = torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
    if quantization == "tensor":
        given["gate_up_input_scale"] = torch.rand(EXPERTS, generator=draw) * 0.01 + 0.005
        given["down_input_scale"] = torch.rand(EXPERTS, generator=draw) * 0.1 + 0.05
    if biases:
        given["gate_up_bias"] = torch.randn(EXPERTS, 2 * WIDTH, generator=draw).to(dtype)
        given["down_bias"] = torch.randn(EXPERTS, HIDDEN, generator=draw).to(dtype)
    return given


def token_by_token(args: dict[str, Any]) -> Tensor:
    """The docstring, one token and one expert after the other."""
    rows = []
    for x, experts, weights in zip(
        args["hidden_states"], args["top_k_index"], args["top_k_weights"], strict=True
    ):
        parts = []
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            middle = gated(product(args, "gate_up", expert, x[None]))
            parts.append(product(args, "down", expert, middle)[0] * weight)
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def product(args: dict[str, Any], part: str, expert: int, x: Tensor) -> Tensor:
    input_scale = args.get(f"{part}_input_scale")
    out = ops.quantized_linear(
        x,
        args[f"{part}_proj"][expert],
        args[f"{part}_scale"][expert],
        None if input_scale is None else input_scale[expert],
        activation=args["input_quantization"],
        zero_point=args[f"{part}_zero_point"][expert] if f"{part}_zero_point" in args else None,
    )
    bias = args.get(f"{part}_bias")
    return out if bias is None else out + bias[expert]


@kinds
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_is_a_loop_of_quantized_linears(kind: str, biases: bool) -> None:
    """In float64, where no activation falls on the other side of a rounding."""
    args = arguments(kind, torch.float64, biases)
    torch.testing.assert_close(ops.quantized_experts(**args), token_by_token(args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["weights", "mxfp4"])
@pytest.mark.parametrize("gate", [{}, {"alpha": 1.702, "beta": 1.0, "limit": 7.0, "is_concatenated": False}])
def test_of_plain_activations_is_experts_of_plain_weights(kind: str, gate: dict[str, Any]) -> None:
    """With the same gate, biases and all."""
    args = arguments(kind, biases=True) | gate
    plain = {name: value for name, value in args.items() if not name.endswith(("_scale", "_quantization"))}
    for part in ("gate_up", "down"):
        plain[f"{part}_proj"] = float8.dequantized(args[f"{part}_proj"], args[f"{part}_scale"], torch.float32)
    torch.testing.assert_close(ops.quantized_experts(**args), ops.experts(**plain))


@kinds
def test_does_without_the_counts_that_a_graph_cannot_know(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, some at a time, it gives the same."""
    args = arguments(kind, torch.float64)
    wanted = ops.quantized_experts(**args)
    monkeypatch.setattr(quantized, "_counts", lambda expert, num_experts: None)
    monkeypatch.setattr(quantized, "COPIED_BYTES", 3 * 8 * args["down_proj"][0].numel())
    torch.testing.assert_close(ops.quantized_experts(**args), wanted, rtol=1e-12, atol=1e-12)


@kinds
def test_takes_up_by_itself(kind: str) -> None:
    """Gate and up in two tensors give the same."""
    args = arguments(kind)
    if kind == "block":  # three rows of blocks, of which the middle one is of both
        args["gate_up_scale"][:, 1] = args["gate_up_scale"][:, 2]
    wanted = ops.quantized_experts(**args)
    args["gate_up_proj"], args["up_proj"] = args["gate_up_proj"].chunk(2, 1)
    scale = args["gate_up_scale"]
    if kind == "zero_points":
        args["gate_up_zero_point"], args["up_zero_point"] = args["gate_up_zero_point"].chunk(2, 1)
    if kind == "block":
        args["gate_up_scale"], args["up_scale"] = scale[:, :2], scale[:, 1:]
    else:
        args["gate_up_scale"], args["up_scale"] = (scale, scale) if kind == "tensor" else scale.chunk(2, 1)
    torch.testing.assert_close(ops.quantized_experts(**args), wanted, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    """Schema, fake and dynamic shapes pass torch's own checks; tokens are independent; none is no token."""
    args = arguments(kind, dtype)
    op: Any = torch.ops.ad_flashinfer.quantized_experts.default
    if dtype == torch.bfloat16:
        others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, (), args, test_utils=others)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in args.items()}
        fake = op(**fakes)
    real = ops.quantized_experts(**args)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    tokens = ("hidden_states", "top_k_index", "top_k_weights")
    some = ops.quantized_experts(**args | {name: args[name][3:4] for name in tokens})
    torch.testing.assert_close(real[3:4], some, rtol=2e-2, atol=2e-2)
    none = ops.quantized_experts(**args | {name: args[name][:0] for name in tokens})
    assert none.shape == (0, HIDDEN)
    assert torch.ops.ad_flashinfer.quantized_experts in ops.TOKEN_BY_TOKEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_quantization": "rows"}, "must be one of none, tensor, token, block.*'rows'"),
        ({"input_quantization": "tensor"}, "input scales go with tensor alone"),
        ({"down_input_scale": torch.ones(EXPERTS)}, "input scales go with tensor alone"),
        ({"is_transposed": True}, r"projections must be \[num_experts, rows, columns\]"),
        ({"up_scale": torch.ones(1)}, "each with scales"),
        ({"top_k_weights": torch.ones(3, 2)}, "experts of 11 tokens need as many rows"),
    ],
    ids=["unknown", "no_scale", "a_scale", "transposed", "up", "tokens"],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    """Arguments that do not say what to compute."""
    with pytest.raises(ValueError, match=message):
        ops.quantized_experts(**arguments("row") | change)
