"""Runs the transforms of a config, in the order of configs/default.yaml."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from ad_flashinfer_pass import registry, transforms
from ad_flashinfer_pass.config import STAGES, AutoDeployConfig, Stage, check_type
from ad_flashinfer_pass.errors import CapacityError, ConfigError, TransformError
from ad_flashinfer_pass.graph.stage_writer import StageWriter
from ad_flashinfer_pass.kernels import prebuilt
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.drafts.head import DraftHead, HeadDrafter
from ad_flashinfer_pass.runtime.drafts.model import ModelDrafter
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo

assert transforms.__name__ == "ad_flashinfer_pass.transforms"  # importing it registers them


def transform_module(
    module: nn.Module,
    config: AutoDeployConfig,
    *,
    draft: nn.Module | None = None,
    on_event: Callable[[str], None] | None = None,
    rank: int | None = None,
    stored: Mapping[Tensor, Tensor] | None = None,
) -> tuple[CachedModel, list[TransformReport]]:
    """Run the pass on a module.

    Args:
        module: in eval mode, on ``config.device`` if that is given; takes input_ids and position_ids, int64
            [b, s], and returns logits [b, s, vocab] or an object that has them.
        config: its keys about the model are not read. If it names no device, the module's is used.
        draft: with ``speculative_config.drafter: model`` the model that guesses, likewise, and of the same
            vocabulary; with eagle3 and mtp the ``runtime.drafts.head.DraftHead``.
        on_event: called with the name of each transform as it begins.
        rank: whose part of the model is made, of ``config.world_size`` ranks. Default: this process's, in
            torch.distributed's default group.
        stored: the weights of a module whose parameters are fake, by these; of each only the rank's part is
            taken to the device.

    Returns:
        The cached model and the report of each transform.

    Raises:
        ConfigError: an argument is of a wrong type, or a setting does not fit.
        TransformError: the pass refuses the module.
        CapacityError: the caches do not fit in memory.
    """
    check_type("module", module, nn.Module)
    check_type("config", config, AutoDeployConfig)
    check_type("draft", draft, nn.Module, type(None))
    check_type("rank", rank, int, type(None))
    if rank is not None and not 0 <= rank < config.world_size:
        raise ConfigError(f"rank must lie in 0..{config.world_size - 1}, by world_size, got {rank}.")
    _check_drafter(config, draft)
    config = on_device_of(next(chain(module.parameters(), module.buffers()), None), config)
    ctx = context(config, on_event)
    ctx.rank = rank_in_group(config.world_size) if rank is None else rank
    ctx.stored = stored
    pipeline = Pipeline.of(config)
    if draft is None:
        transformed, reports = pipeline.run(module, ctx)
    else:
        transformed, reports = _with_draft(pipeline, module, draft, ctx)
    model = CachedModel(transformed, ctx.caches, ctx.sequence_info, ctx.vocab_size, ctx.weights, ctx.drafter)
    model.are_logits_alike = ctx.are_logits_alike
    model.generation_config = getattr(module, "generation_config", None)
    return model, reports


def _check_drafter(config: AutoDeployConfig, draft: nn.Module | None) -> None:
    spec = config.speculative_config
    asks = "nothing" if spec is None else {"ngram": "nothing", "model": "a model"}.get(spec.drafter, "a head")
    given = "nothing" if draft is None else "a head" if isinstance(draft, DraftHead) else "a model"
    if asks != given:
        raise ConfigError(
            f"draft: drafter: {spec and spec.drafter} of speculative_config takes {asks}, got {given}; model "
            "takes the model that guesses, eagle3 and mtp a DraftHead. build_model loads them."
        )


def _with_draft(
    pipeline: Pipeline, module: nn.Module, draft: nn.Module, ctx: TransformContext
) -> tuple[nn.Module, list[TransformReport]]:
    """Both models; their pools are planned together, and the one that guesses is ready before the capture."""
    cache = ctx.config.kv_cache_config
    # The scales are those of the other model's layers.
    unscaled = cache.model_copy(update={"k_scale": 1.0, "v_scale": 1.0})
    ctx.draft = context(ctx.config.model_copy(update={"kv_cache_config": unscaled}), ctx.on_event)
    ctx.draft.is_draft = True
    head = draft if isinstance(draft, DraftHead) else None
    if head is not None:
        ctx.hidden_states, ctx.draft.hidden_states = head.reads, (head.own,)
    guessing, _ = pipeline.before("initialize_cache").run(draft if head is None else head.body, ctx.draft)
    transformed, reports = pipeline.before("compile").run(module, ctx)
    if head is None and ctx.draft.vocab_size != ctx.vocab_size:
        raise ConfigError(
            f"speculative_config.model: its vocabulary has {ctx.draft.vocab_size} tokens, that of the model "
            f"{ctx.vocab_size}; they must be the same."
        )
    if head is not None and ctx.draft.sequence_info.has_lengths > ctx.sequence_info.has_lengths:
        raise ConfigError(
            "speculative_config.model: the rotary frequencies of the head depend on how long a sequence is, "
            "and those of the model do not; the head is of another model."
        )
    guessing, _ = pipeline.since("compile").run(guessing, ctx.draft)
    infos = (ctx.sequence_info, ctx.draft.sequence_info)
    if head is None:
        ctx.drafter = ModelDrafter(*infos, guessing, ctx.draft.caches)
    else:
        ctx.drafter = HeadDrafter(*infos, head, guessing, ctx.draft.caches, ctx.caches["hidden_states"])
    transformed, more = pipeline.since("compile").run(transformed, ctx)
    return transformed, [*reports, *more]


def rank_in_group(world_size: int) -> int:
    """The rank of this process among those that compute a model; 0 if it does so alone.

    Raises:
        ConfigError: torch.distributed has no group of so many.
    """
    if world_size == 1:
        return 0
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    if size != world_size:
        there = f"a group of {size}" if size else "no group"
        raise ConfigError(
            f"world_size: got {world_size}, but torch.distributed has {there} here; build_model and the "
            "commands start the ranks, else call init_process_group first."
        )
    return dist.get_rank()


def on_device_of(tensor: Tensor | None, config: AutoDeployConfig) -> AutoDeployConfig:
    """The config with the device of a model that is there, by one of its tensors, unless it names one.

    Raises:
        ConfigError: a setting does not fit the device.
    """
    if tensor is None or tensor.is_meta or "device" in config.model_fields_set:
        return config
    keys = {name: getattr(config, name) for name in config.model_fields_set}
    return AutoDeployConfig(**keys, device=str(tensor.device))


def context(config: AutoDeployConfig, on_event: Callable[[str], None] | None = None) -> TransformContext:
    """What the transforms of a new run share; ``on_event`` takes their names as they begin, and progress.

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
        num_drafts=config.num_drafts,
        has_next=config.speculative_config is not None and config.speculative_config.reads_hidden_states,
    )
    on_event = on_event or (lambda text: None)
    return TransformContext(config=config, device=device, sequence_info=info, on_event=on_event)


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


@dataclass(frozen=True)
class Pipeline:
    """Transforms in the order in which they run; iterating gives their names.

    A place in it is a transform, or a stage, which begins with its first transform.
    """

    entries: tuple[tuple[str, Stage], ...]
    """The name of each transform and its stage."""

    @classmethod
    def of(cls, config: AutoDeployConfig) -> Pipeline:
        """All that are enabled: by stage, and within a stage as configs/default.yaml has them."""
        entries = [(name, entry.stage) for name, entry in config.transforms.items() if entry.enabled]
        return cls(tuple(sorted(entries, key=lambda entry: STAGES.index(entry[1]))))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.entries)

    def before(self, place: str) -> Pipeline:
        """Those before a place."""
        return Pipeline(self.entries[: self._index(place)])

    def since(self, place: str) -> Pipeline:
        """Those from a place on."""
        return Pipeline(self.entries[self._index(place) :])

    def upto(self, name: str) -> Pipeline:
        """Those up to a transform, with it."""
        return Pipeline(self.entries[: self._index(name) + 1])

    def without(self, *names: str) -> Pipeline:
        """All but some."""
        return Pipeline(tuple(entry for entry in self.entries if entry[0] not in names))

    def run(
        self,
        model: nn.Module,
        ctx: TransformContext,
        *,
        after: Callable[[nn.Module, TransformReport], None] = lambda model, report: None,
    ) -> tuple[nn.Module, list[TransformReport]]:
        """Run each; with AD_DUMP_GRAPHS_DIR set, write the graph after each of them there.

        Args:
            model: an eval-mode module that takes input_ids and position_ids, both int64 [b, s].
            ctx: config and shared records; filled by the transforms.
            after: called with the module and the report of each transform once it has run.

        Returns:
            The module that the last transform made, and one report a transform, in the order run.

        Raises:
            TransformError: a transform refuses the model; see ``errors``.
        """
        reports: list[TransformReport] = []
        writer = StageWriter.from_environment()
        for name, stage in self.entries:
            ctx.on_event(name)
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
                writer.write(model, stage, name)
            after(model, report)
        return model, reports

    def _index(self, place: str) -> int:
        if place in STAGES:
            return sum(STAGES.index(stage) < STAGES.index(place) for _, stage in self.entries)
        return list(self).index(place)


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
