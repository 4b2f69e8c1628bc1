"""Runs the transforms of a config, stage by stage.

Order, and why each stands where it does:

1. ``export_model``: everything after works on one aten graph.
2. ``expand_flex_attention``: its block masks die with it, before anything reads the graph.
   ``functionalize``: everything after takes a node for one value. ``eliminate_noops``: casts, slices and
   assertions would stand between the nodes that matchers read.
3. ``match_repeat_kv``: before attention, which is then written in fewer ways.
4. ``match_attention``: SDPA and eager forms become one op, with the mask still a subgraph.
5. ``classify_mask``: the mask subgraph becomes attributes of that op, or the pass stops.
6. ``number_by_positions``, ``check_packing``: after the masks are gone, since they are the part that mixes
   tokens rightly.
7. ``insert_cached_attention``, ``gather_logits_before_lm_head``: the graph takes its final inputs.
8. ``initialize_cache``: the resources are known; plans and allocates them.
9. ``tune_attention``: the pools are there, to be timed over; captured graphs keep what it chose.
10. ``fuse_small_batch``, ``compile_model``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass import registry, transforms
from ad_flashinfer_pass.config import STAGES, AutoDeployConfig, check_type
from ad_flashinfer_pass.errors import CapacityError, ConfigError, TransformError
from ad_flashinfer_pass.graph.stage_writer import StageWriter
from ad_flashinfer_pass.kernels import prebuilt
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo

assert transforms.__name__ == "ad_flashinfer_pass.transforms"  # importing it registers them


def transform_module(
    module: nn.Module,
    config: AutoDeployConfig,
    *,
    on_event: Callable[[str], None] | None = None,
) -> tuple[CachedModel, list[TransformReport]]:
    """Run the pass on a module.

    Args:
        module: in eval mode, on ``config.device``; takes input_ids and position_ids, int64 [b, s], and
            returns logits [b, s, vocab] or an object that has them.
        config: its model keys are not read.
        on_event: called with the name of each transform as it begins.

    Returns:
        The cached model and the report of each transform.

    Raises:
        ConfigError: an argument is of a wrong type, or a setting does not fit.
        TransformError: the pass refuses the module.
        CapacityError: the caches do not fit in memory.
    """
    check_type("module", module, nn.Module)
    ctx = context(config)
    transformed, reports = run(module, ctx, on_event)
    model = CachedModel(transformed, ctx.caches, ctx.sequence_info, ctx.vocab_size, ctx.weight_bytes)
    model.generation_config = getattr(module, "generation_config", None)
    return model, reports


def context(config: AutoDeployConfig) -> TransformContext:
    """What the transforms of a new run share.

    Raises:
        ConfigError: there is no such device.
        CapacityError: the metadata alone does not fit in memory.
    """
    check_type("config", config, AutoDeployConfig)
    device = select.torch_device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {config.device}, but torch sees no CUDA GPU here; set device: cpu.")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count > 0:
            raise ConfigError(f"device: got {config.device}, the GPUs here are cuda:0 to cuda:{count - 1}.")
        torch.cuda.set_device(device)  # streams, events and graphs are those of the current device
    if config.kernel_dir is not None and device.type == "cuda":
        prebuilt.use(Path(config.kernel_dir), device)
    _check_metadata_fits(config, device)
    info = SequenceInfo(
        max_seq_len=config.sequence_limit,
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.token_budget,
        tokens_per_block=config.kv_cache_config.tokens_per_block,
        device=device,
    )
    return TransformContext(config=config, device=device, sequence_info=info)


# Bytes of metadata that are not worth a look at the memory.
_LARGE = 2**28


def _check_metadata_fits(config: AutoDeployConfig, device: torch.device) -> None:
    max_seq_len = config.sequence_limit
    pages = -(-max_seq_len // config.kv_cache_config.tokens_per_block)
    # Page ids, ragged and as a table, in int32; tokens and positions in int64.
    needed = 8 * config.max_batch_size * pages + 16 * config.token_budget
    free = transforms.initialize_cache.free_bytes(device) if needed > _LARGE else needed
    if needed > free:
        raise CapacityError(
            f"the metadata of a step needs {needed:.3g} bytes, {free:.3g} are free on {device}: it has "
            f"max_num_tokens ({config.token_budget}) tokens and max_batch_size ({config.max_batch_size}) "
            f"times max_seq_len ({max_seq_len}) / tokens_per_block pages. Lower one of them."
        )


def run(
    model: nn.Module,
    ctx: TransformContext,
    on_event: Callable[[str], None] | None = None,
    *,
    skip: Collection[str] = (),
    after: Callable[[nn.Module, TransformReport], None] | None = None,
) -> tuple[nn.Module, list[TransformReport]]:
    """Run every enabled transform; with AD_DUMP_GRAPHS_DIR set, write the graph after each of them there.

    Args:
        model: an eval-mode module that takes input_ids and position_ids, both int64 [b, s].
        ctx: config and shared records; filled by the transforms.
        on_event: called with the transform's name before it runs.
        skip: transforms that are left out, as if they were not enabled.
        after: called with the module and the report of each transform once it has run.

    Returns:
        The module that the last transform made, and one report a transform, in the order run.

    Raises:
        TransformError: a transform refuses the model; see ``errors``.
    """
    if on_event is not None:
        ctx.on_event = on_event
    entries = sorted(ctx.config.transforms.items(), key=lambda entry: STAGES.index(entry[1].stage))
    reports: list[TransformReport] = []
    writer = StageWriter.from_environment()
    for name, settings in entries:
        if not settings.enabled or name in skip:
            continue
        if on_event is not None:
            on_event(name)
        nodes = _nodes(model)
        start = time.perf_counter()
        try:
            model, report = registry.get(name)(model, ctx)
        except TransformError as err:
            err.transform, err.reports = name, reports
            raise
        report.seconds = time.perf_counter() - start
        _note_changes(report, nodes, _nodes(model))
        reports.append(report)
        if writer is not None:
            writer.write(model, settings.stage, name)
        if after is not None:
            after(model, report)
    return model, reports


def _nodes(model: nn.Module) -> dict[fx.Node, tuple[Any, ...]]:
    """The nodes of a graph with what they call; empty if the module is no graph."""
    if not isinstance(model, fx.GraphModule):
        return {}
    return {node: (node.target, node.args, node.kwargs) for node in model.graph.nodes}


def _note_changes(
    report: TransformReport, before: dict[fx.Node, tuple[Any, ...]], now: dict[fx.Node, tuple[Any, ...]]
) -> None:
    if before and now:
        report.removed = [node.name for node in before if node not in now]
        report.added = [node.name for node in now if node not in before]
        report.rewired = [node.name for node in now if node in before and now[node] != before[node]]
