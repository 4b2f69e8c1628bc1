"""A graph from Dynamo -> the form of an exported graph, which is what the transforms read.

Dynamo's graph calls torch functions, takes parameters, buffers and sizes as inputs, and may be one of several
pieces of a model. Here its parameters and buffers become attributes again and it is traced by torch.export,
so that the matcher sees the ops of an exported model:

Before: out = graph(s0, input_ids: [1, s0], w_0, w_1, ..., position_ids: [1, s0])
After:  out = graph(input_ids: int64 [1, t], position_ids: int64 [1, t], hidden_0, ...)

The batch is always 1: sequences lie one after the other. What else a piece takes (what the piece before it
made) follows the two inputs that every piece has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.fx.traceback import preserve_node_meta

from ad_flashinfer_pass.errors import ExportError, SessionError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.transforms.export_model import failed_guard, plain_module, reason_of

_EXAMPLE_TOKENS = 13
_OTHER_TOKENS = (2, 5, 17)


@dataclass(frozen=True)
class Source:
    """One input of a graph from Dynamo."""

    name: str
    """How the model calls it, for example ``model.layers.0.self_attn.q_proj.weight``."""
    is_attribute: bool
    """Whether it is a parameter or buffer."""
    shape: tuple[int | torch.SymInt, ...] | None
    """None for a size."""
    is_number: bool = False
    """Whether it is a float of the model, such as an epsilon, that Dynamo takes for dynamic."""


def sources(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Source]:
    """What the inputs of a graph from Dynamo are.

    Raises:
        ExportError: it is no graph from Dynamo, or takes something that is no tensor.
    """
    if not all("grapharg" in node.meta for node in gm.graph.find_nodes(op="placeholder")):
        raise ExportError(
            "the backend was given a graph that Dynamo did not make, as aot_autograd(fw_compiler=...) does: "
            "give it to torch.compile itself. A graph of your own goes through transform or transform_module."
        )
    found = []
    for node, example in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        name = _name_of(node.meta["grapharg"].source)
        if isinstance(example, Tensor):
            is_attribute = isinstance(example, nn.Parameter) or "_buffers[" in name
            shape = tuple(node.meta["example_value"].shape)
            found.append(Source(_readable(name), is_attribute, shape, _is_number(node)))
        elif isinstance(example, (int, torch.SymInt)):
            found.append(Source(_readable(name), False, None))
        else:
            raise ExportError(
                f"the model takes {_readable(name)}, a {type(example).__name__}, which a graph for a "
                "session cannot have: pass tensors."
            )
    return found


def branch_on_tokens(max_num_tokens: int) -> str | None:
    """Where the graph that Dynamo just made is for some numbers of tokens only, and which; None if for all.

    Such a graph is not that of a step: transformers leaves out a window's mask where there are fewer tokens
    than the window, but a step of few tokens may be that of a long sequence.

    Args:
        max_num_tokens: of a step.
    """
    context = TracingContext.try_get()
    env = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    for guard in [] if env is None else env.guards:
        symbols = guard.expr.free_symbols
        if not all(symbol.is_integer for symbol in symbols):
            continue
        near = {int(c) + d for c in guard.expr.atoms() if c.is_Integer for d in (-1, 0, 1)}
        for n in sorted({*_OTHER_TOKENS, max_num_tokens, *near}):
            if 2 <= n <= max_num_tokens and not bool(guard.expr.subs(dict.fromkeys(symbols, n))):
                return f"{guard.expr}, which {n} tokens are not, by {guard.sloc}"
    return None


def cache_of_its_own() -> str | None:
    """The cache object that the model was called with, in the graph that Dynamo just made; None if none."""
    context = TracingContext.try_get()
    for guard in [] if context is None else context.guards_context.dynamo_guards:
        # Even an empty one, whose tensors are none of the inputs, is asked for its layers.
        if found := re.match(r"L\[.*past_key_values'\](?=\.)", _name_of(guard)):
            return _readable(found[0])
    return None


class _Number(NamedTuple):
    """In place of a tensor of which a graph reads nothing but its value."""

    value: float

    def item(self) -> float:
        """As of the tensor."""
        return self.value


def has_own_cache(name: str) -> SessionError:
    """The refusal of a call with a cache."""
    return SessionError(
        f"the model was called with a cache of its own ({name}); the session holds K and V. Call it without "
        "past_key_values."
    )


class Piece(nn.Module):
    """A graph from Dynamo as a module of input_ids, position_ids and further tensors.

    Args:
        gm: the graph.
        inputs: its ``sources``.
        args: of one call of the graph; parameters and buffers are taken from it.
        input_ids: what of ``args`` is input_ids, int64 [1, total_tokens].
        position_ids: likewise.

    Raises:
        SessionError: it takes the state of another cache.
        ExportError: it takes a size that is not the number of tokens.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Source],
        args: Sequence[Any],
        input_ids: Tensor,
        position_ids: Tensor,
    ) -> None:
        super().__init__()
        self._run = fx.Interpreter(gm).run
        self._order: list[str | int | _Number] = []
        """For each input of the graph: an attribute, or which argument of ``forward``; -1: a size."""
        self.where: dict[str, int] = {}
        """Which argument of the graph is input_ids and which position_ids, if it takes them."""
        self.extra: list[int] = []
        """Which arguments of the graph are the further tensors."""
        self._extra_shapes: list[tuple[int | None, ...]] = []
        """Of the further tensors, None for the number of tokens."""
        self._dtypes: list[torch.dtype] = []
        for index, (source, arg) in enumerate(zip(inputs, args, strict=True)):
            if re.search(r"past_key_values|\.key_cache|\.value_cache", source.name):
                raise has_own_cache(source.name)
            if source.shape is None:
                if arg != input_ids.shape[1]:
                    raise ExportError(
                        f"the graph depends on {source.name}={arg}, which is not the number of tokens."
                    )
                self._order.append(-1)
            elif source.is_number:
                self._order.append(_Number(arg.item()))
            elif source.is_attribute:
                self._order.append(self._enter(source.name, arg))
            elif arg is input_ids or arg is position_ids:
                self._order.append(0 if arg is input_ids else 1)
                self.where["input_ids" if arg is input_ids else "position_ids"] = index
            elif not arg.is_floating_point() and arg.numel() > 1:
                raise SessionError(
                    f"{source.name}, {arg.dtype} {list(arg.shape)}, is not one of batch.inputs. Call the "
                    "model with batch.inputs themselves and without a mask: sequences of any length lie "
                    "one after the other. If the model made it, a graph break cut it off: torch.compile(..., "
                    "fullgraph=True) says where."
                )
            else:
                self._order.append(2 + len(self.extra))
                self.extra.append(index)
                fixed = tuple(size if isinstance(size, int) else None for size in source.shape)
                self._extra_shapes.append(fixed)
                self._dtypes.append(arg.dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *extra: Tensor) -> Any:
        """What the graph returns."""
        num_tokens = input_ids.shape[1]
        for tensor, fixed in zip(extra, self._extra_shapes, strict=True):
            for size, known in zip(tensor.shape, fixed, strict=True):
                if known is None:
                    torch._check(size == num_tokens)
        given = (input_ids, position_ids, *extra)
        args: list[Any] = []
        for what in self._order:
            if isinstance(what, str):
                args.append(self._attribute(what))
            elif isinstance(what, _Number):
                args.append(what)
            else:
                args.append(num_tokens if what < 0 else given[what])
        return self._run(*args)

    def examples(self, num_tokens: int, device: torch.device) -> list[Tensor]:
        """Inputs of ``forward`` for a number of tokens, at positions 0, 1, 2, ..."""
        input_ids = torch.zeros((1, num_tokens), dtype=torch.int64, device=device)
        position_ids = torch.arange(num_tokens, device=device)[None]
        extra = [
            torch.zeros([num_tokens if n is None else n for n in shape], dtype=dtype, device=device)
            for shape, dtype in zip(self._extra_shapes, self._dtypes, strict=True)
        ]
        return [input_ids, position_ids, *extra]

    def dynamic_dims(self) -> list[dict[int, Any]]:
        """Of each input of ``forward``, the dimensions that count tokens."""
        dynamic = torch.export.Dim.DYNAMIC
        extra = [{i: dynamic for i, n in enumerate(shape) if n is None} for shape in self._extra_shapes]
        return [{1: dynamic}, {1: dynamic}, *extra]

    def _attribute(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def _enter(self, name: str, tensor: Tensor) -> str:
        """Put a parameter or buffer where the model has it."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        g.register_tensor(owner, leaf, tensor)
        return name


def exported(piece: Piece, device: torch.device, max_num_tokens: int) -> fx.GraphModule:
    """The piece as an exported graph with its outputs in a tuple.

    Raises:
        ExportError: torch.export refused, or the graph is not right for all numbers of tokens.
    """
    dims = piece.dynamic_dims()
    # One tuple for *extra, as torch.export wants it.
    shapes = (dims[0], dims[1], tuple(dims[2:])) if dims[2:] else (dims[0], dims[1])
    try:
        with torch.no_grad(), preserve_node_meta():
            program = torch.export.export(
                piece, tuple(piece.examples(_EXAMPLE_TOKENS, device)), dynamic_shapes=shapes, strict=False
            )
    except Exception as err:  # torch.export raises whatever the model's own code raises
        raise ExportError(
            f"the graph cannot be exported with a dynamic number of tokens: {reason_of(err)}"
        ) from err
    gm, guards = plain_module(program.module())
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {key: (_readable(path), kind) for key, (path, kind) in stack.items()}
    for num_tokens in (*_OTHER_TOKENS, max_num_tokens):
        inputs = [
            torch.empty_like(x, device="meta") for x in piece.examples(num_tokens, torch.device("meta"))
        ]
        failed = failed_guard(guards, inputs)
        if failed is not None:
            raise ExportError(
                f"the graph is not right for {num_tokens} tokens ({failed}). Let the model compute from "
                "shapes with tensors, or lower max_num_tokens of the session if that is the bound."
            )
    return gm


def _is_number(node: fx.Node) -> bool:
    """Whether a tensor stands for a Python float: with dynamic=True, Dynamo makes inputs of them."""
    is_passed_as_tensor = node.meta["grapharg"].pass_arg_as_tensor
    return is_passed_as_tensor and all(
        user.op == "call_method" and user.target == "item" for user in node.users
    )


def _name_of(source: Any) -> str:
    """Of a source or guard of Dynamo's; a method in some versions of torch."""
    return str(source.name if isinstance(source.name, str) else source.name())


def _readable(name: str) -> str:
    """L["self"]._modules["model"]._parameters["weight"] -> model.weight."""
    name = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)
    name = re.sub(r"^[LG]\['(\w+)'\]", r"\1", name)
    name = re.sub(r"\['?(\w+)'?\]", r".\1", name)
    return re.sub(r"^self\.", "", name)
