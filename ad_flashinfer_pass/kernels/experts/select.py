"""Which kernels run experts: those that are named, or by the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.experts import four_bits, gemv, grouped
from ad_flashinfer_pass.kernels.experts.arguments import DEFAULT, Experts
from ad_flashinfer_pass.kernels.kernel_plan import Kernel


def candidates(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    device: torch.device,
    bits: int = 16,
    by_blocks: bool = False,
    quantization: str = "none",
) -> list[Kernel]:
    """The kernels worth timing, the most promising first.

    Args:
        num_tokens: of a step.
        top_k: experts of a token.
        num_experts: of the layer.
        device: where they run.
        bits: of an element of a weight.
        by_blocks: each block of a weight has a scale.
        quantization: of activations that float8 weights multiply.
    """
    per_expert = num_tokens * top_k / num_experts
    if bits == 4:
        return four_bits.candidates(num_tokens, per_expert)
    by_gemv = [Kernel("gemv", config) for config in gemv.candidates(num_tokens, bits == 8)]
    is_w8a8 = bits == 8 and quantization != "none"
    name = "grouped_w8a8" if is_w8a8 else "grouped"
    by_group = grouped.candidates(per_expert, device, by_blocks, is_w8a8)
    return by_gemv + [Kernel(name, config) for config in by_group]


def run(x: Experts, kernel: Kernel) -> Tensor:
    """``ops.experts`` by a kernel.

    Args:
        x: the arguments, on a CUDA device.
        kernel: of ``candidates``, or ``arguments.DEFAULT``.

    Returns:
        [t, hidden], in the dtype of hidden_states.
    """
    if kernel.name == DEFAULT:
        num_tokens, top_k = x.top_k_index.shape
        num_experts, device = x.down.weight.shape[0], x.top_k_index.device
        sizes = (num_tokens, top_k, num_experts)
        kernel = candidates(*sizes, device, x.down.bits, x.is_by_blocks, x.quantization)[0]
    if x.down.bits == 4:
        return four_bits.run(x, kernel)
    if kernel.name == "gemv":
        return gemv.run(x, gemv.Config(*kernel.options))
    return grouped.run(x, grouped.Config(*kernel.options), kernel.name == "grouped_w8a8")
