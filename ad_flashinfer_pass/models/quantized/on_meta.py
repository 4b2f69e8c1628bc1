"""Quantized modules without weights: enough to export, transform and plan."""

from __future__ import annotations

import torch
from torch import nn

from ad_flashinfer_pass.models.quantized.layout import Layout
from ad_flashinfer_pass.models.quantized.modules import (
    Projections,
    QuantizedLinear,
    names_of,
    put_together,
    quantized_experts,
)
from ad_flashinfer_pass.models.quantized.places import experts_of, linears_of
from ad_flashinfer_pass.models.quantized.scheme import DTYPES, Operands, Scheme


def quantize_like(model: nn.Module, layout: Layout) -> None:
    """Replace what a layout names, and an op computes, by quantized modules with weights on meta."""
    for name, (linear, scheme) in linears_of(model, layout).items():
        if scheme.only_dequantized:
            continue
        operands = _on_meta(scheme, tuple(linear.weight.shape))
        model.set_submodule(name, QuantizedLinear(operands, linear.bias, scheme.activation))
    for name, (module, scheme) in experts_of(model, layout).items():
        if scheme.only_dequantized:
            continue
        into, out_of = (getattr(module, part) for part in names_of(module))
        if scheme.is_of_experts:
            projections = Projections(*(_on_meta(scheme, tuple(each.mT.shape)) for each in (into, out_of)))
        else:
            number, rows, depth = into.shape
            rows = rows // 2 if module.has_gate else rows
            one = {part: _on_meta(scheme, (rows, depth)) for part in (("gate",) if module.has_gate else ())}
            one |= {"up": _on_meta(scheme, (rows, depth)), "down": _on_meta(scheme, tuple(out_of.shape[1:]))}
            projections = put_together([one] * number)
        model.set_submodule(name, quantized_experts(module, name, projections, scheme.activation))


def _on_meta(scheme: Scheme, sizes: tuple[int, ...]) -> Operands:
    parts = {
        name: torch.empty(
            part.shapes[-1], dtype=DTYPES[part.dtypes[0] if len(part.dtypes) == 1 else "F32"], device="meta"
        )
        for name, part in scheme.parts(*sizes).items()
    }
    return scheme.operands(parts)
