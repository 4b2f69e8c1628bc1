"""``explain``: every attention site of a model and its experts, and what the pass does with them."""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import (
    ExportError,
    MaskError,
    NoAttentionError,
    PackingError,
    TransformError,
    UnsupportedError,
)
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.weights import ExpertsSite, step_weights
from ad_flashinfer_pass.inspection.lint import lint_graph
from ad_flashinfer_pass.inspection.stages import Stages, run_stages
from ad_flashinfer_pass.inspection.tables import folded, ranges, short, source_line, table
from ad_flashinfer_pass.inspection.target import check_target, site_choices
from ad_flashinfer_pass.kernels.attention.capability import ledger
from ad_flashinfer_pass.kernels.attention.select import Choice
from ad_flashinfer_pass.matching import SDPA
from ad_flashinfer_pass.records import SiteNotes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.records import CachedSite, TransformContext, TransformReport


@dataclass(frozen=True, kw_only=True)
class SiteExplanation:
    """One attention site."""

    index: int
    module: str
    """Path of the module that made it."""
    where: str
    """Node and source line."""
    form: str
    """How it stood in the graph."""
    folded: list[str]
    """What the op took over from nodes around it."""
    mask: str
    """Class of the mask, with the evidence."""
    needs: dict[str, str]
    """Every item that a kernel must honour."""
    prefill: str
    """Kernel and reason."""
    decode: str
    cache: str
    """Name of the pool, which several sites can share."""
    cache_bytes_per_token: int
    """Of the pool; 0 for a site that reads the pool of another."""


@dataclass(frozen=True, kw_only=True)
class StateExplanation:
    """One op with a state."""

    module: str
    """Path of the module that made it."""
    where: str
    """Node and source line."""
    op: str
    prefill: str
    """Kernel for steps with prompts."""
    decode: str
    """Kernel for one token of each sequence."""
    cache: str
    """Name of the pool."""
    shape: tuple[int, ...]
    """Of the state of one sequence."""
    dtype: str
    bytes: int
    """Of that state."""


@dataclass(frozen=True, kw_only=True)
class KernelUse:
    """A kernel that was chosen, for how many sites, and why."""

    phase: str
    kernel: str
    num_sites: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class RefusalExplanation:
    """Why the pass stopped."""

    transform: str
    error: str
    """Class of the error."""
    message: str
    """What must hold, what was found, and what to do."""
    node: str
    """Name of the node; empty if the refusal is not about one."""
    op: str
    module: str
    where: str
    """Node and source line."""
    shapes: list[str]
    """Of the node's tensor arguments and result."""
    source: list[str]
    """Lines of the user's file around the node's, with their numbers."""
    picture: list[str]
    """Of a mask: it and the nearest class around the first place where they differ."""
    advice: str
    """What can be done about such a refusal."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All sites of a model, and what each transform reported; or why the pass refused it."""

    sites: list[SiteExplanation]
    transforms: dict[str, list[str]]
    """Notes and skips by transform."""
    not_captured: list[str]
    """What outside attention would keep a CUDA graph from being captured; see ``inspection.lint``."""
    experts: list[ExpertsSite] = field(default_factory=list)
    """Of the layers that have some, in order."""
    states: list[StateExplanation] = field(default_factory=list)
    """Of the ops that have one, in order."""
    refusal: RefusalExplanation | None = None


def explain(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    sm: int | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Explanation:
    """Run the pass up to the insertion, without weights, and say what it found.

    Args:
        config: the model and the settings of the pass.
        graph: a saved ExportedProgram in place of the model.
        stage: stop after this transform or stage. Before the insertion the sites have no kernels and caches.
        sm: compute capability of the GPU for which kernels are chosen, 90 for 9.0. Default: that of
            ``config.device``, or a CPU.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: no such stage; or the device is a GPU that is not here and ``sm`` is not given.
        LoadError: the model cannot be read.
    """
    check_target(config, sm)
    try:
        run = run_stages(config, graph, None if stage is None else [stage], on_event, sm=sm)
    except TransformError as err:
        return Explanation(sites=[], transforms=_notes(err.reports), not_captured=[], refusal=_refusal(err))
    return explain_run(run, config, sm)


_ADVICE: dict[type[TransformError], str] = {
    MaskError: "Kernels run causal masks, sliding windows, chunks and ALiBi; docs/mask_prover.md says what "
    "can be proved. A batch needs no padding mask here: sequences of different length are ragged.",
    PackingError: "docs/transforms.md says what packing needs. Move what mixes tokens into attention, or "
    "take it out.",
    UnsupportedError: "Another attn_implementation (sdpa or eager) may write the same attention without that "
    "part; else compute what is asked for outside of attention.",
    NoAttentionError: "dump --stage eliminate_noops shows the graph that was searched.",
    ExportError: "TORCH_LOGS=export,dynamic shows what torch.export did. A graph that you exported can be "
    "given in place of the model.",
}


def _refusal(err: TransformError) -> RefusalExplanation:
    node = err.node if isinstance(err.node, fx.Node) else None
    advice = next((text for kind, text in _ADVICE.items() if isinstance(err, kind)), "")
    return RefusalExplanation(
        transform=err.transform,
        error=type(err).__name__,
        message=str(err),
        node=node.name if node is not None else "",
        op=str(node.target) if node is not None else "",
        module=g.module_path(node) if node is not None else "",
        where=g.where(node) if node is not None else "",
        shapes=_shapes(node) if node is not None else [],
        source=_source_lines(node) if node is not None else [],
        picture=list(err.picture),
        advice=advice,
    )


def _shapes(node: fx.Node) -> list[str]:
    tensors = [(source.name, source) for source in node.all_input_nodes if g.is_tensor(source)]
    tensors += [("result", node)] if g.is_tensor(node) else []
    return [
        f"{name}: {tuple(map(str, g.shape(n)))} {g.value(n).dtype}".replace("'", "") for name, n in tensors
    ]


def _source_lines(node: fx.Node) -> list[str]:
    """Three lines before and after the one that made the node, if its file is here."""
    file, _, line = g.source_line(node).rpartition(":")
    if not line.isdigit():
        return []
    number, lines = int(line), linecache.getlines(file)
    around = range(max(1, number - 3), min(len(lines), number + 3) + 1)
    return [f"{'>' if n == number else ' '} {n:>5}  {lines[n - 1].rstrip()}" for n in around]


def explain_run(run: Stages, config: AutoDeployConfig, sm: int | None) -> Explanation:
    """The explanation of a run; see ``explain``."""
    assert isinstance(run.module, fx.GraphModule)
    if run.ctx.sites:
        sites = _sites(run.ctx, config, sm)
    else:
        sites = [_site_before_insertion(index, node) for index, node in enumerate(_attentions(run.module))]
    outside = [f"{f.where}: {f.message} ({f.rule})" for f in lint_graph(run.module, suppress=["host-plan"])]
    experts = [_with_kernel(site, run.ctx) for site in step_weights(run.module).experts]
    return Explanation(
        sites=sites,
        transforms=_notes(run.reports),
        not_captured=outside,
        experts=experts,
        states=_states(run.ctx),
    )


def _with_kernel(site: ExpertsSite, ctx: TransformContext) -> ExpertsSite:
    """With the kernels that it will have on the target, where a build chooses them."""
    is_tuned = (
        ctx.target is not None
        and ctx.target.type == "cuda"
        and site.dtype in ("bfloat16", "float16")
        and ctx.config.transforms["tune_experts"].enabled
    )
    return replace(site, kernel="triton, chosen by time in the build") if is_tuned else site


def _states(ctx: TransformContext) -> list[StateExplanation]:
    return [
        StateExplanation(
            module=site.module,
            where=site.where,
            op=site.op,
            prefill=site.prefill,
            decode=site.decode,
            cache=site.cache,
            shape=state.shape,
            dtype=str(state.dtype).removeprefix("torch."),
            bytes=state.bytes_per_slot,
        )
        for site, state in zip(ctx.state_sites, ctx.states, strict=True)
    ]


def _sites(ctx: TransformContext, config: AutoDeployConfig, sm: int | None) -> list[SiteExplanation]:
    pools = {resource.name: resource.bytes_per_page // resource.page_size for resource in ctx.resources}
    return [_site(index, site, pools, site_choices(site, config, sm)) for index, site in enumerate(ctx.sites)]


def _site(
    index: int, site: CachedSite, pools: dict[str, int], choices: tuple[Choice, Choice]
) -> SiteExplanation:
    prefill, decode = choices
    return SiteExplanation(
        index=index,
        module=site.module,
        where=site.where,
        form=site.notes.form,
        folded=site.notes.folded,
        mask=site.notes.mask,
        needs=ledger(site.site),
        prefill=f"{prefill.kernel}: {prefill.reason}",
        decode=f"{decode.kernel}: {decode.reason}",
        cache=site.cache,
        cache_bytes_per_token=0 if site.site.shares_kv else pools[site.cache],
    )


def _attentions(gm: fx.GraphModule) -> list[fx.Node]:
    """Attention that was matched, or SDPA calls if none was yet."""
    matched = [node for node in gm.graph.nodes if g.is_op(node, torch.ops.ad_flashinfer.attention)]
    return matched or [node for node in gm.graph.nodes if g.is_op(node, *SDPA)]


def _site_before_insertion(index: int, node: fx.Node) -> SiteExplanation:
    notes = node.meta.get("site_notes", SiteNotes(str(node.target), mask="not classified yet"))
    return SiteExplanation(
        index=index,
        module=g.module_path(node),
        where=g.where(node),
        form=notes.form,
        folded=notes.folded,
        mask=notes.mask if g.op_args(node)["attn_mask"] is None else "not classified yet",
        needs={},
        prefill="",
        decode="",
        cache="",
        cache_bytes_per_token=0,
    )


def _notes(reports: list[TransformReport]) -> dict[str, list[str]]:
    """Without the kernels, which have a table of their own."""
    return {
        report.name: [
            *(note for note in report.notes if not note.startswith(("prefill: ", "decode: "))),
            *(f"passed over {skip.where}: {skip.reason}" for skip in report.skipped),
        ]
        for report in reports
    }


def kernel_uses(explanation: Explanation) -> list[KernelUse]:
    """The kernels of all sites, each with the reason for which it was chosen."""
    counts = Counter(
        (phase, choice)
        for site in explanation.sites
        for phase, choice in (("prefill", site.prefill), ("decode", site.decode))
        if choice
    )
    return [
        KernelUse(phase=phase, kernel=kernel, num_sites=count, reason=reason)
        for (phase, choice), count in counts.items()
        for kernel, _, reason in [choice.partition(": ")]
    ]


def as_tables(explanation: Explanation) -> list[RenderableType]:
    """The explanation for a terminal: the sites, those alike as one, or the refusal; then the evidence."""
    tables: list[RenderableType] = []
    evidence = table("transform", "what it found", title="Evidence")
    notes = [(name, short(note)) for name, notes in explanation.transforms.items() for note in notes]
    for _, cells in folded(notes):
        evidence.add_row(*cells)
    if explanation.refusal is not None:
        return [_refusal_table(explanation.refusal), evidence]
    rows = [
        (
            site.module,
            source_line(site.where),
            "; ".join([site.form, *([", ".join(site.folded)] if site.folded else [])]),
            site.mask.partition(":")[0],
            site.prefill.partition(":")[0],
            site.decode.partition(":")[0],
            site.cache,
            f"{site.cache_bytes_per_token:,}",
        )
        for site in explanation.sites
    ]
    for places, cells in folded(rows):
        many = f"{len(places)} sites, {ranges(places)}" if len(places) > 1 else f"site {places[0]}"
        sites = table(many, "")
        for name, cell in zip(_ROWS, cells, strict=True):
            if cell:
                sites.add_row(name, cell)
        tables.append(sites)
    total = sum(site.cache_bytes_per_token for site in explanation.sites)
    if explanation.sites or not explanation.states:
        tables.append(f"{len(explanation.sites)} attentions, {total:,} cache bytes a token in all")
    kernels = table("phase", "kernel", "sites", "why", title="Kernels")
    for use in kernel_uses(explanation):
        kernels.add_row(use.phase, use.kernel, str(use.num_sites), use.reason)
    outside = table("what outside attention will not capture", title="Capture")
    for each in explanation.not_captured:
        outside.add_row(short(each))
    tables += [kernels, *_states_tables(explanation.states), *_experts_tables(explanation.experts), evidence]
    return [*tables, outside] if explanation.not_captured else tables


STATES_COLUMNS = ("layers", "module", "op", "prefill", "decode", "state of a sequence", "bytes")


def states_rows(states: list[StateExplanation]) -> list[tuple[str, ...]]:
    """Cells under ``STATES_COLUMNS``, layers that are alike as one row."""
    rows = (
        (
            each.module,
            each.op,
            each.prefill,
            each.decode,
            f"{each.dtype}{list(each.shape)}",
            f"{each.bytes:,}",
        )
        for each in states
    )
    return [(str(len(places)), *cells) for places, cells in folded(rows)]


def _states_tables(states: list[StateExplanation]) -> list[RenderableType]:
    if not states:
        return []
    shown = table(*STATES_COLUMNS, title="States")
    for row in states_rows(states):
        shown.add_row(*row)
    return [shown, f"{len(states)} states, {sum(each.bytes for each in states):,} bytes a sequence in all"]


EXPERTS_COLUMNS = (
    "layers",
    "module",
    "experts",
    "a token's",
    "width",
    "kernel",
    "bytes of one",
    "a token reads",
)


def experts_rows(sites: list[ExpertsSite]) -> list[tuple[str, ...]]:
    """Cells under ``EXPERTS_COLUMNS``, layers that are alike as one row."""
    rows = (
        (
            site.module,
            f"{site.num_experts}",
            f"{site.top_k}",
            f"{site.width}, hidden {site.hidden}",
            site.kernel,
            f"{site.bytes_each:,}",
            f"{site.top_k * site.bytes_each:,}",
        )
        for site in sites
    )
    return [(str(len(places)), *cells) for places, cells in folded(rows)]


def _experts_tables(sites: list[ExpertsSite]) -> list[RenderableType]:
    if not sites:
        return []
    shown = table(*EXPERTS_COLUMNS, title="Experts")
    for row in experts_rows(sites):
        shown.add_row(*row)
    read, held = (
        sum(number(site) * site.bytes_each for site in sites)
        for number in (lambda site: site.top_k, lambda site: site.num_experts)
    )
    return [shown, f"A token reads {read:,} bytes of the {held:,} of all experts"]


_ROWS = ("module", "source line", "matched as", "mask", "prefill", "decode", "cache", "bytes a token")


def _refusal_table(refusal: RefusalExplanation) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Refused by {refusal.transform} ({refusal.error})")
    table.add_column("")
    table.add_column(Text(refusal.message))
    rows = {
        "node": f"{refusal.node} = {refusal.op}" if refusal.node else "",
        "module": refusal.module,
        "shapes": "\n".join(refusal.shapes),
        "source": "\n".join([refusal.where, *refusal.source]) if refusal.source else refusal.where,
        "first difference": "\n".join(refusal.picture),
        "what to do": refusal.advice,
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, Text(text))
    return table
