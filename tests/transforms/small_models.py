"""Language models of a few hundred parameters with the attention under test, and ways to transform them.

Shapes: b sequences, s tokens, n heads, d head size; an attention gets q, k and v as [b, n, s, d].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ad_flashinfer_pass import registry, transforms
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo

assert transforms.__name__ == "ad_flashinfer_pass.transforms"  # importing it registers them
aten = torch.ops.aten
ATTENTION = torch.ops.ad_flashinfer.attention
CPU = torch.device("cpu")
VOCAB, HEADS, KV_HEADS, HEAD_DIM = 29, 4, 2, 8
GROUP = HEADS // KV_HEADS
SCALE = 0.25

Attend = Callable[["Layer", Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v, position_ids) -> [b, n, s, d]; k and v have KV_HEADS heads."""
Mix = Callable[["SmallModel", Tensor, Tensor], Tensor]
"""(model, hidden [b, s, n * d], position_ids) -> hidden; anything that stands outside attention."""


class Float8Linear(nn.Module):
    """A linear in float8.

    Args:
        rows: of the weight.
        depth: of the weight.
        activation: how activations are quantized.
        scaling: what shares a scale: tensor, row, or block of 128 x 128.
        input_scale: of ``tensor``.
        has_bias: in bfloat16.
    """

    def __init__(
        self,
        rows: int,
        depth: int,
        activation: str = "none",
        scaling: str = "tensor",
        input_scale: float = 0.01,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(rows, depth).to(torch.float8_e4m3fn), requires_grad=False)
        sizes = {"tensor": (1,), "row": (rows, 1), "block": (-(-rows // 128), -(-depth // 128))}[scaling]
        self.weight_scale = nn.Parameter(torch.rand(sizes) / 8 + 0.01)
        self.bias = nn.Parameter(torch.randn(rows).bfloat16()) if has_bias else None
        self.input_scale = nn.Parameter(torch.tensor(input_scale)) if activation == "tensor" else None
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., depth] -> [..., rows]."""
        out: Tensor = torch.ops.ad_flashinfer.quantized_linear(
            x, self.weight, self.weight_scale, self.input_scale, self.bias, self.activation
        )
        return out


class Layer(nn.Module):
    """x + output(attend(query(x), key(x), value(x)))."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attend = attend
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, KV_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(width, KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(
        self, x: Tensor, position_ids: Tensor, shared: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The new x, and k and v; with ``shared`` the layer reads those of another."""
        x_norm = self.norm(x)
        q = self.query(x_norm).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k = self.key(x_norm).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        v = self.value(x_norm).unflatten(-1, (KV_HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = shared or (k, v)
        out = self.attend(self, q, k, v, position_ids)
        return x + self.output(out.transpose(1, 2).flatten(2)), (k, v)


class SmallModel(nn.Module):
    """Embeddings of token and position, one layer for each of ``attends``, then lm_head.

    Args:
        attends: the attention of each layer.
        mix: stands between the embeddings and the layers.
        parts: modules that ``mix`` uses, by name.
        shares_kv: every layer reads K and V of the first one.
    """

    def __init__(
        self, *attends: Attend, mix: Mix | None = None, shares_kv: bool = False, **parts: nn.Module
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * HEAD_DIM
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(attend) for attend in attends)
        self.lm_head = nn.Linear(width, VOCAB)
        self.mix, self.shares_kv = mix, shares_kv
        self.parts = nn.ModuleDict(parts)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for layer in self.layers:
            # Logits of several units, so that a wrong scale, cap or mask shows in the result.
            layer.query.weight.mul_(4.0)  # type: ignore[operator,union-attr]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, VOCAB]."""
        x = self.tokens(input_ids) + self.positions(position_ids)
        if self.mix is not None:
            x = self.mix(self, x, position_ids)
        shared = None
        for layer in self.layers:
            x, kv = layer(x, position_ids, shared)
            shared = kv if self.shares_kv else None
        logits: Tensor = self.lm_head(x)
        return logits


def causal(position_ids: Tensor, window: int | None = None) -> Tensor:
    """bool [b, 1, s, s], True where a query may see a key."""
    q, k = position_ids[:, None, :, None], position_ids[:, None, None, :]
    return k <= q if window is None else (k <= q) & (k > q - window)


def additive(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where visible, the lowest number of the dtype elsewhere."""
    zero, lowest = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(visible, zero, lowest)


def repeat_kv(x: Tensor) -> Tensor:
    """As transformers does it: expand and reshape."""
    b, n, s, d = x.shape
    return x[:, :, None].expand(b, n, GROUP, s, d).reshape(b, n * GROUP, s, d)


def sdpa(layer: Layer, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
    """The plainest form: torch's op, causal, grouped heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def eager(
    *,
    scores: Callable[[Tensor, Tensor], Tensor] = lambda q, k: q @ k.transpose(2, 3) * SCALE,
    mask: Callable[[Tensor, Tensor], Tensor] = lambda logits, p: logits + additive(causal(p), logits.dtype),
    weights: Callable[[Tensor, Layer], Tensor] = lambda logits, _: torch.softmax(logits, -1),
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Attend:
    """matmul -> mask -> softmax -> matmul, with any of the four steps replaced."""

    def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        logits = mask(scores(q, repeat_kv(k)), position_ids)
        return product(weights(logits, layer), repeat_kv(v))

    return attend


def softmax_with_sinks(logits: Tensor, layer: Layer) -> Tensor:
    """As gpt-oss does it: one more column, taken off after the softmax."""
    sinks = layer.sinks.reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], -1)
    combined = torch.cat([logits, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return torch.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]


def context(**config: Any) -> TransformContext:
    """A context for sequences of up to 64 tokens in pages of 5."""
    keys: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 6, "max_num_tokens": 96, **config}
    keys.setdefault("kv_cache_config", {"tokens_per_block": 5})
    settings = AutoDeployConfig(**keys)
    info = SequenceInfo(
        settings.sequence_limit,
        settings.max_batch_size,
        settings.token_budget,
        settings.kv_cache_config.tokens_per_block,
        CPU,
        settings.num_drafts,
    )
    return TransformContext(settings, CPU, info)


def run(
    model: nn.Module, ctx: TransformContext, *names: str
) -> tuple[fx.GraphModule, dict[str, TransformReport]]:
    """The module after these transforms, and their reports by name."""
    reports = {}
    for name in names:
        model, reports[name] = registry.get(name)(model, ctx)
    assert isinstance(model, fx.GraphModule)
    model.graph.lint()
    return model, reports


def exported(model: nn.Module, *names: str, ctx: TransformContext | None = None) -> fx.GraphModule:
    """The graph of a model, without writes in place and no-ops, after these further transforms."""
    return run(model, ctx or context(), "export_model", "functionalize", "eliminate_noops", *names)[0]


def count(gm: fx.GraphModule, *targets: Any) -> int:
    """Nodes that call one of ``targets``."""
    return sum(g.is_op(node, *targets) for node in gm.graph.nodes)


def find(gm: fx.GraphModule, *targets: Any) -> list[fx.Node]:
    """Nodes that call one of ``targets``, in order."""
    return [node for node in gm.graph.nodes if g.is_op(node, *targets)]


def tokens(batch: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input_ids, and position_ids from 0."""
    ids = torch.randint(VOCAB, (batch, size), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(size).repeat(batch, 1)


def assert_computes(gm: nn.Module, model: nn.Module, tolerance: float = 1e-5) -> None:
    """The graph gives the model's logits, for several shapes.

    The default tolerance is that of float32 sums taken in another order.
    """
    for batch, size in ((1, 1), (2, 7), (3, 12)):
        ids, positions = tokens(batch, size)
        torch.testing.assert_close(gm(ids, positions), model(ids, positions), atol=tolerance, rtol=tolerance)


def snapshot(gm: fx.GraphModule) -> list[tuple[str, object]]:
    """The nodes of a graph, to see whether they change."""
    return [(node.name, node.target) for node in gm.graph.nodes]
