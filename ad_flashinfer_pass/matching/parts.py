"""An attention in its own terms: what every way of writing it in a graph is read into."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ad_flashinfer_pass.graph.axes import Axis, Dims


class NotAttention(Exception):
    """Why a softmax is not the softmax of an attention."""


@dataclass(frozen=True)
class Operand:
    """A node and its axes."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class MaskTerm:
    """One thing done to the logits: an addition, or positions hidden or shown."""

    node: fx.Node
    dims: Dims
    """Of the logits where the term is applied; the node is broadcast to them."""
    factor: float = 1.0
    """Of an additive term: a constant by which the logits are multiplied after the addition."""
    is_bool: bool = False
    """True and False, or 1 and 0."""
    hides: bool = False
    """Of a boolean term: True hides a key; else True shows it."""


@dataclass(frozen=True)
class SiteAxes:
    """The axes of an attention by their part in it."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    """Query heads of a KV head."""
    queries: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    head_dim: tuple[Axis, ...]
    v_head_dim: tuple[Axis, ...]

    @property
    def heads(self) -> tuple[Axis, ...]:
        """Query heads; those of a KV head stand together."""
        return self.kv_heads + self.group

    @property
    def query(self) -> Dims:
        """[b, s, num_heads, head_dim]."""
        return self.batch, self.queries, self.heads, self.head_dim

    @property
    def key(self) -> Dims:
        """[b, t, num_kv_heads, head_dim]."""
        return self.batch, self.keys, self.kv_heads, self.head_dim

    @property
    def value(self) -> Dims:
        """[b, t, num_kv_heads, v_head_dim]."""
        return self.batch, self.keys, self.kv_heads, self.v_head_dim

    @property
    def result(self) -> Dims:
        """[b, s, num_heads, v_head_dim]."""
        return self.batch, self.queries, self.heads, self.v_head_dim

    @property
    def logits(self) -> Dims:
        """[b, num_heads, s, t]."""
        return self.batch, self.heads, self.queries, self.keys


@dataclass(kw_only=True)
class AttentionMatch:
    """One attention in its own terms."""

    form: str
    """How it stands in the graph, in words."""
    result: Operand
    """Makes the result."""
    axes: SiteAxes = field(init=False)
    query: Operand = field(init=False)
    key: Operand = field(init=False)
    value: Operand = field(init=False)
    mask_terms: list[MaskTerm] = field(default_factory=list)
    is_causal: bool = False
    scale: float = 1.0
    logit_cap: float | None = None
    sinks: Operand | None = None
    temperatures: list[tuple[Operand, bool]] = field(default_factory=list)
    """Tensors by which the logits are multiplied, or divided where True: one number, or one for each head or
    query."""


@dataclass(frozen=True)
class Place:
    """A node from which an operand can be taken, and the constant by which it is multiplied after it."""

    node: fx.Node
    dims: Dims
    factor: float = 1.0
