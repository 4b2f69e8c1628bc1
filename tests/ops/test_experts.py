"""``ad_flashinfer.experts`` in place of transformers' experts, against their own eager forward."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.experts import Gate, as_one_op, gate_of

HIDDEN, WIDTH, EXPERTS, TOP_K, TOKENS = 16, 24, 5, 2, 11
CONFIG: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "moe_latent_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_limit": 0.7,
    "swiglu_alpha": 1.702,
    "_experts_implementation": "eager",
}
# Of transformers: the modeling file, the class, and the gate that it has.
KINDS = {
    "plain": ("mixtral", "MixtralExperts", Gate()),
    "alternating": (
        "gpt_oss",
        "GptOssExperts",
        Gate(alpha=1.702, beta=1.0, limit=0.7, is_concatenated=False),
    ),
    "transposed": ("aria", "AriaExperts", Gate()),
    "limit": ("hy_v4", "HYV4Experts", Gate(limit=0.7)),
    "alpha": ("minimax_m3_vl", "MiniMaxM3VLExperts", Gate(alpha=1.702, beta=1.0, limit=0.7)),
    "no_gate": ("nemotron_h", "NemotronHExperts", Gate(activation="relu2", has_gate=False)),
    "in_float32": ("beam", "BeamExperts", Gate()),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def experts_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Experts of transformers with random weights; skips what the installed version has not."""
    family, name, _ = KINDS[kind]
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}", exc_type=ImportError)
    torch.manual_seed(0)
    module = getattr(modeling, name)(SimpleNamespace(**{**CONFIG, **changes})).to(dtype)
    if not hasattr(module, "is_transposed"):
        pytest.skip(f"{name} of this version does not go through transformers' experts interface")
    if hasattr(module, "limit"):  # a constant in some versions
        module.limit = CONFIG["swiglu_limit"]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.requires_grad_(False).normal_(std=0.5)
    return module


def routed(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for each token two experts, never the last, with weights."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator)
    weights, index = scores.topk(TOP_K)
    return hidden.to(dtype), index, weights.to(dtype)


@kinds
def test_equals_the_forward_of_transformers(kind: str) -> None:
    """In float32, whatever the layout, the biases and the gate; an expert without tokens changes nothing."""
    module = experts_of(kind)
    wanted = module(*routed())
    with as_one_op(module):
        found = module(*routed())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6 * float(wanted.abs().max()))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_rounds_as_transformers_does(kind: str, dtype: torch.dtype) -> None:
    """As near to float32 as transformers' own."""
    module, exact = experts_of(kind, dtype), experts_of(kind)
    exact.load_state_dict(module.state_dict())
    inputs = routed(dtype)
    wanted = exact(inputs[0].float(), inputs[1], inputs[2].float())
    theirs = module(*inputs)
    with as_one_op(module):
        found = module(*inputs)
    assert found.dtype == dtype
    assert _error(found, wanted) < 1.2 * _error(theirs, wanted) + torch.finfo(dtype).eps


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@kinds
def test_gate_is_read_of_the_code(kind: str) -> None:
    """The arguments of the op follow from what the module computes, not from its name."""
    assert gate_of(experts_of(kind), "experts") == KINDS[kind][2]


def test_a_gate_in_float32_is_told_from_one_in_bfloat16() -> None:
    """In float32 there is nothing to tell."""
    assert gate_of(experts_of("in_float32", torch.bfloat16), "experts") == Gate(in_float32=True)
    assert gate_of(experts_of("plain", torch.bfloat16), "experts") == Gate()


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activations_of_transformers_have_a_name(name: str, activation: str) -> None:
    assert gate_of(experts_of("plain", hidden_act=name), "experts") == Gate(activation=activation)


class Gated(nn.Module):
    """An activation of its own."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Computes."""
        out: Tensor = self.function(self, x)
        return out


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.silu(x) * self.weight,
        lambda self, x: F.silu(x) * 2.0,
        lambda self, x: F.silu(x.clamp(max=40.0)),
        lambda self, x: F.silu(x) + 1e-6,
        lambda self, x: F.silu(x.flip(-1)),
        lambda self, x: F.silu(x) * x.mean(),
        lambda self, x: F.silu(x) if len(x) < 9 else F.relu(x),
        lambda self, x: ACT2FN["gelu_new"](x),
        lambda self, x: x,
    ],
    ids=[
        "weight",
        "factor",
        "limit_of_one",
        "offset",
        "flip",
        "other_tokens",
        "number_of_tokens",
        "gelu_new",
        "none",
    ],
)
def test_a_gate_that_the_op_has_not_is_refused_by_name(function: Any) -> None:
    """What is near to a gate of the op, or equal on usual numbers, is another gate."""
    module = experts_of("plain")
    module.act_fn = Gated(function)
    with pytest.raises(UnsupportedError, match=r"^layer\.experts \(MixtralExperts\) .*gate") as raised:
        gate_of(module, "layer.experts")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("attribute", "said"),
    [("_is_expert_parallel", "some of the experts only"), ("has_post_expert_norm", "normalises")],
)
def test_experts_with_more_to_them_are_refused_by_name(attribute: str, said: str) -> None:
    module = experts_of("plain")
    setattr(module, attribute, True)
    with pytest.raises(UnsupportedError, match=rf"^layer\.experts \(MixtralExperts\) .*{said}"):
        gate_of(module, "layer.experts")


def test_nothing_stays_replaced() -> None:
    """An error within the block, or a module that is refused after others, leaves them as they were."""
    good, bad = experts_of("plain"), experts_of("plain")
    bad.act_fn = Gated(lambda self, x: x)
    with pytest.raises(UnsupportedError):
        enter(nn.ModuleList([good, bad]))
    assert "forward" not in vars(good)
    with pytest.raises(ZeroDivisionError):
        enter(good)
    assert "forward" not in vars(good)


def enter(model: nn.Module) -> None:
    with as_one_op(model):
        raise ZeroDivisionError


def test_functions_of_the_user_are_left_alone() -> None:
    """A function that the user entered in the interface, or put on the module, is what the user wants."""
    moe = importlib.import_module("transformers.integrations.moe")
    module = experts_of("plain", _experts_implementation="mine")
    moe.ALL_EXPERTS_FUNCTIONS["mine"] = lambda self, hidden, index, weights: hidden * 2
    try:
        with as_one_op(module):
            assert torch.equal(module(*routed()), routed()[0] * 2)
    finally:
        del moe.ALL_EXPERTS_FUNCTIONS["mine"]
    module = experts_of("plain")
    module.forward = lambda hidden, index, weights: hidden * 3
    with as_one_op(module):
        assert torch.equal(module(*routed()), routed()[0] * 3)


def test_each_token_by_itself() -> None:
    """A token's result is the same alone, in another order and among others, but for rounding."""
    module = experts_of("plain")
    with as_one_op(module):
        hidden, index, weights = routed(tokens=40)
        together = module(hidden, index, weights)
        backwards = module(hidden.flip(0), index.flip(0), weights.flip(0)).flip(0)
        alone = torch.cat([module(*(x[t : t + 1] for x in (hidden, index, weights))) for t in range(40)])
    torch.testing.assert_close(backwards, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_weights_of_the_input() -> None:
    """weigh_input multiplies what the experts see: another result, since they are not linear."""
    module = experts_of("plain")
    hidden, index, weights = routed()
    found = ops.experts(hidden, index, weights, module.gate_up_proj, module.down_proj, weigh_input=True)
    ones = torch.ones(TOKENS, 1)
    wanted = sum(module(hidden * weights[:, j, None], index[:, j, None], ones) for j in range(TOP_K))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    module = experts_of("plain")
    with as_one_op(module):
        assert module(*routed(tokens=0)).shape == (0, HIDDEN)


@pytest.mark.parametrize("kind", ["plain", "alternating", "no_gate"])
def test_opcheck_and_fake(kind: str) -> None:
    """torch's own checks, and a fake with the shape, strides and dtype of the result."""
    module = experts_of(kind)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    args = (*routed(), up, module.down_proj, *biases, None)
    options = {**KINDS[kind][2]._asdict(), "is_transposed": module.is_transposed}
    overload = torch.ops.ad_flashinfer.experts.default
    torch.library.opcheck(overload, args, options)
    real = overload(*args, **options)
    with FakeTensorMode() as mode:
        fake = overload(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args), **options)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_public_function_is_the_op() -> None:
    code = ops.experts.__code__
    schema = torch.ops.ad_flashinfer.experts.default._schema
    assert list(code.co_varnames[: code.co_argcount]) == [arg.name for arg in schema.arguments]
