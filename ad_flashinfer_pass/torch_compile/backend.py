"""``torch.compile(model, backend="flashinfer_trtllm", options={"session": session})``.

Dynamo captures the model, or the pieces of it between graph breaks, and hands each graph to the backend. A
graph is transformed when it is called first, since only then the tensors are known that it is called with:
it takes the form of an exported graph (``pieces``), the transforms of the pipeline give each attention its
cache, and what comes out is compiled by Inductor or by a compile backend of ``compile_model`` (``runners``).

A step holds any number of sequences, one after the other in [1, total_tokens], so one graph serves prefill
and decode. Which layer has which cache is told by its weights: of the key and of the value projection.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ad_flashinfer_pass.config import nearest
from ad_flashinfer_pass.errors import (
    ConfigError,
    ExportError,
    MaskError,
    NoAttentionError,
    PackingError,
    SessionError,
    TransformError,
    UnsupportedError,
)
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.ops import STATES
from ad_flashinfer_pass.pipeline import Pipeline
from ad_flashinfer_pass.records import CachedSite, TransformContext
from ad_flashinfer_pass.torch_compile import runners
from ad_flashinfer_pass.torch_compile.batch import Batch, CacheGroup
from ad_flashinfer_pass.torch_compile.pieces import (
    Piece,
    Source,
    branch_on_tokens,
    cache_of_its_own,
    exported,
    has_own_cache,
    sources,
)
from ad_flashinfer_pass.torch_compile.session import CacheSession, CompileRecord
from ad_flashinfer_pass.transforms.insert_cached_attention import cache_pair

aten = torch.ops.aten
_OPTIONS = ("session", "compile_backend", "mode", "cuda_graph_batch_sizes")
_ATTENTION_TRANSFORMS = ("match_repeat_kv", "match_attention", "classify_mask")
# What this module and a session do in their place.
_NOT_HERE = ("export_model", "gather_logits_before_lm_head", "initialize_cache")

_RECURRENT = "A session keeps no state of a recurrent layer: give such a model to LLM."
_SPLIT = (
    "A graph break split the model into pieces, and what runs between them is not checked: "
    "torch.compile(..., fullgraph=True) says where. If it is a loop over experts, call the model within "
    "ad_flashinfer_pass.experts.as_one_op(model)."
)


def flashinfer_trtllm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend, as torch.compile calls it.

    Args:
        gm: a graph from Dynamo.
        example_inputs: of the call that made Dynamo capture it.
        options: ``session`` (required), a ``CacheSession``; ``compile_backend``, how the transformed graph is
            run: inductor (default) or one of AutoDeployConfig.compile_backend; ``mode``, Inductor's, as
            torch.compile has it; ``cuda_graph_batch_sizes``, as in AutoDeployConfig.
        mode: torch.compile refuses it beside options, so it stands there.

    Returns:
        What Dynamo calls in place of the graph.

    Raises:
        ConfigError: an option is unknown or has a bad value.
        SessionError: there is no session among the options.
    """
    settings = _checked(options or {}, mode)
    return _Compiled(gm, sources(gm, example_inputs), **settings)


def _checked(options: dict[str, Any], mode: str | None) -> dict[str, Any]:
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(
                f"torch.compile options: unknown option {name!r}; {nearest(name, list(_OPTIONS))}"
            )
    session = options.get("session")
    if not isinstance(session, CacheSession):
        given = f"got {session!r}" if "session" in options else "there is none"
        raise SessionError(
            f'the backend flashinfer_trtllm needs options={{"session": CacheSession(...)}}, {given}.'
            + (
                f' torch.compile takes mode or options: put "mode": {mode!r} into the options.'
                if mode
                else ""
            )
        )
    backend = options.get("compile_backend", runners.INDUCTOR)
    inductor_mode = options.get("mode", "default")
    changes = {name: options[name] for name in ("cuda_graph_batch_sizes",) if name in options}
    if backend != runners.INDUCTOR:
        if "mode" in options:
            raise ConfigError(f"the option mode is Inductor's; compile_backend is {backend!r}.")
        session.config(compile_backend=backend, **changes)
    elif changes:
        raise ConfigError(f"the option {next(iter(changes))} is for backends that capture CUDA graphs.")
    modes = list(dict.fromkeys(("default", *torch._inductor.list_mode_options())))
    if inductor_mode not in modes:
        raise ConfigError(f"unknown mode {inductor_mode!r}; {nearest(str(inductor_mode), modes)}")
    if inductor_mode == "reduce-overhead":
        raise ConfigError(
            "the mode reduce-overhead is Inductor's CUDA graphs, which do not see that lengths change from "
            'step to step. Set "compile_backend": "torch-opt", which captures.'
        )
    return {"session": session, "backend": backend, "mode": inductor_mode, "changes": changes}


class _Compiled:
    """What Dynamo calls in place of one graph."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: list[Source],
        session: CacheSession,
        backend: str,
        mode: str,
        changes: dict[str, Any],
    ) -> None:
        self.gm = gm
        self.inputs = inputs
        self.session = session
        self.backend = backend
        self.mode = mode
        self.attributes = [i for i, source in enumerate(inputs) if source.is_attribute]
        self._numbers = [i for i, source in enumerate(inputs) if source.is_number]
        self._changes = changes
        self.branch = branch_on_tokens(session.sequence_info.max_num_tokens)
        self.own_cache = cache_of_its_own()
        self._transformed: dict[tuple[float, ...], _Transformed] = {}
        session.compiles.append(CompileRecord("dynamo", f"{len(gm.graph.nodes)} nodes", 0.0))

    def context(self) -> TransformContext:
        """For one run of the transforms."""
        changes = dict(self._changes)
        if self.backend != runners.INDUCTOR:
            changes |= {"compile_backend": self.backend, "cuda_graph_token_buckets": []}
        if self.backend in (runners.INDUCTOR, "torch-simple"):
            # To fuse weights makes the module's own views of them, which only served models are worth.
            changes["transforms"] = {"fuse_gemms": {"enabled": False}}
        return TransformContext(
            config=self.session.config(**changes),
            device=self.session.device,
            sequence_info=self.session.sequence_info,
            keeps_strides=True,  # Dynamo guards them
            on_event=self.session.on_event,
        )

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the open batch.

        Raises:
            SessionError: gradients are on, no batch is open, or the batch does not fit the state.
            TransformError: the pass refuses the graph.
        """
        batch = self.session.batch
        if torch.is_grad_enabled():
            raise SessionError(
                "the compiled model is for inference: the KV cache has no gradient. Use torch.no_grad."
            )
        if self.own_cache is not None:
            raise has_own_cache(self.own_cache)
        # Pieces of one code, such as the layers of a model, share a graph and differ in their weights.
        key = (*(id(args[i]) for i in self.attributes), *(args[i].item() for i in self._numbers))
        transformed = self._transformed.get(key)
        if transformed is None:
            # Caches and weights made in inference mode could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                transformed = _Transformed(self, args, batch)
            self._transformed[key] = transformed
        return transformed(batch, args)


class _Transformed:
    """A graph with its weights, caches and compiled code."""

    def __init__(self, owner: _Compiled, args: Sequence[Any], batch: Batch) -> None:
        session = owner.session
        start = time.perf_counter()
        self._piece = Piece(
            owner.gm, owner.inputs, args, batch.inputs["input_ids"], batch.inputs["position_ids"]
        )
        # Their ids are taken while they live.
        self._weights = {owner.inputs[i].name: args[i] for i in owner.attributes}
        self._dtypes = [weight.dtype for weight in self._weights.values()]
        if self._piece.extra:
            session.note_split(_SPLIT)
        ctx = owner.context()
        self._group: CacheGroup | None = None
        try:
            if owner.branch is not None:
                is_mask = "masking_utils" in owner.branch
                raise ExportError(
                    f"the graph is right only for {owner.branch}. A step has any number of tokens, whatever "
                    "the length of its sequences: do not branch on it, or lower max_num_tokens of "
                    "the session if that is the bound. "
                    + ('Load the model with attn_implementation="eager".' if is_mask else _RECURRENT)
                )
            ctx.on_event("export_model")
            gm = exported(self._piece, session.device, session.sequence_info.max_num_tokens)
            _refuse_training(gm)
            keys = _transform(gm, ctx)
            self._vocab_size = _vocab_size(gm)
            if keys:
                weights = list(self._weights.values())
                self._group = session.group(keys, ctx.resources, _name(ctx.sites[0]), weights)
        except TransformError as err:
            err.args = (f"{err}{self._hint(err)}",)
            raise
        seconds = time.perf_counter() - start
        session.compiles.append(CompileRecord("pass", f"{len(ctx.sites)} attentions", seconds))
        caches = self._group.caches if self._group is not None else []
        ctx.caches.update(zip((resource.name for resource in ctx.resources), caches, strict=True))
        self._runner = runners.runner(gm, ctx, caches, session, owner.backend, owner.mode, self._weights)

    def _hint(self, err: TransformError) -> str:
        """What may be behind a refusal."""
        if self._piece.extra:
            return f" {_SPLIT}"
        if "position_ids" not in self._piece.where and isinstance(err, (MaskError, PackingError)):
            return " The model was called without position_ids: give it those of batch.inputs."
        return ""

    def __call__(self, batch: Batch, args: Sequence[Any]) -> Any:
        if [weight.dtype for weight in self._weights.values()] != self._dtypes:
            raise SessionError(
                "weights have another dtype than when the model was compiled, which Dynamo of torch "
                f"{torch.__version__} does not see: call torch._dynamo.reset() before the next step."
            )
        for name, index in self._piece.where.items():
            if args[index] is not batch.inputs[name]:
                raise SessionError(f"{name} is not that of the open batch: call the model with batch.inputs.")
        largest = max(max(tokens) for _, tokens in batch.entries)
        if self._vocab_size is not None and largest >= self._vocab_size:
            raise SessionError(
                f"token {largest} is not in the vocabulary of the model, which has {self._vocab_size} rows."
            )
        if self._group is not None:
            self._group.check(batch)
        outputs = self._runner(batch, [args[i] for i in self._piece.extra])
        if self._group is not None:
            batch.ran.add(self._group)
        return outputs


def _transform(gm: fx.GraphModule, ctx: TransformContext) -> list[Hashable]:
    """Run the transforms in place, but those of the stage compile, which runners run.

    Gives the keys of the layers, in order; none if there is no attention.
    """
    for node in gm.graph.nodes:
        if g.is_op(node, *STATES):
            raise UnsupportedError(
                f"{g.where(node)}: {node.target} has a state, which a session of torch.compile does not "
                "keep: give the model to LLM, or to ad_flashinfer_pass.exported.transform.",
                node=node,
            )
    transforms = Pipeline.of(ctx.config).without(*_NOT_HERE)
    early = transforms.before("post_load_fusion")
    try:
        early.run(gm, ctx)
    except NoAttentionError as nothing:
        # A piece between graph breaks, or a model without attention, which the batch refuses when it ends.
        try:
            early.without(*_ATTENTION_TRANSFORMS).run(gm, ctx)
        except PackingError as err:
            raise PackingError(f"{err} There is no attention in this graph. {_SPLIT}") from nothing
        return []
    keys = _layer_keys(gm, ctx)  # while each layer has weights of its own
    transforms.since("post_load_fusion").before("compile").run(gm, ctx)
    return keys


def _vocab_size(gm: fx.GraphModule) -> int | None:
    """Rows of the smallest table that is looked up by token; None if none is."""
    tokens = gm.graph.find_nodes(op="placeholder")[0]
    tables = [
        g.args(node)[0]
        for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if g.args(node)[1] is tokens
    ]
    return min((int(g.shape(table)[0]) for table in tables), default=None)


def _refuse_training(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if g.is_op(node, aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.native_dropout):
            args = g.op_args(node)
            if args["train"] and args["p"]:
                raise SessionError(
                    f"{g.where(node)}: the model is in training mode: call model.eval() first."
                )


def _name(site: CachedSite) -> str:
    return site.module or site.where


def _layer_keys(gm: fx.GraphModule, ctx: TransformContext) -> list[Hashable]:
    """What tells each cache of a graph from all others: the weights that K and V are projected with.

    A layer that runs more than once, as in models that share weights, has a cache each time.
    """
    keys: dict[tuple[fx.Node, fx.Node], Hashable] = {}
    seen: Counter[Hashable] = Counter()
    kv_dtype = ctx.config.kv_cache_config.dtype
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.ad_flashinfer.attention.default):
        pair = cache_pair(node)
        if pair in keys:
            continue
        args = g.op_args(node)
        weights = _projection(args["key"]), _projection(args["value"])
        if None in weights:
            raise SessionError(
                f"{g.module_path(node) or g.where(node)} takes K or V that no weight of its graph makes. "
                f"{_SPLIT}"
            )
        shapes = [tuple(g.shape(args[name])[2:]) for name in ("key", "value")]
        layer = (*weights, *shapes, g.value(args["key"]).dtype, kv_dtype)
        keys[pair] = (*layer, seen[layer])
        seen[layer] += 1
    return list(keys.values())


def _projection(node: fx.Node) -> int | None:
    """Identity of the nearest weight matrix that a tensor is made with."""
    level, seen = [node], {node}
    while level:
        for current in level:
            if current.op == "get_attr":
                weight = g.attribute(current)
                if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                    return id(weight)
        level = [x for current in level for x in current.all_input_nodes if x not in seen]
        seen.update(level)
    return None
