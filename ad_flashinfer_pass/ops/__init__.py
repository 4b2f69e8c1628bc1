"""The custom ops of namespace ``ad_flashinfer``, one file each; importing this registers them."""

import torch

from ad_flashinfer_pass.ops.all_reduce import all_gather, all_reduce
from ad_flashinfer_pass.ops.append_kv import append_kv
from ad_flashinfer_pass.ops.attention import attention
from ad_flashinfer_pass.ops.cached_attention import cached_attention
from ad_flashinfer_pass.ops.causal_conv1d import cached_causal_conv1d, causal_conv1d
from ad_flashinfer_pass.ops.experts import experts, quantized_experts
from ad_flashinfer_pass.ops.gated_delta_rule import cached_gated_delta_rule, gated_delta_rule
from ad_flashinfer_pass.ops.kda import cached_kda, kda
from ad_flashinfer_pass.ops.keep_hidden_state import keep_hidden_state
from ad_flashinfer_pass.ops.linear import linear
from ad_flashinfer_pass.ops.prepare_metadata import prepare_metadata
from ad_flashinfer_pass.ops.quantized_linear import quantized_linear
from ad_flashinfer_pass.ops.rope_append import rope_append
from ad_flashinfer_pass.ops.scaled_mm import scaled_mm
from ad_flashinfer_pass.ops.selective_scan import cached_selective_scan, selective_scan
from ad_flashinfer_pass.ops.sequence_length import sequence_length
from ad_flashinfer_pass.ops.ssd_scan import cached_ssd_scan, ssd_scan
from ad_flashinfer_pass.ops.top_k import top_k

TOKEN_BY_TOKEN: set[torch._ops.OpOverloadPacket] = {
    torch.ops.ad_flashinfer.all_gather,
    torch.ops.ad_flashinfer.all_reduce,
    torch.ops.ad_flashinfer.experts,
    torch.ops.ad_flashinfer.quantized_experts,
    torch.ops.ad_flashinfer.quantized_linear,
    torch.ops.ad_flashinfer.top_k,
}
"""Ops whose contract is that they work token by token: along all dimensions but the last, an element of each
result is computed from the same element of each operand that has tokens. ``check_packing`` takes their word;
add yours: ``TOKEN_BY_TOKEN.add(torch.ops.my_kernels.rms_norm)``."""

STATES: dict[torch._ops.OpOverloadPacket, torch._ops.OpOverloadPacket] = {
    torch.ops.ad_flashinfer.causal_conv1d: torch.ops.ad_flashinfer.cached_causal_conv1d,
    torch.ops.ad_flashinfer.gated_delta_rule: torch.ops.ad_flashinfer.cached_gated_delta_rule,
    torch.ops.ad_flashinfer.kda: torch.ops.ad_flashinfer.cached_kda,
    torch.ops.ad_flashinfer.selective_scan: torch.ops.ad_flashinfer.cached_selective_scan,
    torch.ops.ad_flashinfer.ssd_scan: torch.ops.ad_flashinfer.cached_ssd_scan,
}
"""Ops that read the earlier tokens of a sequence through a state of fixed size, with the op that keeps it in
a slot. Their tensors of tokens are [batch, tokens, ...]."""

__all__ = [
    "STATES",
    "TOKEN_BY_TOKEN",
    "all_gather",
    "all_reduce",
    "append_kv",
    "attention",
    "cached_attention",
    "cached_causal_conv1d",
    "cached_gated_delta_rule",
    "cached_kda",
    "cached_selective_scan",
    "cached_ssd_scan",
    "causal_conv1d",
    "experts",
    "gated_delta_rule",
    "kda",
    "keep_hidden_state",
    "linear",
    "prepare_metadata",
    "quantized_experts",
    "quantized_linear",
    "rope_append",
    "scaled_mm",
    "selective_scan",
    "sequence_length",
    "ssd_scan",
    "top_k",
]
