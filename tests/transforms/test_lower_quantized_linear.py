"""``lower_quantized_linear``: the ops that stand for a float8 linear give its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.kernels.linear.float8 import by_torch
from ad_flashinfer_pass.transforms.lower_quantized_linear import lower
from tests.transforms.small_models import Float8Linear, find

assert ops.__name__  # importing it registers the op
ROWS, DEPTH = 48, 64


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("activation", ["tensor", "token"])
def test_the_numbers_are_those_of_the_op(activation: str, scaling: str, has_bias: bool) -> None:
    """For any sizes of batch and sequence; a token of zeros, too."""
    torch.manual_seed(0)
    module = Float8Linear(ROWS, DEPTH, activation, scaling, has_bias=has_bias)
    sizes = {0: torch.export.Dim("b", max=8), 1: torch.export.Dim("s", max=8)}
    example = torch.randn(2, 3, DEPTH).bfloat16()
    gm = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    (node,) = find(gm, torch.ops.ad_flashinfer.quantized_linear)
    lower(gm, node)
    gm.recompile()
    assert len(find(gm, torch.ops.ad_flashinfer.scaled_mm)) == 1
    x = torch.randn(3, 5, DEPTH).bfloat16()
    x[0, 0] = 0
    found = gm(x)
    flat, bias = x.double().flatten(0, 1), None if module.bias is None else module.bias.double()
    wanted = by_torch(flat, module.weight, module.weight_scale, module.input_scale, bias, activation)
    assert found.dtype == torch.bfloat16
    assert float((found.double().view(-1, ROWS) - wanted).norm() / wanted.norm()) < 4e-3
