"""``diff``: what was removed, added and rewired between two graphs, layer by layer.

Nodes are the same if they have the same stable name, which they keep over all stages of a run. Layers
with the same changes are folded into one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, computed_field

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph.data import GraphData, NodeData
from ad_flashinfer_pass.graph.text_format import node_line
from ad_flashinfer_pass.inspection.sizes import allocated_bytes
from ad_flashinfer_pass.inspection.stages import (
    is_file_name,
    read_graph,
    resolve,
    run_stages,
)
from ad_flashinfer_pass.inspection.tables import ranges, table

if TYPE_CHECKING:
    from rich.console import RenderableType

# The path of a module up to its first number: the list of layers and the index of one.
_LAYER = re.compile(r"%(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*)\.(\d+)\.")


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class Change(_Data):
    """One node that is not the same before and after; a side is None where the node is not there."""

    name: str
    before: str | None
    """Its line in a text dump."""
    after: str | None


class LayerDiff(_Data):
    """The changes of one layer, and of the layers that changed alike."""

    layers: tuple[int, ...]
    """Empty: outside all layers."""
    removed: tuple[Change, ...]
    added: tuple[Change, ...]
    rewired: tuple[Change, ...]
    """Other arguments or another target."""
    retyped: tuple[Change, ...]
    """The same call with a result of another type."""
    bytes_before: int
    """Intermediate results of one of these layers."""
    bytes_after: int


class OpCount(_Data):
    """How often an op is called."""

    op: str
    before: int
    after: int


class GraphDiff(_Data):
    """All changes between two graphs."""

    before: str
    """Title."""
    after: str
    layers: tuple[LayerDiff, ...]
    """Changed ones, folded, in order; first what lies outside all layers."""
    removed: tuple[str, ...]
    """Names of the nodes of all layers."""
    added: tuple[str, ...]
    rewired: tuple[str, ...]
    retyped: tuple[str, ...]
    ops: tuple[OpCount, ...]
    """Ops whose count changed, most first."""
    batch: int
    seq: int
    bytes_before: int
    """Intermediate results of the whole graph for batch x seq tokens, each counted once, views not."""
    bytes_after: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_empty(self) -> bool:
        """Whether nothing changed."""
        return not self.layers


def diff(
    config: AutoDeployConfig,
    before: str = "export",
    after: str | None = None,
    *,
    graph: Path | None = None,
    sm: int | None = None,
    batch: int = 1,
    seq: int = 2048,
    on_event: Callable[[str], None] | None = None,
) -> GraphDiff:
    """Compare a model's graphs at two stages, or graphs in files.

    Args:
        config: the model, of which no weights are read, and the settings; not used if both sides are files.
        before: a transform, a stage, which stands for its last transform, or the file of a text or JSON dump
            or of a saved ExportedProgram.
        after: likewise. Default: the last transform.
        graph: a saved ExportedProgram in place of the model.
        sm: compute capability of the GPU that will run it, 90 for 9.0. Default: that of ``config.device``.
        batch: sequences for which bytes are counted.
        seq: tokens of each.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: an unknown stage.
        LoadError: the model or a file cannot be read.
        TransformError: the pass refuses the model before the stages are reached.
    """
    names = (before, after or resolve(None, config))
    sides = {name: read_graph(Path(name)) for name in names if is_file_name(name)}
    wanted = {name: resolve(name, config) for name in names if name not in sides}
    if wanted:
        graphs = run_stages(config, graph, list(wanted.values()), on_event, sm=sm).graphs
        sides |= {name: graphs[stage] for name, stage in wanted.items()}
    return diff_graphs(*(sides[name] for name in names), batch=batch, seq=seq)


def diff_graphs(before: GraphData, after: GraphData, *, batch: int = 1, seq: int = 2048) -> GraphDiff:
    """Compare two graphs.

    Args:
        before: see ``dump`` and ``stages.read_graph``.
        after: likewise.
        batch: sequences for which bytes are counted.
        seq: tokens of each.
    """
    symbols = {"b": batch, "s": seq}
    sizes = [_bytes_by_layer(graph, symbols) for graph in (before, after)]
    changes = _changes(before, after)
    folded: dict[tuple[str, ...], LayerDiff] = {}
    for layer in sorted(changes, key=lambda index: -1 if index is None else index):
        kinds = changes[layer]
        one = LayerDiff(
            layers=() if layer is None else (layer,),
            **{kind: tuple(kinds.get(kind, ())) for kind in ("removed", "added", "rewired", "retyped")},
            bytes_before=sizes[0][layer],
            bytes_after=sizes[1][layer],
        )
        key = _signature(one)
        if key in folded:
            one = folded[key].model_copy(update={"layers": (*folded[key].layers, *one.layers)})
        folded[key] = one
    by_kind = {
        kind: tuple(change.name for kinds in changes.values() for change in kinds.get(kind, ()))
        for kind in ("removed", "added", "rewired", "retyped")
    }
    return GraphDiff(
        before=before.title,
        after=after.title,
        layers=tuple(folded.values()),
        **by_kind,
        ops=_op_counts(before, after),
        batch=batch,
        seq=seq,
        bytes_before=sum(sizes[0].values()),
        bytes_after=sum(sizes[1].values()),
    )


def _changes(before: GraphData, after: GraphData) -> dict[int | None, dict[str, list[Change]]]:
    found: dict[int | None, dict[str, list[Change]]] = {}

    def enter(layer: int | None, kind: str, old: NodeData | None, new: NodeData | None) -> None:
        node = new or old
        assert node is not None
        lines = [
            None if side is None else node_line(side, graph.device)
            for side, graph in ((old, before), (new, after))
        ]
        change = Change(name=node.name, before=lines[0], after=lines[1])
        found.setdefault(layer, {}).setdefault(kind, []).append(change)

    for old in before.nodes:
        new = after.by_name.get(old.name)
        if new is None:
            enter(before.layers[old.name], "removed", old, None)
        elif (old.op, old.target, old.args, old.kwargs) != (new.op, new.target, new.args, new.kwargs):
            enter(after.layers[new.name], "rewired", old, new)
        elif old.value != new.value:
            enter(after.layers[new.name], "retyped", old, new)
    for new in after.nodes:
        if new.name not in before.by_name:
            enter(after.layers[new.name], "added", None, new)
    return found


def _signature(layer: LayerDiff) -> tuple[str, ...]:
    """The same for layers that changed alike: layer indices count from the layer's own."""
    if not layer.layers:
        return ("outside all layers",)
    own = layer.layers[0]
    kinds = (layer.removed, layer.added, layer.rewired, layer.retyped)
    lines = [
        f"{number}{side or ''}"
        for number, changes in enumerate(kinds)
        for change in changes
        for side in (change.before, change.after)
    ]
    lists = {match[1] for line in lines for match in _LAYER.finditer(line)}
    # Names of fused weights have the path in them, with underscores; those of inputs have the index alone.
    index = re.compile(
        rf"((?:\b|_)(?:{'|'.join(map(re.escape, sorted(lists | {'kv_cache'})))})[._])(\d+)(?!\d)"
    )
    lines = [index.sub(lambda match: f"{match[1]}{int(match[2]) - own:+d}", line) for line in lines]
    return (*lines, str(layer.bytes_before), str(layer.bytes_after))


def _bytes_by_layer(graph: GraphData, symbols: Mapping[str, int]) -> Counter[int | None]:
    sizes: Counter[int | None] = Counter()
    for node in graph.nodes:
        sizes[graph.layers[node.name]] += allocated_bytes(node, symbols)
    return sizes


def _op_counts(before: GraphData, after: GraphData) -> tuple[OpCount, ...]:
    counts = [Counter(node.opname for node in graph.nodes) for graph in (before, after)]
    names = sorted(
        counts[0].keys() | counts[1].keys(), key=lambda op: (-abs(counts[0][op] - counts[1][op]), op)
    )
    return tuple(
        OpCount(op=op, before=counts[0][op], after=counts[1][op])
        for op in names
        if counts[0][op] != counts[1][op]
    )


_SIGNS = {
    "removed": ("-", "red"),
    "added": ("+", "green"),
    "rewired": ("~", "yellow"),
    "retyped": (":", "cyan"),
}


def as_tables(found: GraphDiff) -> list[RenderableType]:
    """The differences for a terminal: lines by layer, then the counts of ops, then bytes."""
    from rich.text import Text

    if found.is_empty:
        return [f"no difference between {found.before} and {found.after}"]
    parts: list[RenderableType] = [f"--- {found.before}", f"+++ {found.after}"]
    for layer in found.layers:
        parts.append(Text(f"\n@@ {_heading(layer)} @@", style="bold"))
        for kind, (sign, color) in _SIGNS.items():
            for change in getattr(layer, kind):
                parts += [Text(line, style=color) for line in _lines(sign, change)]
    ops = table("op", "before", "after", title="Calls")
    for op in found.ops:
        ops.add_row(op.op, str(op.before), str(op.after))
    saved = found.bytes_before - found.bytes_after
    return [
        *parts,
        "",
        ops,
        f"{len(found.removed)} removed, {len(found.added)} added, {len(found.rewired)} rewired, "
        f"{len(found.retyped)} retyped",
        f"intermediate results of {found.batch} x {found.seq} tokens: {_mib(found.bytes_before)} before, "
        f"{_mib(found.bytes_after)} after, {_mib(abs(saved))} {'saved' if saved >= 0 else 'more'}",
    ]


def _heading(layer: LayerDiff) -> str:
    if not layer.layers:
        where = "outside the layers"
    elif len(layer.layers) == 1:
        where = f"layer {layer.layers[0]}"
    else:
        where = f"layers {ranges(layer.layers)}, {len(layer.layers)} alike"
    return f"{where}: {_mib(layer.bytes_before)} -> {_mib(layer.bytes_after)}" + (
        " each" if len(layer.layers) > 1 else ""
    )


def _lines(sign: str, change: Change) -> list[str]:
    if change.before is None or change.after is None:
        return [f"{sign} {change.before or change.after}"]
    return [f"{sign} {change.before}", f"{' ' * len(sign)} -> {change.after.partition(' = ')[2]}"]


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
