"""The arguments of ``ops.experts`` in one form, whatever the layout of the weights, and what kernels take.

Needs no triton, as a graph that is shown for a GPU elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import float8

DEFAULT = "triton"
"""The plan of experts that were not measured: the first of ``select.candidates``."""
MAX_COLUMNS = 1024
"""Of a row of ``top_k``."""
MAX_K = 32
"""Of ``top_k``: each is a turn of a loop that is written out."""


class Projection(NamedTuple):
    """One product of an expert."""

    weight: Tensor
    """[num_experts, rows, columns], of any strides."""
    bias: Tensor | None
    """[num_experts, rows]."""
    scale: Tensor | None = None
    """Of a float8 or 4-bit weight, as ``ops.quantized_experts`` takes it; of any strides."""
    input_scale: Tensor | None = None
    """[num_experts], contiguous; likewise, of what it multiplies."""
    zero_point: Tensor | None = None
    """Of integers of 4 bits; strides as of scale."""

    @property
    def bits(self) -> int:
        """Of an element of the weight."""
        return 4 if self.weight.dtype == torch.uint8 else 8 * self.weight.itemsize

    @property
    def depth(self) -> int:
        """Elements of a row."""
        return self.weight.shape[2] * (2 if self.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Elements of a row that share a scale, of 4 bits; else 0."""
        return 0 if self.scale is None or self.bits != 4 else self.depth // self.scale.shape[2]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the weight, then of the bias; 0 without one."""
        return (*self.weight.stride(), *((0, 0) if self.bias is None else self.bias.stride()))

    @property
    def scale_strides(self) -> tuple[int, int]:
        """Of experts and of rows, or rows of blocks; 0 where all have one scale."""
        if self.scale is None:
            return 0, 0
        return self.scale.stride(0), self.scale.stride(1) if self.scale.shape[1] > 1 else 0

    @property
    def is_by_blocks(self) -> bool:
        """Whether each block of 128 x 128 has a scale."""
        if self.scale is None or self.bits == 4:
            return False
        return float8.is_by_blocks(self.weight[0], self.scale[0])


class Experts(NamedTuple):
    """See ``ops.experts.experts``."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    gate: Projection
    """Without a gate, what is activated."""
    up: Projection | None
    """What the activated gate multiplies; strides as of gate."""
    down: Projection
    activation: str
    alpha: float
    beta: float
    limit: float | None
    weigh_input: bool
    quantization: str
    """Of activations: the ``input_quantization`` of ``ops.quantized_experts``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what stands between the projections."""
        return self.down.weight.dtype if self.down.scale is None else self.hidden_states.dtype

    @property
    def is_by_blocks(self) -> bool:
        """Whether each block of a weight has a scale."""
        return self.gate.is_by_blocks or self.down.is_by_blocks

    @property
    def width(self) -> int:
        """Elements between the projections."""
        return self.down.depth

    @property
    def hidden(self) -> int:
        """Elements of a token."""
        return self.down.weight.shape[1]


def arguments(
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
    has_gate: bool = True,
    is_concatenated: bool = True,
    is_transposed: bool = False,
    weigh_input: bool = False,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_up_input_scale: Tensor | None = None,
    down_input_scale: Tensor | None = None,
    gate_up_zero_point: Tensor | None = None,
    down_zero_point: Tensor | None = None,
    up_zero_point: Tensor | None = None,
    input_quantization: str = "none",
) -> Experts:
    """The arguments of ``ops.quantized_experts`` by what the products read; views.

    Quantized weights are not transposed.
    """
    if is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        up_proj = None if up_proj is None else up_proj.mT
    gate, up = (
        Projection(gate_up_proj, gate_up_bias, gate_up_scale, gate_up_input_scale, gate_up_zero_point),
        None,
    )
    down = Projection(down_proj, down_bias, down_scale, down_input_scale, down_zero_point)
    if has_gate:
        half = down.depth
        cuts = (slice(half), slice(half, None)) if is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        weights = (gate_up_proj, up_proj) if up_proj is not None else [gate_up_proj[:, cut] for cut in cuts]
        scales, zeros = (gate_up_scale, up_scale), (gate_up_zero_point, up_zero_point)
        if up_proj is None and gate_up_scale is not None:
            scales = _halves(gate_up_scale, cuts, half)
        if up_proj is None and gate_up_zero_point is not None:
            zeros = _halves(gate_up_zero_point, cuts, half)
        biases = [None if gate_up_bias is None else gate_up_bias[:, cut] for cut in cuts]
        gate, up = [
            Projection(weight, bias, scale, gate_up_input_scale, zero)
            for weight, bias, scale, zero in zip(weights, biases, scales, zeros, strict=True)
        ]
        if up.strides != gate.strides:  # in two tensors that lie otherwise
            gate, up = [part._replace(weight=part.weight.contiguous()) for part in (gate, up)]
    return Experts(
        hidden_states.contiguous(),
        top_k_index.contiguous(),
        top_k_weights.contiguous(),
        gate,
        up,
        down,
        activation,
        alpha,
        beta,
        limit,
        weigh_input,
        input_quantization,
    )


def _halves(scale: Tensor, cuts: tuple[slice, slice], rows: int) -> tuple[Tensor, Tensor]:
    """Scales of gate and of up, each of so many rows."""
    if scale.shape[1] == 1:
        return scale, scale
    if scale.shape[1] == 2 * rows:
        return scale[:, cuts[0]], scale[:, cuts[1]]
    first, second = scale.chunk(2, 1)  # rows of blocks, which belong to one of them
    return first, second
