"""For a program that was exported elsewhere: transform it, save the result, load it again.

::

    program = torch.export.export(model, (input_ids, position_ids), dynamic_shapes=...)
    cached = transform(program, max_batch_size=8, max_seq_len=4096)  # CachedModel: step(), or Engine(cached)
    torch.export.save(to_program(cached), "cached.pt2")
    cached = restore("cached.pt2", max_batch_size=8, max_seq_len=4096)

A saved program is the graph with its weights. Metadata and pages are its inputs, so they are not in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes_config

from ad_flashinfer_pass import ops, pipeline, saved_program
from ad_flashinfer_pass.config import AutoDeployConfig, check_type
from ad_flashinfer_pass.errors import ConfigError, ExportError
from ad_flashinfer_pass.experts import offer_to_transformers
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.attention.select import Choice
from ad_flashinfer_pass.kernels.kernel_plan import KernelPlan
from ad_flashinfer_pass.ops.experts import KERNELS as EXPERTS_KERNELS
from ad_flashinfer_pass.ops.linear import KERNELS as LINEAR_KERNELS
from ad_flashinfer_pass.records import (
    CachedSite,
    KvCacheResource,
    SiteNotes,
    StateResource,
    TransformContext,
)
from ad_flashinfer_pass.runtime.cached_model import POOLS, CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo
from ad_flashinfer_pass.transforms.export_model import plain_module

offer_to_transformers()
assert ops.__name__  # a loaded program calls the ops of torch.ops.ad_flashinfer

_TOKENS = ("input_ids", "position_ids")
_TOKENWISE = (*_TOKENS, "sequence_lengths")
_SIZES = ("max_batch_size", "max_seq_len", "max_num_tokens", "tokens_per_block")
_OF_RANKS = (torch.ops.ad_flashinfer.all_reduce, torch.ops.ad_flashinfer.all_gather)
_MADE_FOR = "made_for"
"""Buffer of a saved program: its sizes, int64 [4]. The graph alone does not tell them all."""


def transform(
    program: ExportedProgram,
    config: AutoDeployConfig | None = None,
    *,
    on_event: Callable[[str], None] | None = None,
    **settings: Any,
) -> CachedModel:
    """Give the attention of an exported program paged caches.

    Args:
        program: a function of input_ids and position_ids, int64 [batch, seq], both dynamic, by these names or
            in this order; its first output is the logits [batch, seq, vocab]. It is not changed.
        config: how it is served; its keys about the model are not read.
        on_event: called with the name of each transform as it begins.
        settings: the keys of a config, in place of ``config``.

    Returns:
        The model with its pools allocated.

    Raises:
        ConfigError: a setting is unknown or out of range, or given twice.
        TransformError: the pass refuses the program.
    """
    check_type("program", program, ExportedProgram)
    config = _config(config, settings)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _take_out_constants(module, program)
    _order_inputs(module)
    return pipeline.transform_module(module, config, on_event=on_event)[0]


def to_program(model: CachedModel) -> ExportedProgram:
    """A transformed model as an ExportedProgram, for ``torch.export.save``.

    Its inputs are, by name, the tokens, the metadata and the caches; the numbers of tokens, sequences, rows
    of logits and pages are dynamic. torch.export adds guards that no number is 1, which the graph does not
    need: call ``program.module(check_guards=False)``, or ``restore`` the program.

    Raises:
        ConfigError: the model was compiled or captured, is one rank's part, has a head that guesses, or
            computes sequences anew when they grow beyond some length (longrope).
    """
    check_type("model", model, CachedModel)
    module = model.module
    if not isinstance(module, fx.GraphModule):
        raise ConfigError(
            f"only a model of compile_backend 'torch-simple' can be saved, got a {type(module).__name__}; "
            "choose the backend when it is restored."
        )
    if any(g.is_op(node, *_OF_RANKS) for node in module.graph.nodes):
        raise ConfigError(
            "a model of several ranks cannot be saved, of which this is one's part: save the program before "
            "transform, and transform it in each rank."
        )
    if model.sequence_info.has_next:
        raise ConfigError(
            "a model whose hidden states a head reads cannot be saved, since the head cannot: transform it "
            "without speculative_config, or with drafter: ngram."
        )
    if (limit := model.sequence_info.recompute_at) is not None:
        raise ConfigError(
            f"a saved program cannot say that sequences are computed anew when they grow beyond {limit} "
            f"tokens, which this model's longrope needs: set max_seq_len to {limit} at most."
        )
    given = {**model.sequence_info.named_args(), **model.caches}
    for name, shape in (*((name, (2, 13)) for name in _TOKENWISE), ("token_gather_indices", (5,))):
        given[name] = torch.zeros(shape, dtype=torch.int64, device=model.device)
    module = fx.GraphModule(module, module.graph)  # with the same tensors, and what restore asks for
    module.register_buffer(_MADE_FOR, torch.tensor(_sizes(model.sequence_info), device=model.device))
    # torch.export wants them in the order of the graph's inputs.
    examples = {node.name: given[node.name] for node in module.graph.find_nodes(op="placeholder")}
    dynamic: dict[str, Any] = dict.fromkeys(examples)
    dynamic.update({name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in _TOKENWISE if name in examples})
    dynamic["token_gather_indices"] = {0: Dim.DYNAMIC}
    dynamic.update({name: {0: Dim.DYNAMIC} for name in model.caches})
    # Else sizes of 1, a decode step's, would be taken for another program.
    oblivious = symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with oblivious, torch.no_grad():
        return torch.export.export(module, (), examples, dynamic_shapes=dynamic, strict=False)


def restore(
    program: ExportedProgram | Path | str, config: AutoDeployConfig | None = None, **settings: Any
) -> CachedModel:
    """A model, with pools of its own, from a program that ``to_program`` made.

    Args:
        program: path of the saved file, of which no code is run, or what ``torch.export.load`` returned.
        config: with the sizes for which the program was transformed. Dtypes, scales and device must be the
            program's if they are given; compile_backend and the number of pages may differ.
        settings: the keys of a config, in place of ``config``.

    Raises:
        ConfigError: a setting is unknown, or is not that of the program.
        CapacityError: the caches do not fit in memory.
        LoadError: the file cannot be read.
    """
    check_type("program", program, ExportedProgram, PathLike, str)
    if not isinstance(program, ExportedProgram):
        program = saved_program.load(program)
    gm, _ = plain_module(program.module(check_guards=False))
    output = gm.graph.output_node()
    output.args = (g.args(output)[0][0],)
    ctx = pipeline.context(pipeline.on_device_of(getattr(gm, _MADE_FOR, None), _config(config, settings)))
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    ctx.sequence_info.has_lengths = "sequence_lengths" in inputs
    ctx.sequence_info.has_states = "slot_idx" in inputs
    for name in ctx.sequence_info.named_args():
        if name not in inputs:
            raise ConfigError(f"the program takes no {name}: it was not made by transform.")
    for name, node in inputs.items():
        if name.startswith("kv_cache_"):
            planes, heads, page_size, head_dim = map(int, g.shape(node)[1:])
            resource = KvCacheResource(name, heads, head_dim, page_size, g.value(node).dtype, planes)
            ctx.resources.append(resource)
        elif name.startswith(POOLS):
            shape = tuple(map(int, g.shape(node)[1:]))
            ctx.states.append(StateResource(name, shape, g.value(node).dtype))
    ctx.vocab_size = int(g.shape(g.args(output)[0])[-1])
    _check_kernels(gm)
    ctx.sites = _sites(gm)
    attention = torch.ops.ad_flashinfer.cached_attention.default
    drafting, num_drafts = ctx.config.speculative_config, ctx.sequence_info.num_drafts
    for node in gm.graph.find_nodes(op="call_function", target=attention):
        args = g.op_args(node)
        # verify_kernel takes drafts alone, all of one length: without drafts, extends are prefilled.
        is_unused = args["verify_kernel"] and not num_drafts
        ctx.sequence_info.max_extend_len = 1 if is_unused else args["max_extend_len"]
    if drafting is not None and drafting.drafter != "ngram":
        raise ConfigError(
            f"speculative_config: got drafter: {drafting.drafter}, but a program that was saved has one "
            "model; use drafter: ngram, or transform both models."
        )
    if num_drafts and ctx.sequence_info.max_extend_len != 1 + num_drafts:
        raise ConfigError(
            f"speculative_config: the program was transformed without {num_drafts} drafts a sequence; leave "
            "the key out, or transform the model again."
        )
    _check_settings(gm, ctx)
    module, _ = pipeline.Pipeline.of(ctx.config).since("initialize_cache").run(gm, ctx)
    return CachedModel(module, ctx.caches, ctx.sequence_info, ctx.vocab_size, ctx.weights, ctx.drafter)


def _check_kernels(gm: fx.GraphModule) -> None:
    """Refuse a plan that names what is no kernel here, now and not in a step of that size."""
    attention, verifiers = (
        {
            name: (0,) if getattr(provider, options) is getattr(Provider, options) else (0, 1)
            for name, provider in select.PROVIDERS.items()
        }
        for options in ("options", "verify_options")
    )
    known: dict[Any, dict[str, Mapping[str, Sequence[int]]]] = {
        torch.ops.ad_flashinfer.cached_attention.default: {
            "prefill_kernel": dict.fromkeys(attention, (0,)),
            "decode_kernel": attention,
            "verify_kernel": {"": (0,), **verifiers},
        },
        torch.ops.ad_flashinfer.experts.default: {"plan": EXPERTS_KERNELS},
        torch.ops.ad_flashinfer.quantized_experts.default: {"plan": EXPERTS_KERNELS},
        torch.ops.ad_flashinfer.linear.default: {"plan": LINEAR_KERNELS},
    }
    for node, arguments in ((node, known.get(node.target, {})) for node in gm.graph.nodes):
        for argument, num_options in arguments.items():
            text = g.op_args(node)[argument]
            if not _is_plan(text, num_options) or (argument == "prefill_kernel" and text not in attention):
                raise ConfigError(
                    f"{g.where(node)}: {argument} {text[:80]!r} is nothing that this version runs; it has "
                    f"{', '.join(num_options)}. Transform the model again."
                )


def _is_plan(text: str, num_options: Mapping[str, Sequence[int]]) -> bool:
    if text in num_options and not text:
        return True
    try:
        kernels = KernelPlan.parse(text).kernels
    except ValueError:
        return False
    return all(name in num_options and len(given) in num_options[name] for name, given in kernels)


def _sizes(info: SequenceInfo) -> list[int]:
    return [getattr(info, name) for name in _SIZES]


def _check_settings(gm: fx.GraphModule, ctx: TransformContext) -> None:
    """Refuse what is not the program's. Sizes have to be given; of the rest only what is given counts."""
    made_for = getattr(gm, _MADE_FOR, None)
    if made_for is None:
        raise ConfigError("the program was saved without its sizes, by an older version: transform it again.")
    for name, made, given in zip(_SIZES, made_for.tolist(), _sizes(ctx.sequence_info), strict=True):
        if made != given:
            raise ConfigError(
                f"the program was transformed for other sizes: {name} is {made}, and {given} with these "
                f"settings. Give {', '.join(_SIZES[:-1])} and {_SIZES[-1]} as they were."
            )
    here, there = ctx.device, made_for.device
    if (here.type, here.index or 0) != (there.type, there.index or 0):
        move = f"torch.export.passes.move_to_device_pass(program, '{here}') moves it"
        raise ConfigError(f"device: the program is on {there}, got {here}; {move}.")
    if here.type == "cuda":
        _check_versions(ctx.sites, torch.cuda.get_device_capability(here)[0])
    config, cache = ctx.config, ctx.config.kv_cache_config
    sites = list({each.cache: each.site for each in ctx.sites}.values())
    found: list[tuple[BaseModel, str, Any, Any]] = []
    for site in sites[:1]:
        found.append((config, "dtype", site.dtype, _dtype(config.dtype, site)))
        found.append((cache, "dtype", site.kv_dtype, _dtype(cache.dtype, site)))
    for name, scale in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
        scales = scale if isinstance(scale, list) else [scale] * len(sites)
        with_own = [(n, site) for n, site in enumerate(sites) if name == "k_scale" or not site.is_latent]
        own = [getattr(site, name) for _, site in with_own]
        found.append((cache, name, own, [scales[n] for n, _ in with_own]))
    for model, name, own, asked in found:
        if name in model.model_fields_set and own != asked:
            raise ConfigError(
                f"{'kv_cache_config.' if model is cache else ''}{name}: the program was transformed for "
                f"{own}, got {getattr(model, name)!r}; leave the key out, or transform the model again."
            )


def _check_versions(sites: list[CachedSite], compute_major: int) -> None:
    """Refuse kernels that the FlashInfer which is installed does not have yet; a newer one chose them."""
    for site in sites:
        plans = {"prefill": site.prefill.kernel, "decode": site.decode.kernel, "verify": site.verify}
        for phase, plan in plans.items():
            for kernel in KernelPlan.parse(plan).names if plan else []:
                provider = select.PROVIDERS[kernel]
                since = provider.extend_since if phase == "verify" else None
                lacking = [*provider.capability.too_old(site.site, compute_major), since and since.lacking()]
                for reason in filter(None, lacking):
                    raise ConfigError(
                        f"the program runs {kernel} at {site.where}, but {reason}: transform it here."
                    )


def _dtype(name: str, site: Site) -> torch.dtype:
    """What a dtype of the config means for a site; auto is the site's own."""
    known = {"auto": site.dtype, "fp8": torch.float8_e4m3fn}
    return known[name] if name in known else getattr(torch, name)


def _sites(gm: fx.GraphModule) -> list[CachedSite]:
    """The attention sites of a graph after insertion, in order, with the kernels that it names."""
    sites: list[CachedSite] = []
    target = torch.ops.ad_flashinfer.cached_attention.default
    for node in gm.graph.find_nodes(op="call_function", target=target):
        args = g.op_args(node)
        _, planes, heads, page_size, width = g.shape(args["kv_cache"])
        query = g.value(args["query"])
        names = ("scale", "v_head_dim", "sliding_window", "logit_cap", "chunk", "k_scale", "v_scale")
        site = Site(
            dtype=query.dtype,
            kv_dtype=g.value(args["kv_cache"]).dtype,
            num_heads=int(query.shape[2]),
            num_kv_heads=int(heads),
            head_dim=int(width if planes == 1 else query.shape[3]),
            page_size=int(page_size),
            has_sinks=args["sinks"] is not None,
            has_alibi=args["alibi_slopes"] is not None,
            is_latent=planes == 1,
            shares_kv=args["kv_cache"].name in {other.cache for other in sites},
            **{name: args[name] for name in names},
        )
        prefill, decode = (Choice(args[f"{phase}_kernel"], "as saved") for phase in ("prefill", "decode"))
        notes = SiteNotes("ad_flashinfer.cached_attention, as saved")
        where, cache = g.where(node), args["kv_cache"].name
        verify = args["verify_kernel"]
        sites.append(CachedSite(where, g.module_path(node), notes, site, prefill, decode, cache, verify))
    return sites


def _config(config: AutoDeployConfig | None, settings: dict[str, Any]) -> AutoDeployConfig:
    if config is not None and settings:
        raise ConfigError(f"give a config or its keys, not both, got config and {', '.join(settings)}.")
    return AutoDeployConfig(**settings) if config is None else config


def _take_out_constants(module: fx.GraphModule, program: ExportedProgram) -> None:
    """Take out inputs that are no tensors, such as a flag: the graph was made for one value of each."""
    inputs = module.graph.find_nodes(op="placeholder")
    values = dict(zip(inputs, program.graph_signature.user_inputs, strict=True))
    constants = {node: value for node, value in values.items() if not g.is_tensor(node)}
    for call in module.graph.find_nodes(op="call_module"):
        name = str(call.target)
        kept = [node for node in g.args(call) if node not in constants]
        given = [constants.get(node, _GIVEN) for node in g.args(call)]
        module.set_submodule(name, _WithConstants(module.get_submodule(name), given))
        call.args = tuple(kept)
    for node in constants:
        module.graph.erase_node(node)


_GIVEN = object()


class _WithConstants(nn.Module):
    """A module of torch.export that checks its inputs, some of which are always the same."""

    def __init__(self, module: nn.Module, inputs: list[Any]) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs

    def forward(self, *args: Any) -> Any:
        given = iter(args)
        return self.module(*(next(given) if value is _GIVEN else value for value in self.inputs))


def _order_inputs(module: fx.GraphModule) -> None:
    """Bring input_ids and position_ids to the front."""
    inputs = {node.name: node for node in module.graph.find_nodes(op="placeholder")}
    named = [inputs[name] for name in _TOKENS if name in inputs]
    if len(named) == 1:
        raise ExportError(
            f"the program takes {', '.join(inputs)}: it must take input_ids and position_ids, by these "
            "names or in this order, since positions start anew with each sequence of a batch."
        )
    for node in reversed(named):
        first = module.graph.find_nodes(op="placeholder")[0]
        if first is not node:
            first.prepend(node)
