"""Edits and questions on FX graphs; the only place that creates nodes.

A node made by ``call_op`` has its ``meta["val"]``, so that the next transform can ask for its shape;
docs/invariants.md says what else must hold after every transform.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg

aten = torch.ops.aten
_ORIGIN = ("nn_module_stack", "stack_trace")
_TORCH = f"{Path(torch.__file__).parent}/"

# Second names of pointwise ops, which torch leaves without the tag.
_UNTAGGED_POINTWISE = frozenset(
    getattr(aten, name)
    for name in (
        "__and__ __or__ __xor__ absolute divide fix floor_divide greater greater_equal hardswish less "
        "less_equal log_sigmoid multiply negative not_equal rsub special_erf special_exp2 special_expit "
        "subtract"
    ).split()
)


def call_op(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A ``call_function`` node at the graph's insertion point, with its ``meta["val"]``."""
    node = graph.call_function(target, args, kwargs)
    _compute_value(node)
    for key in _ORIGIN:
        source = next((n for n in reversed(node.all_input_nodes) if key in n.meta), None)
        if source is not None:
            node.meta[key] = source.meta[key]
    return node


def copy_origin(node: fx.Node, source: fx.Node) -> None:
    """Let a node come from the same line and module as another, as far as those are known."""
    node.meta.update({key: source.meta[key] for key in _ORIGIN if key in source.meta})


def update_values(changed: fx.Node) -> None:
    """Compute ``meta["val"]`` of all that is computed from a node, after its shape or dtype changed."""
    stale = {changed}
    for node in changed.graph.nodes:
        if node.op == "call_function" and not stale.isdisjoint(node.all_input_nodes):
            _compute_value(node)
            stale.add(node)


def replace(node: fx.Node, new: fx.Node) -> None:
    """Give the readers of a node another one, and remove it."""
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def replace_op(node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
    """Put another op with the same result in a node's place; shapes and source are kept, not computed."""
    with node.graph.inserting_before(node):
        other = node.graph.call_function(target, args)
    other.meta = dict(node.meta)
    replace(node, other)


def add_input(gm: fx.GraphModule, name: str, example: Tensor) -> fx.Node:
    """A placeholder after the last one; ``example`` gives shape, dtype and device."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(placeholders[-1]):
        return _with_value(gm, gm.graph.placeholder(name), example)


def add_attribute(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """A parameter or buffer of the graph, and a node at the insertion point that reads it."""
    register_tensor(gm, name, tensor)
    return _with_value(gm, gm.graph.get_attr(name), tensor.detach())


def register_tensor(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Enter a tensor as the parameter that it is, or else as a buffer."""
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, with the same parameters."""
    return graph_module(gm, copy.deepcopy(gm.graph))


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A module of a graph, whose code is made when it is first asked for, and not after each change."""
    return _LazyGraphModule(root, graph)


def parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a module takes; of a graph whose code is not made yet, what it will take."""
    if isinstance(module, fx.GraphModule):
        _ = module.code
    return inspect.signature(module.forward).parameters


def token_input(gm: fx.GraphModule) -> fx.Node | None:
    """The placeholder of the tokens, input_ids [b, s] or inputs_embeds [b, s, d]; None if there is none."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return next((node for node in placeholders if node.name in ("input_ids", "inputs_embeds")), None)


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode | None:
    """The mode of the graph's fake tensors, None if the graph has none."""
    return next(filter(None, map(_mode, gm.graph.nodes)), None)


def finish(gm: fx.GraphModule) -> None:
    """Remove dead nodes, check the graph and generate its code; after every change."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def delete_unread(gm: fx.GraphModule) -> None:
    """Let go of parameters, buffers and modules that the graph does not read."""
    gm.delete_all_unused_submodules()
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)


def has_weights(gm: nn.Module) -> bool:
    """Whether the parameters hold numbers: none is on meta, none is fake, so that the graph can be run."""
    return not any(p.is_meta or isinstance(p, FakeTensor) for p in gm.parameters())


def has_numbers(tensor: Any) -> bool:
    """Whether this is a tensor whose numbers can be read."""
    return isinstance(tensor, Tensor) and type(tensor) is not FakeTensor and not tensor.is_meta


def value(node: fx.Node) -> Any:
    """``meta["val"]``: a fake tensor, a SymInt, a tuple of them, or None."""
    return node.meta.get("val")


def tensors(node: fx.Node) -> list[Tensor]:
    """The tensors among a node's values: one, those of an op with several results, or none."""
    values = value(node)
    return [v for v in (values if isinstance(values, (tuple, list)) else [values]) if isinstance(v, Tensor)]


def shape(node: fx.Node) -> tuple[int | SymInt, ...]:
    """Sizes of a tensor node."""
    return tuple(value(node).shape)


def is_tensor(node: Any) -> bool:
    """Whether this is a node whose value is one tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor)


def same_size(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are equal for all values of their symbols; adds no guard."""
    if isinstance(a, SymInt) or isinstance(b, SymInt):
        return str(a) == str(b)
    return a == b


def same_shape(a: Iterable[int | SymInt], b: Iterable[int | SymInt]) -> bool:
    """Whether two shapes are equal for all values of their symbols."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_size, a, b))


def args(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments, without the union type that FX gives them."""
    return node.args


def attribute(node: fx.Node) -> Any:
    """What a ``get_attr`` node reads."""
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def op_args(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op node by their schema names, in their order, defaults filled in."""
    op = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) else node.target
    assert isinstance(op, torch._ops.OpOverload), node.format_node()
    schema = op._schema.arguments
    found = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    found.update(zip((arg.name for arg in schema), node.args, strict=False))
    found.update(node.kwargs)
    return {arg.name: found[arg.name] for arg in schema if arg.name in found}


def is_op(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether this is a call of one of ``targets``: overloads, packets (any overload) or functions."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is target or packet is target for target in targets)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on the elements at its own place only."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _UNTAGGED_POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def halves_repeat(node: fx.Node) -> bool:
    """Whether the second half of the last dimension is shown to repeat the first.

    Shown are cat(f, f), a buffer whose values say so, rows that an index takes from such, and pointwise
    functions of such, with constants. What the graph writes to is not shown.
    """
    while not is_written(node):
        if is_op(node, torch.ops.aten.cat.default):
            parts, dim = args(node)[0], (*args(node)[1:], 0)[0]
            return len(parts) == 2 and parts[0] is parts[1] and dim in (-1, len(shape(node)) - 1)
        if node.op == "get_attr":
            table = attribute(node)
            return has_numbers(table) and table.shape[-1] % 2 == 0 and torch.equal(*table.chunk(2, -1))
        if is_op(node, torch.ops.aten.index.Tensor) and len(args(node)[1]) < len(shape(args(node)[0])):
            node = args(node)[0]
            continue
        inputs = node.all_input_nodes
        copies = (torch.ops.aten.to, torch.ops.aten._to_copy)
        if len(inputs) != 1 or not (is_pointwise(node) or is_op(node, *copies)):
            return False
        node = inputs[0]
    return False


def mutates_input(node: fx.Node) -> bool:
    """Whether the op writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: fx.Node) -> bool:
    """Whether a result may lie in the memory of an argument: by the op's schema, or as one of its results."""
    schema = getattr(node.target, "_schema", None)
    by_schema = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return by_schema or node.target is operator.getitem


def is_written(node: fx.Node) -> bool:
    """Whether an op of the graph writes to the memory of a tensor, itself or a view that is made of it."""
    same = node.graph.find_nodes(op="get_attr", target=node.target) if node.op == "get_attr" else [node]
    for user in {user for one in same for user in one.users}:
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        given = op_args(user)
        takes = {arg.name: arg.alias_info for arg in user.target._schema.arguments if arg.alias_info}
        aliases = [info for name, info in takes.items() if given.get(name) in same]
        if any(info.is_write for info in aliases) or (aliases and is_written(user)):
            return True
    return False


def source_line(node: fx.Node) -> str:
    """File and line of the model's source that made the node; empty if it is not known."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in frames if line.startswith("File ")]
    if not files:
        return ""
    # A line of the model says more than one of the torch module that it calls.
    own = [line for line in files if _TORCH not in line]
    file, line, *_ = (own or files)[-1].removeprefix("File ").split(", ")
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')}"


def where(node: fx.Node) -> str:
    """The node's name and the line of the user's source that made it, for messages."""
    line = source_line(node)
    return f"node {node.name} ({line})" if line else f"node {node.name}"


def module_path(node: fx.Node) -> str:
    """Path of the module that made the node, for example ``model.layers.3.self_attn``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    # torch writes this where a pass of its own made the node.
    return paths[-1] if paths and paths[-1] != "_empty_nn_module_stack_from_metadata_hook" else ""


def ancestors(node: fx.Node, stop: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """The node and all that it is computed from, each once; nothing is asked of a stopped node."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        if stop(current):
            continue
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)


def _with_value(gm: fx.GraphModule, node: fx.Node, example: Tensor) -> fx.Node:
    mode = fake_mode(gm)
    node.meta["val"] = mode.from_tensor(example, static_shapes=True) if mode else example
    return node


def _mode(node: fx.Node) -> FakeTensorMode | None:
    return next((v.fake_mode for v in tensors(node) if isinstance(v, FakeTensor)), None)


def _compute_value(node: fx.Node) -> None:
    mode = next(filter(None, map(_mode, [*node.all_input_nodes, *node.graph.nodes])), None)
    if mode is None:
        return
    given = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    # In a graph that was read the layers share their values, and so they share what is computed from them.
    named = map_arg((node.args, dict(node.kwargs)), lambda n: f"@{id(n.meta['val'])}")
    known = vars(mode).setdefault("known_results", {})
    key = f"{node.target} {named}"
    if key not in known:
        assert callable(node.target)
        # Without it torch 2.11 decomposes ops such as linear in C++, which knows no symbolic sizes.
        with mode, torch.no_grad(), enable_python_dispatcher():
            known[key] = given, node.target(*given[0], **given[1])
    node.meta["val"] = known[key][1]
