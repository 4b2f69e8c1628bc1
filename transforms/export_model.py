"""nn.Module -> aten graph with dynamic batch and sequence.

After: logits: [b, s, vocab] = graph(input_ids: int64 [b, s], position_ids: int64 [b, s])
  or:  logits: [b, s, vocab] = graph(inputs_embeds: float [b, s, d], position_ids: int64 [b, s])

The graph shares the module's parameters. A model of transformers is called without a cache; a module
of one's own is called with input_ids and position_ids, and returns logits or something with them; one whose
forward has no input_ids but inputs_embeds, as the text stack of a vision model, is called with those. A
graph that was made elsewhere, ``ExportedProgram.module()`` or from ``make_fx``, is taken as it is.
"""

from __future__ import annotations

import bisect
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ad_flashinfer_pass import experts, export_cache, states
from ad_flashinfer_pass.errors import ExportError, UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register

# Large enough that sizes are not confused with small constants, distinct, and not 0 or 1, which
# torch.export specialises.
_EXAMPLE_BATCH, _EXAMPLE_SEQ = 2, 13
# One sequence, one token, and more of both than the example has; the longest sequence is added.
_OTHER_SHAPES = ((1, 5), (4, 1), (3, 17))
# Tokens; what holds only beyond is refused without a run, which would take too much memory.
_LONGEST_RUN = 4096


@register("export_model")
def export_model(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Export ``model``.

    Raises:
        ExportError: torch.export refused, in its own words; or a given graph has other inputs than tokens
            and positions, or is not dynamic in both sizes.
    """
    if isinstance(model, fx.GraphModule):
        gm = _given(model, ctx)
    else:
        from ad_flashinfer_pass.models import ropes  # with it comes transformers

        with ropes.by_own_length(model, ctx.sequence_info.max_seq_len):
            gm = _exported(model, ctx)
        ctx.sequence_info.recompute_at = ropes.recomputes_at(model, ctx.sequence_info.max_seq_len)
    report = TransformReport("export_model", num_matches=1)
    report.notes.append(f"{len(gm.graph.nodes)} nodes")
    return gm, report


def _exported(model: nn.Module, ctx: TransformContext) -> fx.GraphModule:
    wrapped = Logits(model).eval()
    has_weights = g.has_weights(wrapped)
    keys = [
        export_cache.key_of(wrapped, max_seq_len=ctx.sequence_info.max_seq_len, was_compared=was_compared)
        for was_compared in ((True,) if has_weights else (True, False))
    ]
    for key in filter(None, keys):
        if (kept := export_cache.load(key, wrapped)) is not None:
            return kept
    example = wrapped.example((_EXAMPLE_BATCH, _EXAMPLE_SEQ), ctx.device)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), experts.as_one_op(model), states.as_ops(model):
            program = torch.export.export(
                wrapped,
                example,
                dynamic_shapes=(dynamic, dynamic),
                strict=False,
            )
    except UnsupportedError:
        raise
    except Exception as err:  # torch.export raises whatever the model's own code raises
        raise ExportError(
            f"{type(model).__name__} cannot be exported with dynamic batch and sequence: {reason_of(err)}"
        ) from err
    gm, guards = _single_output(program.module())
    with experts.as_one_op(model), states.as_ops(model):  # the same ops on both sides round alike
        _check_other_shapes(gm, wrapped, guards, ctx)
    first = gm.graph.find_nodes(op="placeholder")[0]
    first.name = first.target = wrapped.tokens
    g.finish(gm)
    if keys[-1] is not None:
        export_cache.store(keys[-1], gm, wrapped)
    return gm


def reason_of(err: Exception) -> str:
    """What torch.export said, in terms of the model where it spoke of its own settings."""
    text = " ".join(str(err).split())
    fixed = re.search(
        r"L\['(\w+)'\]\S* as dynamic but your code specialized it to be a constant \((\d+)\)", text
    )
    if fixed is not None:
        return (
            f"its code fixes a size of {fixed[1]} to {fixed[2]}, as a loop over the tokens does. Compute "
            "from shapes with tensors; of recurrent layers those are served whose functions are known "
            "(docs/architectures.md)."
        )
    branch = re.search(r"data-dependent expression (.+?) \(unhinted", text)
    if branch is not None:
        return (
            f"its code{_line_of_model(err)} needs a value that is known only when it runs ({branch[1]}). "
            "Use operations on tensors in place of branches and loops on their values."
        )
    return text[:600] or type(err).__name__


def _line_of_model(err: Exception) -> str:
    """The innermost line outside torch, as text for a message."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if "/torch/" not in f.filename]
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames[1:] else ""  # the first is in this file


def _given(given: fx.GraphModule, ctx: TransformContext) -> fx.GraphModule:
    inputs = given.graph.find_nodes(op="placeholder")
    shapes = [g.shape(node) if g.is_tensor(node) else () for node in inputs]
    ranks = [len(shape) for shape in shapes]
    is_float = ranks[:1] and g.is_tensor(inputs[0]) and g.value(inputs[0]).is_floating_point()
    if len(ranks) != 2 or ranks[0] != (3 if is_float else 2) or ranks[1] not in (2, 3):
        raise ExportError(
            "a given graph must have two inputs, input_ids [batch, seq] or inputs_embeds [batch, seq, "
            "hidden], and position_ids [batch, seq], or [n, batch, seq] if a token has several, got "
            f"{', '.join(f'{n.name} {tuple(shape)}' for n, shape in zip(inputs, shapes, strict=True))}."
        )
    if not all(isinstance(size, torch.SymInt) for size in shapes[0][:2]):
        raise ExportError(
            f"batch and sequence of a given graph must be dynamic, got {inputs[0].name} {tuple(shapes[0])}: "
            "export it with dynamic_shapes, or trace it with make_fx(tracing_mode='symbolic')."
        )
    for node, name in zip(
        inputs, ("inputs_embeds" if is_float else "input_ids", "position_ids"), strict=True
    ):
        node.name = node.target = name
    gm, guards = _single_output(given)
    for shape in (*_OTHER_SHAPES, (1, ctx.sequence_info.max_seq_len)):
        examples = (g.value(node).new_empty((*_shape_of(node, shape),), device="meta") for node in inputs)
        failed = failed_guard(guards, tuple(examples))
        if failed is not None:
            raise ExportError(
                f"the given graph is not right for {shape[0]} x {shape[1]} tokens ({failed}). Export it from "
                "an example with other sizes, or lower max_seq_len if that is the bound."
            )
    return gm


class Logits(nn.Module):
    """The model as a function of tokens, by number or vector, and position_ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = g.parameters(model)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.takes_positions = "position_ids" in parameters
        by_vector = "inputs_embeds" in parameters and "input_ids" not in parameters
        self.tokens = "inputs_embeds" if by_vector else "input_ids"
        self.extra: dict[str, Any] = {}
        takes_cache = not parameters.keys().isdisjoint(("past_key_values", "cache"))
        if "use_cache" in parameters or (takes_any and takes_cache):
            self.extra = {"use_cache": False}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, vocab]."""
        kwargs = {"position_ids": position_ids} if self.takes_positions else {}
        return _logits(self.model(**{self.tokens: input_ids}, **kwargs, **self.extra))

    def example(self, shape: tuple[int, int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Tokens of this shape and positions from 0; on meta, of no values.

        Raises:
            ExportError: the model takes vectors, and their width is not known.
        """
        batch, seq = shape
        ids = torch.arange(batch * seq, device=device).view(shape) % 2
        positions = torch.arange(seq, device=device).repeat(batch, 1)
        if self.tokens == "input_ids":
            return ids, positions
        config = getattr(self.model, "config", None)
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise ExportError(
                f"{type(self.model).__name__} takes inputs_embeds, whose width is not known: give the module "
                "a config with hidden_size, or export it and give the graph."
            )
        weight = next(self.model.parameters())
        return (ids[..., None] + torch.linspace(0, 1, width, device=device)).to(weight.dtype), positions


def _logits(out: Any) -> Tensor:
    """What a model returned: the part called logits, or the first of a tuple, or the only tensor.

    Raises:
        ExportError: none of them is one.
    """
    parts: dict[Any, Any] = {}
    if isinstance(out, Mapping):
        parts = dict(out)
    elif isinstance(out, (tuple, list)):
        parts = dict(enumerate(out))
    elif not isinstance(out, Tensor):
        parts = getattr(out, "__dict__", parts)
    named = getattr(out, "logits", parts.get("logits", parts.get(0)))
    tensors = [part for part in parts.values() if isinstance(part, Tensor)]
    found = out if isinstance(out, Tensor) else named if isinstance(named, Tensor) else None
    if found is None and len(tensors) == 1:
        found = tensors[0]
    if found is None:
        raise ExportError(
            f"it returns a {type(out).__name__} of {', '.join(map(str, parts)) or 'nothing'}, and which of "
            "them are the logits is not said: return the logits, or a dict or object with `logits`."
        )
    return found


def plain_module(module: nn.Module) -> tuple[fx.GraphModule, list[nn.Module]]:
    """The graph with its parameters as attributes, plain inputs, a tuple of outputs, and no hooks.

    Also the modules that check what export assumed about the shapes of the inputs.
    """
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    guards = []
    _inline_regions(module)
    for node in graph.find_nodes(op="call_module"):
        guards.append(module.get_submodule(str(node.target)))
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    gm = g.graph_module(module, graph)
    g.finish(gm)
    return gm, guards


def _single_output(module: nn.Module) -> tuple[fx.GraphModule, list[nn.Module]]:
    """``plain_module`` with the first output alone, the logits."""
    assert isinstance(module, fx.GraphModule)
    output = module.graph.output_node()
    result = g.args(output)[0]
    output.args = (result[0] if isinstance(result, (tuple, list)) else result,)
    return plain_module(module)


def _check_other_shapes(
    gm: fx.GraphModule, wrapped: Logits, guards: list[nn.Module], ctx: TransformContext
) -> None:
    """Refuse a graph into which a property of the example's shape was written.

    Not everything that export assumed matters: strides decide how a reshape is done, a branch on a length
    what is computed. So where an assumption does not hold, the graph is run beside the model; also for sizes
    of 1, which torch.export takes for larger ones without a guard.
    """
    for shape in (*_OTHER_SHAPES, (1, ctx.sequence_info.max_seq_len)):
        failed = failed_guard(guards, wrapped.example(shape, "meta"))
        if failed is not None:
            is_wrong = not _computes_the_same(gm, wrapped, shape, ctx.device)
        else:
            is_one = shape in _OTHER_SHAPES and 1 in shape and _can_be_compared(gm)
            is_wrong = is_one and _computes_the_same(gm, wrapped, shape, ctx.device) is False
            failed = "its code takes another path for a size of 1"
        if is_wrong:
            name, example = type(wrapped.model).__name__, f"{_EXAMPLE_BATCH} x {_EXAMPLE_SEQ}"
            is_long = shape not in _OTHER_SHAPES and shape[1] > _EXAMPLE_SEQ
            most = _longest(gm, wrapped, guards, ctx) if is_long else 0
            bound = f"or set max_seq_len: {most}" if most else "or lower max_seq_len if that is the bound"
            raise ExportError(
                f"{name} cannot be exported with dynamic batch and sequence: the graph made from {example} "
                f"tokens is not right for {shape[0]} x {shape[1]} ({failed}). Let the model compute from "
                f"shapes with tensors, not with Python numbers, {bound}."
            )


def _longest(gm: fx.GraphModule, wrapped: Logits, guards: list[nn.Module], ctx: TransformContext) -> int:
    """Tokens of a sequence up to which a graph is right that is not so up to max_seq_len.

    By halving: below ``_LONGEST_RUN`` at most 12 runs, each of a length of which an assumption does not hold.
    """

    def is_wrong(length: int) -> bool:
        shape = 1, length
        failed = failed_guard(guards, wrapped.example(shape, "meta"))
        return failed is not None and not _computes_the_same(gm, wrapped, shape, ctx.device)

    lengths = range(ctx.sequence_info.max_seq_len)
    return bisect.bisect_left(lengths, True, lo=_EXAMPLE_SEQ, key=is_wrong) - 1


def failed_guard(guards: list[nn.Module], inputs: Sequence[Tensor]) -> str | None:
    """What export assumed about its inputs and these, on meta, do not have; None if they have all."""
    try:
        for guard in guards:
            guard(*inputs)
    except AssertionError as err:
        return " ".join(str(err).split())
    return None


def _inline_regions(gm: fx.GraphModule) -> None:
    """The bodies of ``no_grad``, and of ``autocast`` that is switched off, in place of the calls of them.

    Legal because nothing here takes gradients, and no autocast is on outside.

    Raises:
        ExportError: an autocast region is switched on.
    """
    hops = torch.ops.higher_order
    for node in list(gm.graph.nodes):
        if node.target is hops.wrap_with_set_grad_enabled:
            body, *inputs = g.args(node)[1:]
        elif node.target is hops.wrap_with_autocast:
            _, dtype, enabled, _, body, *inputs = g.args(node)
            if enabled:
                raise ExportError(
                    f"{g.where(node)}: the model runs a part of itself under autocast to {dtype}, which the "
                    "graph cannot keep. Export it in the dtype that it should have, without autocast."
                )
        else:
            continue
        _inline(gm, node, body, inputs)
        return _inline_regions(gm)  # a region can hold others


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.Node, inputs: list[Any]) -> None:
    """Copy the nodes of a region in front of its call, and give its results to the readers of the call."""
    region = g.attribute(body)
    placeholders = region.graph.find_nodes(op="placeholder")
    values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    with gm.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op in ("get_attr", "call_function"):
                values[inner] = gm.graph.node_copy(inner, values.__getitem__)
            if inner.op == "get_attr":
                values[inner].target = f"{body.target}.{inner.target}"
    results = fx.node.map_arg(g.args(region.graph.output_node())[0], values.__getitem__)
    for user in list(node.users):
        g.replace(user, results[g.args(user)[1]])
    gm.graph.erase_node(node)


def _shape_of(node: fx.Node, tokens: tuple[int, int]) -> list[int]:
    """The shape of an input for so many sequences and tokens."""
    first = g.value(node).dim() - 2 if g.value(node).dtype == torch.int64 else 0
    sizes = [int(size) if at not in (first, first + 1) else 0 for at, size in enumerate(g.shape(node))]
    sizes[first : first + 2] = tokens
    return sizes


def _can_be_compared(gm: fx.GraphModule) -> bool:
    """Whether the graph gives the model's numbers again and again, and has weights."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and g.mutates_input(node)]
    # Else each run would change the model; such a write is refused by what follows.
    return g.has_weights(gm) and all(node.all_input_nodes[0].op != "get_attr" for node in calls)


def _computes_the_same(
    gm: fx.GraphModule, wrapped: Logits, shape: tuple[int, int], device: torch.device
) -> bool | None:
    """Whether they do; None if one of them cannot be run."""
    if shape[1] > _LONGEST_RUN or not g.has_weights(gm):
        return None
    inputs, cuda = wrapped.example(shape, device), [device] if device.type == "cuda" else []
    # By one kernel of attention: without a mask, which a model may leave out, torch takes another.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=cuda):
        try:
            torch.manual_seed(0)
            wanted = wrapped(*inputs)
            torch.manual_seed(0)
            found = gm(*inputs)
        except (RuntimeError, IndexError, ValueError, AssertionError):  # what the model's own code raises
            return None
    # The same ops on the same numbers: this is ample for sums in another order. Logits that a mask fills say
    # nothing of the size of the others.
    share = max(1e-3, 2 * torch.finfo(wanted.dtype).eps)
    sizes = wanted[wanted.abs() < torch.finfo(wanted.dtype).max / 2].abs()
    largest = float(sizes.max()) if len(sizes) else 0.0
    return torch.allclose(found, wanted, rtol=share, atol=share * largest, equal_nan=True)
