"""An FX graph as plain data: what ``dump`` writes and reads, and what ``diff`` compares.

Names of nodes are stable. A node is called after the module that made it and its op, as in
``model.layers.3.self_attn.softmax``, numbered within that module, so that a node more or less in one
layer renames nothing in another. A name is given when the node is first seen and kept over all stages
of a run. The name in FX, which error messages use, is kept beside it.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import SymInt, Tensor, fx
from torch.utils._dtype_abbrs import dtype_abbrs

from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.aliasing import views

if TYPE_CHECKING:
    import networkx as nx

Size = int | str
"""A number, or an expression of symbols such as ``8*b*s``."""
Kind = Literal["attention", "append", "metadata", "inserted", "source", "input", "weight"]

_DTYPES = {abbreviation: dtype for dtype, abbreviation in dtype_abbrs.items()}
_REFERENCE = re.compile(r'"(?:[^"\\]|\\.)*"|%([\w.]+)')
_ENVIRONMENT = re.compile(r"^.*/(?:site|dist)-packages/")
_KINDS: dict[str, Kind] = {
    "ad_flashinfer.attention": "attention",
    "ad_flashinfer.cached_attention": "attention",
    # Tokens meet there, too.
    "ad_flashinfer.cached_causal_conv1d": "attention",
    "ad_flashinfer.cached_gated_delta_rule": "attention",
    "ad_flashinfer.cached_kda": "attention",
    "ad_flashinfer.cached_selective_scan": "attention",
    "ad_flashinfer.cached_ssd_scan": "attention",
    "aten.scaled_dot_product_attention": "attention",
    "ad_flashinfer.append_kv": "append",
    "ad_flashinfer.rope_append": "append",
    "ad_flashinfer.prepare_metadata": "metadata",
}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorType(_Data):
    """Type of one tensor."""

    dtype: str
    """As torch prints it in graphs: f32, bf16, i64, b8, f8e4m3fn."""
    shape: tuple[Size, ...]
    device: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _DTYPES[self.dtype].itemsize


Item = TensorType | str | None
Value = Item | tuple[Item, ...]
"""Type of a node's result: a tensor, a size or other scalar as text, nothing, or several of these."""


class NodeData(_Data):
    """One node."""

    name: str
    fx_name: str
    """The node's name in FX."""
    op: str
    """placeholder, get_attr, call_function, call_method, call_module, output; or outside, for a node that a
    cut left out and that another reads."""
    target: str
    """For example aten.linear.default, operator.getitem, or the path of a weight."""
    args: tuple[str, ...] = ()
    """Arguments as text; nodes are written %name."""
    kwargs: dict[str, str] = {}
    value: Value = None
    is_view: bool = False
    """Whether the result lies in the memory of an input."""
    module: str = ""
    """Path of the module that made it."""
    source: str = ""
    """File and line that made it, without the path of the environment."""
    made_by: str | None = None
    """The transform that inserted it; None if it came from the model."""

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes it reads, in the order of its arguments, each once."""
        text = " ".join([*self.args, *self.kwargs.values()])
        return tuple(dict.fromkeys(m[1] for m in _REFERENCE.finditer(text) if m[1]))

    @property
    def opname(self) -> str:
        """The op without its overload: aten.linear, operator.getitem; the kind of node for others."""
        if self.op != "call_function":
            return self.op
        parts = self.target.split(".")
        return ".".join(parts[:2]) if len(parts) == 3 else self.target

    @property
    def kind(self) -> Kind:
        """What it is to the pass; for colours."""
        if self.op == "placeholder":
            return "input"
        if self.op == "get_attr":
            return "weight"
        return _KINDS.get(self.opname, "inserted" if self.made_by else "source")

    @property
    def tensors(self) -> list[TensorType]:
        """The tensors among its results."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return [value for value in values if isinstance(value, TensorType)]


class GraphData(_Data):
    """One graph, nodes in the order in which they run."""

    title: str
    device: str
    """Of most tensors."""
    nodes: tuple[NodeData, ...]

    @cached_property
    def by_name(self) -> dict[str, NodeData]:
        """The nodes by their stable name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def layers(self) -> dict[str, int | None]:
        """Layer by node name. An input or weight that only one layer reads belongs to it; None: no layer."""
        found = {node.name: layer_of(node.module) for node in self.nodes}
        readers: dict[str, set[int | None]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, set()).add(found[node.name])
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr") and found[node.name] is None:
                layers = readers.get(node.name, set())
                found[node.name] = layers.pop() if len(layers) == 1 else None
        return found

    def networkx(self) -> nx.DiGraph:
        """The graph as data flow: an edge from each node to its readers; each has its ``data``."""
        import networkx as nx  # only who asks for this needs it

        out: nx.DiGraph = nx.DiGraph(title=self.title)
        for node in self.nodes:
            out.add_node(node.name, data=node)
            out.add_edges_from((name, node.name) for name in node.inputs)
        return out

    def find(self, name: str) -> NodeData:
        """A node by its name, its name in FX, or an end of its name that no other has.

        Raises:
            ConfigError: there is none, or there are several.
        """
        name = name.removeprefix("%")
        exact = [node for node in self.nodes if name in (node.name, node.fx_name)]
        found = exact or [node for node in self.nodes if node.name.endswith("." + name)]
        if len(found) == 1:
            return found[0]
        if not found:
            close = difflib.get_close_matches(name, [node.name for node in self.nodes], n=1)
            hint = f"did you mean {close[0]}?" if close else "the text dump shows its names."
            raise ConfigError(f"no node {name!r} in {self.title}; {hint}")
        raise ConfigError(
            f"{name!r} is the end of {len(found)} names, such as {found[0].name} and {found[1].name}; give "
            "one of them."
        )

    def layer(self, index: int) -> GraphData:
        """The nodes of one layer; what they read from elsewhere is kept as ``outside``.

        Raises:
            ConfigError: there is no such layer.
        """
        known = sorted({layer for layer in self.layers.values() if layer is not None})
        if index not in known:
            has = f"layers {known[0]} to {known[-1]}" if known else "no layers"
            raise ConfigError(f"--layer {index}: {self.title} has {has}.")
        return self._cut({name for name, layer in self.layers.items() if layer == index}, f"layer {index}")

    def around(self, name: str, hops: int) -> GraphData:
        """The nodes at most ``hops`` edges from one; what they read from elsewhere is kept as ``outside``.

        Raises:
            ConfigError: there is no such node.
        """
        node = self.find(name)
        import networkx as nx

        near = nx.ego_graph(self.networkx(), node.name, radius=hops, undirected=True)
        return self._cut(set(near), f"{hops} hops around {node.name}")

    def _cut(self, names: Collection[str], what: str) -> GraphData:
        read = {source for node in self.nodes if node.name in names for source in node.inputs}
        kept = []
        for node in self.nodes:
            if node.name in names:
                kept.append(node)
            elif node.name in read:
                kept.append(
                    NodeData(
                        name=node.name,
                        fx_name=node.fx_name,
                        op="outside",
                        target="outside",
                        value=node.value,
                        is_view=node.is_view,
                        module=node.module,
                    )
                )
        return GraphData(title=f"{self.title}, {what}", device=self.device, nodes=tuple(kept))


class NodeNames:
    """Stable names of one graph's nodes, given when they are first seen."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._made_by: dict[str, str | None] = {}
        self._taken: Counter[str] = Counter()
        self._root: str | None = None

    def see(self, gm: fx.GraphModule, transform: str | None) -> None:
        """Name the nodes that are new.

        Args:
            gm: the graph.
            transform: what inserted them; None for those of the model.
        """
        if self._root is None:
            self._root = _common_root(gm)
        for node in gm.graph.nodes:
            if node.name not in self._names:
                self._names[node.name] = self._new_name(node)
                self._made_by[node.name] = transform

    def data(self, gm: fx.GraphModule, title: str) -> GraphData:
        """The graph, all of whose nodes have been seen."""
        symbols = _symbols(gm)
        device, aliases = _main_device(gm), views(gm)
        nodes = tuple(
            NodeData(
                name=self._names[node.name],
                fx_name=node.name,
                op=node.op,
                target=target_name(node),
                args=tuple(self._text(arg) for arg in node.args),
                kwargs={key: self._text(arg) for key, arg in node.kwargs.items()},
                value=_value(g.value(node), symbols),
                is_view=node in aliases,
                module=self._module(node),
                source=_ENVIRONMENT.sub("", g.source_line(node)),
                made_by=self._made_by[node.name],
            )
            for node in gm.graph.nodes
        )
        return GraphData(title=title, device=device, nodes=nodes)

    def _module(self, node: fx.Node) -> str:
        path = str(node.target).rpartition(".")[0] if node.op == "get_attr" else g.module_path(node)
        return self._relative(path)

    def _relative(self, path: str) -> str:
        return path.removeprefix(f"{self._root}.") if path != self._root else ""

    def _new_name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            name = self._relative(str(node.target))
        elif node.op in ("placeholder", "output"):
            name = node.name
        else:
            # aten.linear.default, operator.getitem
            short = target_name(node).split(".")[1 if "." in target_name(node) else 0]
            name = f"{self._module(node)}.{short}".removeprefix(".")
        name = re.sub(r"[^\w.]", "_", name)
        self._taken[name] += 1
        while self._taken[name] > 1:
            numbered = f"{name}_{self._taken[name] - 1}"
            if not self._taken[numbered]:
                self._taken[numbered] += 1
                return numbered
            self._taken[name] += 1
        return name

    def _text(self, arg: Any) -> str:
        """An argument as it is written in a dump."""
        if isinstance(arg, fx.Node):
            return f"%{self._names[arg.name]}"
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(self._text, arg))}]"
        if isinstance(arg, dict):
            return "{" + ", ".join(f"{key}: {self._text(value)}" for key, value in arg.items()) + "}"
        if isinstance(arg, slice):
            return f"slice({', '.join(map(self._text, (arg.start, arg.stop, arg.step)))})"
        if isinstance(arg, (str, torch.device)):
            return '"' + str(arg).replace("\\", "\\\\").replace('"', '\\"') + '"'
        return str(arg)


def layer_of(module: str) -> int | None:
    """Index of the layer that a module path lies in: its first number."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def target_name(node: fx.Node) -> str:
    """The target as text: aten.linear.default, operator.getitem, the path of a weight."""
    target: Any = node.target
    if isinstance(target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    name = str(getattr(target, "__name__", target))
    module = "operator" if getattr(operator, name, None) is target else getattr(target, "__module__", "torch")
    return f"{module}.{name}"


def _common_root(gm: fx.GraphModule) -> str:
    """The module that holds all others, as the wrapper does that an export puts around a model."""
    modules = [g.module_path(node) for node in gm.graph.nodes if node.op == "call_function"]
    weights = [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]
    roots = {path.partition(".")[0] for path in (*modules, *weights) if path}
    return roots.pop() if len(roots) == 1 else ""


def _symbols(gm: fx.GraphModule) -> dict[str, str]:
    """Readable names for the symbols of batch and sequence."""
    ids = next((n for n in gm.graph.find_nodes(op="placeholder") if n.name == "input_ids"), None)
    if ids is None or not g.is_tensor(ids):
        return {}
    sizes = zip(g.shape(ids), ("b", "s"), strict=False)
    return {str(size): name for size, name in sizes if isinstance(size, SymInt)}


def _main_device(gm: fx.GraphModule) -> str:
    values = (g.value(node) for node in gm.graph.nodes)
    counts = Counter(str(value.device) for value in values if isinstance(value, Tensor))
    return counts.most_common(1)[0][0] if counts else "cpu"


def _value(value: Any, symbols: dict[str, str]) -> Value:
    if isinstance(value, (list, tuple)):
        return tuple(_item(item, symbols) for item in value)
    return _item(value, symbols)


def _item(value: Any, symbols: dict[str, str]) -> Item:
    if isinstance(value, Tensor):
        return TensorType(
            dtype=dtype_abbrs[value.dtype],
            shape=tuple(_size(size, symbols) for size in value.shape),
            device=str(value.device),
        )
    return None if value is None else str(_size(value, symbols))


def _size(size: Any, symbols: dict[str, str]) -> Size:
    if isinstance(size, int):
        return size
    return re.sub(r"\b[a-z]\d+\b", lambda match: symbols.get(match[0], match[0]), str(size)).replace(" ", "")
