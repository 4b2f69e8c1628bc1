"""The custom ops of namespace ``ad_flashinfer``, one file each; importing this registers them."""

from ad_flashinfer_pass.ops.append_kv import append_kv
from ad_flashinfer_pass.ops.attention import attention
from ad_flashinfer_pass.ops.cached_attention import cached_attention
from ad_flashinfer_pass.ops.linear import linear
from ad_flashinfer_pass.ops.prepare_metadata import prepare_metadata
from ad_flashinfer_pass.ops.rope_append import rope_append

__all__ = ["append_kv", "attention", "cached_attention", "linear", "prepare_metadata", "rope_append"]
