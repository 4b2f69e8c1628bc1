"""``ad_flashinfer.experts``: the experts of a mixture-of-experts layer, and the sum of what they give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.experts import by_torch
from ad_flashinfer_pass.kernels.experts.arguments import arguments
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.ops.define import define
from ad_flashinfer_pass.ops.launch import launching

KERNELS = {"torch": (0,), "triton": (0,), "gemv": (6,), "grouped": (7,)}
"""The kernels that a plan may name, with the numbers of options that it takes."""


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
    num_tokens = top_k_index.shape[0]
    if hidden_states.shape[0] != num_tokens or top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"experts of {hidden_states.shape[0]} tokens need as many rows of indices and weights, got "
            f"{list(top_k_index.shape)} and {list(top_k_weights.shape)}."
        )
    given: dict[str, Any] = {
        "hidden_states": hidden_states,
        "top_k_index": top_k_index,
        "top_k_weights": top_k_weights,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
        "up_proj": up_proj,
        "activation": activation,
        "alpha": alpha,
        "beta": beta,
        "limit": limit,
        "has_gate": has_gate,
        "is_concatenated": is_concatenated,
        "is_transposed": is_transposed,
        "weigh_input": weigh_input,
    }
    chosen = KernelPlan.parse(plan).at(num_tokens)
    if chosen.name != "torch" and num_tokens and _can_triton(hidden_states, down_proj):
        from ad_flashinfer_pass.kernels.experts import select  # needs triton

        with launching(hidden_states.device, top_k_index=top_k_index, down_proj=down_proj):
            return select.run(arguments(**given), chosen)
    return by_torch.run(**given, in_float32=in_float32)


def _can_triton(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16)


define(
    experts,
    fake=lambda hidden_states, down_proj, is_transposed, **_: hidden_states.new_empty(
        (hidden_states.shape[0], down_proj.shape[-1 if is_transposed else -2])
    ),
)
