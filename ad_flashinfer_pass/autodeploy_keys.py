"""Keys that a YAML of TensorRT-LLM AutoDeploy has and that this package has not.

``taken`` makes of such a mapping one with our keys alone: what means nothing where one process serves one
model is left out and told, what has another name here gets it, and what would change the answer is refused.

Sources: TensorRT-LLM ``_torch/auto_deploy/llm_args.py``, ``config/default.yaml`` and the YAMLs of
``examples/auto_deploy/model_registry``, as of September 2026.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Keys = dict[str, Any]

# Of no meaning here, whatever the value.
_NOTHING = frozenset(
    """
    allreduce_strategy backend batching_type benchmark_enabled cache_transceiver_config
    capacity_scheduler_policy checkpoint_format enable_autotuner enable_chunked_prefill
    enable_iter_perf_stats enable_iter_req_stats
    enable_min_latency fail_fast_on_attention_window_too_large garbage_collection_gen0_threshold gpus_per_node
    guided_decoding_backend iter_stats_max_iterations mode model_factory moe_config mpi_session
    num_postprocess_workers nvfp4_gemm_config perf_metrics_max_requests postprocess_tokenizer_dir
    print_iter_log reasoning_parser request_stats_max_iterations return_perf_metrics runtime scheduler_config
    skip_tokenizer_init stream_interval torch_compile_config use_cuda_graph use_pt_cache_backend
    """.split()
)
_NOTHING_OF_CACHE = frozenset(
    """
    attention_dp_events_gather_period_ms block_reuse_policy copy_on_partial_reuse cross_kv_cache_fraction
    enable_partial_reuse event_buffer_max_size host_cache_size mamba_ssm_cache_dtype
    max_util_for_resume onboard_blocks secondary_offload_min_priority use_kv_cache_manager_v2 use_uvm
    """.split()
)
# Of every transform.
_NOTHING_OF_TRANSFORMS = frozenset(
    """
    attn_layout backend clone_state_dict cuda_graph_batch_sizes debug_visualize_dir expect_mem_change
    num_batched_inputs piecewise_enabled piecewise_num_tokens requires_clean_graph requires_shape_prop
    run_graph_cleanup run_per_gm run_shape_prop skip_on_error strict
    """.split()
)
_TRANSFORMS = frozenset(
    """
    apply_sharding_hints build_model cleanup_input_constraints cleanup_noop_add cleanup_noop_slice
    detect_hidden_states_for_capture detect_sharding eliminate_redundant_transposes export_to_gm
    fuse_add_rms_norm fuse_allreduce_residual_rmsnorm fuse_causal_conv_activation fuse_finegrained_fp8_linear
    fuse_finegrained_fp8_moe fuse_fp4_gemms fuse_fp8_gemms fuse_fp8_linear fuse_fp8_moe
    fuse_gemms_mixed_children fuse_l2norm fuse_mamba_a_log fuse_moe fuse_nvfp4_linear fuse_nvfp4_moe
    fuse_nvfp4_swiglu fuse_rmsnorm fuse_rmsnorm_quant_fp8
    fuse_rope_into_trtllm_attention fuse_rope_into_trtllm_mla fuse_silu_mul fuse_swiglu
    fuse_trtllm_attn_quant_fp8 initialize_mrope_delta_cache insert_cached_causal_conv
    insert_cached_deepseek_v4_sparse_attention insert_cached_delta_rule insert_cached_gated_delta_rule
    insert_cached_mla_attention insert_cached_residual_add insert_cached_ssm_attention
    load_factory_model_weights load_weights match_attention_layout match_bmm_moe_pattern
    match_dense_moe_pattern match_eager_attention match_grouped_attention match_l2norm_pattern
    match_moe_pattern match_nvfp4_swiglu_pattern match_rmsnorm_pattern match_rope_layout match_rope_pattern
    match_sdpa_to_torch_attention match_swiglu_pattern mlir_elementwise_fusion move_inputs_to_device
    multi_stream_gemm multi_stream_mla_attn multi_stream_moe optimize_rope
    quantize_finegrained_fp8_linear_from_config
    quantize_finegrained_fp8_moe quantize_fp8_bmm_from_config quantize_fp8_from_graph
    quantize_fp8_linear_from_config quantize_fp8_moe quantize_int4_gptq_linear_from_config
    quantize_int4_linear_from_config quantize_mxfp4_moe quantize_nvfp4_from_graph
    quantize_nvfp4_linear_from_config quantize_nvfp4_moe resize_kv_cache sharding_transform_executor
    strip_sharding_hints transformers_replace_cached_attn visualize_namespace
    """.split()
)
# Stages of AutoDeploy for transforms that both have: left out, since ours stand elsewhere.
_STAGES = {"gather_logits_before_lm_head": "post_load_fusion"}
# Values that leave all as it is; any other is refused, because it would change what is computed.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), "world_size says here how many GPUs compute the model"),
    **dict.fromkeys(
        ("pipeline_parallel_size", "context_parallel_size"),
        ((1,), "several GPUs share heads and columns here, not layers or tokens"),
    ),
    "max_beam_width": ((1,), "there is no beam search here"),
    "enable_attention_dp": ((False,), "one process serves one GPU here"),
    "speculative_model_kwargs": (({},), "speculative_config.model is taken as its files say"),
    "draft_checkpoint_loader": ((), "speculative_config.model is read as any other model"),
    "tokenizer_kwargs": (({},), "the tokenizer's own settings are used"),
    "enable_lora": ((False,), "there are no adapters here"),
    "lora_config": ((), "there are no adapters here"),
    "peft_cache_config": ((), "there are no adapters here"),
    "quant_config": ((), "the checkpoint says how it is quantized"),
    "revision": ((), "give a directory with that revision as model"),
    "tokenizer_revision": ((), "give a directory with that revision as tokenizer"),
    "load_format": (("auto", 0), "skip_loading_weights draws weights"),
    "kv_cache_config.max_attention_window": ((), "the model's own windows are used"),
    "kv_cache_config.sink_token_length": ((0,), "every token in the window is kept"),
}
_RENAMED = {
    "attn_page_size": "tokens_per_block",
    "free_mem_ratio": "free_gpu_memory_fraction",
}
_BACKENDS = ("trtllm", "flashinfer", "triton", "triton_paged", "torch")


def taken(
    data: Mapping[str, Any], transforms: Mapping[str, Collection[str]], default_batch_size: int
) -> tuple[Keys, list[str], list[str]]:
    """Our keys of a mapping, what was done with the others, and why it is refused.

    Args:
        data: keys of AutoDeploy, ours among them; not changed.
        transforms: ours, by name, with the keys that they take.
        default_batch_size: max_batch_size where none is given.

    Returns:
        The mapping without keys of AutoDeploy, notes, and refusals.
    """
    ours = dict(data)
    unused: list[str] = []
    notes: list[str] = []
    refused: list[str] = []
    cache = ours.get("kv_cache_config")
    cache = {str(key): value for key, value in cache.items()} if isinstance(cache, dict) else None
    for prefix, level, nothing in (
        ("", ours, _NOTHING),
        ("kv_cache_config.", cache or {}, _NOTHING_OF_CACHE),
    ):
        for key in list(level):
            neutral, why = _NEUTRAL.get(f"{prefix}{key}", ((), ""))
            if key in nothing or (why and (level[key] is None or level[key] in neutral)):
                unused.append(f"{prefix}{key}")
                del level[key]
            elif why:
                refused.append(f"{prefix}{key}: got {level.pop(key)!r}, but {why}; delete the key")
    if cache is not None:
        ours["kv_cache_config"] = cache
    for old, new in _RENAMED.items():
        if old in ours:
            _rename(ours, old, "kv_cache_config", new, notes, refused)
    _take_graphs(ours, default_batch_size, notes, refused)
    if ours.get("attn_backend") in _BACKENDS:
        notes.append(f"attn_backend {ours.pop('attn_backend')}: flashinfer_trtllm takes its place")
    if ours.get("compile_backend") == "torch-compile":
        ours["compile_backend"] = "torch-simple"
        notes.append(
            "compile_backend torch-compile: torch-simple takes its place; torch-opt is faster on a GPU"
        )
    if isinstance(ours.get("transforms"), dict):
        ours["transforms"] = _transforms(ours["transforms"], transforms, unused)
    is_autodeploys = unused or notes
    is_captured = ours.get("compile_backend") == "torch-cudagraph" and "device" not in ours
    if is_autodeploys and is_captured:
        import torch  # takes seconds

        if not torch.cuda.is_available():
            ours["compile_backend"] = "torch-simple"
            notes.append("compile_backend torch-cudagraph: torch-simple takes its place on a CPU")
    if unused:
        notes.insert(0, f"keys of AutoDeploy that mean nothing here: {', '.join(unused)}")
    return ours, notes, refused


def _rename(ours: Keys, old: str, parent: str, new: str, notes: list[str], refused: list[str]) -> None:
    value, level = ours.pop(old), ours.setdefault(parent, {})
    if not isinstance(level, dict):
        return
    if new in level and level[new] != value:
        refused.append(f"{old} is {parent}.{new} here, and both are given: delete one of them")
    level[new] = value
    notes.append(f"{old} is {parent}.{new} here")


def _take_graphs(ours: Keys, default_batch_size: int, notes: list[str], refused: list[str]) -> None:
    """AutoDeploy's cuda_graph_config; of its sizes, it captures those up to max_batch_size."""
    given = ours.get("cuda_graph_config", {})
    if given is not None and not isinstance(given, dict):
        refused.append(f"cuda_graph_config: must be a mapping, got {given!r}")
        given = {}
    if "cuda_graph_config" not in ours:
        return
    del ours["cuda_graph_config"]
    sizes = (given or {}).get("batch_sizes")
    if sizes is None:
        notes.append("cuda_graph_config: the batch sizes are those of max_batch_size")
    elif "cuda_graph_batch_sizes" in ours:
        refused.append("cuda_graph_config.batch_sizes is cuda_graph_batch_sizes here: delete one of them")
    else:
        limit = ours.get("max_batch_size", default_batch_size)
        if isinstance(sizes, list) and isinstance(limit, int):
            sizes = [size for size in sizes if not isinstance(size, int) or size <= limit] or None
        ours["cuda_graph_batch_sizes"] = sizes
        notes.append("cuda_graph_config.batch_sizes is cuda_graph_batch_sizes here")


def _transforms(
    given: Mapping[str, Any], known: Mapping[str, Collection[str]], unused: list[str]
) -> dict[str, Any]:
    """The transforms of ours, with our settings."""
    ours = {}
    for name, change in given.items():
        if name in _TRANSFORMS:
            unused.append(f"transforms.{name}")
            continue
        if name in known and isinstance(change, dict):
            drop = [key for key in change if key in _NOTHING_OF_TRANSFORMS and key not in known[name]]
            drop += ["stage"] if change.get("stage", "") == _STAGES.get(name) else []
            unused += [f"transforms.{name}.{key}" for key in drop]
            change = {key: value for key, value in change.items() if key not in drop}
        ours[name] = change
    return ours
