"""A language model of one layer whose attention is over a latent, in many forms and with many flaws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.transforms.small_models import VOCAB, Float8Linear, causal

_WIDTH = 24


@dataclass(frozen=True)
class Form:
    """Sizes of an attention, and how it is written."""

    heads: int = 4
    rank: int = 16
    nope: int = 8
    rope: int = 6
    value: int = 10
    """Elements of V of a head."""
    q_rank: int = 0
    """Of the query's own latent; 0: it has none."""
    has_bias: bool = False
    normed: bool = True
    """Whether the latent has a norm before it is projected."""
    rope_first: bool = False
    """In K and in the query."""
    split: str = "by_head"
    """How one projection makes K and V: by_head, k_then_v, v_then_k, or two projections."""
    join: str = "cat"
    """How K is made of its parts: cat, or write."""
    window: int | None = None
    quantized: str = ""
    """What of the projection has a scale, if it is float8: tensor, row or block."""
    flaw: str = ""
    """What makes it no latent; see ``LatentModel.forward``."""

    @property
    def is_narrow(self) -> bool:
        """Whether the latent is worth being cached."""
        expanded = self.heads * (self.nope + self.rope + self.value)
        return self.rank < self.heads * self.value and 2 * (self.rank + self.rope) <= expanded


class LatentModel(nn.Module):
    """Embedding, attention over a latent, lm_head."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = f = form
        self.tokens = nn.Embedding(VOCAB, _WIDTH)
        self.down = nn.Linear(_WIDTH, f.rank + f.rope, bias=False)
        self.norm = nn.RMSNorm(f.rank)
        q_width = f.heads * (f.nope + f.rope)
        self.query = nn.Linear(_WIDTH, q_width, bias=False)
        if f.q_rank:
            self.query = nn.Sequential(  # type: ignore[assignment]
                nn.Linear(_WIDTH, f.q_rank, bias=False), nn.RMSNorm(f.q_rank), nn.Linear(f.q_rank, q_width)
            )
        self.up = nn.Linear(f.rank, f.heads * (f.nope + f.value), bias=f.has_bias)
        if f.quantized:
            self.up = Float8Linear(self.up.out_features, f.rank, scaling=f.quantized)  # type: ignore[assignment]
        self.up_k = nn.Linear(f.rank, f.heads * f.nope, bias=f.has_bias)
        self.up_v = nn.Linear(f.rank, f.heads * f.value, bias=f.has_bias)
        self.other = nn.Linear(_WIDTH, f.rank, bias=False)
        self.factors = nn.Parameter(torch.linspace(0.5, 2.0, f.heads))
        self.output = nn.Linear(f.heads * f.value, _WIDTH, bias=False)
        self.lm_head = nn.Linear(_WIDTH, VOCAB)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        self.query.requires_grad_(False)
        self.eval()

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, VOCAB]."""
        f, x = self.form, self.tokens(input_ids)
        b, s = input_ids.shape
        q = 2.0 * self.query(x).view(b, s, f.heads, f.nope + f.rope).transpose(1, 2)
        down = self.down(x)
        latent, k_rope = down[..., : f.rank], down[..., f.rank :]
        if f.normed:
            latent = self.norm(latent)
        k_nope, v = self._expanded(latent, self.other(x) if f.flaw == "other_latent" else latent)
        if f.flaw == "activation":
            k_nope = F.silu(k_nope)
        if f.flaw == "factor_of_heads":
            k_nope = k_nope * self.factors.view(1, -1, 1, 1)
        if not f.rope:
            return self._result(x, q, k_nope, v, position_ids)
        q_nope, q_rope = q.split([f.nope, f.rope], -1)
        q_rope, k_rope = (_rotated(part, position_ids) for part in (q_rope, k_rope.view(b, 1, s, f.rope)))
        k_rope = k_rope.expand(-1, f.heads, -1, -1)
        if f.flaw == "rope_of_heads":
            k_rope = k_rope * self.factors.view(1, -1, 1, 1)
        order = (1, 0) if f.rope_first else (0, 1)
        query = torch.cat([(q_nope, q_rope)[i] for i in order], -1)
        parts = [(k_nope, k_rope)[i] for i in order]
        if f.join == "write":
            key = k_nope.new_empty(b, f.heads, s, f.nope + f.rope)
            key[..., : parts[0].shape[-1]] = parts[0]
            key[..., parts[0].shape[-1] :] = parts[1]
        else:
            key = torch.cat(parts, -1)
        return self._result(x, query, key, v, position_ids)

    def _result(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> Tensor:
        out = self._attend(query, key, value, causal(position_ids, self.form.window))
        logits: Tensor = self.lm_head(x + self.output(out.transpose(1, 2).flatten(2)))
        return logits

    def _expanded(self, latent: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """K's part of each head, and V: [b, heads, s, ...]."""
        f = self.form
        if f.split == "two" or other is not latent:
            k, v = (up.unflatten(-1, (f.heads, -1)) for up in (self.up_k(latent), self.up_v(other)))
        elif f.split == "by_head":
            k, v = self.up(latent).unflatten(-1, (f.heads, -1)).split([f.nope, f.value], -1)
        else:
            k_rows, v_rows = f.heads * f.nope, f.heads * f.value
            if f.split == "k_then_v":
                k, v = self.up(latent).split([k_rows, v_rows], -1)
            else:
                v, k = self.up(latent).split([v_rows, k_rows], -1)
            k, v = k.unflatten(-1, (f.heads, -1)), v.unflatten(-1, (f.heads, -1))
        if f.flaw == "heads_in_other_order":
            k = k[:, :, torch.arange(f.heads - 1, -1, -1)]
        return k.transpose(1, 2), v.transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        if self.form.flaw == "sinks":
            logits = query @ key.mT * 0.3
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
            sinks = self.factors.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ value
        return F.scaled_dot_product_attention(query, key, value, visible, scale=0.3)


def _rotated(x: Tensor, position_ids: Tensor) -> Tensor:
    """[b, heads, s, d] by angles of the positions."""
    half = x.shape[-1] // 2
    angles = position_ids[:, None, :, None] * torch.arange(1.0, half + 1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def made(form: Form) -> Callable[[], nn.Module]:
    """What makes the model."""
    return lambda: LatentModel(form)
