"""The callable of ``compile_backend``.

``torch-simple``: the graph's own Python code, op by op. ``torch-cudagraph``: the same, captured and replayed,
for the batch sizes of ``cuda_graph_batch_sizes`` and the token counts of ``cuda_graph_token_buckets``; see
``runtime.cuda_graph``.
``torch-opt``: all but our ops compiled by Inductor, see ``pieces``; on CUDA captured likewise.

Parameters move to the top of the module: reading ``model.layers.0.mlp.up_proj.weight`` takes six lookups
in Python, for each parameter and step.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.weights import step_weights
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import PHASES, Phase
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.registry import register
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule, bucket_sizes
from ad_flashinfer_pass.runtime.drafts.ngram import NgramDrafter
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep

_MANY = 256
"""Tokens of the largest step of the warm-up."""


@register("compile_model")
def compile_model(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
    """Make the graph ready to be called."""
    assert isinstance(model, fx.GraphModule)
    ctx.weights = step_weights(model)
    drafting = ctx.config.speculative_config
    if drafting is not None and drafting.drafter == "ngram":
        ctx.drafter = NgramDrafter(ctx.sequence_info)
    report = TransformReport("compile_model", num_matches=1)
    compiled: nn.Module = _compiled(model, ctx, report)
    if ctx.small_batch_model is not None:
        limit = _most_tokens(ctx.small_batch_model)
        compiled = _BySize(_compiled(ctx.small_batch_model, ctx, report), compiled, limit)
    if ctx.config.compile_backend == "torch-opt":
        from ad_flashinfer_pass.runtime.inductor import eager_pieces  # as in _compiled

        tokens = g.token_input(model)
        _warm_up(compiled, ctx, None if tokens is None else g.value(tokens))
        report.notes.append(str(eager_pieces(compiled)))
    if ctx.config.compile_backend == "torch-simple" or ctx.device.type != "cuda" or ctx.is_draft:
        return compiled, report
    return _captured(compiled, ctx, report), report


def _most_tokens(small: fx.GraphModule) -> int:
    """Of a step for which the graph of few tokens is the faster: what its linears have kernels for."""
    from ad_flashinfer_pass.kernels.linear import small_gemm  # needs triton

    linears = small.graph.find_nodes(op="call_function", target=torch.ops.ad_flashinfer.linear.default)
    has_4_bits = any(g.attribute(g.op_args(node)["weight"]).dtype == torch.uint8 for node in linears)
    return small_gemm.max_tokens("w4a16" if has_4_bits else "w16a16")


class _BySize(nn.Module):
    """One graph for steps of up to so many tokens, another for larger ones."""

    def __init__(self, small: nn.Module, large: nn.Module, limit: int) -> None:
        super().__init__()
        self.small, self.large, self.limit = small, large, limit

    def forward(self, **inputs: Tensor) -> Tensor:
        # Tokens may come as vectors, and positions several at a place.
        graph = self.small if inputs["position_ids"].shape[-2:].numel() <= self.limit else self.large
        return graph(**inputs)


def _compiled(model: fx.GraphModule, ctx: TransformContext, report: TransformReport) -> fx.GraphModule:
    model = _with_flat_attributes(model)
    report.notes.append(f"{ctx.config.compile_backend}: {len(model.graph.nodes)} nodes")
    if ctx.config.compile_backend != "torch-opt":
        return model
    from ad_flashinfer_pass.runtime.inductor import compile_pieces, keep_compiled  # imports Dynamo: seconds

    keep_compiled()
    model, pieces = compile_pieces(model)
    num_calls = sum(piece.num_calls for piece in pieces)
    report.notes.append(f"Inductor: {len(pieces)} distinct pieces, called {num_calls} times a step")
    return model


def _captured(model: nn.Module, ctx: TransformContext, report: TransformReport) -> CudaGraphModule:
    captured = CudaGraphModule(
        model, *bucket_sizes(ctx.config), host_kernels(ctx), ctx.drafter, _host_verifier(ctx)
    )
    captured.capture(
        ctx.sequence_info, ctx.caches, lambda text: ctx.on_event(f"compile_model: CUDA graphs, {text}")
    )
    report.notes.append(f"decode captured for batch sizes {_listed(captured.batch_sizes)}")
    if captured.verify_cost:
        costs = ", ".join(f"{cost:.2f} with {size}" for size, cost in captured.verify_cost.items())
        report.notes.append(f"verification captured for the same, at the cost of {costs} decode steps")
    report.notes.append(f"prefill captured for token counts {_listed(captured.token_buckets)}")
    for phase, kernel in captured.host_kernels.items():
        report.notes.append(f"not captured: {phase} by {kernel}, which reads lengths on the host")
    mebibytes = sum(cost.bytes for cost in captured.costs) / 2**20
    report.notes.append(f"capture: {sum(c.seconds for c in captured.costs):.1f} s, {mebibytes:.1f} MiB")
    return captured


def host_kernels(ctx: TransformContext) -> dict[Phase, str]:
    """The kernel that keeps a phase from being captured, for each phase that has one."""
    sites = list(ctx.sites)
    if ctx.draft is not None and ctx.hidden_states:  # the head runs at the end of each step
        sites += ctx.draft.sites
    return {
        phase: kernel
        for phase in PHASES
        for plan in sorted({getattr(site, phase).kernel for site in sites})
        for kernel in select.on_host(phase, plan)
    }


def _host_verifier(ctx: TransformContext) -> str | None:
    """The kernel that keeps steps with drafts from being captured, if there is one."""
    kernels = {site.verify or site.prefill.kernel for site in ctx.sites}
    if ctx.draft is not None:
        kernels |= {kernel for phase, kernel in host_kernels(ctx.draft).items() if phase == "decode"}
        kernels |= {site.verify or site.prefill.kernel for site in ctx.draft.sites if ctx.hidden_states}
    return next(
        (k for k in sorted(kernels) if select.on_host("prefill", k) or select.on_host("decode", k)), None
    )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def _warm_up(model: nn.Module, ctx: TransformContext, tokens: Tensor | None) -> None:
    """Compile what steps need: one token, few, many, and no, one or many rows of logits.

    Many is beyond ``_BySize.limit``, if that can be. Runs on the first pages, which no sequence owns yet, and
    clears them.
    """
    info = ctx.sequence_info
    few, short = max(1, min(2, info.max_seq_len, info.max_num_tokens // 2)), info.max_batch_size >= 2
    paged = [ctx.caches[resource.name] for resource in ctx.resources]
    num_pages = min((len(cache) for cache in paged), default=ctx.num_pages) - 1
    many = min(_MANY, info.max_seq_len, info.max_num_tokens, num_pages * info.tokens_per_block)
    pages = list(range(1, 1 + -(-many // info.tokens_per_block)))
    # Captured steps of many tokens have many rows of logits; others, as of one prompt, often one.
    is_captured = ctx.device.type == "cuda" and not host_kernels(ctx)
    longest = [many - 1, 1] if is_captured and short and many > 1 else [many]
    steps = (([1], True), ([few], True), ([few], False), ([few] * (1 + short), True), (longest, True))
    for index, (lengths, gather) in enumerate(steps):
        ctx.on_event(f"compile_model: Inductor, step {index + 1} of {len(steps)}")
        info.nest_sequences(
            [
                SequenceStep([0] * n, 0, pages[: -(-n // info.tokens_per_block)], gather, slot=1 + row)
                for row, n in enumerate(lengths)
            ]
        )
        args = info.named_args()
        if tokens is not None and tokens.is_floating_point():
            shape = (*args.pop("input_ids").shape, tokens.shape[-1])
            args["inputs_embeds"] = torch.zeros(shape, dtype=tokens.dtype, device=ctx.device)
        with torch.inference_mode():
            model(**args, **ctx.caches)
    for cache in paged:
        cache[pages] = 0


def _with_flat_attributes(model: fx.GraphModule) -> fx.GraphModule:
    root = nn.Module()
    for node in model.graph.find_nodes(op="get_attr"):
        tensor, name = g.attribute(node), str(node.target).replace(".", "_")
        while hasattr(root, name) and getattr(root, name) is not tensor:
            name += "_"
        g.register_tensor(root, name, tensor)
        node.target = name
    return fx.GraphModule(root, model.graph)
