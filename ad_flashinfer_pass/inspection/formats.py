"""Graphs for other tools: JSON, GraphML, DOT, SVG and Model Explorer's JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import networkx as nx

from ad_flashinfer_pass.errors import AdFlashinferError
from ad_flashinfer_pass.graph.data import GraphData, Kind, NodeData
from ad_flashinfer_pass.graph.text_format import to_text, value_text

# Fill and border; readable with black text on light and on dark pages.
COLORS: dict[Kind, tuple[str, str]] = {
    "attention": ("#ffb74d", "#e65100"),
    "append": ("#81c784", "#1b5e20"),
    "metadata": ("#ba9bd8", "#4a148c"),
    "inserted": ("#a5d6a7", "#2e7d32"),
    "source": ("#f5f5f5", "#9e9e9e"),
    "input": ("#90caf9", "#0d47a1"),
    "weight": ("#cfd8dc", "#607d8b"),
}


def to_json(graph: GraphData) -> str:
    """JSON of the fields of ``GraphData``; ``GraphData.model_validate_json`` reads it back."""
    return graph.model_dump_json(indent=1)


def to_graphml(graph: GraphData) -> str:
    """GraphML, with the fields of each node as its attributes."""
    flat: nx.DiGraph = nx.DiGraph()
    for node in graph.nodes:
        flat.add_node(node.name, **_attributes(graph, node), color=COLORS[node.kind][0])
        flat.add_edges_from((name, node.name) for name in node.inputs)
    out = io.BytesIO()
    nx.write_graphml(flat, out)
    return out.getvalue().decode()


def to_dot(graph: GraphData) -> str:
    """DOT, one cluster a layer.

    Raises:
        AdFlashinferError: the Python package graphviz is missing.
    """
    return str(_digraph(graph).source)


def to_svg(graph: GraphData) -> str:
    """SVG, drawn by Graphviz.

    Raises:
        AdFlashinferError: the Python package graphviz or its program ``dot`` is missing.
    """
    digraph = _digraph(graph)
    import graphviz

    try:
        return str(digraph.pipe(format="svg", encoding="utf-8"))
    except graphviz.ExecutableNotFound:
        raise AdFlashinferError(
            "SVG is drawn by the program dot, which is not installed: apt-get install graphviz, or write "
            "--format dot and draw it elsewhere."
        ) from None


def to_model_explorer(graph: GraphData) -> str:
    """Model Explorer's JSON: a graph collection, with the modules as namespaces.

    Source: google-ai-edge/model-explorer, ``graph_builder.py``.
    """
    nodes = [
        {
            "id": node.name,
            "label": _label(node),
            "namespace": node.module.replace(".", "/"),
            "attrs": [{"key": key, "value": value} for key, value in _attributes(graph, node).items()],
            "incomingEdges": [
                {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
                for place, name in enumerate(node.inputs)
            ],
            "outputsMetadata": [
                {
                    "id": str(place),
                    "attrs": [{"key": "tensor_shape", "value": value_text(tensor, graph.device)}],
                }
                for place, tensor in enumerate(node.tensors)
            ],
            "style": dict(zip(("backgroundColor", "borderColor"), COLORS[node.kind], strict=True)),
        }
        for node in graph.nodes
    ]
    return json.dumps({"label": graph.title, "graphs": [{"id": graph.title, "nodes": nodes}]}, indent=1)


FORMATS: dict[str, Callable[[GraphData], str]] = {
    "text": to_text,
    "json": to_json,
    "graphml": to_graphml,
    "dot": to_dot,
    "svg": to_svg,
    "model-explorer": to_model_explorer,
}


def _label(node: NodeData) -> str:
    return node.opname.rpartition(".")[2] if node.op == "call_function" else node.name.rpartition(".")[2]


def _attributes(graph: GraphData, node: NodeData) -> dict[str, str]:
    layer = graph.layers[node.name]
    return {
        "fx_name": node.fx_name,
        "op": node.op,
        "target": node.target,
        "arguments": ", ".join([*node.args, *(f"{key}={value}" for key, value in node.kwargs.items())]),
        "result": value_text(node.value, graph.device),
        "module": node.module,
        "layer": "" if layer is None else str(layer),
        "source": node.source,
        "made_by": node.made_by or "",
        "kind": node.kind,
    }


def _digraph(graph: GraphData) -> Any:
    try:
        import graphviz
    except ImportError:
        raise AdFlashinferError(
            "DOT and SVG are written by the Python package graphviz: pip install 'ad-flashinfer-pass[see]'."
        ) from None
    out = graphviz.Digraph(graph.title)
    out.attr(label=graph.title, fontname="sans-serif")
    out.attr("node", shape="box", style="filled,rounded", fontname="sans-serif", fontsize="10")
    for layer in dict.fromkeys(graph.layers.values()):
        with out.subgraph(name=None if layer is None else f"cluster_{layer}") as part:
            if layer is not None:
                part.attr(label=f"layer {layer}")
            for node in graph.nodes:
                if graph.layers[node.name] == layer:
                    fill, border = COLORS[node.kind]
                    label = f"{_label(node)}\n{value_text(node.value, graph.device)}\n{node.module}"
                    tooltip = f"{node.name}\n{node.source}"
                    part.node(
                        node.name,
                        graphviz.escape(label).replace("\n", "\\n"),
                        fillcolor=fill,
                        color=border,
                        tooltip=graphviz.escape(tooltip),
                    )
    for node in graph.nodes:
        for name in node.inputs:
            # A port is what stands behind a colon; names hold none.
            out.edge(name, node.name)
    return out
