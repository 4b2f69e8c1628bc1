"""``check``: the cached model beside its source, on the same tokens.

A few sequences go through prefill, mixed, decode and padded steps. At each attention site the queries, keys
and values of every token are recorded as the graph computes them, and the site's result is compared with
attention in float64 over them, as rounded to the dtype of the cache, with the scale, window, cap and sinks
that stand in the graph before the insertion. So an error is found at its own site, whatever it does to later
ones. The logits are compared with those of the source module; once more for captured steps, which
``compile_backend`` runs. Of experts it says how many choices of the routers are those of the dense graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from torch import Tensor, fx, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.inspection.check import float64
from ad_flashinfer_pass.inspection.check import steps as check_steps
from ad_flashinfer_pass.inspection.check.recording import (
    CachedGraph,
    Recorder,
    Routing,
    SiteValues,
    record,
    routings_of,
    sites_of,
)
from ad_flashinfer_pass.inspection.check.reproducer import write_reproducer
from ad_flashinfer_pass.inspection.check.steps import Phase, Step
from ad_flashinfer_pass.inspection.stages import graph_transforms, resolve
from ad_flashinfer_pass.inspection.tables import table
from ad_flashinfer_pass.kernels.collectives import in_threads
from ad_flashinfer_pass.models.layers import Layers
from ad_flashinfer_pass.pipeline import Pipeline, context
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.saved_program import load_module

if TYPE_CHECKING:
    from rich.console import RenderableType

# Share of the largest value of a site's result. Sums in another order, and rounding of what is summed.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Kernels that read 8 bits round the queries, and the weights, to 8 bits too.
_TOLERANCE_8_BITS = 0.15
# Nats a token, on average; a wrong site costs more in all but the largest models.
_KL = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class SiteCheck(_Data):
    """One attention site, or one op with a state, against float64."""

    index: int
    op: str = "attention"
    module: str
    where: str
    prefill: str
    """Kernel."""
    decode: str
    errors: dict[str, float]
    """By phase: the largest error, as a share of the largest value of the site's result."""
    tolerance: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_ok(self) -> bool:
        """Whether every error is within the tolerance; NaN is not."""
        return all(error <= self.tolerance for error in self.errors.values())


class LogitsCheck(_Data):
    """Logits of one phase against those of the source module."""

    phase: Phase
    tokens: int
    top1_agreement: float
    """Share of tokens with the same most likely next token."""
    mean_kl: float
    """Kullback-Leibler divergence from the source, in nats."""
    max_kl: float
    tolerance: float | None
    """Of ``mean_kl``; None: not judged, since a cache of 8 bits changes the logits."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_ok(self) -> bool:
        """Whether the divergence is within the tolerance; NaN is not."""
        return self.mean_kl <= (float("inf") if self.tolerance is None else self.tolerance)


class RoutingCheck(_Data):
    """The experts of one layer: whether tokens go where the dense graph before the insertion sends them.

    It is shown, not judged: rounding before a router can turn a close choice, and later layers follow it.
    """

    module: str
    agreement: float
    """Share of the chosen experts that are chosen there, too, for the same token."""


class CheckReport(_Data):
    """The comparison of a cached model with its source."""

    model: str
    layers: Layers | None
    """Which of its layers were taken, and why; None: it is as it was given."""
    stage: str
    """The last transform that ran; captured steps were run by ``compile_backend``."""
    lengths: tuple[int, ...]
    """Tokens of the sequences."""
    sites: tuple[SiteCheck, ...]
    logits: tuple[LogitsCheck, ...]
    routing: tuple[RoutingCheck, ...] = ()
    """Of each layer that has experts."""
    first: str | None
    """What departs first, None if all agrees."""
    replayed: int
    """Captured steps that a CUDA graph ran, or what stands for one on a CPU."""
    eager: dict[str, int]
    """Captured steps that no graph could run, by reason."""
    reproducer: str | None
    """Script that shows the first wrong site alone."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def is_ok(self) -> bool:
        """Whether all sites and all logits are within their tolerances."""
        return self.first is None


_GATHER = "gather_logits_before_lm_head"


@dataclass
class Prepared:
    """A model on the way through the pass, as far as a check needs it."""

    module: nn.Module
    """The source; its parameters are shared with the graphs."""
    exported: fx.GraphModule
    source: fx.GraphModule
    """Dense, with attention in its canonical form: the last graph before the insertion."""
    cached: fx.GraphModule | None
    """None: the check ends before the insertion."""
    compiled: nn.Module | None
    """What ``compile_backend`` makes of it; None: it is still to be captured as it is."""
    lengths: list[int]
    """Tokens of the sequences that are checked."""
    stage: str
    ctx: TransformContext


def check(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    stage: str | None = None,
    layers: int | None = None,
    reproducer_dir: Path | None = None,
    on_event: Callable[[str], None] | None = None,
) -> CheckReport:
    """Load a model, transform it and compare it with its source.

    Args:
        config: the model and the settings of the pass; its limits are lowered to what the check needs.
        graph: a saved ExportedProgram in place of the model.
        stage: stop after this transform or stage. Before the insertion the dense graph is compared with the
            source. Default: all of them, and ``compile_backend``.
        layers: only the first ones. Default: all, but of a model whose weights are drawn as few as show each
            kind of layer twice; see ``models.few_layers``.
        reproducer_dir: where to write the first wrong site's tensors and a script that runs it; default: not.
        on_event: called with a line of text as each phase begins.

    Raises:
        ConfigError: max_seq_len is too short, no such stage, or no such number of layers; or of several
            ranks, the device is not the CPU, or a graph or a reproducer is given.
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model.
    """
    from ad_flashinfer_pass.models.few_layers import first_layers
    from ad_flashinfer_pass.models.loading import load_model

    tell = on_event or (lambda text: None)
    resolve(stage, config)
    size = config.world_size
    if size > 1:
        _check_ranks(config, graph, reproducer_dir)
        config = config.model_copy(update={"world_size": 1})  # the source is whole
    tell("load_model")
    taken = None
    if graph is not None:
        if layers is not None:
            raise ConfigError(
                "--layers: the layers of a saved graph cannot be chosen; give the model itself."
            )
        module: nn.Module = load_module(graph, config.device)
    else:
        if layers is not None or config.skip_loading_weights:
            config, taken = first_layers(config, layers)
            tell(f"load_model, {taken}")
        loaded = load_model(config)
        module, config = loaded.module, loaded.resolved
    if config.sequence_limit < check_steps.SHORTEST:
        raise ConfigError(
            f"max_seq_len must be at least {check_steps.SHORTEST} for a check, got {config.sequence_limit}."
        )
    config = config.model_copy(update={"world_size": size})
    prepared = [prepare(module, config, stage=stage, on_event=tell, rank=rank) for rank in range(size)]
    if graph is not None:
        # The pass edits the graph that it is given: the source is the copy that was taken first.
        prepared[0].module = prepared[0].exported
    settings: dict[str, Any] = {"layers": taken, "reproducer_dir": reproducer_dir}
    runs = [partial(check_prepared, each, str(graph or config.model), **settings) for each in prepared]
    runs[0] = partial(runs[0], on_event=tell)
    if size == 1:
        return runs[0]()
    reports = in_threads(runs)
    return next((report for report in reports if not report.is_ok), reports[0])


def _check_ranks(config: AutoDeployConfig, graph: Path | None, reproducer_dir: Path | None) -> None:
    """Refuse what cannot be checked of several ranks, which are threads of this process."""
    if config.device != "cpu" or graph is not None or reproducer_dir is not None:
        what = "a saved graph" if graph else "--reproducer" if reproducer_dir else f"device: {config.device}"
        raise ConfigError(
            f"check of {config.world_size} ranks (--tp) runs them as threads on the CPU, got {what}: set "
            "device: cpu, and give the model alone."
        )


def prepare(
    module: nn.Module,
    config: AutoDeployConfig,
    *,
    stage: str | None = None,
    on_event: Callable[[str], None] | None = None,
    rank: int = 0,
) -> Prepared:
    """Transform a module, for a rank of those that compute it, and keep the graphs that it is on the way."""
    last = resolve(stage, config)
    before = list(graph_transforms(config).before("insert_cached_attention"))
    is_dense = last in before
    last_dense = last if is_dense else before[-1]
    captures = stage is None and config.compile_backend != "torch-simple"
    wanted = Pipeline.of(config).without("initialize_cache", *([] if captures else ["compile_model"]))
    if stage is not None:
        # A cached graph can be called once it returns the rows of logits that a step asks for.
        needed = {*wanted.upto(last), *([] if is_dense else [_GATHER])}
        wanted = wanted.without(*{*wanted} - needed)
    *_, last_cached = wanted.without("compile_model")
    kept: dict[str, fx.GraphModule] = {}

    def keep(model: nn.Module, report: TransformReport) -> None:
        if report.name in ("export_model", last_dense, last_cached):
            assert isinstance(model, fx.GraphModule)
            kept[report.name] = g.copied(model)

    ctx = context(_small(config), on_event)
    ctx.rank = rank
    gm, _ = wanted.before("compile").run(module, ctx, after=keep)
    assert isinstance(gm, fx.GraphModule)
    lengths = check_steps.lengths([site.site for site in ctx.sites], config.sequence_limit)
    dense = Prepared(module, kept["export_model"], kept[last_dense], None, None, lengths, last, ctx)
    if is_dense:
        return dense
    # The pools are as small as the check lets them be, whatever the config wants.
    ctx.num_pages = check_steps.num_pages(lengths, ctx.sequence_info.tokens_per_block)
    ctx.caches = {each.name: each.allocate(ctx.num_pages, ctx.device) for each in ctx.resources}
    num_slots = ctx.sequence_info.num_slots
    ctx.caches |= {each.name: each.allocate(num_slots, ctx.device) for each in ctx.states}
    compiled, _ = wanted.since("compile").run(gm, ctx, after=keep)
    dense.cached, dense.compiled = kept[last_cached], compiled if captures else None
    return dense


def _small(config: AutoDeployConfig) -> AutoDeployConfig:
    """With limits that the steps of a check just need, so that few graphs are captured."""
    return config.model_copy(
        update={
            "max_batch_size": check_steps.BATCH,
            "max_num_tokens": check_steps.BUDGET,
            "cuda_graph_batch_sizes": [check_steps.BATCH],
            "cuda_graph_token_buckets": [16, check_steps.BUDGET],
        }
    )


def _vocab_size(prepared: Prepared) -> int:
    (output,) = prepared.exported.graph.find_nodes(op="output")
    return int(g.shape(g.args(output)[0])[-1])


def check_prepared(
    prepared: Prepared,
    title: str,
    *,
    layers: Layers | None = None,
    reproducer_dir: Path | None = None,
    on_event: Callable[[str], None] = lambda text: None,
) -> CheckReport:
    """Compare the graphs of a model; see ``check``."""
    ctx = prepared.ctx
    tokens = check_steps.random_tokens(prepared.lengths, _vocab_size(prepared), ctx.device)
    report = CheckReport(
        model=title,
        layers=layers,
        stage=prepared.stage,
        lengths=tuple(prepared.lengths),
        sites=(),
        logits=(),
        first=None,
        replayed=0,
        eager={},
        reproducer=None,
    )
    with torch.inference_mode():
        on_event("compare: the source")
        dense = [_dense_logits(prepared.module, ids) for ids in tokens]
        if prepared.cached is None:
            found = _check_dense(prepared, tokens, dense)
        else:
            found = _check_cached(prepared, prepared.cached, tokens, dense, reproducer_dir, on_event)
        compared: Sequence[LogitsCheck] = found["logits"]
        if "first" not in found and not all(each.is_ok for each in compared):
            found["first"] = _first_departure(prepared, tokens[1], compared)
    return report.model_copy(update=found)


def _check_dense(prepared: Prepared, tokens: Sequence[Tensor], dense: Sequence[Tensor]) -> dict[str, Any]:
    """The graph before the insertion beside the source."""
    found = [_dense_logits(prepared.source, ids) for ids in tokens]
    compared = _compare_logits("dense", list(zip(found, dense, strict=True)), _KL[_dtype(prepared)])
    return {"logits": (compared,)}


def _dtype(prepared: Prepared) -> torch.dtype:
    """The model's."""
    return next(each.dtype for each in prepared.exported.parameters() if each.dtype in _KL)


def _check_cached(
    prepared: Prepared,
    gm: fx.GraphModule,
    tokens: Sequence[Tensor],
    dense: Sequence[Tensor],
    reproducer_dir: Path | None,
    on_event: Callable[[str], None],
) -> dict[str, Any]:
    """Sites beside float64, logits beside the source's, captured steps too."""
    ctx = prepared.ctx
    steps = check_steps.steps(tokens, ctx.sequence_info.tokens_per_block)
    sites = sites_of(prepared.source, gm)
    cached = CachedGraph(gm, ctx.sequence_info, ctx.caches)
    routings = routings_of(prepared.source, gm)
    logits = record(
        cached, steps, sites, routings, lambda done: on_event(f"compare: step {done + 1} of {len(steps)}")
    )
    on_event("compare: captured steps")
    captured, replayed, eager = _run_captured(prepared, gm, steps)
    on_event("compare: attention in float64")
    needs = [*(each.site for each in ctx.sites), *(None for _ in ctx.state_sites)]
    expected = [float64.expected(each, site, steps) for each, site in zip(needs, sites, strict=True)]
    checked = [_check_site(ctx, i, site, expected[i], steps) for i, site in enumerate(sites)]
    found: dict[str, Any] = {
        "sites": tuple(checked),
        "logits": (
            *_check_logits(prepared, steps, logits, dense),
            *_check_logits(prepared, steps, captured, dense, "captured"),
        ),
        "routing": _check_routing(prepared, routings, steps, tokens),
        "replayed": replayed,
        "eager": eager,
    }
    wrong = next((each for each in checked if not each.is_ok), None)
    if wrong is not None:
        found["first"] = _describe(wrong)
        if reproducer_dir is not None:
            fresh = CachedGraph(gm, ctx.sequence_info, ctx.caches)
            site, name = sites[wrong.index], (wrong.index, wrong.module)
            found["reproducer"] = str(
                write_reproducer(
                    fresh, steps, site, expected[wrong.index], wrong.tolerance, name, reproducer_dir
                )
            )
    return found


def _dense_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """[tokens, vocab] of the source."""
    from ad_flashinfer_pass.transforms.export_model import Logits

    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits: Tensor = Logits(module)(ids, positions)
    return logits[0].float()


def _run_captured(
    prepared: Prepared, gm: fx.GraphModule, steps: Sequence[Step]
) -> tuple[list[Tensor], int, dict[str, int]]:
    """The steps through captured graphs; on a CPU through what stands for them there.

    Returns:
        The logits of each step, how many were replays, and why the others were not.
    """
    from ad_flashinfer_pass.transforms.compile_model import host_kernels

    ctx = prepared.ctx
    module = prepared.compiled
    if module is None:
        small = _small(ctx.config)
        sizes, buckets = small.cuda_graph_batch_sizes, small.cuda_graph_token_buckets
        module = CudaGraphModule(gm, sizes or [], buckets or [], host_kernels(ctx))
        module.capture(ctx.sequence_info, ctx.caches)
    for cache in ctx.caches.values():
        cache.zero_()
    model = CachedModel(module, ctx.caches, ctx.sequence_info, ctx.vocab_size)
    logits = [model.step(step.sequences).float() for step in steps]
    if model.is_captured:
        return logits, model.num_replays, model.eager_steps
    return logits, 0, {f"{ctx.config.compile_backend} captures nothing on {ctx.device}": len(steps)}


def _check_site(
    ctx: TransformContext, index: int, site: SiteValues, expected: Tensor, steps: Sequence[Step]
) -> SiteCheck:
    found = site.rows()["out"].double()
    error = (found - expected).abs().flatten(1).amax(1) / expected.abs().max()
    phases = [step.phase for step in steps for s in step.sequences for _ in s.token_ids]
    errors: dict[str, float] = {}
    for phase, each in zip(phases, error.tolist(), strict=True):
        # A NaN stays: comparing with it is false.
        errors[phase] = each if not each <= errors.get(phase, 0.0) else errors.get(phase, 0.0)
    if index >= len(ctx.sites):
        state = ctx.state_sites[index - len(ctx.sites)]
        return SiteCheck(
            index=index,
            op=state.op,
            module=state.module,
            where=state.where,
            prefill=state.prefill,
            decode=state.decode,
            errors=errors,
            tolerance=_TOLERANCES[g.value(site.cached).dtype],
        )
    what = ctx.sites[index]
    prefill, decode = (g.op_args(site.cached)[f"{phase}_kernel"] for phase in ("prefill", "decode"))
    rounds = what.site.kv_dtype.itemsize == 1 and {prefill, decode} != {"reference"}
    return SiteCheck(
        index=index,
        module=what.module,
        where=what.where,
        prefill=prefill,
        decode=decode,
        errors=errors,
        tolerance=_TOLERANCE_8_BITS if rounds else _TOLERANCES[what.site.dtype],
    )


def _check_routing(
    prepared: Prepared, routings: Sequence[Routing], steps: Sequence[Step], tokens: Sequence[Tensor]
) -> tuple[RoutingCheck, ...]:
    if not routings:
        return ()
    dense: list[dict[str, Tensor]] = []
    for ids in tokens:
        recorder = Recorder(prepared.source, (each.index for each in routings))
        recorder.run(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        dense.append(recorder.kept)
    found = []
    for each in routings:
        parts = [
            dense[owner][each.index][s.input_pos : s.input_pos + len(s.token_ids)]
            for step in steps
            for owner, s in zip(step.owners, step.sequences, strict=True)
        ]
        chosen, wanted = torch.cat(each.chosen), torch.cat(parts)
        same = (chosen[:, :, None] == wanted[:, None]).any(-1)
        found.append(RoutingCheck(module=g.module_path(each.node), agreement=same.double().mean().item()))
    return tuple(found)


def _check_logits(
    prepared: Prepared,
    steps: Sequence[Step],
    found: Sequence[Tensor],
    dense: Sequence[Tensor],
    phase: Phase | None = None,
) -> list[LogitsCheck]:
    """By phase, or all under one name."""
    ctx = prepared.ctx
    rows: dict[Phase, list[tuple[Tensor, Tensor]]] = {}
    for step, logits in zip(steps, found, strict=True):
        wanted = [
            dense[owner][s.input_pos + len(s.token_ids) - 1]
            for owner, s in zip(step.owners, step.sequences, strict=True)
        ]
        rows.setdefault(phase or step.phase, []).append((logits, torch.stack(wanted)))
    rounds = any(site.site.kv_dtype.itemsize == 1 for site in ctx.sites)
    tolerance = None if rounds else _KL[_dtype(prepared)]
    return [_compare_logits(name, parts, tolerance) for name, parts in rows.items()]


def _compare_logits(
    phase: Phase, parts: Sequence[tuple[Tensor, Tensor]], tolerance: float | None
) -> LogitsCheck:
    found, wanted = (torch.cat(each) for each in zip(*parts, strict=True))
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (wanted, found))
    kl = (p.exp() * (p - q)).sum(-1)
    return LogitsCheck(
        phase=phase,
        tokens=len(kl),
        top1_agreement=(found.argmax(-1) == wanted.argmax(-1)).double().mean().item(),
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        tolerance=tolerance,
    )


def _describe(site: SiteCheck) -> str:
    phase = max(site.errors, key=lambda name: (site.errors[name] != site.errors[name], site.errors[name]))
    kernel = site.decode if phase == "decode" else site.prefill
    return (
        f"{site.op} site {site.index} ({site.module}, {site.where}): in {phase} steps its result is off by "
        f"{site.errors[phase]:.2g} of its largest value (at most {site.tolerance:g}), run by {kernel}"
    )


def _first_departure(prepared: Prepared, ids: Tensor, compared: Sequence[LogitsCheck]) -> str:
    """The first node whose value differs between the graphs of one sequence, from the export on."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def run_dense(gm: fx.GraphModule) -> dict[str, Any]:
        recorder = Recorder(gm, (node.name for node in gm.graph.nodes if node.op == "call_function"))
        recorder.run(ids, positions)
        return recorder.kept

    exported, source = run_dense(prepared.exported), run_dense(prepared.source)
    pairs = [("before the insertion", prepared.source, exported, source)]
    if prepared.cached is not None:
        info = prepared.ctx.sequence_info
        pages = list(range(1, -(-ids.shape[1] // info.tokens_per_block) + 1))
        step = Step("prefill", [SequenceStep(ids[0].tolist(), 0, pages, slot=1)], [0])
        recorder = Recorder(prepared.cached, source)
        CachedGraph(prepared.cached, info, prepared.ctx.caches).run(step, recorder)
        pairs.append(("after the insertion", prepared.cached, source, recorder.kept))
    for where, gm, wanted, found in pairs:
        for node in gm.graph.nodes:
            a, b = wanted.get(node.name), found.get(node.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and not _agrees(a, b):
                return (
                    f"{g.where(node)} in {g.module_path(node)}, {where}: its inputs agree with the source's"
                )
    phases = ", ".join(each.phase for each in compared if not each.is_ok)
    return (
        f"the logits of {phases} steps alone: in a prefill of one sequence all nodes agree that the graphs "
        "have in common"
    )


def _agrees(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCES.get(a.dtype, 1e-4)
    return bool(((a - b).abs().max() <= tolerance * a.abs().max()).item())


def as_tables(found: CheckReport) -> list[RenderableType]:
    """The comparison for a terminal."""
    parts: list[RenderableType] = []
    if found.layers is not None:
        parts.append(f"Checked: {found.layers}.")
    phases = list(dict.fromkeys(phase for site in found.sites for phase in site.errors))
    sites = table(
        "#", "op", "module", "prefill", "decode", *phases, "at most", "", title="Sites against float64"
    )
    for site in found.sites:
        errors = [f"{site.errors[phase]:.1e}" for phase in phases]
        sites.add_row(
            str(site.index),
            site.op,
            site.module,
            site.prefill,
            site.decode,
            *errors,
            f"{site.tolerance:.0e}",
            "ok" if site.is_ok else "WRONG",
        )
    logits = table(
        "steps", "tokens", "same top token", "KL, mean", "KL, most", "mean at most", "", title="Logits"
    )
    for each in found.logits:
        logits.add_row(
            each.phase,
            str(each.tokens),
            f"{each.top1_agreement:.1%}",
            f"{each.mean_kl:.1e}",
            f"{each.max_kl:.1e}",
            "-" if each.tolerance is None else f"{each.tolerance:.0e}",
            "WRONG" if not each.is_ok else "not judged" if each.tolerance is None else "ok",
        )
    if found.sites:
        parts.append(sites)
    parts.append(logits)
    if found.routing:
        routing = table("module", "same experts", title="Experts, against the graph before the insertion")
        for layer in found.routing:
            routing.add_row(layer.module, f"{layer.agreement:.1%}")
        parts.append(routing)
    if found.replayed or found.eager:
        reasons = "".join(f"; {count} not: {why}" for why, count in found.eager.items())
        parts.append(f"{found.replayed} of the captured steps were replays{reasons}")
    judged = "all" if all(each.tolerance is not None for each in found.logits) else "every attention"
    verdict = f"{judged} agrees" if found.first is None else f"first departure: {found.first}"
    parts.append(verdict)
    return parts if found.reproducer is None else [*parts, f"run it alone: python {found.reproducer}"]
