"""AutoDeploy's ops that the plugin meets in a graph, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# AD/export/library/unified_attn.py: of what transformers passes to an attention function, what
# is handed on; is_causal is not among the former, softcap not among the latter.
HF_ATTN_KWARGS_MAPPING = {
    "dropout": "dropout_p",
    "is_causal": "is_causal",
    "scaling": "scale",
    "sinks": "sinks",
    "sliding_window": "sliding_window",
    "logit_cap": "logit_cap",
}

# AD/custom_ops/torch_libs (torch_attention.py at 0fef79e9); the last two arguments since summer 2026.
_ATTENTION = (
    "torch_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, Tensor? sinks=None, int? sliding_window=None, "
    'float? logit_cap=None, str layout="bnsd"'
)
_SHARED = ", int? layer_idx=None, int? shared_kv_source_layer_idx=None"


def define(layer_idx: bool) -> torch.library.Library:
    """Define them in namespace ``auto_deploy``; they go with the library that is returned."""
    library = torch.library.Library("auto_deploy", "FRAGMENT")
    library.define(f"{_ATTENTION}{_SHARED if layer_idx else ''}) -> Tensor")
    library.impl("torch_attention", attention, "CompositeExplicitAutograd")
    # AD/custom_ops/rope/flashinfer_rope.py: cos_sin_cache [max positions, rotary_dim], cos and then sin.
    library.define(
        "flashinfer_rope(Tensor q, Tensor k, Tensor position_ids, Tensor cos_sin_cache, bool is_neox=True) "
        "-> (Tensor, Tensor)"
    )
    library.impl("flashinfer_rope", rope_by_table, "CompositeExplicitAutograd")
    # AD/custom_ops/rope/torch_rope.py
    library.define(
        "torch_rope_with_explicit_cos_sin(Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim=1) "
        "-> (Tensor, Tensor)"
    )
    library.impl("torch_rope_with_explicit_cos_sin", rope_explicit, "CompositeExplicitAutograd")
    return library


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    layout: str = "bnsd",
    layer_idx: int | None = None,
    shared_kv_source_layer_idx: int | None = None,
) -> Tensor:
    """Dense attention by SDPA in float32; "HF sliding_window W attends to the last W tokens"."""
    assert layout == "bsnd"
    assert sinks is None
    assert logit_cap is None
    is_causal = True  # flashinfer and torch attend so, whatever the flag says
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    n = q.shape[2]
    rows, columns = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
    visible = columns <= rows if is_causal else torch.ones(n, n, dtype=torch.bool, device=q.device)
    if sliding_window and sliding_window > 0:
        visible = visible & (columns > rows - sliding_window)
    mask = visible if attn_mask is None else visible & attn_mask
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(query.dtype).contiguous()


def rope_by_table(
    q: Tensor, k: Tensor, position_ids: Tensor, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    """FlashInfer's rotation of the first rotary_dim elements of a head."""
    assert is_neox
    cos, sin = cos_sin_cache[position_ids].chunk(2, -1)
    cos, sin = (torch.cat((x, x), -1).unsqueeze(2) for x in (cos, sin))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope_explicit(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb``, but in float32."""
    cos, sin = cos.float().unsqueeze(unsqueeze_dim), sin.float().unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    part, rest = x[..., :size].float(), x[..., size:]
    first, second = part.chunk(2, -1)
    turned = part * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), rest), -1)
