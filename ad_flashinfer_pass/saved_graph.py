"""An exported graph as a file, read back without running anything that the file holds.

What ``torch.export.save`` writes takes as long to read as a model takes to export. Here what many nodes
share, a type or a place in the source, stands once, and weights are those of the module that is there. As in
``saved_program``, a call must be of an operator that torch knows, and a size of a small grammar.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import SymInt, Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.saved_program import DAMAGE, checked_expression, checked_operator

_KINDS = (torch.dtype, torch.layout, torch.memory_format)
_LARGEST_CONSTANT = 2**20
"""Elements of a tensor that belongs to the graph and not to the module."""


class CannotSaveError(Exception):
    """The graph holds what such a file does not."""


def dumps(gm: fx.GraphModule, owner: nn.Module, key: str) -> bytes:
    """A graph as a file.

    Args:
        gm: of aten ops, with its values.
        owner: the module whose parameters and buffers it reads; they are not written.
        key: what the graph was made from.

    Raises:
        CannotSaveError: it has regions, or arguments, values or constants of other kinds.
    """
    constants, symbols = dict[str, Tensor](), dict[str, int]()
    memory = _shared_memory(gm)
    values, origins = dict[str, int](), dict[str, int]()
    nodes, own = [], _tensors(owner)
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.op == "call_function":
            target = _name(node.target)
        elif node.op == "get_attr" and (tensor := g.attribute(node)) is not own.get(target):
            if type(tensor) is not Tensor or target in own or tensor.numel() > _LARGEST_CONSTANT:
                raise CannotSaveError(f"{target} is not of the module")
            constants[target] = tensor.detach().cpu().clone()
        elif node.op not in ("get_attr", "placeholder", "output"):
            raise CannotSaveError(node.op)
        modules = [[key, *map(str, place)] for key, place in (node.meta.get("nn_module_stack") or {}).items()]
        shared = (
            (values, _described(g.value(node), symbols, memory)),
            (origins, [modules, node.meta.get("stack_trace")]),
        )
        numbers = [table.setdefault(json.dumps(entry), len(table)) for table, entry in shared]
        nodes.append([node.name, node.op, target, _written(node.args), _written(node.kwargs), *numbers])
    tables = [list(map(json.loads, table)) for table in (values, origins)]
    text = json.dumps([symbols, *tables, nodes])
    return save(constants, {"key": key, "graph": text, "digest": _digest(key, text, constants)})


def load(file: Path, owner: nn.Module, key: str) -> fx.GraphModule:
    """The graph of a file that ``dumps`` wrote, with the tensors of a module.

    Args:
        file: that was written.
        owner: a module like the one for which it was written.
        key: what was given then.

    Raises:
        LoadError: it is damaged, or is not such a file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            constants = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 -- no mapping
        text = metadata.get("graph", "")
        if metadata.get("key") != key or metadata.get("digest") != _digest(key, text, constants):
            raise LoadError("is damaged, or of another model")
        return _graph(json.loads(text), owner, constants)
    except LoadError as err:
        raise LoadError(f"{file}: {err}") from None
    except (SafetensorError, sympy.SympifyError, RecursionError, *DAMAGE) as err:
        raise LoadError(f"{file}: {type(err).__name__}: {' '.join(str(err).split())[:200]}") from None


def _digest(key: str, text: str, constants: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{key}\n{text}\n".encode() + save(dict(constants))).hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if getattr(target, "__module__", None) == "_operator":
        return f"_operator.{target.__name__}"
    raise CannotSaveError(f"a call of {target}")


def _written(value: Any) -> Any:
    """An argument as JSON."""
    if isinstance(value, fx.Node):
        return {"@node": value.name}
    if isinstance(value, Mapping):
        return {name: _written(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = list(map(_written, value))
        return items if isinstance(value, list) else {"@tuple": items}
    if isinstance(value, _KINDS):
        return {"@torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"@device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CannotSaveError(f"an argument {value!r:.80}")


def _described(value: Any, symbols: dict[str, int], memory: dict[int, int]) -> Any:
    """A node's value as JSON; the symbols of its sizes, with their hints, and its memory are added."""
    if isinstance(value, Tensor):
        sizes = [_described(list(sizes), symbols, memory) for sizes in (value.shape, value.stride())]
        number = memory.get(value.untyped_storage()._cdata) if memory else None
        return {"tensor": [str(value.dtype).removeprefix("torch."), str(value.device), number, *sizes]}
    if isinstance(value, (list, tuple)):
        return [_described(item, symbols, memory) for item in value]
    if value is None or type(value) is int:
        return value
    if not isinstance(value, SymInt):
        raise CannotSaveError(f"a value {value!r:.80}")
    expression = value.node.expr
    if expression.is_Symbol and str(value.node.shape_env.bound_sympy(expression)) == "VR[2, int_oo]":
        symbols[expression.name] = int(value.node.hint)
    if not symbols.keys() >= {symbol.name for symbol in expression.free_symbols}:
        raise CannotSaveError(f"a size {value} with bounds")
    return sympy.srepr(expression)


def _shared_memory(gm: fx.GraphModule) -> dict[int, int]:
    """Numbers of what several values share, if anything is written: views are told by it."""
    if not any(node.op == "call_function" and g.mutates_input(node) for node in gm.graph.nodes):
        return {}
    try:
        places = Counter(t.untyped_storage()._cdata for node in gm.graph.nodes for t in g.tensors(node))
    except NotImplementedError:  # under vmap
        raise CannotSaveError("a value has no memory") from None
    return {place: number for number, place in enumerate(places) if places[place] > 1}


def _graph(data: list[Any], owner: nn.Module, constants: dict[str, Tensor]) -> fx.GraphModule:
    symbols, values, origins, nodes = data
    values = list(_values(values, symbols))
    origins = [
        {"nn_module_stack": {key: (path, kind) for key, path, kind in modules}, "stack_trace": trace}
        for modules, trace in origins
    ]
    targets = {name: _target(name) for _, op, name, *_ in nodes if op == "call_function"}
    tensors, graph, made = _tensors(owner), fx.Graph(), dict[str, fx.Node]()
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    tensors.update({name: tensor.to(device) for name, tensor in constants.items()})
    for name, op, target, args, kwargs, value, origin in nodes:
        if op not in ("get_attr", "placeholder", "call_function", "output"):
            raise LoadError(f"{op!r:.80} is no node that is written")
        called = targets[target] if op == "call_function" else target
        node = graph.create_node(op, called, _read(args, made), _read(kwargs, made), name)
        node.meta.update({"val": values[value], **{key: of for key, of in origins[origin].items() if of}})
        made[name] = node
    graph.lint()
    read = {node.target for node in graph.find_nodes(op="get_attr")}
    return g.graph_module({name: tensors[name] for name in read}, graph)


def _target(name: str) -> Any:
    if name == "_operator.getitem":
        return operator.getitem
    module, *path = checked_operator(name).split(".")
    found: Any = {"torch": torch, "_operator": operator}[module]
    for part in path:
        found = getattr(found, part)
    return found


def _read(value: Any, made: Mapping[str, fx.Node]) -> Any:
    """An argument from JSON."""
    if isinstance(value, list):
        return [_read(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"@node": name}:
            return made[name]
        case {"@tuple": items}:
            return tuple(_read(item, made) for item in items)
        case {"@device": name}:
            return torch.device(name)
        case {"@torch": name}:
            if not isinstance(found := getattr(torch, name), _KINDS):
                raise LoadError(f"torch.{name:.80} is no dtype or layout")
            return found
    return {name: _read(item, made) for name, item in value.items()}


def _values(described: list[Any], symbols: dict[str, int]) -> Iterator[Any]:
    """The values of nodes; equal ones are one object, and views share the memory of what they show."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    dynamic: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * len(symbols))
    sizes: Any = mode.from_tensor(
        torch.empty(*symbols.values(), device="meta"), symbolic_context=dynamic
    ).shape
    own = {name: size.node.expr for name, size in zip(symbols, sizes, strict=True)}
    hints = {own[name]: hint for name, hint in symbols.items()}

    @cache
    def size_of(text: str) -> int | SymInt:
        expression = sympy.sympify(checked_expression(text))
        expression = expression.xreplace({symbol: own[symbol.name] for symbol in expression.free_symbols})
        return env.create_symintnode(expression, hint=int(expression.xreplace(hints)))

    @cache
    def memory_of(number: int, device: str) -> Tensor:
        return torch.empty(16, dtype=torch.uint8, device=device)

    def value_of(entry: Any) -> Any:
        if isinstance(entry, dict):
            name, device, number, *sizes = entry["tensor"]
            (shape, stride), dtype = (
                (list(map(value_of, each)) for each in sizes),
                _read({"@torch": name}, {}),
            )
            if number is None:
                return torch.empty_strided(shape, stride, dtype=dtype, device=device)
            return memory_of(number, device).view(dtype).as_strided(shape, stride)
        if isinstance(entry, list):
            return tuple(map(value_of, entry))
        return size_of(entry) if isinstance(entry, str) else entry

    with mode:
        yield from map(value_of, described)
