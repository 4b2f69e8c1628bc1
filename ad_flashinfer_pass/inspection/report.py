"""``report``: what the pass did to a model, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import jinja2

from ad_flashinfer_pass import __version__
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph.data import GraphData
from ad_flashinfer_pass.inspection.diff import GraphDiff, LayerDiff, diff_graphs
from ad_flashinfer_pass.inspection.drawing import draw_layer
from ad_flashinfer_pass.inspection.explain import (
    EXPERTS_COLUMNS,
    STATES_COLUMNS,
    Explanation,
    KernelUse,
    SiteExplanation,
    experts_rows,
    explain_run,
    kernel_uses,
    states_rows,
)
from ad_flashinfer_pass.inspection.lint import RULES, Finding, as_row, lint_run
from ad_flashinfer_pass.inspection.plan import MemoryPlan, answers, gib, plan_run
from ad_flashinfer_pass.inspection.stages import run_stages
from ad_flashinfer_pass.inspection.tables import folded, ranges, short, source_line
from ad_flashinfer_pass.inspection.target import check_target
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.runtime.cuda_graph import bucket_sizes


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The CUDA graphs of one kind of step."""

    steps: str
    sizes: list[int]
    reason: str
    """Why there are none; empty if there are."""


@dataclass(frozen=True, kw_only=True)
class LayerPicture:
    """One of the layers that changed alike, before and after, as SVG."""

    layers: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report shows."""

    title: str
    target: str
    versions: dict[str, str]
    explanation: Explanation
    transforms: list[TransformReport]
    difference: GraphDiff
    memory: MemoryPlan
    kernels: list[KernelUse]
    captures: list[Capture]
    picture: LayerPicture | None
    findings: list[Finding]
    """What keeps the graph from being captured."""


def report(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    memory: int | None = None,
    sm: int | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Report:
    """Run the pass without weights and gather what it did; ``to_html`` writes it.

    Args:
        config: the model and the settings of the pass.
        graph: a saved ExportedProgram in place of the model.
        stage: the last transform or stage that is shown. Before the insertion there are no kernels and pools.
        memory: bytes of the device, for the memory plan. Default: no limit.
        sm: compute capability of the GPU, 90 for 9.0. Default: that of ``config.device``, or a CPU.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: no such stage; or the device is a GPU that is not here and ``sm`` is not given.
        CapacityError: the weights leave no room for a page a layer.
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model.
    """
    check_target(config, sm)
    run = run_stages(config, graph, None if stage is None else ["export", stage], on_event, sm=sm)
    before, after = (list(run.graphs.values())[end] for end in (0, -1))
    explanation = explain_run(run, config, sm)
    difference = diff_graphs(before, after, batch=1, seq=config.token_budget)
    return Report(
        title=str(graph or config.model),
        target=f"SM{sm}" if sm is not None else config.device,
        versions={
            "ad-flashinfer-pass": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
        explanation=explanation,
        transforms=run.reports,
        difference=difference,
        memory=plan_run(run, config, memory, sm),
        kernels=kernel_uses(explanation),
        captures=_captures(config, explanation) if run.ctx.sites else [],
        findings=lint_run(run, config, sm),
        picture=_picture(difference, before, after),
    )


def to_html(found: Report) -> str:
    """One page: styles, scripts and pictures are in it, and it asks for nothing over a network."""
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["gib"] = gib
    return environment.from_string(template).render(
        report=found,
        sites=_sites(found.explanation.sites),
        tables=[
            ("States", STATES_COLUMNS, states_rows(found.explanation.states)),
            ("Experts", EXPERTS_COLUMNS, experts_rows(found.explanation.experts)),
        ],
        notes={each.name: _notes(each) for each in found.transforms},
        findings=[cells for _, cells in folded(map(as_row, found.findings))],
        answers=answers(found.memory),
        heading=_heading,
        changes=_changes,
        rules=RULES,
    )


def _sites(sites: Sequence[SiteExplanation]) -> list[tuple[str, tuple[str, ...]]]:
    """Numbers and cells of the sites, those that differ in their layer alone as one."""
    rows = (
        (
            site.module,
            source_line(site.where),
            site.form,
            ", ".join(site.folded),
            site.mask.partition(":")[0],
            ", ".join(f"{name} {value.removeprefix('torch.')}" for name, value in site.needs.items()),
            site.prefill.partition(":")[0],
            site.decode.partition(":")[0],
            site.cache,
            f"{site.cache_bytes_per_token:,}",
        )
        for site in sites
    )
    return [(ranges([sites[place].index for place in places]), cells) for places, cells in folded(rows)]


def _notes(report: TransformReport) -> list[str]:
    """What a transform found, notes that differ in their layer alone as one."""
    passed_over = (f"passed over {skip.where}: {skip.reason}" for skip in report.skipped)
    return [note for _, (note,) in folded((short(note),) for note in (*report.notes, *passed_over))]


def _captures(config: AutoDeployConfig, explanation: Explanation) -> list[Capture]:
    """As ``compile_model`` captures them."""
    on_host = {
        phase: sorted(
            {
                kernel
                for site in explanation.sites
                for kernel in select.on_host(phase, getattr(site, phase).partition(":")[0])
            }
        )
        for phase in ("prefill", "decode")
    }
    none = "" if config.compile_backend != "torch-simple" else "compile_backend torch-simple captures nothing"
    decode, prefill = (
        none or (f"{', '.join(on_host[phase])} reads lengths on the host" if on_host[phase] else "")
        for phase in ("decode", "prefill")
    )
    # A step with prefill can hold decode sequences too.
    prefill = prefill or decode
    sizes, buckets = bucket_sizes(config)
    return [
        Capture(steps="decode, by batch size", sizes=[] if decode else sizes, reason=decode),
        Capture(steps="prefill and mixed, by tokens", sizes=[] if prefill else buckets, reason=prefill),
    ]


def _picture(difference: GraphDiff, before: GraphData, after: GraphData) -> LayerPicture | None:
    """Of the layers with attention the kind of which there are most; None if no layer has attention."""
    kinds = sorted((kind for kind in difference.layers if kind.layers), key=lambda kind: -len(kind.layers))
    for kind in kinds:
        # The changes of a kind are those of its first layer.
        index, *others = kind.layers
        layer = after.layer(index)
        module = next((node.module for node in layer.nodes if node.kind == "attention"), None)
        if module is None:
            continue
        marked = {change.name for change in (*kind.removed, *kind.added)}
        return LayerPicture(
            layers=f"layer {index}, and {len(others)} others alike ({ranges(kind.layers)})",
            before=draw_layer(before.layer(index), module, marked),
            after=draw_layer(layer, module, marked),
        )
    return None


def _heading(layer: LayerDiff) -> str:
    if not layer.layers:
        return "outside the layers"
    return f"layer{'s' * (len(layer.layers) > 1)} {ranges(layer.layers)}"


def _changes(layer: LayerDiff) -> list[tuple[str, str]]:
    """Sign and line of each change."""
    lines = [("-", change.before or "") for change in layer.removed]
    lines += [("+", change.after or "") for change in layer.added]
    for change in (*layer.rewired, *layer.retyped):
        lines.append(("~", f"{change.before}  →  {(change.after or '').partition(' = ')[2]}"))
    return lines
