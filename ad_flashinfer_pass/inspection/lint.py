"""``lint``: what in a graph keeps a CUDA graph of it from being captured, or makes its replay wrong.

The graph is read, not run. ``RULES`` says of each rule why it is one and what to do. A graph that was made on
a CPU has no second device, so the rules about copies between host and device find nothing in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import SymBool, SymFloat, SymInt, fx

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.config import AutoDeployConfig, nearest
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.inspection.stages import Stages, run_stages
from ad_flashinfer_pass.inspection.tables import folded, source_line, table
from ad_flashinfer_pass.inspection.target import check_target, site_choices
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import PHASES
from ad_flashinfer_pass.runtime.cached_model import POOLS

if TYPE_CHECKING:
    from rich.console import RenderableType

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer
aten = torch.ops.aten

# They read a flag or a size on the host, which no tag of torch tells; found by capturing every op of torch's
# own table of samples (tests/gpu/test_capture_ops.py).
_SYNCS = {
    f"aten.{name}"  # not every torch has all of them
    for name in (
        "item _local_scalar_dense is_nonzero equal allclose cholesky _linalg_check_errors "
        "linalg_inv linalg_cholesky linalg_solve linalg_eig linalg_eigvals _linalg_eigh linalg_eigvalsh "
        "_linalg_svd linalg_pinv linalg_lstsq linalg_matrix_rank linalg_matrix_exp linalg_ldl_factor_ex "
        "linalg_ldl_solve"
    ).split()
}
_COPIES = {aten._to_copy, aten.to, aten.copy_, aten.copy, aten.lift_fresh_copy}
# Of other packages: attention that plans, or reads lengths, on the host in each call.
_PLANNERS = (
    "auto_deploy.flashinfer_attention_mha_with_cache",
    "auto_deploy.flashinfer_mla",
    "auto_deploy.torch_cached_attention_with_cache",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rule that a node breaks."""

    rule: str
    node: str
    """Name in FX."""
    where: str
    """Node and source line."""
    module: str
    message: str


@dataclass(frozen=True)
class Rule:
    """What makes a graph unfit for capture."""

    why: str
    fix: str
    example: str
    """A small graph that breaks it, in Python: x and i are tensors of the device, h and s of the host."""
    find: Callable[[fx.Node, _Graph], str | None]
    """What is wrong with a node, None if nothing is."""


class _Graph:
    """What rules ask about a graph."""

    def __init__(self, gm: fx.GraphModule, static_inputs: Collection[str]) -> None:
        self.static_inputs = static_inputs
        devices = [tensor.device for node in gm.graph.nodes for tensor in g.tensors(node)]
        # The device that is captured: any but the host.
        captured = (device for device in devices if device.type not in ("cpu", "meta"))
        self.device = next(captured, torch.device("cpu"))

    def on_host(self, node: Any) -> bool:
        """Whether this is a tensor of the host beside those of another device."""
        tensors = g.tensors(node) if isinstance(node, fx.Node) else []
        return self.device.type != "cpu" and any(tensor.device.type == "cpu" for tensor in tensors)

    def on_device(self, node: Any) -> bool:
        """Whether this is a tensor of the device that is captured."""
        return isinstance(node, fx.Node) and any(t.device.type == self.device.type for t in g.tensors(node))


def lint_graph(
    gm: fx.GraphModule, *, static_inputs: Collection[str] | None = None, suppress: Collection[str] = ()
) -> list[Finding]:
    """Read a graph.

    Args:
        gm: its nodes have ``meta["val"]``.
        static_inputs: inputs that are the same tensors in each call, which the graph may therefore write.
            Default: the pools, ``kv_cache_*``, ``conv_state_*`` and ``recurrent_state_*``.
        suppress: rules that are left out.

    Raises:
        ConfigError: an unknown rule is suppressed.
    """
    _check_rules(suppress)
    if static_inputs is None:
        names = (node.name for node in gm.graph.find_nodes(op="placeholder"))
        static_inputs = {name for name in names if name.startswith(POOLS)}
    graph = _Graph(gm, static_inputs)
    found = []
    for node in gm.graph.nodes:
        for name, rule in RULES.items():
            message = rule.find(node, graph) if name not in suppress else None
            if message is not None:
                found.append(_finding(name, node, message))
    return found


def _check_rules(names: Collection[str]) -> None:
    for unknown in set(names) - set(RULES):
        raise ConfigError(f"no rule {unknown!r}; {nearest(unknown, list(RULES))}")


def lint(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    sm: int | None = None,
    suppress: Collection[str] = (),
    on_event: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Run the pass without weights and read the graph that it leaves, and the kernels that run it.

    Args:
        config: the model and the settings of the pass.
        graph: a saved ExportedProgram in place of the model.
        stage: read the graph after this transform or stage.
        sm: compute capability of the GPU, 90 for 9.0. Default: that of ``config.device``, or a CPU.
        suppress: rules that are left out.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: an unknown rule or stage; or the device is a GPU that is not here without ``sm``.
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model.
    """
    check_target(config, sm)
    _check_rules(suppress)
    run = run_stages(config, graph, None if stage is None else [stage], on_event, sm=sm)
    return lint_run(run, config, sm, suppress)


def lint_run(
    run: Stages, config: AutoDeployConfig, sm: int | None, suppress: Collection[str] = ()
) -> list[Finding]:
    """The findings of a run; see ``lint``."""
    assert isinstance(run.module, fx.GraphModule)
    # Kernels are chosen anew, for the GPU on which the graph will be captured.
    found = lint_graph(run.module, suppress=[*suppress, "host-plan"])
    if "host-plan" in suppress:
        return found
    for site in run.ctx.sites:
        for phase, choice in zip(PHASES, site_choices(site, config, sm), strict=True):
            for kernel in select.on_host(phase, choice.kernel):
                message = f"{phase} by {kernel} reads lengths on the host"
                node = site.where.split()[1]
                found.append(
                    Finding(
                        rule="host-plan", node=node, where=site.where, module=site.module, message=message
                    )
                )
    return found


def _finding(rule: str, node: fx.Node, message: str) -> Finding:
    return Finding(
        rule=rule, node=node.name, where=g.where(node), module=g.module_path(node), message=message
    )


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target))


def _tagged(node: fx.Node, tag: torch.Tag) -> bool:
    return node.op == "call_function" and tag in getattr(node.target, "tags", ())


def _is_mask(node: Any) -> bool:
    return g.is_tensor(node) and g.value(node).dtype in (torch.bool, torch.uint8)


def _host_sync(node: fx.Node, graph: _Graph) -> str | None:
    if node.op == "call_method" and node.target in ("item", "tolist", "cpu", "numpy"):
        return f"{node.target}() waits for the device"
    if node.target in (torch.cuda.synchronize,):
        return "waits for the device"
    is_known = _name(node) in _SYNCS or _waits_for_some(node)
    if node.op != "call_function" or not (is_known or _tagged(node, torch.Tag.data_dependent_output)):
        return None
    if not any(graph.on_device(source) for source in node.all_input_nodes):
        return None
    return f"{_name(node)} waits for the device, to read a value of a tensor"


def _waits_for_some(node: fx.Node) -> bool:
    """Ops that wait for the device for some arguments alone.

    Source: lu_factor in BatchLinearAlgebra.cpp of torch 2.11, for the shapes that it gives to MAGMA.
    """
    if _name(node) in ("aten.linspace", "aten.logspace"):
        return any(g.is_tensor(source) for source in node.all_input_nodes)
    if _name(node) == "aten.segment_reduce":
        return g.op_args(node)["lengths"] is not None
    if _name(node) in ("aten.masked_fill", "aten.masked_fill_", "aten.index_fill", "aten.index_fill_"):
        value = g.op_args(node)["value"]
        return g.is_tensor(value) and g.value(value).device.type != "cpu"
    if _name(node) == "aten.normal":  # looks whether a deviation is negative
        return g.is_tensor(g.op_args(node).get("std"))
    if _name(node) == "aten.histc":  # without bounds it looks for them
        args = g.op_args(node)
        return bool(args["min"] == args["max"])
    if _name(node) in ("aten.linalg_lu_factor_ex", "aten.linalg_lu") and g.is_tensor(node.all_input_nodes[0]):
        *batch, rows, columns = g.shape(node.all_input_nodes[0])
        count = math.prod(batch)
        return not (rows == columns and (count == 1 or rows <= 16 or (rows <= 128 and count <= 16)))
    return False


def _dynamic_shape(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function":
        return None
    if g.is_op(node, aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        if not any(_is_mask(index) for index in g.args(node)[1]) or _is_masked_fill(node, graph):
            return None
        return f"{_name(node)} by a mask: how many elements are taken is known only on the device"
    if _name(node) == "aten._to_sparse":
        return f"how many elements {_name(node)} keeps is known only on the device"
    if _tagged(node, torch.Tag.dynamic_output_shape):
        # With a given size, repeat_interleave asks for nothing.
        if node.kwargs.get("output_size") is not None:
            return None
        return f"the shape of {_name(node)}'s result depends on values"
    return None


def _unbacked(value: Any) -> bool:
    symbols = value.node.expr.free_symbols if isinstance(value, (SymInt, SymFloat, SymBool)) else ()
    return any(str(symbol).startswith(("u", "zu")) for symbol in symbols)


def _data_allocation(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or _dynamic_shape(node, graph) is not None:
        return None
    made = any(_unbacked(size) for tensor in g.tensors(node) for size in tensor.shape)
    known = any(_unbacked(size) for n in node.all_input_nodes for t in g.tensors(n) for size in t.shape)
    if not made or known:
        return None
    return f"{_name(node)} makes a tensor whose size is a value of another"


def _device_to_host(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not graph.on_host(node):
        return None
    is_copy = getattr(node.target, "overloadpacket", None) in _COPIES
    if not is_copy or node.kwargs.get("non_blocking"):
        return None
    if any(graph.on_device(source) for source in node.all_input_nodes):
        return f"{_name(node)} copies to the host and waits for it"
    return None


def _pageable_copy(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not graph.on_device(node):
        return None
    if getattr(node.target, "overloadpacket", None) in _COPIES:
        if any(graph.on_host(source) for source in node.all_input_nodes):
            return f"{_name(node)} copies from host memory that is not pinned"
    elif g.is_op(node, aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
        # An index on the host is copied to the device first, and so is a number that is put somewhere.
        _, indices, *values = g.args(node)
        copied = [*indices, *([] if _is_masked_fill(node, graph) else values[:1])]
        if any(graph.on_host(each) for each in copied):
            return f"{_name(node)} copies an index or a value from host memory that is not pinned"
    return None


def _is_masked_fill(node: fx.Node, graph: _Graph) -> bool:
    """Whether index_put is run as masked_fill, which waits for nothing: one mask, and one number on the host.

    Source: canDispatchToMaskedFill, aten/src/ATen/native/TensorAdvancedIndexing.cpp.
    """
    if not g.is_op(node, aten.index_put, aten.index_put_):
        return False
    args = g.op_args(node)
    given = [index for index in args["indices"] if index is not None]
    value = args["values"]
    is_number = g.is_tensor(value) and graph.on_host(value) and g.value(value).numel() == 1
    return is_number and len(given) == 1 and _is_mask(given[0]) and not args["accumulate"]


def _host_value(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not graph.on_device(node):
        return None
    if not isinstance(node.target, torch._ops.OpOverload) or _pageable_copy(node, graph) is not None:
        return None
    # By contract metadata on the host is read through the batch size and upper bounds alone.
    read = [
        name
        for name, arg in g.op_args(node).items()
        if graph.on_host(arg) and not name.endswith("_host") and not _is_constant(arg)
    ]
    return f"{_name(node)} reads {read[0]} on the host; a replay sees its value at capture" if read else None


def _is_constant(node: fx.Node) -> bool:
    """Whether a tensor is the same in each call: what reads no input, and draws nothing."""
    return not any(
        each.op == "placeholder" or _tagged(each, torch.Tag.nondeterministic_seeded)
        for each in g.ancestors(node, lambda _: False)
    )


def _generator(node: fx.Node, graph: _Graph) -> str | None:
    given = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, torch.Generator)]
    return f"{_name(node)} draws from a generator of its own" if given else None


def _host_plan(node: fx.Node, graph: _Graph) -> str | None:
    if _name(node) in _PLANNERS:
        return f"{_name(node)} plans on the host in each call"
    if not g.is_op(node, torch.ops.ad_flashinfer.cached_attention):
        return None
    args = g.op_args(node)
    for phase in PHASES:
        for kernel in select.on_host(phase, args[f"{phase}_kernel"]):
            return f"{phase} by {kernel} reads lengths on the host"
    return None


def _input_mutation(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not g.mutates_input(node):
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    args = g.op_args(node)
    for argument in node.target._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[argument.name]
        while isinstance(written, fx.Node) and g.is_view(written):
            written = g.args(written)[0]
        is_input = isinstance(written, fx.Node) and written.op == "placeholder"
        if is_input and written.name not in graph.static_inputs:
            return f"{_name(node)} writes the input {written.name}, of which a replay has a copy"
    return None


def _python_scalar(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    scalars = [n for n in node.all_input_nodes if _unbacked(g.value(n))]
    if not scalars or not g.tensors(node):
        return None
    return f"{_name(node)} takes {scalars[0].name}, a Python number that was read from a tensor"


def _missing_fake(node: fx.Node, graph: _Graph) -> str | None:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.returns and g.value(node) is None:
        return f"{_name(node)} has no fake implementation here: nothing behind it can be judged"
    return None


RULES: dict[str, Rule] = {
    "host-sync": Rule(
        "the host waits for the device, which a capture forbids",
        "keep the value in a tensor; use the _ex variant of a linalg op, which checks nothing",
        "torch.linalg.inv(x)",
        _host_sync,
    ),
    "dynamic-shape": Rule(
        "the size of the result is known only on the device, so the host must wait for it",
        "use torch.where or masked_fill for a mask, nonzero_static, or repeat_interleave with output_size",
        "x[x > 0]",
        _dynamic_shape,
    ),
    "data-allocation": Rule(
        "memory is allocated by a value, while a graph has its memory fixed",
        "allocate the upper bound and mask what is beyond the length",
        "torch.zeros(i.max().item(), device=x.device)",
        _data_allocation,
    ),
    "device-to-host": Rule(
        "a copy to the host waits for the device",
        "keep the tensor on the device",
        "x.cpu() + 1",
        _device_to_host,
    ),
    "pageable-copy": Rule(
        "a copy from memory that is not pinned cannot be captured",
        "make the tensor once on the device, as a buffer, or make it an input",
        "x + h.to(x.device)",
        _pageable_copy,
    ),
    "host-value": Rule(
        "a value on the host is written into the graph when it is captured, and never read again",
        "give it as a tensor on the device",
        "x * s",
        _host_value,
    ),
    "generator": Rule(
        "a generator that is not registered with the graph cannot be used in a capture",
        "use the device's default generator, or CUDAGraph.register_generator_state",
        "torch.rand(8, generator=torch.Generator(x.device), device=x.device)",
        _generator,
    ),
    "host-plan": Rule(
        "the op decides on the host, in each call, what a replay would have to decide anew",
        "choose a kernel that reads lengths on the device; explain says why another was chosen",
        'ad_flashinfer.cached_attention(..., prefill_kernel="fa2")',
        _host_plan,
    ),
    "input-mutation": Rule(
        "a replay writes to its own copy of the input, not to the caller's tensor",
        "return the new value, or pass the same tensor each time and name it a static input",
        "x.add_(1) * 2",
        _input_mutation,
    ),
    "python-scalar": Rule(
        "a number that was read from a tensor is written into the graph when it is captured",
        "pass the tensor itself",
        "x + x.sum().item()",
        _python_scalar,
    ),
    "missing-fake": Rule(
        "without shapes and dtypes the rest of the graph cannot be judged",
        "register a fake implementation with torch.library.register_fake",
        "an op of torch.library without register_fake",
        _missing_fake,
    ),
}


def as_row(finding: Finding) -> tuple[str, ...]:
    """Rule, source line, module and message."""
    return finding.rule, source_line(finding.where), finding.module, finding.message


def as_tables(found: list[Finding]) -> list[RenderableType]:
    """The findings for a terminal, layers alike in one row, then what to do about each rule."""
    if not found:
        return ["nothing found that would keep the graph from being captured"]
    findings = table("rule", "node", "source line", "module", "what")
    for places, (rule, *cells) in folded(map(as_row, found)):
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        findings.add_row(rule, found[places[0]].node + more, *cells)
    rules = table("rule", "why", "fix")
    for name in dict.fromkeys(each.rule for each in found):
        rules.add_row(name, RULES[name].why, RULES[name].fix)
    return [findings, rules]


def rules_as_data() -> dict[str, dict[str, str]]:
    """Why, fix and example of each rule, by its id."""
    return {name: {"why": rule.why, "fix": rule.fix, "example": rule.example} for name, rule in RULES.items()}


def rules_table() -> RenderableType:
    """All rules for a terminal."""
    shown = table("rule", "why", "fix", "example")
    for name, rule in RULES.items():
        shown.add_row(name, rule.why, rule.fix, rule.example)
    return shown
