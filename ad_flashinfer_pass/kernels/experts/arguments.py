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
    """Of a float8 weight, as ``ops.quantized_experts`` takes it; of any strides."""
    input_scale: Tensor | None = None
    """[num_experts], contiguous; likewise, of what it multiplies."""

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
        return self.scale is not None and float8.is_by_blocks(self.weight[0], self.scale[0])


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
        return self.down.weight.shape[2]

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
    input_quantization: str = "none",
) -> Experts:
    """The arguments of ``ops.experts`` and the scales of float8 weights by what the products read; views.

    Float8 weights are not transposed.
    """
    if is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        up_proj = None if up_proj is None else up_proj.mT
    gate, up = Projection(gate_up_proj, gate_up_bias, gate_up_scale, gate_up_input_scale), None
    if has_gate:
        half = down_proj.shape[2]
        cuts = (slice(half), slice(half, None)) if is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        weights = (gate_up_proj, up_proj) if up_proj is not None else [gate_up_proj[:, cut] for cut in cuts]
        scales = (gate_up_scale, up_scale)
        if up_proj is None and gate_up_scale is not None:
            scales = _halves(gate_up_scale, cuts, half)
        gate, up = [
            Projection(
                weight, None if gate_up_bias is None else gate_up_bias[:, cut], scale, gate_up_input_scale
            )
            for weight, cut, scale in zip(weights, cuts, scales, strict=True)
        ]
        if up.strides != gate.strides:  # in two tensors that lie otherwise
            gate, up = [part._replace(weight=part.weight.contiguous()) for part in (gate, up)]
    down = Projection(down_proj, down_bias, down_scale, down_input_scale)
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
