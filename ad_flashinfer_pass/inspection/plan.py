"""``plan``: what a deployment takes of a device's memory, before anything is allocated.

Weights and intermediate results are counted in the graph as the pass leaves it; pages are counted by the
function with which ``initialize_cache`` allocates them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, fx

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import CapacityError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.data import GraphData, NodeData, layer_of
from ad_flashinfer_pass.graph.text_format import value_text
from ad_flashinfer_pass.graph.weights import step_weights
from ad_flashinfer_pass.inspection.sizes import allocated_bytes
from ad_flashinfer_pass.inspection.stages import Stages, run_stages
from ad_flashinfer_pass.inspection.tables import table
from ad_flashinfer_pass.inspection.target import check_target, site_choices
from ad_flashinfer_pass.kernels import symmetric_memory
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.tune import timed_providers
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes, prefill_buckets, verified_batches

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.records import KvCacheResource, TransformContext
    from ad_flashinfer_pass.transforms.initialize_cache import Pages


# Measured on an H200 with torch 2.11 (benchmarks/results/memory_plan.json): what CUDA and torch take before
# anything is allocated, and what each graph takes beside the memory that all of them share.
_CONTEXT_BYTES = 620 * 2**20
_GRAPH_BYTES = 4 * 2**20
# cuBLAS keeps 32 MiB for each stream on which it has run (torch's choice on Hopper): that of eager steps, of
# the timing of kernels, of captures. ``linear.small_gemm`` has 64 MiB for the parts of split sums.
_LINEAR_BYTES = (3 * 32 + 64) * 2**20


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class PlanRow(_Data):
    """One use of memory."""

    name: str
    bytes: int
    arithmetic: str
    """How the bytes come about."""


class PoolGroup(_Data):
    """Pools of the same shape."""

    names: tuple[str, ...]
    """Graph inputs that take them."""
    bytes_per_page: int
    """Of one pool."""
    arithmetic: str


class MemoryPlan(_Data):
    """Where the memory of a device goes."""

    model: str
    memory: int | None
    """Bytes of the device; None: no limit was given."""
    rows: tuple[PlanRow, ...]
    pools: tuple[PoolGroup, ...]
    tokens_per_block: int
    bytes_per_token: int
    """In all pools together."""
    pages_wanted: int
    """For max_batch_size sequences of max_seq_len tokens, or for max_tokens."""
    pages_fitting: int | None
    """In the share of the memory that the weights leave; None: no limit was given."""
    pages: int
    """Of each pool, as ``initialize_cache`` allocates them, without the scratch page."""
    pages_arithmetic: str
    max_seq_len: int
    weights_read: dict[int, int]
    """Bytes of weights that a decode step reads, by its number of sequences; of the experts, it counts those
    that so many tokens are expected to choose if all are equally likely. Empty if there are no experts."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens(self) -> int:
        """Tokens that the pools hold."""
        return self.pages * self.tokens_per_block

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sequences(self) -> int:
        """Sequences of max_seq_len tokens that the pools hold."""
        return self.pages // math.ceil(self.max_seq_len / self.tokens_per_block)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def left(self) -> int | None:
        """Bytes of the device that nothing takes; negative: it does not fit."""
        return None if self.memory is None else self.memory - self.total


def plan(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    memory: int | None = None,
    sm: int | None = None,
    on_event: Callable[[str], None] | None = None,
) -> MemoryPlan:
    """Plan the memory of a deployment from its config alone.

    Args:
        config: the model and the settings of the pass.
        graph: a saved ExportedProgram in place of the model.
        stage: plan for the graph after this transform or stage. Before the insertion it has no pools.
        memory: bytes of the device. Default: no limit; all that the config asks for is planned.
        sm: compute capability of the GPU, 90 for 9.0. Default: that of ``config.device``, or a CPU.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: no such stage; or the device is a GPU that is not here and ``sm`` is not given.
        CapacityError: the weights leave no room for a page a layer.
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model.
    """
    check_target(config, sm)
    run = run_stages(config, graph, None if stage is None else [stage], on_event, sm=sm)
    return plan_run(run, config, memory, sm)


def plan_run(run: Stages, config: AutoDeployConfig, memory: int | None, sm: int | None) -> MemoryPlan:
    """The plan of a run, for its last graph; see ``plan``."""
    final = list(run.graphs.values())[-1]
    assert isinstance(run.module, fx.GraphModule)
    weights = _weights(run.module)
    metadata = _metadata(run.ctx)
    on_gpu = sm is not None or config.device.startswith("cuda")
    is_captured = on_gpu and config.compile_backend != "torch-simple"
    before = [*weights, metadata]
    if on_gpu:
        how = "CUDA's context, as measured on an H200"
        before.append(PlanRow(name="context", bytes=_CONTEXT_BYTES, arithmetic=how))
    taken = sum(row.bytes for row in before)
    pages = _pages(run.ctx, memory, taken)
    rows = [
        *before,
        *(_pool_row(group, pages.allocated) for group in _pools(run.ctx.resources)),
        *_state_rows(run.ctx),
        *_workspaces(run.ctx, config, sm, is_captured),
        *_activations(final, config),
        *(_graphs(config) if is_captured else []),
    ]
    info, read = run.ctx.sequence_info, step_weights(run.module)
    batches = (1, info.max_batch_size) if read.experts else ()
    model = final.title.removesuffix(f" after {list(run.graphs)[-1]}")
    return MemoryPlan(
        model=model if config.world_size == 1 else f"{model}, on each of {config.world_size} GPUs",
        memory=memory,
        rows=tuple(rows),
        pools=tuple(_pools(run.ctx.resources)),
        tokens_per_block=info.tokens_per_block,
        bytes_per_token=pages.bytes_per_page // info.tokens_per_block,
        pages_wanted=pages.wanted,
        pages_fitting=None if memory is None else pages.fitting,
        pages=pages.allocated,
        pages_arithmetic=_pages_arithmetic(run.ctx, pages, memory, taken),
        max_seq_len=info.max_seq_len,
        weights_read={number: read.bytes_at(number) for number in batches},
    )


def _weights(gm: fx.GraphModule) -> list[PlanRow]:
    """What the graph reads, each tensor once, by layer; layers with the same tensors are one row."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = g.attribute(node)
        if isinstance(tensor, Tensor):
            tensors.setdefault(id(tensor), (str(node.target), tensor))
    by_layer: dict[int | None, list[Tensor]] = {}
    readers = {
        str(node.target): {layer_of(g.module_path(user)) for user in node.users}
        for node in gm.graph.find_nodes(op="get_attr")
    }
    for name, tensor in tensors.values():
        layer = layer_of(name)
        if layer is None and len(readers[name]) == 1:
            (layer,) = readers[name]
        by_layer.setdefault(layer, []).append(tensor)
    groups: dict[str, list[int | None]] = {}
    for layer, parts in by_layer.items():
        text = " + ".join(sorted(_shape_text(tensor) for tensor in parts))
        groups.setdefault(text, []).append(layer)
    rows = []
    for text, layers in groups.items():
        size = sum(tensor.numel() * tensor.itemsize for tensor in by_layer[layers[0]])
        if layers == [None]:
            rows.append(PlanRow(name="weights outside the layers", bytes=size, arithmetic=text))
            continue
        count = len(layers)
        rows.append(
            PlanRow(
                name=f"weights of {count} layer{'s' * (count > 1)}",
                bytes=count * size,
                arithmetic=f"{count} x {size:,}: {text}",
            )
        )
    return rows


def _shape_text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _metadata(ctx: TransformContext) -> PlanRow:
    info = ctx.sequence_info
    host = info.named_args()["batch_info_host"].data_ptr()
    buffers = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in info.named_args().values()
        if tensor.data_ptr() != host
    }
    return PlanRow(
        name="metadata",
        bytes=sum(buffers.values()),
        arithmetic=f"tensors of a step for {info.max_batch_size} sequences, {info.max_num_tokens} tokens and "
        f"{info.max_blocks_per_seq} pages a sequence",
    )


def _pages(ctx: TransformContext, memory: int | None, taken: int) -> Pages:
    from ad_flashinfer_pass.transforms.initialize_cache import Pages, count_pages

    if not ctx.resources and not ctx.states:
        return Pages(wanted=0, fitting=0, bytes_per_page=0)
    # Without a limit: more than any config can want.
    free = 2**62 if memory is None else memory - taken
    if free < 0:
        raise CapacityError(
            f"weights and metadata take {taken} bytes, and there are {memory}; split the model over "
            f"{'more' if ctx.config.world_size > 1 else 'several'} GPUs (--tp), or quantize it."
        )
    try:
        return count_pages(ctx, free)
    except CapacityError as err:
        raise CapacityError(f"of {memory} bytes, weights and metadata take {taken}; {err}") from None


def _pages_arithmetic(ctx: TransformContext, pages: Pages, memory: int | None, taken: int) -> str:
    from ad_flashinfer_pass.transforms.initialize_cache import state_bytes

    info, config = ctx.sequence_info, ctx.config.kv_cache_config
    if not ctx.resources:
        if ctx.states:
            return "no attention: a sequence has states and no pages"
        return "no pools before insert_cached_attention"
    each = -(-info.max_seq_len // info.tokens_per_block)
    wanted = (
        f"wanted: {info.max_batch_size} sequences x ceil({info.max_seq_len} / {info.tokens_per_block}) = "
        f"{info.max_batch_size * each} pages"
    )
    if config.max_tokens is not None:
        wanted += f", at most ceil(max_tokens {config.max_tokens} / {info.tokens_per_block})"
    if memory is None:
        return wanted
    states = f" - {state_bytes(ctx):,} of states" if ctx.states else ""
    share = f"({memory:,} - {taken:,}) x {config.free_gpu_memory_fraction}{states}"
    return (
        f"{wanted}; fitting: {f'({share})' if states else share} / "
        f"{pages.bytes_per_page:,} bytes a page - 1 scratch page = {pages.fitting}"
    )


def _pools(resources: Iterable[KvCacheResource]) -> list[PoolGroup]:
    groups: dict[str, list[KvCacheResource]] = {}
    for resource in resources:
        text = (
            f"{resource.planes} x {resource.num_kv_heads} heads x {resource.page_size} tokens x "
            f"{resource.head_dim} x "
            f"{resource.dtype.itemsize} bytes ({str(resource.dtype).removeprefix('torch.')})"
        )
        groups.setdefault(text, []).append(resource)
    return [
        PoolGroup(
            names=tuple(resource.name for resource in group),
            bytes_per_page=group[0].bytes_per_page,
            arithmetic=text,
        )
        for text, group in groups.items()
    ]


def _state_rows(ctx: TransformContext) -> list[PlanRow]:
    """Of the pools of states, those of one shape together."""
    slots = ctx.sequence_info.num_slots
    shapes = Counter((state.shape, state.dtype, state.bytes_per_slot) for state in ctx.states)
    return [
        PlanRow(
            name=f"{count} pool{'s' * (count > 1)} of states",
            bytes=count * slots * size,
            arithmetic=f"{count} x ({slots - 1} + 1 scratch) slots x {size:,} bytes: "
            f"{str(dtype).removeprefix('torch.')}{list(shape)}",
        )
        for (shape, dtype, size), count in shapes.items()
    ]


def _pool_row(group: PoolGroup, pages: int) -> PlanRow:
    count = len(group.names)
    return PlanRow(
        name=f"{count} KV cache pool{'s' * (count > 1)}",
        bytes=count * (pages + 1) * group.bytes_per_page,
        arithmetic=f"{count} x ({pages} + 1 scratch) pages x {group.bytes_per_page:,} bytes: "
        f"{group.arithmetic}",
    )


def _workspaces(
    ctx: TransformContext, config: AutoDeployConfig, sm: int | None, is_captured: bool
) -> list[PlanRow]:
    choices = [choice for site in ctx.sites for choice in site_choices(site, config, sm)]
    kernels = dict.fromkeys(choice.kernel for choice in choices)
    if is_captured and config.transforms["tune_attention"].enabled:
        # Those that are timed at warm-up are made, whichever is the fastest.
        device = torch.device(config.device)
        kernels |= dict.fromkeys(
            name for site in ctx.sites for name in timed_providers(site.site, device, sm)
        )
    rows = [
        PlanRow(name=f"workspace of {kernel}", bytes=size, arithmetic="fixed, shared by all layers")
        for kernel in kernels
        if (size := select.PROVIDERS[kernel].capability.workspace_bytes)
    ]
    if is_captured and config.world_size > 1:
        how = "what sums go through that are captured, of all layers"
        rows.append(PlanRow(name="symmetric memory", bytes=symmetric_memory.MAX_BYTES, arithmetic=how))
    if is_captured:
        how = "cuBLAS: 3 streams x 32 MiB; small_gemm: 64 MiB"
        rows.append(PlanRow(name="workspaces of linears", bytes=_LINEAR_BYTES, arithmetic=how))
    return rows


def _activations(graph: GraphData, config: AutoDeployConfig) -> list[PlanRow]:
    """The largest step's intermediate results: of prefill, or of decode if that is more."""
    steps = {
        f"prefill of {config.token_budget} tokens": {"b": 1, "s": config.token_budget},
        f"decode of {config.max_batch_size} sequences": {"b": config.max_batch_size, "s": 1},
    }
    peaks = {name: peak(graph, symbols) for name, symbols in steps.items()}
    name = max(peaks, key=lambda step: peaks[step][0])
    size, alive, at = peaks[name]
    largest = sorted(alive, key=lambda node: -allocated_bytes(node, steps[name]))[:3]
    shown = ", ".join(f"{node.name} {value_text(node.value, graph.device)}" for node in largest)
    return [
        PlanRow(
            name="intermediate results",
            bytes=size,
            arithmetic=f"{name}, most at {at.name}: {len(alive)} tensors alive, the largest {shown}",
        )
    ]


def _graphs(config: AutoDeployConfig) -> list[PlanRow]:
    """What captured graphs take beside the intermediate results of the largest, which all share."""
    sizes, totals = bucket_sizes(config)
    count = len(sizes) + len(verified_batches(config)) + len(prefill_buckets(totals, config.max_batch_size))
    how = f"{count} graphs x {_GRAPH_BYTES:,}, as measured on an H200; their memory is one pool"
    return [PlanRow(name="CUDA graphs", bytes=count * _GRAPH_BYTES, arithmetic=how)]


def peak(graph: GraphData, symbols: Mapping[str, int]) -> tuple[int, list[NodeData], NodeData]:
    """The most bytes of intermediate results that are alive at once, which they are, and at which node.

    A result lives until its last reader has run, and as long as any view of it.
    """
    base: dict[str, str] = {}
    last: dict[str, int] = {}
    for place, node in enumerate(graph.nodes):
        base[node.name] = base.get(node.inputs[0], node.name) if node.is_view and node.inputs else node.name
        for name in (*node.inputs, node.name):
            last[base[name]] = place
    alive: dict[str, int] = {}
    most, most_alive, at = 0, [], graph.nodes[0]
    ends: dict[int, list[str]] = {}
    for name, place in last.items():
        ends.setdefault(place, []).append(name)
    total = 0
    for place, node in enumerate(graph.nodes):
        size = allocated_bytes(node, symbols)
        if size:
            alive[node.name] = size
            total += size
        if total > most:
            most, most_alive, at = total, list(alive), node
        for name in ends.get(place, ()):
            total -= alive.pop(name, 0)
    return most, [graph.by_name[name] for name in most_alive], at


def as_tables(found: MemoryPlan) -> list[RenderableType]:
    """The plan for a terminal."""
    shown = table("what", "GiB", "how", title=f"Memory of {found.model}")
    for row in found.rows:
        shown.add_row(row.name, gib(row.bytes), row.arithmetic)
    shown.add_section()
    shown.add_row("all", gib(found.total), f"{found.total:,} bytes")
    if found.left is not None and found.memory is not None:
        note = "for the allocator's rounding and modules of kernels" if found.left >= 0 else "it does not fit"
        shown.add_row("left", gib(found.left), f"of {found.memory:,} bytes: {note}")
    return [shown, *answers(found)]


def answers(found: MemoryPlan) -> list[str]:
    """The plan in sentences."""
    if not found.pools:
        return [found.pages_arithmetic, *_reads(found)]
    lines = [
        f"The pools hold {found.tokens:,} tokens ({found.pages:,} pages of {found.tokens_per_block}), "
        f"{found.bytes_per_token:,} bytes each: {found.sequences:,} sequences of {found.max_seq_len:,} "
        "tokens.",
        found.pages_arithmetic,
        *_reads(found),
    ]
    if found.pages_fitting is not None and found.pages_fitting > found.pages_wanted:
        lines.append(
            f"There is room for {found.pages_fitting * found.tokens_per_block:,} tokens: raise "
            "max_batch_size or max_seq_len to use it."
        )
    if found.pages_fitting is not None and found.pages_fitting < found.pages_wanted:
        lines.append(
            "Memory limits the pools: with more running sequences than fit, some wait or start over."
        )
    if found.left is not None and found.left < 0:
        lines.append("It does not fit: lower kv_cache_config.free_gpu_memory_fraction or max_num_tokens.")
    return lines


def _reads(found: MemoryPlan) -> list[str]:
    if not found.weights_read:
        return []
    held = sum(row.bytes for row in found.rows if row.name.startswith("weights"))
    reads = ", ".join(f"{gib(size)} for {number:,}" for number, size in found.weights_read.items())
    return [
        f"A decode step reads this much of {gib(held)} GiB of weights, by its number of sequences: {reads}; "
        "experts that none of them is expected to choose are not read."
    ]


def gib(count: int) -> str:
    """Bytes as GiB with as many digits as are of use."""
    return f"{count / 2**30:.3f}"
