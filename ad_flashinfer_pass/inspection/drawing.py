"""A picture of one layer as SVG: its attention op by op, its other modules as boxes.

Boxes stand in rows by the longest path that leads to them; within a row they are ordered by the places of
what they are connected to, so that few lines cross. Longer lines are led between the boxes of the rows
that they pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import networkx as nx

from ad_flashinfer_pass.graph.data import GraphData, Kind, NodeData
from ad_flashinfer_pass.graph.text_format import value_text

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _LANE = 136, 38, 14, 32, 18
_SWEEPS = 8


@dataclass
class Box:
    """What is drawn as one box: a node, or the nodes of a module."""

    name: str
    label: str
    detail: str
    """Second line: a shape, or how many ops."""
    tooltip: str
    kind: Kind
    is_marked: bool = False
    """Holds a node that the pass removed or inserted."""


def draw_layer(graph: GraphData, attention: str, marked: set[str]) -> str:
    """SVG of one layer; colours are classes that the page defines.

    Args:
        graph: a cut, see ``GraphData.layer``.
        attention: path of the module whose nodes are drawn one by one.
        marked: names of the nodes that stand out.
    """
    boxes, flow = _boxes(graph, attention, marked)
    rows = _rows(flow)
    places = _places(rows, flow)
    return _svg(boxes, flow, places)


def _boxes(graph: GraphData, attention: str, marked: set[str]) -> tuple[dict[str, Box], nx.DiGraph]:
    home = {node.name: _box_of(node, attention) for node in graph.nodes}
    members: dict[str, list[NodeData]] = {}
    for node in graph.nodes:
        box = home[node.name]
        if box is not None:
            members.setdefault(box, []).append(node)
    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(members)
    for node in graph.nodes:
        for name in node.inputs:
            source, target = home[name], home[node.name]
            if source is not None and target is not None and source != target:
                flow.add_edge(source, target)
    for cycle in list(nx.strongly_connected_components(flow)):
        if len(cycle) > 1:  # a module whose nodes do not run in one piece
            members, flow = _merged(members, flow, cycle)
    return {name: _box(name, nodes, graph, marked) for name, nodes in members.items()}, flow


def _box_of(node: NodeData, attention: str) -> str | None:
    """The box in which a node is drawn; None for weights and numbers, which are not."""
    if node.op == "get_attr" or (node.op != "output" and not node.tensors and node.value is not None):
        return None
    if node.op == "outside":
        return "metadata" if not node.module else node.name
    if node.op == "placeholder":
        return node.name if node.name.startswith("kv_cache") else "metadata"
    if node.module == attention or not node.module:
        return node.name
    if node.module.startswith(f"{attention}."):
        return node.module
    layer = attention.rpartition(".")[0]
    below = node.module.removeprefix(layer).removeprefix(".").partition(".")[0]
    return f"{layer}.{below}" if below else node.name


def _merged(
    members: dict[str, list[NodeData]], flow: nx.DiGraph, cycle: set[str]
) -> tuple[dict[str, list[NodeData]], nx.DiGraph]:
    first = min(cycle)
    joined = {name: nodes for name, nodes in members.items() if name not in cycle}
    joined[first] = [node for name in sorted(cycle) for node in members[name]]
    renamed = nx.relabel_nodes(flow, dict.fromkeys(cycle, first))
    renamed.remove_edges_from(list(nx.selfloop_edges(renamed)))
    return joined, renamed


def _box(name: str, nodes: list[NodeData], graph: GraphData, marked: set[str]) -> Box:
    one = nodes[0]
    kinds = {node.kind for node in nodes}
    special: list[Kind] = ["attention", "append", "metadata"]
    kind: Kind = next((k for k in special if k in kinds), "source")
    tooltip = "\n".join(f"{node.name}  {node.source}" for node in nodes[:20])
    short = name.rpartition(".")[2]
    is_marked = any(node.name in marked for node in nodes)
    if name == "metadata":
        return Box(name, "metadata", f"{len(nodes)} inputs", tooltip, "metadata", is_marked)
    if len(nodes) > 1:
        return Box(name, short, f"{len(nodes)} ops", tooltip, kind, is_marked)
    label = one.opname.rpartition(".")[2] if one.op == "call_function" else short
    if one.op == "outside":
        label, kind = ".".join(name.split(".")[-2:]), "input"
    elif one.op == "placeholder":
        kind = "input"
    elif kind == "source" and one.made_by:
        kind = "inserted"
    detail = value_text(one.value, graph.device).replace("None", "")
    return Box(name, label, detail, tooltip, kind, is_marked)


def _rows(flow: nx.DiGraph) -> list[list[str]]:
    """Boxes by the longest path that leads to them, with a lane in each row that a line passes.

    Lanes are added to ``flow``, in place of the lines.
    """
    rank: dict[str, int] = {}
    for name in nx.topological_sort(flow):
        rank[name] = max((rank[before] + 1 for before in flow.predecessors(name)), default=0)
    for name in list(flow):  # inputs stand just above their first reader
        if not list(flow.predecessors(name)) and list(flow.successors(name)):
            rank[name] = min(rank[reader] for reader in flow.successors(name)) - 1
    lowest = min(rank.values(), default=0)
    rank = {name: place - lowest for name, place in rank.items()}
    for number, (source, target) in enumerate(list(flow.edges)):
        lanes = [f"lane {number} {place}" for place in range(rank[source] + 1, rank[target])]
        rank.update({lane: int(lane.rpartition(" ")[2]) for lane in lanes})
        if lanes:
            flow.remove_edge(source, target)
            nx.add_path(flow, [source, *lanes, target])
    rows: list[list[str]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for name, place in rank.items():
        rows[place].append(name)
    return rows


def _places(rows: list[list[str]], flow: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Centre of each box and lane."""
    x = {name: float(place) for row in rows for place, name in enumerate(row)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = flow.predecessors if down else flow.successors
        for row in rows if down else rows[::-1]:
            wish = {name: _mean([x[other] for other in neighbours(name)], x[name]) for name in row}
            row.sort(key=wish.__getitem__)
            x.update(_spread(row, wish))
    left = min(x[name] - _half(name) for name in x) if x else 0.0
    return {
        name: (x[name] - left, place * (_HEIGHT + _GAP_Y) + _HEIGHT / 2)
        for place, row in enumerate(rows)
        for name in row
    }


def _spread(row: list[str], wish: dict[str, float]) -> dict[str, float]:
    """Places near the wished ones, in this order and without overlap."""
    found: dict[str, float] = {}
    edge = float("-inf")
    for name in row:
        found[name] = max(wish[name], edge + _half(name))
        edge = found[name] + _half(name) + _GAP_X
    shift = _mean([wish[name] - found[name] for name in row], 0.0)
    return {name: place + shift for name, place in found.items()}


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _half(name: str) -> float:
    return (_LANE if name.startswith("lane ") else _WIDTH) / 2


def _svg(boxes: dict[str, Box], flow: nx.DiGraph, places: dict[str, tuple[float, float]]) -> str:
    width = max((x + _half(name) for name, (x, _) in places.items()), default=0) + 4
    height = max((y for _, y in places.values()), default=0) + _HEIGHT / 2 + 4
    parts = [
        f'<svg viewBox="-2 -2 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img">'
    ]
    parts += [_line([places[name] for name in path], path) for path in _lines(flow, boxes)]
    for name, box in boxes.items():
        x, y = places[name]
        classes = f"box {box.kind}{' marked' if box.is_marked else ''}"
        parts.append(
            f'<g class="{classes}"><title>{escape(box.tooltip)}</title>'
            f'<rect x="{x - _WIDTH / 2:.1f}" y="{y - _HEIGHT / 2:.1f}" '
            f'width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
            f'<text x="{x:.1f}" y="{y - 3:.1f}" class="label">{escape(_cut(box.label, 20))}</text>'
            f'<text x="{x:.1f}" y="{y + 12:.1f}">{escape(_cut(box.detail, 21))}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def _lines(flow: nx.DiGraph, boxes: dict[str, Box]) -> Iterator[list[str]]:
    """Each line as the boxes and lanes that it joins."""
    for name in boxes:
        for step in flow.successors(name):
            path = [name, step]
            while path[-1] not in boxes:
                path.append(next(flow.successors(path[-1])))
            yield path


def _line(points: list[tuple[float, float]], path: list[str]) -> str:
    """A curve from the lower edge of the first box to the upper edge of the last."""
    (x0, y0), *inner, (x1, y1) = points
    ends = [(x0, y0 + _HEIGHT / 2), *inner, (x1, y1 - _HEIGHT / 2)]
    text = f"M{ends[0][0]:.1f} {ends[0][1]:.1f}"
    for (ax, ay), (bx, by) in pairwise(ends):
        middle = (ay + by) / 2
        text += f"C{ax:.1f} {middle:.1f} {bx:.1f} {middle:.1f} {bx:.1f} {by:.1f}"
    return f'<path class="flow" d="{text}"><title>{escape(f"{path[0]} to {path[-1]}")}</title></path>'


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
