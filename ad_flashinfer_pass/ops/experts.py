"""``ad_flashinfer.experts``: the experts of a mixture-of-experts layer, and the sum of what they give.

``ad_flashinfer.quantized_experts`` is the same of weights that are float8 or of 4 bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.experts import by_torch, quantized
from ad_flashinfer_pass.kernels.experts.arguments import arguments
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.kernels.linear import float8
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching

KERNELS = {"torch": (0,), "triton": (0,), "gemv": (6,), "grouped": (7,), "grouped_w8a8": (7,)}
"""The kernels that a plan may name, with the numbers of options that it takes."""
_FLOATS = (torch.bfloat16, torch.float16)


def experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_proj: Tensor | None = None,
    activation: str = "silu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    in_float32: bool = False,
    has_gate: bool = True,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    weigh_input: bool = False,
    plan: str = "torch",
) -> Tensor:
    """The sum over j of ``weights[t, j] * down(gate(gate_up(hidden[t])))``, by expert ``index[t, j]``.

    Token by token: a row of the result depends on the same row of the first three arguments and on no other,
    but for rounding, which differs with the number of rows that an expert has. Products are in the dtype of
    the experts, a weight and what it multiplies are promoted, the k results are summed in float32.

    Args:
        hidden_states: [t, hidden].
        top_k_index: int [t, k], each in [0, num_experts).
        top_k_weights: [t, k].
        gate_up_proj: [num_experts, 2 * width, hidden]; without a gate [num_experts, width, hidden].
        down_proj: [num_experts, hidden, width].
        gate_up_bias: [num_experts, 2 * width]; without a gate [num_experts, width].
        down_bias: [num_experts, hidden].
        up_proj: [num_experts, width, hidden]; gate_up_proj is the gate alone then, of the same shape.
        activation: of ``by_torch.ACTIVATIONS``; of the gate, and without a gate of all.
        alpha: if not 1, the gate becomes gate * sigmoid(alpha * gate), which is silu for 1.
        beta: added to what the activated gate multiplies.
        limit: first, gate is cut at limit and what it multiplies to [-limit, limit].
        in_float32: the gate is computed in float32 and rounded once.
        has_gate: half of the columns of gate_up are multiplied by the other half, activated.
        is_concatenated: all of the gate stands before the rest; else the two alternate.
        is_transposed: the last two dimensions of all projections are swapped.
        weigh_input: weights multiply hidden_states in place of the results.
        plan: torch, triton or a kernel of ``kernels.experts`` with its options, by the number of tokens: a
            ``KernelPlan``. On a CPU it is torch. Triton's round once between the projections.

    Returns:
        [t, hidden], contiguous, in the dtype of hidden_states.

    Raises:
        ValueError: the first three are not of the same tokens.
    """
    given = dict(locals())
    chosen = KernelPlan.parse(given.pop("plan")).at(_num_tokens(given))
    if chosen.name != "torch" and len(hidden_states) and _can_triton(hidden_states, down_proj):
        from ad_flashinfer_pass.kernels.experts import select  # needs triton

        del given["in_float32"]
        with launching(hidden_states.device, top_k_index=top_k_index, down_proj=down_proj):
            return select.run(arguments(**given), chosen)
    return by_torch.run(**given)


def quantized_experts(
    *args: Any,
    gate_up_scale: Tensor,
    down_scale: Tensor,
    up_scale: Tensor | None = None,
    gate_up_input_scale: Tensor | None = None,
    down_input_scale: Tensor | None = None,
    gate_up_zero_point: Tensor | None = None,
    down_zero_point: Tensor | None = None,
    up_zero_point: Tensor | None = None,
    input_quantization: str = "none",
    **kwargs: Any,
) -> Tensor:
    """``experts`` of float8 or 4-bit projections: its arguments, in its order, then the scales by name.

    Each product is that of ``quantized_linear`` of the same numbers, without a bias: in float32, in float64
    if hidden_states are, rounded once to their dtype. All that stands around the products is as in
    ``experts``; biases are not quantized.

    Args:
        args: of ``experts``. Projections are float8_e4m3fn; or MXFP4 or integers of 4 bits, uint8 with half
            as many columns, by ``four_bits.pack``.
        gate_up_scale: of gate_up_proj. Float8: of each expert, [num_experts, 1, 1]; of each row,
            [num_experts, rows, 1]; or of each block of 128 x 128, [num_experts, ceil(rows / 128),
            ceil(columns / 128)].
            MXFP4: uint8 [num_experts, rows, columns / 32], 2^(scale - 127) for each 32 elements of a row.
            Integers: a real dtype, [num_experts, rows, columns / group].
        down_scale: likewise of down_proj.
        up_scale: likewise of up_proj, if that is given.
        gate_up_input_scale: [num_experts], what the ``tensor`` quantization of hidden_states divides by.
        down_input_scale: [num_experts], likewise of what down_proj multiplies.
        gate_up_zero_point: uint8 of the shape of gate_up_scale, what is taken from integers. Default: 8.
        down_zero_point: likewise.
        up_zero_point: likewise.
        input_quantization: how what a projection multiplies is rounded, the ``activation`` of
            ``quantized_linear``.
        kwargs: of ``experts``. is_transposed must be False. Kernels other than torch's leave activations in
            16 bits (W8A16, W4A16), whatever input_quantization says; grouped_w8a8 quantizes them.

    Returns:
        [t, hidden], contiguous, in the dtype of hidden_states.

    Raises:
        ValueError: tokens differ in number, projections are transposed, or input scales do not go with the
            quantization.
    """
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    named = given.arguments
    chosen = KernelPlan.parse(named.pop("plan")).at(_num_tokens(named))
    inputs = (gate_up_input_scale, down_input_scale)
    is_known = input_quantization in float8.ACTIVATIONS
    if not is_known or any((input_quantization == "tensor") != (scale is not None) for scale in inputs):
        raise ValueError(
            f"quantized_experts: input_quantization must be one of {', '.join(float8.ACTIVATIONS)}, and "
            f"input scales go with tensor alone, got {input_quantization!r}."
        )
    if named["is_transposed"] or (up_scale is None) != (named["up_proj"] is None):
        raise ValueError(
            "quantized_experts: projections must be [num_experts, rows, columns], each with scales."
        )
    hidden_states, down_proj = named["hidden_states"], named["down_proj"]
    weights = [(named["gate_up_proj"], gate_up_scale), (down_proj, down_scale)]
    fits = hidden_states.dtype in _FLOATS and all(float8.has_kernels(*each) for each in weights)
    if chosen.name != "torch" and fits and len(hidden_states) and hidden_states.device.type == "cuda":
        from ad_flashinfer_pass.kernels.experts import select  # needs triton

        del named["in_float32"]
        scaled = arguments(
            **named,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
            up_scale=up_scale,
            gate_up_input_scale=gate_up_input_scale,
            down_input_scale=down_input_scale,
            gate_up_zero_point=gate_up_zero_point,
            down_zero_point=down_zero_point,
            up_zero_point=up_zero_point,
            input_quantization=input_quantization,
        )
        with launching(hidden_states.device, top_k_index=named["top_k_index"], down_proj=down_proj):
            return select.run(scaled, chosen)
    scales = [quantized.Scales(gate_up_scale, gate_up_input_scale, gate_up_zero_point)]
    if up_scale is not None:
        scales.append(quantized.Scales(up_scale, gate_up_input_scale, up_zero_point))
    scales.append(quantized.Scales(down_scale, down_input_scale, down_zero_point))
    products = partial(
        quantized.products,
        scales=scales,
        quantization=input_quantization,
        dtype=named["hidden_states"].dtype,
    )
    return by_torch.run(**named, products=products)


_SIGNATURE = inspect.signature(experts)
_OWN = inspect.signature(quantized_experts)
# The arguments of experts are written once; those of its own have to be named.
quantized_experts.__signature__ = _OWN.replace(  # type: ignore[attr-defined]
    parameters=[
        *_SIGNATURE.parameters.values(),
        *(each for each in _OWN.parameters.values() if each.kind == inspect.Parameter.KEYWORD_ONLY),
    ]
)


def _num_tokens(given: Mapping[str, Any]) -> int:
    rows, index, weights = (given[name] for name in ("hidden_states", "top_k_index", "top_k_weights"))
    if rows.shape[0] != index.shape[0] or weights.shape != index.shape:
        raise ValueError(
            f"experts of {rows.shape[0]} tokens need as many rows of indices and weights, got "
            f"{list(index.shape)} and {list(weights.shape)}."
        )
    return int(index.shape[0])


def _can_triton(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cuda" and weight.dtype in _FLOATS


for op in (experts, quantized_experts):
    define(
        op,
        fake=lambda hidden_states, down_proj, is_transposed, **_: hidden_states.new_empty(
            (hidden_states.shape[0], down_proj.shape[-1 if is_transposed else -2])
        ),
    )
