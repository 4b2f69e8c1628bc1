"""Graphs as text, one node a line in SSA form, and back.

::

    ad-flashinfer-pass graph 1
    title: demo after match_attention
    device: cpu

    %input_ids: i64[b, s] = placeholder input_ids
    %model.norm.weight: f32[128] = get_attr model.norm.weight
    %model.norm.mul: f32[b, s, 128] = aten.mul.Tensor(%model.norm.weight, %x)  # modeling_llama.py:66
    output(%lm_head.linear)

    names in FX:
    %model.norm.mul mul_56

A type that ends in & is a view: the result lies in the memory of an input. A device stands behind the shape
where it is not that of the header. A comment holds the source line, then ``in`` and the module where the
name does not begin with it, then ``by`` and the transform that made the node. A line holds nothing that a
change elsewhere in the graph would alter, but for the names in FX, which therefore stand at the end.
"""

from __future__ import annotations

import re

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.graph.data import GraphData, Item, NodeData, TensorType, Value

FIRST_LINE = "ad-flashinfer-pass graph 1"
_FX_NAMES = "names in FX:"
_NODE = re.compile(
    r"(?:%(?P<name>[\w.]+)(?:: (?P<type>.*?))? = )?(?P<op>\w+ )?(?P<target>[\w.]+)(?P<rest>\(.*|)$"
)
_COMMENT = re.compile(r"(?P<source>.*?)(?:(?:^| )in (?P<module>\S*))?(?:(?:^| )by (?P<made_by>\w+))?$")
_TENSOR = re.compile(r"(\w+)\[(.*?)\](\S*)$")
# Ops whose target is a name and not a function.
_NAMED = ("placeholder", "get_attr", "call_module", "call_method")


def to_text(graph: GraphData) -> str:
    """The graph as text; ``from_text`` reads it back."""
    lines = [FIRST_LINE, f"title: {graph.title}", f"device: {graph.device}", ""]
    lines += [node_line(node, graph.device) for node in graph.nodes]
    named = [f"%{node.name} {node.fx_name}" for node in graph.nodes if node.name != node.fx_name]
    return "\n".join([*lines, "", _FX_NAMES, *named]) + "\n"


def node_line(node: NodeData, device: str) -> str:
    """One node in SSA form."""
    arguments = ", ".join([*node.args, *(f"{key}={value}" for key, value in node.kwargs.items())])
    if node.op == "output":
        return f"output({arguments})"
    target = f"{node.op} {node.target}" if node.op in _NAMED else node.target
    call = f"({arguments})" if node.op not in ("placeholder", "get_attr", "outside") else ""
    kind = "" if node.value is None else f": {value_text(node.value, device)}{'&' * node.is_view}"
    notes = [node.source] if node.source else []
    if node.module != node.name.rpartition(".")[0]:
        notes.append(f"in {node.module}")
    if node.made_by:
        notes.append(f"by {node.made_by}")
    return f"%{node.name}{kind} = {target}{call}" + (f"  # {' '.join(notes)}" if notes else "")


def value_text(value: Value, device: str) -> str:
    """A type: bf16[b, s, 128], (i32[8], i64[b*s]), Sym(b*s) or None; behind it a device if not ``device``."""
    if isinstance(value, TensorType):
        elsewhere = value.device if value.device != device else ""
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]{elsewhere}"
    if isinstance(value, tuple):
        return f"({', '.join(value_text(item, device) for item in value)})"
    return "None" if value is None else f"Sym({value})"


def from_text(text: str) -> GraphData:
    """Read a graph that ``to_text`` wrote.

    Raises:
        LoadError: names the first line that is not of the format.
    """
    lines = text.splitlines()
    if not lines or lines[0] != FIRST_LINE:
        raise LoadError(f"not a text dump: its first line must be {FIRST_LINE!r}; write one with dump.")
    try:
        end = lines.index(_FX_NAMES)
    except ValueError:
        raise LoadError(f"the text dump is cut short: the line {_FX_NAMES!r} is missing.") from None
    title, device = (line.partition(": ")[2] for line in lines[1:3])
    fx_names = {}
    for number, line in enumerate(lines[end + 1 :], end + 2):
        pair = line.removeprefix("%").split(" ")
        if len(pair) == 2:
            fx_names[pair[0]] = pair[1]
        elif line:
            raise LoadError(f"line {number} must be a name and its name in FX, got {line[:80]!r}")
    nodes = []
    for number, line in enumerate(lines[:end]):
        if number > 2 and line:
            nodes.append(_node(line, number + 1, device, fx_names))
    return GraphData(title=title, device=device, nodes=tuple(nodes))


def _node(line: str, number: int, device: str, fx_names: dict[str, str]) -> NodeData:
    body, comment = _split_comment(line)
    match, notes = _NODE.match(body), _COMMENT.match(comment)
    if match is None or notes is None:
        raise LoadError(f"line {number} is not a node: {line[:80]!r}")
    args, kwargs = [], {}
    for argument in _split(match["rest"][1:-1]):
        key = re.match(r"(\w+)=", argument)
        if key:
            kwargs[key[1]] = argument[key.end() :]
        else:
            args.append(argument)
    target, op = match["target"], (match["op"] or "").strip()
    if not op:
        op = target if target in ("output", "outside") else "call_function"
    name, kind = match["name"] or "output", match["type"]
    is_view = kind is not None and kind.endswith("&")
    return NodeData(
        name=name,
        fx_name=fx_names.get(name, name),
        op=op,
        target=target,
        args=tuple(args),
        kwargs=kwargs,
        value=_value(kind[:-1] if is_view else kind, device, number),
        is_view=is_view,
        module=name.rpartition(".")[0] if notes["module"] is None else notes["module"],
        source=notes["source"],
        made_by=notes["made_by"],
    )


def _split_comment(line: str) -> tuple[str, str]:
    """The line before its comment, and the comment; a # in a string begins none."""
    end = line.rfind(")  # ")
    if end >= 0:
        return line[: end + 1], line[end + 5 :]
    if not line.endswith(")"):
        body, _, comment = line.partition("  # ")
        return body, comment
    return line, ""


def _value(text: str | None, device: str, number: int) -> Value:
    if text is not None and text.startswith("("):
        return tuple(_item(item, device, number) for item in _split(text[1:-1]))
    return _item(text, device, number)


def _item(text: str | None, device: str, number: int) -> Item:
    if text is None or text == "None":
        return None
    if text.startswith("Sym("):
        return text[4:-1]
    match = _TENSOR.match(text)
    if match is None:
        raise LoadError(f"line {number}: {text!r} is not a type, such as bf16[b, s, 128] or Sym(b).")
    sizes = [size for size in _split(match[2]) if size]
    return TensorType(
        dtype=match[1],
        shape=tuple(int(size) if size.lstrip("-").isdecimal() else size for size in sizes),
        device=match[3] or device,
    )


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket and no string."""
    parts, depth, start, quoted, escaped = [], 0, 0, False, False
    for at, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
