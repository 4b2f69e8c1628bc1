"""Experts as one op of the graph: ``ad_flashinfer.experts`` in place of the forward of their module.

How a module sends tokens to experts and back (by sorting, by counting, by a loop) is nothing that a graph
needs to know. For the time of an export, each module of experts that is known computes by the op:

Before: out = module(hidden_states, top_k_index, top_k_weights)     sort, histc, grouped_mm, index_put, ...
After:  out = ad_flashinfer.experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, ...)

Known are those that go through transformers' experts interface, which says what they compute but for what
stands between the two projections: that is traced, and has to be what the op computes, op for op.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.experts.by_torch import ACTIVATIONS, gated
from ad_flashinfer_pass.known_code import digest

aten = torch.ops.aten
_ANY_WIDTH = 8
_TRACING = threading.Lock()
"""make_fx changes what all threads see, and fails in two of them at a time."""
_NO_MORE = (None, None, None)
"""Biases, and a projection of its own for what the gate multiplies."""


class Gate(NamedTuple):
    """What stands between the two projections: arguments of ``ops.experts``, in its order."""

    activation: str = "silu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    in_float32: bool = False
    has_gate: bool = True
    is_concatenated: bool = True


@contextmanager
def as_one_op(model: nn.Module) -> Iterator[None]:
    """Within, the known modules of experts of ``model`` compute by ``ad_flashinfer.experts``.

    Raises:
        UnsupportedError: one of them computes what the op cannot.
    """
    replaced = []
    try:
        for name, module in model.named_modules():
            if "forward" in vars(module):
                continue
            for method, function in _by_the_op(module, name).items():
                setattr(module, method, function)
                replaced.append((module, method))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


def _by_the_op(module: nn.Module, name: str) -> dict[str, Callable[..., Any]]:
    """The methods of a known module by the op; none for all others."""
    if goes_through_the_interface(module):
        return {"forward": partial(_of_interface, module, gate_of(module, name))}
    written = _WRITTEN.get(type(module).__name__)
    if written is None or not type(module).__module__.startswith("transformers."):
        return {}
    code = [getattr(type(module), method) for method in written.methods]
    code += [type(module.get_submodule(part)).forward for part in written.parts]
    if digest(code) not in written.digests:
        return {}
    given: tuple[Any, ...] = (module,)
    if written.activation is not None:
        weight = next(module.parameters())
        example = (2 * _ANY_WIDTH, weight.dtype, weight.device)
        activation = attrgetter(written.activation)(module)
        given = (module, _gate(_multiplied(activation), _where(module, name), *example))
    return {method: partial(function, *given) for method, function in written.methods.items()}


def goes_through_the_interface(module: nn.Module) -> bool:
    """Whether this module computes by one of the functions of transformers' experts interface."""
    moe = sys.modules.get("transformers.integrations.moe")
    forward = type(module).forward
    if moe is None or getattr(forward, "__globals__", None) is not vars(moe):
        return False
    interface = inspect.getclosurevars(forward).nonlocals.get("experts_interface")
    name: Any = getattr(module.config, "_experts_implementation", None)
    function = moe.ALL_EXPERTS_FUNCTIONS.get(name)
    home = getattr(function, "__globals__", {}).get("__name__", "")  # a wrapper's __module__ is another's
    is_known = home.startswith(("transformers.", "ad_flashinfer_pass."))
    return interface is moe.ALL_EXPERTS_FUNCTIONS and (name in (None, "eager") or is_known)


def _of_interface(
    module: Any, gate: Gate, hidden_states: Tensor, *routing: Tensor, **named: Tensor
) -> Tensor:
    """The arguments of the forward have other names in some modules, in this order."""
    index, weights = (*routing, *named.values())
    up = "gate_up_proj" if module.has_gate else "up_proj"
    out: Tensor = torch.ops.ad_flashinfer.experts(
        hidden_states,
        index,
        weights,
        getattr(module, up),
        module.down_proj,
        getattr(module, f"{up}_bias") if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        None,
        *gate,
        is_transposed=module.is_transposed,
    )
    return out


def _dbrx(module: Any, gate: Gate, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    mlp = module.mlp
    w1, v1, w2 = (w.view(-1, module.ffn_hidden_size, module.hidden_size) for w in (mlp.w1, mlp.v1, mlp.w2))
    tokens = hidden_states.reshape(-1, module.hidden_size)
    out = torch.ops.ad_flashinfer.experts(tokens, index, weights, w1, w2.mT, None, None, v1, *gate)
    return out.view(hidden_states.shape[0], -1, module.hidden_size)


def _llama4(module: Any, gate: Gate, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """All experts on all tokens there, with weights of 0 for most, which multiply what an expert reads."""
    experts = module.experts
    tokens = hidden_states.reshape(-1, module.hidden_dim)
    logits = F.linear(tokens, module.router.weight)
    best, index = torch.topk(logits, module.router.top_k, dim=1)
    routed = torch.ops.ad_flashinfer.experts(
        tokens,
        index,
        torch.sigmoid(best.float()).to(best.dtype),
        experts.gate_up_proj,
        experts.down_proj,
        *_NO_MORE,
        *gate,
        is_transposed=True,
        weigh_input=True,
    )
    return module.shared_expert(tokens) + routed, logits


def _longcat(module: Any, gate: Gate, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Experts beyond those with weights give a token back as it is."""
    number = module.num_routed_experts
    gives_back = index >= number
    routed = torch.ops.ad_flashinfer.experts(
        hidden_states,
        index.masked_fill(gives_back, 0),
        weights.masked_fill(gives_back, 0.0),
        module.gate_up_proj[:number],
        module.down_proj,
        *_NO_MORE,
        *gate,
    )
    kept = weights.masked_fill(~gives_back, 0.0).sum(-1, keepdim=True)
    return routed + (hidden_states * kept).to(hidden_states.dtype)


def _jetmoe(module: Any, gate: Gate, hidden_states: Tensor) -> Tensor:
    tokens = hidden_states.reshape(-1, module.input_size)
    index, weights, _ = _jetmoe_routing(module.router, tokens)
    ups, downs = module.input_linear.weight, module.output_linear.weight
    out: Tensor = torch.ops.ad_flashinfer.experts(tokens, index, weights, ups, downs, *_NO_MORE, *gate)
    return out.view(hidden_states.shape) + module.bias


def _jetmoe_routing(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Experts and weights [t, k], and the logits of all experts."""
    logits = router.layer(tokens).float()
    best, index = logits.topk(router.top_k, dim=1)
    return index, torch.softmax(best, dim=1).type_as(tokens), logits


def _jetmoe_queries(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Projections of each token by the experts that it is sent to: all compute, k are kept."""
    tokens = hidden_states.reshape(-1, module.input_size)
    index, weights, logits = _jetmoe_routing(module.router, tokens)
    projected = F.linear(tokens, module.input_linear.weight.flatten(0, 1))
    by_expert = projected.unflatten(-1, (module.num_experts, module.hidden_size))
    queries = by_expert.gather(1, index[..., None].expand(-1, -1, module.hidden_size))
    return queries.view(*hidden_states.shape[:-1], module.top_k, -1), logits, (index, weights)


def _jetmoe_outputs(module: Any, attended: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """The way back: to the other experts a token gives zeros."""
    index, weights = routing
    weighted = attended.flatten(0, 1) * weights[..., None]
    nothing = weighted.new_zeros(weighted.shape[0], module.num_experts, module.hidden_size)
    by_expert = nothing.scatter(1, index[..., None].expand_as(weighted), weighted)
    out = torch.bmm(by_expert.transpose(0, 1), module.output_linear.weight.mT).sum(0)
    return out.view(*attended.shape[:2], -1) + module.bias


def offer_to_transformers() -> None:
    """Make ``model.set_experts_implementation("ad_flashinfer")`` known, for models that others trace."""
    torch._dynamo.assume_constant_result(_constant_gate)  # Dynamo would look into how the gate is traced
    moe = importlib.import_module("transformers.integrations.moe")
    moe.ALL_EXPERTS_FUNCTIONS.register("ad_flashinfer", _when_called)


def _when_called(module: Any, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    return _of_interface(module, Gate(*_constant_gate(id(module))), hidden_states, *routing, **named)


def _constant_gate(address: int) -> tuple[Any, ...]:
    # Dynamo of torch 2.11 gives no module to such a function. It does know a module's id, and guards it.
    module = ctypes.cast(address, ctypes.py_object).value
    # A trace that is going on, as torch.export's, must not take this one in.
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():
        return tuple(gate_of(module, "experts"))


class _Written(NamedTuple):
    """A module of transformers that has its own code for experts."""

    methods: dict[str, Callable[..., Any]]
    """Of the module, its gate if it has an activation, and what its own method takes: the same by the op."""
    activation: str | None
    """Where it has the activation of its gate."""
    parts: tuple[str, ...]
    """Modules in it whose code counts, too."""
    digests: tuple[str, ...]
    """Of the code that was read, 5.17 to 5.24: other code is another module."""


_JETMOE = ("router", "input_linear", "output_linear")
_WRITTEN = {
    "DbrxExperts": _Written(
        {"forward": _dbrx}, "mlp.activation_fn", ("mlp",), ("a219cffa9b69b320", "134a34410ecccc5d")
    ),
    "JetMoeMoA": _Written(
        {"map": _jetmoe_queries, "reduce": _jetmoe_outputs}, None, _JETMOE, ("82f61b4fdb4935c5",)
    ),
    "JetMoeMoE": _Written({"forward": _jetmoe}, "activation", _JETMOE, ("ea9e4e5cd07e79ae",)),
    "Llama4TextMoe": _Written(
        {"forward": _llama4}, "experts.act_fn", ("experts", "router"), ("9d7df63b0a7af6de",)
    ),
    "LongcatFlashExperts": _Written({"forward": _longcat}, "act_fn", (), ("b89842d1183acf1c",)),
}


def _multiplied(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return function


def _where(module: nn.Module, name: str) -> str:
    return f"{name} ({type(module).__name__})"


def gate_of(module: Any, name: str) -> Gate:
    """What a module of transformers' experts interface computes between its projections.

    Args:
        module: has ``_apply_gate``, or ``act_fn`` and no gate.
        name: its path in the model, for messages.

    Raises:
        UnsupportedError: the op has no arguments that compute the same.
    """
    where = _where(module, name)
    for attribute, what in (
        ("_is_expert_parallel", "holds some of the experts only"),
        ("has_post_expert_norm", "normalises what each expert gives"),
    ):
        if getattr(module, attribute, False):
            raise UnsupportedError(f"{where} {what}, which ad_flashinfer.experts does not compute.")
    down = module.down_proj
    width = down.shape[-2 if module.is_transposed else -1]
    if not module.has_gate:
        return _gate(module.act_fn, where, width, down.dtype, down.device, has_gate=False)
    layout = {"is_concatenated": module.is_concatenated}
    return _gate(module._apply_gate, where, 2 * width, down.dtype, down.device, **layout)


def _gate(function: Callable[[Tensor], Tensor], where: str, *example: Any, **given: bool) -> Gate:
    """The gate that computes as a function does.

    Args:
        function: to be traced.
        where: for the message.
        example: number of columns, dtype and device of what it gets.
        given: fields of the gate that are known.

    Raises:
        UnsupportedError: there is none.
    """
    traced = _trace(function, *example)
    numbers = {argument: _number(traced.graph, *place) for argument, place in _NUMBERS.items()}
    found: dict[str, Any] = {argument: number for argument, number in numbers.items() if number is not None}
    for in_float32, activation in product((False, True), ACTIVATIONS):
        candidate = Gate(activation=activation, in_float32=in_float32, **found, **given)
        if _trace_of_gate(candidate, *example).text == traced.text:
            return candidate
    names = [node.target._schema.name for node in traced.graph.nodes if _is_aten(node)]
    raise UnsupportedError(
        f"{where} has a gate, or an activation, of {', '.join(dict.fromkeys(names)) or 'nothing'}, which "
        f"ad_flashinfer.experts does not have. It has {', '.join(ACTIVATIONS)}, with limits."
    )


_NUMBERS: dict[str, tuple[Any, str]] = {
    "limit": (aten.clamp, "max"),
    "alpha": (aten.mul, "other"),
    "beta": (aten.add, "other"),
}
"""Where a number of a gate stands in its graph."""


class _Trace(NamedTuple):
    graph: fx.Graph
    text: str
    """The same for the same ops on the same numbers."""


def _trace(
    function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: torch.device
) -> _Trace:
    """A function of [any number of rows, width] as a graph."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    rows_are_dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        [DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    example = torch.empty((2, width), dtype=dtype, device=device)
    example = mode.from_tensor(example, symbolic_context=rows_are_dynamic)
    with torch.no_grad(), _TRACING:
        graph = make_fx(lambda x: function(x))(example).graph  # a lambda, because it counts a method's self
    return _Trace(graph, f"{_written(graph)} {[str(guard.expr) for guard in env.guards]}")


@lru_cache(maxsize=256)
def _trace_of_gate(gate: Gate, width: int, dtype: torch.dtype, device: torch.device) -> _Trace:
    return _trace(lambda x: gated(x, *gate), width, dtype, device)


def _number(graph: fx.Graph, op: Any, argument: str) -> float | None:
    found = [g.op_args(node).get(argument) for node in graph.nodes if g.is_op(node, op)]
    return next((float(number) for number in found if isinstance(number, (int, float))), None)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _written(graph: fx.Graph) -> str:
    """What a graph computes, whatever the order of factors."""

    def write(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(write, value))}]"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(float(value))
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return str(value)
        if g.is_op(value, aten.silu):
            return times(write(value.args[0]), f"aten.sigmoid.default({write(value.args[0])})")
        if not _is_aten(value):
            return f"{value.target}{write(value.args)}"
        args = [write(arg) for arg in g.op_args(value).values()]
        return times(*args) if g.is_op(value, aten.mul) else f"{value.target}({', '.join(args)})"

    def times(*factors: str) -> str:
        return f"({' * '.join(sorted(factors))})"

    return write(graph.output_node().args[0])
