"""``lower_quantized_linear``: the ops that stand for a float8 linear give its numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.linear.float8 import by_torch
from ad_flashinfer_pass.transforms.lower_quantized_linear import lower
from tests.transforms.small_models import Float8Linear, find

assert ops.__name__  # importing it registers the op
DEPTH = 64


def lowered(module: nn.Module, width: int) -> fx.GraphModule:
    """The graph of a module for any sizes of batch and sequence, with its float8 linears written out."""
    sizes = {0: torch.export.Dim("b", max=8), 1: torch.export.Dim("s", max=8)}
    example = torch.randn(2, 3, width).bfloat16()
    gm = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    nodes = find(gm, torch.ops.ad_flashinfer.quantized_linear)
    for node in nodes:
        lower(gm, node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert len(find(gm, torch.ops.aten._scaled_mm)) == len(nodes) > 0
    return gm


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert float((found.double() - wanted).norm() / wanted.norm()) < 6e-3


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("rows", [48, 96])
@pytest.mark.parametrize("activation", ["tensor", "token"])
def test_the_numbers_are_those_of_the_op(activation: str, rows: int, scaling: str, has_bias: bool) -> None:
    """A token of zeros, too."""
    torch.manual_seed(0)
    module = Float8Linear(rows, DEPTH, activation, scaling, has_bias=has_bias)
    x = torch.randn(3, 5, DEPTH).bfloat16()
    x[0, 0] = 0
    bias = None if module.bias is None else module.bias.double()
    scales = (module.weight_scale, module.input_scale)
    wanted = by_torch(x.double().flatten(0, 1), module.weight, *scales, bias, activation)
    assert_near(lowered(module, DEPTH)(x).view(-1, rows), wanted)


def gated(both: Tensor) -> Tensor:
    """SwiGLU of halves, cut as ``fuse_gemms`` does."""
    cut = torch.ops.aten.slice.Tensor
    out: Tensor = F.silu(cut(both, -1, 0, DEPTH)) * cut(both, -1, DEPTH, 2 * DEPTH)
    return out


class Mlp(nn.Module):
    """A norm, gate and up in one, and down."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, DEPTH).bfloat16(), requires_grad=False)
        self.both = Float8Linear(2 * DEPTH, DEPTH, activation, "row")
        self.down = Float8Linear(DEPTH, DEPTH, activation, "row")

    def forward(self, x: Tensor) -> Tensor:
        """The same shape as x."""
        wide = x.float()
        normed = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
        return self.down(gated(self.both(normed)))


@pytest.mark.parametrize("activation", ["tensor", "token"])
def test_a_norm_and_a_gate_are_quantized_where_they_are_computed(activation: str) -> None:
    torch.manual_seed(0)
    module = Mlp(activation)
    gm = lowered(module, DEPTH)
    first, second = (g.op_args(node) for node in find(gm, torch.ops.ad_flashinfer.quantize))
    assert first["norm"] is not None
    assert second["gated"]
    x = torch.randn(3, 5, DEPTH).bfloat16()
    # A rounding of the norm to bfloat16 may move a number to the next float8, in either.
    torch.testing.assert_close(gm(x), module(x), rtol=0.1, atol=0.1 * float(module(x).abs().max()))


def test_what_others_read_stays() -> None:
    class Read(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            gate = gated(self.both(x))
            return self.down(gate) + gate

    torch.manual_seed(0)
    nodes = find(lowered(Read("token"), DEPTH), torch.ops.ad_flashinfer.quantize)
    assert not any(g.op_args(node)["gated"] for node in nodes)
