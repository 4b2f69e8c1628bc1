"""The modules that hold quantized weights, and what puts them together from a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ad_flashinfer_pass.ops  # noqa: F401 -- registers the ops
from ad_flashinfer_pass.experts import Gate, gate_of
from ad_flashinfer_pass.kernels.linear.float8 import BLOCK, is_by_blocks
from ad_flashinfer_pass.models.quantized.scheme import Operands


class _Holder(nn.Module):
    """Parameters of any dtype, None among them."""

    def hold(self, **tensors: Tensor | None) -> None:
        """Each as a parameter of its name, without gradient."""
        for name, tensor in tensors.items():
            held = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, held)


class QuantizedLinear(_Holder):
    """A linear that computes by ``ops.quantized_linear``; its arguments are those of the op.

    Args:
        operands: float8_e4m3fn [rows, depth], or uint8 [rows, depth / 2], with scales.
        bias: [rows].
        activation: how what it is given is quantized.
    """

    def __init__(self, operands: Operands, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        weight = operands.weight
        self.out_features = weight.shape[0]
        self.in_features = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
        self.activation = activation
        self.hold(**operands._asdict(), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., depth] -> [..., rows]."""
        out: Tensor = torch.ops.ad_flashinfer.quantized_linear(
            x,
            self.weight,
            self.weight_scale,
            self.input_scale,
            self.bias,
            self.activation,
            self.zero_point,
        )
        return out

    def extra_repr(self) -> str:
        """For print."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.activation}"


class Projections(NamedTuple):
    """Of all experts of a layer: arguments of ``ops.quantized_experts``."""

    gate_up: Operands
    """Without a gate, or with ``up``, one projection."""
    down: Operands
    up: Operands | None = None
    """Where the scales of gate and up cannot be put together."""


class QuantizedExperts(_Holder):
    """The experts of a layer, computed by ``ops.quantized_experts``; its arguments are those of the op.

    Args:
        projections: of all experts.
        gate: what stands between them.
        gate_up_bias: [num_experts, rows].
        down_bias: likewise.
        input_quantization: how what a projection multiplies is rounded.
    """

    def __init__(
        self,
        projections: Projections,
        gate: Gate,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        input_quantization: str,
    ) -> None:
        super().__init__()
        gate_up, down, up = projections
        self.gate, self.input_quantization = gate, input_quantization
        self.num_experts = gate_up.weight.shape[0]
        self.hold(
            gate_up_proj=gate_up.weight,
            down_proj=down.weight,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            up_proj=None if up is None else up.weight,
            gate_up_scale=gate_up.weight_scale,
            down_scale=down.weight_scale,
            up_scale=None if up is None else up.weight_scale,
            gate_up_input_scale=gate_up.input_scale,
            down_input_scale=down.input_scale,
            gate_up_zero_point=gate_up.zero_point,
            down_zero_point=down.zero_point,
            up_zero_point=None if up is None else up.zero_point,
        )

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Tokens [t, hidden], and of each [t, k] the experts and their weights -> [t, hidden].

        The latter have other names in some models, in this order.
        """
        index, weights = (*routing, *named.values())
        out: Tensor = torch.ops.ad_flashinfer.quantized_experts(
            hidden_states,
            index,
            weights,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_bias,
            self.down_bias,
            self.up_proj,
            *self.gate,
            gate_up_scale=self.gate_up_scale,
            down_scale=self.down_scale,
            up_scale=self.up_scale,
            gate_up_input_scale=self.gate_up_input_scale,
            down_input_scale=self.down_input_scale,
            gate_up_zero_point=self.gate_up_zero_point,
            down_zero_point=self.down_zero_point,
            up_zero_point=self.up_zero_point,
            input_quantization=self.input_quantization,
        )
        return out

    def extra_repr(self) -> str:
        """For print."""
        return f"num_experts={self.num_experts}, {self.input_quantization}"


def quantized_experts(
    module: Any, path: str, projections: Projections, input_quantization: str
) -> QuantizedExperts:
    """In place of experts that go through transformers' interface.

    Args:
        module: those, with their biases.
        path: theirs, for messages.
        projections: quantized.
        input_quantization: see ``QuantizedExperts``.
    """
    into, out_of = (getattr(module, f"{part}_bias") if module.has_bias else None for part in names_of(module))
    return QuantizedExperts(projections, gate_of(module, path), into, out_of, input_quantization)


def names_of(module: Any) -> tuple[str, str]:
    """Of the parameters of experts that go through transformers' interface."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def put_together(experts: Sequence[Mapping[str, Operands]]) -> Projections:
    """The projections of experts that are stored one by one.

    Args:
        experts: of each ``down`` and ``up``, and ``gate`` if it has one. Gate and up have one input_scale.
    """
    stacked = {part: _stacked([expert[part] for expert in experts]) for part in experts[0]}
    if "gate" not in stacked:
        return Projections(stacked["up"], stacked["down"])
    gate, up = stacked["gate"], stacked["up"]
    rows = gate.weight.shape[1]
    if is_by_blocks(gate.weight, gate.weight_scale) and rows % BLOCK and gate.weight.dtype != torch.uint8:
        return Projections(gate, stacked["down"], up)  # a block would be of both
    scales = [
        part.weight_scale.expand(-1, rows, -1) if part.weight_scale.shape[1:] == (1, 1) else part.weight_scale
        for part in (gate, up)
    ]
    zero_points = [part.zero_point for part in (gate, up) if part.zero_point is not None]
    gate_up = Operands(
        torch.cat([gate.weight, up.weight], 1),
        torch.cat(scales, 1),
        gate.input_scale,
        torch.cat(zero_points, 1) if zero_points else None,
    )
    return Projections(gate_up, stacked["down"])


def _stacked(operands: Sequence[Operands]) -> Operands:
    weights, scales, inputs, zero_points = zip(*operands, strict=True)
    if scales[0].numel() == 1:
        scales = tuple(scale.reshape(1, 1) for scale in scales)
    return Operands(
        torch.stack(weights),
        torch.stack(scales),
        None if inputs[0] is None else torch.stack([scale.reshape(()) for scale in inputs]),
        None if zero_points[0] is None else torch.stack(zero_points),
    )
