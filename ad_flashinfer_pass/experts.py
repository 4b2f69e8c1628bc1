"""Experts as one op of the graph: ``ad_flashinfer.experts`` in place of the forward of their module.

How a module sends tokens to experts and back (by sorting, by counting, by a loop) is nothing that a graph
needs to know. For the time of an export, each module of experts that is known computes by the op:

Before: out = module(hidden_states, top_k_index, top_k_weights)     sort, histc, grouped_mm, index_put, ...
After:  out = ad_flashinfer.experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, ...)

Known are those that go through transformers' experts interface, which says what they compute but for what
stands between the two projections: that is traced, and has to be what the op computes, op for op.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.ops.experts import ACTIVATIONS, gated

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """What stands between the two projections: arguments of ``ops.experts``."""

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
            if "forward" not in vars(module) and _goes_through_the_interface(module):
                module.forward = partial(_forward, module, gate_of(module, name))
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _goes_through_the_interface(module: nn.Module) -> bool:
    """Whether transformers' own experts functions are what this module computes by."""
    moe = sys.modules.get("transformers.integrations.moe")
    if moe is None or getattr(type(module).forward, "__globals__", None) is not vars(moe):
        return False
    name: Any = getattr(module.config, "_experts_implementation", None)
    function = moe.ALL_EXPERTS_FUNCTIONS.get(name)
    return name in (None, "eager") or getattr(function, "__module__", "").startswith("transformers.")


def _forward(module: Any, gate: Gate, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    """As ``forward`` of experts, whose arguments have other names in some modules, in this order."""
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
        **asdict(gate),
        is_transposed=module.is_transposed,
    )
    return out


def gate_of(module: Any, name: str) -> Gate:
    """What a module of transformers' experts interface computes between its projections.

    Args:
        module: has ``_apply_gate``, or ``act_fn`` and no gate.
        name: its path in the model, for messages.

    Raises:
        UnsupportedError: the op has no arguments that compute the same.
    """
    where = f"{name} ({type(module).__name__})"
    for attribute, what in (
        ("_is_expert_parallel", "holds some of the experts only"),
        ("has_post_expert_norm", "normalises what each expert gives"),
    ):
        if getattr(module, attribute, False):
            raise UnsupportedError(f"{where} {what}, which ad_flashinfer.experts does not compute.")
    down = module.down_proj
    width = down.shape[-2 if module.is_transposed else -1] * (2 if module.has_gate else 1)
    example = (width, down.dtype, down.device)
    traced = _trace(module._apply_gate if module.has_gate else module.act_fn, *example)
    numbers = {argument: _number(traced.graph, *place) for argument, place in _NUMBERS.items()}
    gate = Gate(has_gate=module.has_gate, is_concatenated=module.is_concatenated)
    gate = replace(gate, **{argument: number for argument, number in numbers.items() if number is not None})
    for in_float32, activation in product((False, True), ACTIVATIONS):
        candidate = replace(gate, activation=activation, in_float32=in_float32)
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
    rows_are_dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    example = torch.empty((2, width), dtype=dtype, device=device)
    example = mode.from_tensor(example, symbolic_context=rows_are_dynamic)
    with torch.no_grad():
        graph = make_fx(lambda x: function(x))(example).graph  # a lambda, because it counts a method's self
    return _Trace(graph, f"{_written(graph)} {[str(guard.expr) for guard in env.guards]}")


@lru_cache(maxsize=256)
def _trace_of_gate(gate: Gate, width: int, dtype: torch.dtype, device: torch.device) -> _Trace:
    return _trace(partial(gated, **asdict(gate)), width, dtype, device)


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
