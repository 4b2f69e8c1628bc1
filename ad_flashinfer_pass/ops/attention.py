"""``ad_flashinfer.attention``: the source attention, to which all forms are brought."""

from __future__ import annotations

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.attention import reference
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.ops.define import define


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    chunk: int | None = None,
    alibi_slopes: Tensor | None = None,
    key_up: Tensor | None = None,
    value_up: Tensor | None = None,
) -> Tensor:
    """Dense attention without a cache.

    Layout is "bsnd" and grouped-query attention is implied by the head counts, as in AutoDeploy's
    ``torch_attention``. Softmax is taken in float32.

    With ``key_up`` and ``value_up`` all heads share one row a token, whose first elements are a latent c:
    head h attends over keys [key_up[h] c, the rest of the row] and values value_up[h] c.

    Args:
        query: [b, s, num_heads, head_dim].
        key: [b, t, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        value: [b, t, num_kv_heads, v_head_dim].
        attn_mask: bool (True = may attend) or float (added to the logits), broadcastable to
            [b, num_heads, s, t]. None once the mask has been classified.
        is_causal: query i attends key j only if j <= i; requires s == t.
        scale: factor of the logits; default 1 / sqrt(head_dim).
        sinks: [num_heads], one more logit in each softmax, whose value is zero.
        sliding_window: with W, also j > i - W: W tokens, the current one included; requires is_causal.
        logit_cap: with c, logits become c * tanh(logits / c) before any mask is added.
        chunk: with C, also i // C == j // C; requires is_causal.
        alibi_slopes: float32 [num_heads]; slope * (j - i) is added to the logits.
        key_up: [num_heads, n, rank], of n + rest = head_dim; key is then [b, t, 1, rank + rest].
        value_up: [num_heads, size, rank]; value is then the latent, [b, t, 1, rank].

    Returns:
        [b, s, num_heads, v_head_dim], in the dtype of query; with value_up [b, s, num_heads, size].

    Raises:
        ValueError: is_causal, sliding_window or chunk where queries and keys are not the same tokens.
    """
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"is_causal needs as many keys as queries, got {key.shape[1]} and {query.shape[1]}; give a mask."
        )
    if not is_causal and (sliding_window is not None or chunk is not None):
        raise ValueError("sliding_window and chunk narrow a causal mask: set is_causal, or give a mask.")
    spec = AttentionSpec(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        sliding_window=sliding_window,
        logit_cap=logit_cap,
        chunk=chunk,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    if key_up is not None and value_up is not None:
        key, value = expand(key, value, key_up, value_up)
    return reference.dense_attention(query, key, value, spec, attn_mask, is_causal)


def expand(row: Tensor, latent: Tensor, key_up: Tensor, value_up: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of each head, [..., num_heads, size], of rows and their latents [..., 1, size]."""
    key, value = (torch.einsum("...r,hdr->...hd", latent.squeeze(-2), up) for up in (key_up, value_up))
    rest = row[..., latent.shape[-1] :].expand(*key.shape[:-1], -1)
    return torch.cat((key, rest), -1), value


def _fake(query: Tensor, value: Tensor, value_up: Tensor | None, **_: object) -> Tensor:
    size = value.shape[-1] if value_up is None else value_up.shape[1]
    return query.new_empty((*query.shape[:-1], size))


define(attention, fake=_fake)
