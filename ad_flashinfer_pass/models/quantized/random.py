"""Random weights of quantized modules, of the size that the plain model's would have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ad_flashinfer_pass.kernels.linear.float8 import LARGEST
from ad_flashinfer_pass.kernels.linear.four_bits import ZERO_POINT
from ad_flashinfer_pass.models.quantized.modules import QuantizedExperts, QuantizedLinear

_LARGEST_INPUT = 16.0
"""That float8 activations with a static scale can hold: a norm's outputs are smaller."""
_OF_4_BITS = 4.0
"""Deviation of numbers of 4 bits that are all as likely: 4.6 of integers, 2.9 of float4_e2m1."""


def draw(model: nn.Module, device: torch.device, deviation: float) -> None:
    """Give the quantized modules of a model, whose parameters are on meta, numbers.

    Args:
        model: with real parameters elsewhere.
        device: that takes them.
        deviation: of the weights that they stand for.
    """
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    drawn = drawn_of(module, name, device, deviation, generator)
                    setattr(module, name, nn.Parameter(drawn, requires_grad=False))


def drawn_of(
    module: nn.Module, name: str, device: torch.device, deviation: float, generator: torch.Generator
) -> Tensor:
    """Numbers for a parameter of a quantized module; see ``draw``."""
    parameters = dict(module.named_parameters(recurse=False))
    has_4_bits = any(p.dtype == torch.uint8 for each, p in parameters.items() if _is_weight(each))
    return _drawn(name, parameters[name], device, deviation / (_OF_4_BITS if has_4_bits else 1.0), generator)


def _is_weight(name: str) -> bool:
    return not name.endswith(("scale", "zero_point", "bias"))


def _drawn(
    name: str, parameter: Tensor, device: torch.device, scale: float, generator: torch.Generator
) -> Tensor:
    new: dict[str, Any] = {"device": device, "dtype": parameter.dtype}
    if name.endswith("input_scale"):
        return torch.full(parameter.shape, _LARGEST_INPUT / LARGEST, **new)
    if name.endswith("zero_point"):
        return torch.full(parameter.shape, ZERO_POINT, **new)
    if name.endswith("scale"):
        exponent = 127 + round(math.log2(scale))
        return torch.full(parameter.shape, exponent if parameter.dtype == torch.uint8 else scale, **new)
    if parameter.dtype == torch.uint8:
        return torch.randint(256, parameter.shape, generator=generator, **new)
    return torch.randn(parameter.shape, generator=generator, device=device).to(parameter.dtype)
