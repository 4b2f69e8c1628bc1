"""``check``: the cached model beside its source, on the same tokens.

A few sequences go through prefill, mixed, decode and padded steps. At each attention site the queries, keys
and values of every token are recorded as the graph computes them, and the site's result is compared with
attention in float64 over them, as rounded to the dtype of the cache, with the scale, window, cap and sinks
that stand in the graph before the insertion. So an error is found at its own site, whatever it does to later
ones. The logits are compared with those of the source module.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ad_flashinfer_pass import graph as g
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.inspection.stages import load_program, transform_order
from ad_flashinfer_pass.metadata import Bucket, SequenceStep
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ad_flashinfer_pass.kernels.capability import Site
    from ad_flashinfer_pass.registry import TransformContext, TransformReport

Phase = Literal["prefill", "mixed", "decode", "padded", "captured"]

_BATCH = 4
_SHORTEST = 32
_BUDGET = 512
_CHUNK = 300
# Share of the largest value of a site's result. Sums in another order, and rounding of what is summed.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Kernels that read 8 bits round the queries, and the weights, to 8 bits too.
_TOLERANCE_8_BITS = 0.15
# Nats a token, on average; a wrong site costs more in all but the largest models.
_KL = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class SiteCheck(_Data):
    """One attention site against float64."""

    index: int
    module: str
    where: str
    prefill: str
    """Kernel."""
    decode: str
    errors: dict[str, float]
    """By phase: the largest error, as a share of the largest value of the site's result."""
    tolerance: float

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

    @property
    def is_ok(self) -> bool:
        """Whether the divergence is within the tolerance; NaN is not."""
        return self.mean_kl <= (float("inf") if self.tolerance is None else self.tolerance)


class CheckReport(_Data):
    """The comparison of a cached model with its source."""

    model: str
    lengths: tuple[int, ...]
    """Tokens of the sequences."""
    sites: tuple[SiteCheck, ...]
    logits: tuple[LogitsCheck, ...]
    first: str | None
    """What departs first, None if all agrees."""
    reproducer: str | None
    """Script that shows the first wrong site alone."""

    @property
    def is_ok(self) -> bool:
        """Whether all sites and all logits are within their tolerances."""
        return self.first is None


@dataclass
class Prepared:
    """A model on the way through the pass, as far as a check needs it."""

    module: nn.Module
    """The source; its parameters are shared with the graphs."""
    exported: fx.GraphModule
    source: fx.GraphModule
    """Dense, with attention in its canonical form: the last graph before the insertion."""
    cached: fx.GraphModule
    ctx: TransformContext


@dataclass
class _Step:
    phase: Phase
    sequences: list[SequenceStep]
    owners: list[int]
    """Which sequence each of them is."""
    bucket: Bucket | None = None

    def rows(self) -> list[int]:
        """Where the tokens of the sequences stand among all, padding included."""
        lens = [len(sequence.token_ids) for sequence in self.sequences]
        if self.bucket is None or not self.bucket.num_tokens:
            return list(range(sum(lens)))
        long = sum(n for n in lens if n > 1)
        decodes = sum(n == 1 for n in lens)
        return [*range(long), *range(self.bucket.num_tokens, self.bucket.num_tokens + decodes)]


@dataclass
class _Site:
    """What is recorded of an attention: rows in the order of the steps."""

    node: fx.Node
    """In the source graph."""
    cached: fx.Node
    values: dict[str, list[Tensor]] = field(
        default_factory=lambda: {"query": [], "key": [], "value": [], "out": []}
    )


def check(
    config: AutoDeployConfig,
    *,
    graph: Path | None = None,
    reproducer_dir: Path | None = None,
    on_event: Callable[[str], None] | None = None,
) -> CheckReport:
    """Load a model, transform it and compare it with its source.

    Args:
        config: the model and the settings of the pass; its limits are lowered to what the check needs.
        graph: a saved ExportedProgram in place of the model.
        reproducer_dir: where to write the first wrong site's tensors and a script that runs it; default: not.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: max_seq_len is too short.
        LoadError: the model cannot be read.
        TransformError: the pass refuses the model.
    """
    from ad_flashinfer_pass.models.loading import load_model

    if on_event is not None:
        on_event("load_model")
    if graph is None:
        prepared = prepare(load_model(config).module, config, on_event=on_event)
    else:
        prepared = prepare(load_program(graph), config, on_event=on_event)
        # The pass edits the graph that it is given: the source is the copy that was taken first.
        prepared.module = prepared.exported
    if on_event is not None:
        on_event("compare")
    return check_prepared(prepared, str(graph or config.model), reproducer_dir=reproducer_dir)


def prepare(
    module: nn.Module, config: AutoDeployConfig, *, on_event: Callable[[str], None] | None = None
) -> Prepared:
    """Transform a module and keep the graphs that it is on the way."""
    from ad_flashinfer_pass import pipeline

    if config.max_seq_len < _SHORTEST:
        raise ConfigError(f"max_seq_len must be at least {_SHORTEST} for a check, got {config.max_seq_len}.")
    small = config.model_copy(
        update={"max_batch_size": _BATCH, "max_num_tokens": _BUDGET, "compile_backend": "torch-simple"}
    )
    ctx = pipeline.context(small)
    order = transform_order(config)
    last_dense = order[order.index("insert_cached_attention") - 1]
    kept: dict[str, fx.GraphModule] = {}

    def keep(model: nn.Module, report: TransformReport) -> None:
        if report.name in ("export_model", last_dense):
            assert isinstance(model, fx.GraphModule)
            kept[report.name] = _copy(model)

    cached, _ = pipeline.run(module, ctx, on_event, skip=("compile_model",), after=keep)
    assert isinstance(cached, fx.GraphModule)
    return Prepared(module, kept["export_model"], kept[last_dense], cached, ctx)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is now, with the same parameters."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


def check_prepared(prepared: Prepared, title: str, *, reproducer_dir: Path | None = None) -> CheckReport:
    """Compare the graphs of a model; see ``check``."""
    ctx = prepared.ctx
    lengths = _lengths(prepared)
    tokens = _tokens(lengths, ctx.vocab_size, ctx.device)
    script = _script(tokens, ctx.sequence_info.tokens_per_block)
    with torch.inference_mode():
        dense = [_dense_logits(prepared.module, ids) for ids in tokens]
        sites = _sites(prepared)
        logits = _run(prepared, script, sites)
        captured = _run_captured(prepared, script)
        checked = [_check_site(ctx, index, site, script) for index, site in enumerate(sites)]
        compared = [
            *_check_logits(ctx, script, logits, dense),
            *_check_logits(ctx, script, captured, dense, "captured"),
        ]
        wrong = next((index for index, each in enumerate(checked) if not each.is_ok), None)
        first, reproducer = None, None
        if wrong is not None:
            first = _describe(checked[wrong])
            if reproducer_dir is not None:
                reproducer = str(
                    _write_reproducer(prepared, script, sites[wrong], checked[wrong], reproducer_dir)
                )
        elif not all(each.is_ok for each in compared):
            first = _first_departure(prepared, tokens[1])
    return CheckReport(
        model=title,
        lengths=tuple(lengths),
        sites=tuple(checked),
        logits=tuple(compared),
        first=first,
        reproducer=reproducer,
    )


def _lengths(prepared: Prepared) -> list[int]:
    """One sequence that is longer than each window and chunk, if it may be, and two short ones."""
    most = prepared.ctx.config.max_seq_len
    spans = [
        getattr(site.site, name) or 0 for site in prepared.ctx.sites for name in ("sliding_window", "chunk")
    ]
    longest = max([64, *(span + 24 for span in spans)])
    return [min(most, longest), min(most, 41), 28]


def _tokens(lengths: Sequence[int], vocab_size: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (1, n), generator=generator).to(device) for n in lengths]


def _script(tokens: Sequence[Tensor], page_size: int) -> list[_Step]:
    """Every kind of step; the pages of the sequences alternate, and page 1 is one of them."""
    lists = [ids[0].tolist() for ids in tokens]
    a, b, c = (len(ids) for ids in lists)
    done = [0, 0, 0]
    # The pages of a sequence are every third one, backwards: page 1 is where the last tokens of one are.
    pages = [
        [1 + 3 * block + first for block in reversed(range(-(-len(ids) // page_size)))]
        for first, ids in zip((1, 2, 0), lists, strict=True)
    ]

    def to(owner: int, end: int) -> tuple[int, SequenceStep]:
        start, done[owner] = done[owner], end
        own = pages[owner][: -(-end // page_size)]
        return owner, SequenceStep(lists[owner][start:end], start, own)

    def step(phase: Phase, *parts: tuple[int, SequenceStep], bucket: Bucket | None = None) -> _Step:
        kind = [2 if len(s.token_ids) == 1 else int(s.input_pos > 0) for _, s in parts]
        ordered = [part for _, part in sorted(zip(kind, parts, strict=True), key=lambda each: each[0])]
        return _Step(phase, [s for _, s in ordered], [owner for owner, _ in ordered], bucket)

    steps = [
        step("prefill", to(0, min(a // 2, _CHUNK)), to(1, b // 3)),
        step("mixed", to(2, c // 2), to(0, done[0] + 5), to(1, b // 3 + 1)),
        step("mixed", to(0, min(a - 7, done[0] + _CHUNK)), to(1, b - 7), to(2, c - 7)),
    ]
    while done[0] < a - 7:
        steps.append(step("mixed", to(0, min(a - 7, done[0] + _CHUNK))))
    for back in (6, 5):
        steps.append(step("decode", to(0, a - back), to(1, b - back), to(2, c - back)))
    for back in (4, 3):
        bucket = Bucket(0, _BATCH)
        steps.append(step("padded", to(0, a - back), to(1, b - back), to(2, c - back), bucket=bucket))
    bucket = Bucket(8, _BATCH)
    steps.append(step("padded", to(2, c), to(0, a - 2), to(1, b - 2), bucket=bucket))
    steps.append(step("decode", to(0, a - 1), to(1, b - 1)))
    steps.append(step("decode", to(0, a), to(1, b)))
    return steps


def _dense_logits(module: nn.Module, ids: Tensor) -> Tensor:
    """[tokens, vocab] of the source."""
    from ad_flashinfer_pass.transforms.export_model import Logits

    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    logits: Tensor = Logits(module)(ids, positions)
    return logits[0].float()


def _sites(prepared: Prepared) -> list[_Site]:
    dense = prepared.source.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.attention.default
    )
    cached = prepared.cached.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.cached_attention.default
    )
    return [_Site(*pair) for pair in zip(dense, cached, strict=True)]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the results of some nodes, by name."""

    def __init__(self, gm: fx.GraphModule, wanted: Iterable[str]) -> None:
        super().__init__(gm)
        self.wanted = set(wanted)
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = result
        return result


def _run(prepared: Prepared, script: Sequence[_Step], sites: Sequence[_Site]) -> list[Tensor]:
    """The script through the cached graph, op by op; fills in the sites and returns each step's logits."""
    ctx, gm = prepared.ctx, prepared.cached
    caches = {name: torch.zeros_like(cache) for name, cache in ctx.caches.items()}
    present = {node.name for node in gm.graph.nodes}
    parts = {id(site): _operands(site.node) for site in sites}
    wanted = {site.cached.name for site in sites}
    for operands in parts.values():
        wanted |= {name for node in operands.values() for name in _needed(node, present)}
    logits = []
    for step in script:
        recorder = _Recorder(gm, wanted)
        logits.append(_run_step(prepared, step, caches, recorder))
        rows = step.rows()
        for site in sites:
            found = {name: _resolve(node, recorder.kept, present) for name, node in parts[id(site)].items()}
            found["out"] = recorder.kept[site.cached.name]
            for name, value in found.items():
                site.values[name].append(value.flatten(0, 1)[rows])
    return logits


def _run_step(
    prepared: Prepared, step: _Step, caches: dict[str, Tensor], interpreter: fx.Interpreter
) -> Tensor:
    info = prepared.ctx.sequence_info
    info.nest_sequences(step.sequences, pad_to=step.bucket)
    inputs = {**info.named_args(), **caches}
    placeholders = prepared.cached.graph.find_nodes(op="placeholder")
    logits: Tensor = interpreter.run(*(inputs[node.name] for node in placeholders))[0]
    return logits[: len(step.sequences)].float()


def _run_captured(prepared: Prepared, script: Sequence[_Step]) -> list[Tensor]:
    """The script through captured graphs; on a CPU through what stands for them there."""
    from ad_flashinfer_pass.transforms.compile_model import host_kernels

    ctx = prepared.ctx
    caches = {name: torch.zeros_like(cache) for name, cache in ctx.caches.items()}
    most = max(len(step.rows()) for step in script)
    buckets = sorted({16, max(16, most)})
    captured = CudaGraphModule(prepared.cached, [_BATCH], buckets, host_kernels(ctx))
    captured.capture(ctx.sequence_info, caches)
    model = CachedModel(captured, caches, ctx.sequence_info, ctx.vocab_size)
    return [model.step(step.sequences).float() for step in script]


def _operands(node: fx.Node) -> dict[str, fx.Node]:
    args = g.op_args(node)
    return {name: args[name] for name in ("query", "key", "value")}


def _needed(node: fx.Node, present: set[str]) -> set[str]:
    """The nodes of the cached graph from which a node of the source graph can be computed."""
    if node.name in present:
        return {node.name}
    return {name for source in node.all_input_nodes for name in _needed(source, present)}


def _resolve(node: fx.Node, kept: dict[str, Any], present: set[str]) -> Any:
    """The value of a node of the source graph: as the cached graph computed it, or from what it computed."""
    if node.name in present:
        return kept[node.name]
    assert callable(node.target)
    args = map_arg(node.args, lambda source: _resolve(source, kept, present))
    kwargs = map_arg(node.kwargs, lambda source: _resolve(source, kept, present))
    return node.target(*args, **kwargs)


def _check_site(ctx: TransformContext, index: int, site: _Site, script: Sequence[_Step]) -> SiteCheck:
    what = ctx.sites[index]
    expected, found = _expected(what.site, site, script), torch.cat(site.values["out"]).double()
    error = (found - expected).abs().flatten(1).amax(1) / expected.abs().max()
    phases = [step.phase for step in script for s in step.sequences for _ in s.token_ids]
    errors: dict[str, float] = {}
    for phase, each in zip(phases, error.tolist(), strict=True):
        # A NaN stays: comparing with it is false.
        errors[phase] = each if not each <= errors.get(phase, 0.0) else errors.get(phase, 0.0)
    kernels = {what.prefill.kernel, what.decode.kernel}
    rounds = what.site.kv_dtype.itemsize == 1 and kernels != {"reference"}
    return SiteCheck(
        index=index,
        module=what.module,
        where=what.where,
        prefill=what.prefill.kernel,
        decode=what.decode.kernel,
        errors=errors,
        tolerance=_TOLERANCE_8_BITS if rounds else _TOLERANCES[what.site.dtype],
    )


def _expected(needs: Site, site: _Site, script: Sequence[_Step]) -> Tensor:
    """float64 results of a site for all tokens, in the order of the steps."""
    parts = [
        (owner, range(s.input_pos, s.input_pos + len(s.token_ids)))
        for step in script
        for owner, s in zip(step.owners, step.sequences, strict=True)
    ]
    owners = torch.tensor([owner for owner, span in parts for _ in span])
    positions = torch.tensor([position for _, span in parts for position in span])
    rows = {name: torch.cat(values) for name, values in site.values.items()}
    rows["key"] = _rounded(rows["key"], needs.k_scale, needs.kv_dtype)
    rows["value"] = _rounded(rows["value"], needs.v_scale, needs.kv_dtype)
    expected = torch.empty_like(rows["out"], dtype=torch.float64)
    for owner in owners.unique():
        mine = (owners == owner).nonzero()[:, 0]
        mine = mine[positions[mine].argsort()].to(expected.device)
        expected[mine] = _attention_in_float64(site.node, *(rows[n][mine] for n in ("query", "key", "value")))
    return expected


def _rounded(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """What a cache of that dtype holds of x; 8 bits saturate."""
    limit = torch.finfo(dtype).max
    return (x.double() / scale).clamp(-limit, limit).to(dtype).double() * scale


def _attention_in_float64(node: fx.Node, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The source attention of one sequence, [tokens, heads, size], written out.

    Raises:
        AssertionError: the node still has a mask, which the insertion does not take.
    """
    args = g.op_args(node)
    assert args["attn_mask"] is None
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scale = args["scale"] if args["scale"] is not None else q.shape[-1] ** -0.5
    logits = q @ k.transpose(1, 2) * scale
    if args["logit_cap"] is not None:
        logits = args["logit_cap"] * torch.tanh(logits / args["logit_cap"])
    at = torch.arange(q.shape[1], device=q.device)
    distance = at[:, None] - at[None]
    if args["alibi_slopes"] is not None:
        logits = logits - _tensor(args["alibi_slopes"])[:, None, None].double() * distance
    hidden = distance < 0
    if args["sliding_window"] is not None:
        hidden |= distance >= args["sliding_window"]
    if args["chunk"] is not None:
        hidden |= at[:, None] // args["chunk"] != at[None] // args["chunk"]
    logits = logits.masked_fill(hidden, float("-inf"))
    if args["sinks"] is not None:
        sinks = _tensor(args["sinks"]).double()[:, None, None].expand(-1, q.shape[1], 1)
        logits = torch.cat((logits, sinks), -1)
    weights = torch.softmax(logits, -1)[..., : q.shape[1]]
    return (weights @ v).transpose(0, 1)


def _tensor(node: fx.Node) -> Tensor:
    """The value of a node that is made of weights alone."""
    if node.op == "get_attr":
        value: Tensor = g.attribute(node)
        return value
    assert callable(node.target)
    result: Tensor = node.target(*map_arg(node.args, _tensor), **map_arg(node.kwargs, _tensor))
    return result


def _check_logits(
    ctx: TransformContext,
    script: Sequence[_Step],
    found: Sequence[Tensor],
    dense: Sequence[Tensor],
    phase: Phase | None = None,
) -> list[LogitsCheck]:
    """By phase, or all under one name."""
    rows: dict[Phase, list[tuple[Tensor, Tensor]]] = {}
    for step, logits in zip(script, found, strict=True):
        wanted = [
            dense[owner][s.input_pos + len(s.token_ids) - 1]
            for owner, s in zip(step.owners, step.sequences, strict=True)
        ]
        rows.setdefault(phase or step.phase, []).append((logits, torch.stack(wanted)))
    site = ctx.sites[0].site
    tolerance = None if site.kv_dtype.itemsize == 1 else _KL[site.dtype]
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
        f"attention site {site.index} ({site.module}, {site.where}): in {phase} steps its result is off by "
        f"{site.errors[phase]:.2g} of its largest value (at most {site.tolerance:g}), run by {kernel}"
    )


def _first_departure(prepared: Prepared, ids: Tensor) -> str:
    """The first node whose value differs between the graphs of one sequence, from the export on."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    caches = {name: torch.zeros_like(cache) for name, cache in prepared.ctx.caches.items()}
    pages = list(range(1, -(-ids.shape[1] // prepared.ctx.sequence_info.tokens_per_block) + 1))
    step = _Step("prefill", [SequenceStep(ids[0].tolist(), 0, pages)], [0])

    def run_dense(gm: fx.GraphModule) -> dict[str, Any]:
        recorder = _Recorder(gm, (node.name for node in gm.graph.nodes if node.op == "call_function"))
        recorder.run(ids, positions)
        return recorder.kept

    exported, source = run_dense(prepared.exported), run_dense(prepared.source)
    recorder = _Recorder(prepared.cached, source)
    _run_step(prepared, step, caches, recorder)
    pairs = (
        ("before the insertion", prepared.source, exported, source),
        ("after the insertion", prepared.cached, source, recorder.kept),
    )
    for where, gm, wanted, found in pairs:
        for node in gm.graph.nodes:
            a, b = wanted.get(node.name), found.get(node.name)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and not _agrees(a, b):
                return (
                    f"{g.where(node)} in {g.module_path(node)}, {where}: its inputs agree with the source's"
                )
    return "the logits alone: every node that both graphs have agrees in a prefill of one sequence"


def _agrees(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _TOLERANCES.get(a.dtype, 1e-4)
    return bool(((a - b).abs().max() <= tolerance * a.abs().max()).item())


def _write_reproducer(
    prepared: Prepared, script: Sequence[_Step], site: _Site, checked: SiteCheck, directory: Path
) -> Path:
    """The first step in which a site is wrong: its tensors, and a script that runs the op on them."""
    from safetensors.torch import save_file

    caches = {name: torch.zeros_like(cache) for name, cache in prepared.ctx.caches.items()}
    everything, end = _expected(prepared.ctx.sites[checked.index].site, site, script), 0
    for step in script:
        recorder = _ArgumentRecorder(prepared.cached, site.cached)
        _run_step(prepared, step, caches, recorder)
        rows = step.rows()
        start, end = end, end + len(rows)
        expected = everything[start:end]
        found = recorder.result.flatten(0, 1)[rows].double()
        error = (found - expected).abs().max() / expected.abs().max()
        if not error <= checked.tolerance:
            break
    tensors = {
        name: value.contiguous() for name, value in recorder.arguments.items() if isinstance(value, Tensor)
    }
    scalars = {name: value for name, value in recorder.arguments.items() if not isinstance(value, Tensor)}
    tensors |= {"expected": expected.contiguous(), "rows": torch.tensor(rows)}
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"site_{checked.index}.safetensors"
    save_file(tensors, file, metadata={"scalars": json.dumps(scalars)})
    script_file = directory / f"site_{checked.index}.py"
    script_file.write_text(
        _SCRIPT.format(index=checked.index, module=checked.module, phase=step.phase, file=file.name),
        encoding="utf-8",
    )
    return script_file


_SCRIPT = '''"""Attention site {index} ({module}) in a {phase} step: the op beside attention in float64."""
import json, pathlib
import torch
from safetensors import safe_open
from ad_flashinfer_pass import ops  # registers the op
with safe_open(pathlib.Path(__file__).with_name("{file}"), framework="pt") as file:
    tensors = {{name: file.get_tensor(name) for name in file.keys()}}
    scalars = json.loads(file.metadata()["scalars"])
expected, rows = tensors.pop("expected"), tensors.pop("rows")
found = torch.ops.ad_flashinfer.cached_attention(**tensors, **scalars).flatten(0, 1)[rows].double()
print(f"largest error: {{(found - expected).abs().max() / expected.abs().max():.3g}} of the largest value")
'''


class _ArgumentRecorder(fx.Interpreter):
    """Runs a graph and keeps the arguments of one node as they are when it runs, and its result."""

    def __init__(self, gm: fx.GraphModule, node: fx.Node) -> None:
        super().__init__(gm)
        self._node = node
        self.arguments: dict[str, Any] = {}
        self.result = torch.empty(0)

    def run_node(self, n: fx.Node) -> Any:
        if n is self._node:
            args = map_arg(g.op_args(n), lambda source: self.env[source])
            self.arguments = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in args.items()
            }
        result = super().run_node(n)
        if n is self._node:
            self.result = result
        return result


def as_tables(found: CheckReport) -> list[RenderableType]:
    """The comparison for a terminal."""
    from rich.table import Table

    phases = list(dict.fromkeys(phase for site in found.sites for phase in site.errors))
    sites = Table(
        "#", "module", "prefill", "decode", *phases, "at most", "", title="Attention against float64"
    )
    for site in found.sites:
        errors = [f"{site.errors[phase]:.1e}" for phase in phases]
        sites.add_row(
            str(site.index),
            site.module,
            site.prefill,
            site.decode,
            *errors,
            f"{site.tolerance:.0e}",
            "ok" if site.is_ok else "WRONG",
        )
    logits = Table(
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
            "ok" if each.is_ok else "WRONG",
        )
    verdict = "all agrees" if found.first is None else f"first departure: {found.first}"
    parts: list[RenderableType] = [sites, logits, verdict]
    return parts if found.reproducer is None else [*parts, f"run it alone: python {found.reproducer}"]
