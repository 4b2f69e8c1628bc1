"""The graph after each transform: of a model without its weights, or of a saved ExportedProgram."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import fx, nn

from ad_flashinfer_pass.config import STAGES, AutoDeployConfig, nearest
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.graph.data import GraphData, NodeNames
from ad_flashinfer_pass.graph.text_format import from_text
from ad_flashinfer_pass.kernels import prebuilt
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.saved_program import load_module

# They allocate pools, time kernels and capture graphs, for which a graph without weights has no use.
_NOT_RUN = ("initialize_cache", "tune_attention", "tune_all_reduce", "compile_model")


@dataclass
class Stages:
    """A run of the pass, as far as it was asked for."""

    ctx: TransformContext
    graphs: dict[str, GraphData] = field(default_factory=dict)
    """By transform, in order; those that were asked for."""
    reports: list[TransformReport] = field(default_factory=list)
    module: nn.Module | None = None
    """What the last transform made."""


def run_stages(
    config: AutoDeployConfig,
    graph: Path | None = None,
    stages: Collection[str] | None = None,
    on_event: Callable[[str], None] | None = None,
    *,
    sm: int | None = None,
) -> Stages:
    """Run the pass without weights and keep the graphs that are asked for.

    Args:
        config: the model and the settings of the pass; its device needs not be here.
        graph: a file that torch.export.save wrote, in place of the model.
        stages: names of transforms, or of stages, which stand for their last transform; the run ends with
            the last of them. Default: all.
        on_event: called with the name of each phase as it begins.
        sm: compute capability of the GPU for which the graph is made, whose fusions are then shown too.

    Raises:
        ConfigError: an unknown stage, or the model cannot be found.
        LoadError: the model or the file cannot be read.
        TransformError: the pass refuses the model at a transform that has to run.
    """
    order = graph_transforms(config)
    wanted = list(order) if stages is None else [resolve(stage, config) for stage in stages]
    if on_event is not None:
        on_event("load_model")
    target = select.torch_device(config.device if sm is None else "cuda")
    if config.kernel_dir is not None and target.type == "cuda" and sm is None and torch.cuda.is_available():
        prebuilt.use(Path(config.kernel_dir), target)
    config = config.model_copy(update={"device": "cpu", "compile_backend": "torch-simple"})
    title = str(graph) if graph is not None else config.model
    if graph is None:
        from ad_flashinfer_pass.models.weightless import load_weightless  # takes seconds to import

        module, config = load_weightless(config)
    else:
        module = load_module(graph)
    run, names = Stages(context(config, on_event)), NodeNames()
    run.ctx.target, run.ctx.sm = target, sm

    def keep(model: nn.Module, report: TransformReport) -> None:
        if isinstance(model, fx.GraphModule):
            names.see(model, report.name if report.name != "export_model" else None)
            if report.name in wanted:
                run.graphs[report.name] = names.data(model, f"{title} after {report.name}")

    last = max(wanted, key=list(order).index)
    run.module, run.reports = order.upto(last).run(module, run.ctx, after=keep)
    return run


def graph_transforms(config: AutoDeployConfig) -> Pipeline:
    """The enabled transforms that change a graph."""
    return Pipeline.of(config).without(*_NOT_RUN)


def resolve(stage: str | None, config: AutoDeployConfig) -> str:
    """The transform that a name of a stage or a transform stands for; without a name, the last.

    Raises:
        ConfigError: there is none that runs.
    """
    order = graph_transforms(config)
    if found := [name for name, each in order.entries if stage in (None, name, each)]:
        return found[-1]
    if stage in (*STAGES, *config.transforms):
        raise ConfigError(
            f"--stage {stage}: no transform of it makes a new graph here; there are {', '.join(order)}."
        )
    known = {name for entry in order.entries for name in entry}
    raise ConfigError(f"--stage {stage}: no such stage or transform; {nearest(str(stage), sorted(known))}")


def is_file_name(name: str) -> bool:
    """Whether an argument names a file and not a stage."""
    path = Path(name)
    return path.suffix in (".txt", ".json", ".pt2") or path.name != name or path.is_file()


def read_graph(file: Path) -> GraphData:
    """A graph from a text or JSON dump, or from a saved ExportedProgram.

    Raises:
        LoadError: the file is none of them.
    """
    if file.suffix not in (".txt", ".json"):
        gm, names = load_module(file), NodeNames()
        names.see(gm, None)
        return names.data(gm, str(file))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise LoadError(f"{file}: {getattr(err, 'strerror', None) or 'not text'}.") from None
    try:
        return from_text(text) if file.suffix == ".txt" else GraphData.model_validate_json(text)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LoadError(
            f"{file}: no JSON dump ({where}: {first['msg']}); write it with dump --json."
        ) from None
    except LoadError as err:
        raise LoadError(f"{file}: {err}") from None
