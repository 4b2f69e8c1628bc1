"""The FX transforms, one per file, imported as ``ad_flashinfer_pass.transforms``."""

if __name__ != "ad_flashinfer_pass.transforms":  # a second copy would register everything twice
    raise ImportError(f"import ad_flashinfer_pass.transforms, not {__name__}")

from ad_flashinfer_pass.transforms import (
    cache_latent,
    check_packing,
    classify_mask,
    compile_model,
    eliminate_noops,
    expand_flex_attention,
    export_model,
    functionalize,
    fuse_gemms,
    fuse_rope_append,
    fuse_small_batch,
    fuse_top_k,
    gather_logits_before_lm_head,
    initialize_cache,
    insert_cached_attention,
    insert_cached_state,
    lower_quantized_linear,
    match_attention,
    match_repeat_kv,
    number_by_positions,
    tune_attention,
    tune_experts,
)

__all__ = [
    "cache_latent",
    "check_packing",
    "classify_mask",
    "compile_model",
    "eliminate_noops",
    "expand_flex_attention",
    "export_model",
    "functionalize",
    "fuse_gemms",
    "fuse_rope_append",
    "fuse_small_batch",
    "fuse_top_k",
    "gather_logits_before_lm_head",
    "initialize_cache",
    "insert_cached_attention",
    "insert_cached_state",
    "lower_quantized_linear",
    "match_attention",
    "match_repeat_kv",
    "number_by_positions",
    "tune_attention",
    "tune_experts",
]
