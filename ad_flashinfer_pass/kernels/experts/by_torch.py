"""Experts by torch's kernels: of any dtype, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: torch.square(F.relu(x)),
}
COPIED_BYTES = 1 << 28
"""Of weights at a time, where each row multiplies a copy of its expert's."""
Product = Callable[[Tensor], Tensor]
"""Of rows [n, columns], sorted by expert, each with its expert's weight: [n, rows]."""


def run(
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
    products: Callable[[Tensor, list[Tensor]], list[Product]] | None = None,
) -> Tensor:
    """``ops.experts``, each product rounded to the dtype of the experts.

    Args:
        products: of the expert of each row, sorted, and the projections. Default: plain ones.
    """
    num_tokens, top_k = top_k_index.shape
    ups = [gate_up_proj] if up_proj is None else [gate_up_proj, up_proj]
    weights = [weight.mT if is_transposed else weight for weight in (*ups, down_proj)]
    # All that is sent to one expert lies together.
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    *into, out_of = (products or _products)(expert, weights)
    rows, factors = hidden_states[order // top_k], top_k_weights.reshape(-1)[order][:, None]
    if weigh_input:
        rows = rows * factors
    parts = [product(rows) for product in into]
    middle = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if gate_up_bias is not None:
        middle = middle + gate_up_bias[expert]
    middle = gated(middle, activation, alpha, beta, limit, in_float32, has_gate, is_concatenated)
    results = out_of(middle)
    if down_bias is not None:
        results = results + down_bias[expert]
    if not weigh_input:
        results = results * factors
    by_token = torch.empty_like(results)
    by_token[order] = results
    return by_token.view(num_tokens, top_k, results.shape[-1]).sum(1).to(hidden_states.dtype)


def gated(
    x: Tensor,
    activation: str = "silu",
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    in_float32: bool = False,
    has_gate: bool = True,
    is_concatenated: bool = True,
) -> Tensor:
    """What stands between the two projections, [..., width]; arguments as of ``experts``."""
    activate = ACTIVATIONS[activation]
    if not has_gate:
        return activate(x)
    gate, up = x.chunk(2, -1) if is_concatenated else (x[..., ::2], x[..., 1::2])
    if in_float32:
        gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gate = activate(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)
    return (gate * (up if beta == 0.0 else up + beta)).to(x.dtype)


def _products(expert: Tensor, weights: list[Tensor]) -> list[Product]:
    """Each row, cast to the dtype of the weight, with its expert's [num_experts, rows, columns]."""
    product: Callable[..., Tensor]
    device = expert.device
    columns = [weight.mT for weight in weights]
    if device.type == "cuda" and all(_fits_grouped_mm(weight) for weight in columns):
        ends = torch.searchsorted(
            expert, torch.arange(weights[0].shape[0], device=device, dtype=expert.dtype), right=True
        )
        product = partial(_grouped_mm, offs=ends.int())
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        product = partial(_by_row, expert=expert)
    else:
        product = partial(_by_expert, counts=torch.bincount(expert, minlength=weights[0].shape[0]).tolist())
    return [partial(_cast, product, weight) for weight in columns]


def _cast(product: Callable[..., Tensor], weight: Tensor, rows: Tensor) -> Tensor:
    return product(rows.to(weight.dtype), weight)


def _fits_grouped_mm(weight: Tensor) -> bool:
    """Whether torch has a kernel for it that does not wait: bfloat16, rows of 16 bytes, Hopper or later."""
    has_kernel = torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    aligned = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    return has_kernel and aligned and weight.dtype == torch.bfloat16 and weight.data_ptr() % 16 == 0


def _grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    result: Tensor = F.grouped_mm(rows, weight, offs=offs)
    return result


def _by_row(rows: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Slow, but of a fixed number of launches: a CUDA graph can hold it."""
    step = max(1, COPIED_BYTES // (weight[0].numel() * weight.itemsize))
    parts = [
        torch.bmm(some[:, None], weight[chosen])[:, 0]
        for some, chosen in zip(rows.split(step), expert.split(step), strict=True)
    ]
    return torch.cat(parts)


def _by_expert(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    result = rows.new_empty((rows.shape[0], weight.shape[-1]))
    start = 0
    for number, count in enumerate(counts):
        if count:
            torch.mm(rows[start : start + count], weight[number], out=result[start : start + count])
            start += count
    return result
