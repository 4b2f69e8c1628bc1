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
    """Replace what a layout names, and an op computes, by quantized modules with weights on meta.

    Weights whose sizes no checkpoint of the scheme can have, as rows that no group divides, stay plain.
    """
    for name, (linear, scheme) in linears_of(model, layout).items():
        if not _fits(scheme, tuple(linear.weight.shape)):
            continue
        operands = _on_meta(scheme, tuple(linear.weight.shape))
        model.set_submodule(name, QuantizedLinear(operands, linear.bias, scheme.activation))
    for name, (module, scheme) in experts_of(model, layout).items():
        into, out_of = (getattr(module, part) for part in names_of(module))
        if scheme.is_of_experts:
            sizes = {part: tuple(each.mT.shape) for part, each in (("up", into), ("down", out_of))}
        else:
            rows = into.shape[1] // 2 if module.has_gate else into.shape[1]
            sizes = {"up": (rows, into.shape[2]), "down": tuple(out_of.shape[1:])}
            sizes |= {"gate": sizes["up"]} if module.has_gate else {}
        if not all(_fits(scheme, each) for each in sizes.values()):
            continue
        one = {part: _on_meta(scheme, each) for part, each in sizes.items()}
        if scheme.is_of_experts:
            projections = Projections(one["up"], one["down"])
        else:
            projections = put_together([one] * len(into))
        model.set_submodule(name, quantized_experts(module, name, projections, scheme.activation))


def _fits(scheme: Scheme, sizes: tuple[int, ...]) -> bool:
    """Whether the tensor that shows a weight shows one of these sizes, which an op computes with."""
    shape = scheme.parts(*sizes)[scheme.weight].shapes[-1]
    return not scheme.only_dequantized and scheme.sizes(tuple(shape)) == sizes


def _on_meta(scheme: Scheme, sizes: tuple[int, ...]) -> Operands:
    parts = {
        name: torch.empty(
            part.shapes[-1], dtype=DTYPES[part.dtypes[0] if len(part.dtypes) == 1 else "F32"], device="meta"
        )
        for name, part in scheme.parts(*sizes).items()
    }
    return scheme.operands(parts)
