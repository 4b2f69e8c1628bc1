"""The arguments of ``ops.experts`` in one form, whatever the layout of the weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """One product of an expert."""

    weight: Tensor
    """[num_experts, rows, columns], of any strides."""
    bias: Tensor | None
    """[num_experts, rows]."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the weight, then of the bias; 0 without one."""
        return (*self.weight.stride(), *((0, 0) if self.bias is None else self.bias.stride()))


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
) -> Experts:
    """The arguments of ``ops.experts`` by what the products read; views of the weights."""
    if is_transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        up_proj = None if up_proj is None else up_proj.mT
    gate, up = Projection(gate_up_proj, gate_up_bias), None
    if has_gate:
        half = down_proj.shape[2]
        cuts = (slice(half), slice(half, None)) if is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        weights = (gate_up_proj, up_proj) if up_proj is not None else [gate_up_proj[:, cut] for cut in cuts]
        gate, up = [
            Projection(weight, None if gate_up_bias is None else gate_up_bias[:, cut])
            for weight, cut in zip(weights, cuts, strict=True)
        ]
        if up.strides != gate.strides:  # in two tensors that lie otherwise
            gate, up = [part._replace(weight=part.weight.contiguous()) for part in (gate, up)]
    down = Projection(down_proj, down_bias)
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
    )
