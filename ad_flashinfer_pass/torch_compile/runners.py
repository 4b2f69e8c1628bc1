"""How a transformed graph is run on a batch: by Inductor, or by a compile backend of ``compile_model``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_flashinfer_pass.errors import ConfigError, SessionError, UnsupportedError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.pipeline import Pipeline
from ad_flashinfer_pass.records import TransformContext
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import METADATA_ARGS
from ad_flashinfer_pass.torch_compile.batch import Batch
from ad_flashinfer_pass.torch_compile.session import CacheSession, CompileRecord

INDUCTOR = "inductor"
aten = torch.ops.aten

Runner = Callable[[Batch, Sequence[Tensor]], Sequence[Any]]


def runner(
    gm: fx.GraphModule,
    ctx: TransformContext,
    caches: Sequence[Tensor],
    session: CacheSession,
    backend: str,
    mode: str,
    weights: Mapping[str, Tensor],
) -> Runner:
    """The graph as a function of a batch and of what it takes beside it; gives its outputs.

    Args:
        gm: after the transforms; takes input_ids and position_ids [1, total_tokens], further tensors, the
            metadata if it has caches, and those.
        ctx: of the transforms.
        caches: in the order of the graph's inputs.
        session: theirs.
        backend: inductor, or a compile backend of ``AutoDeployConfig``.
        mode: Inductor's.
        weights: the model's parameters and buffers, as it names them.
    """
    if backend == INDUCTOR:
        return _Packed(gm, caches, session, _Inductor(gm, session, mode))
    if backend == "torch-simple":
        compiled, _ = Pipeline.of(ctx.config).since("compile").run(gm, ctx)
        return _Packed(gm, caches, session, compiled)
    return _Captured(gm, ctx, caches, session, backend, weights)


class _Packed:
    """Calls a graph with everything that it takes, in order.

    Where a step has one token, the tensors that torch.compile sees hold it twice; the graph gets it once.
    """

    def __init__(
        self, gm: fx.GraphModule, caches: Sequence[Tensor], session: CacheSession, call: Callable[..., Any]
    ) -> None:
        self._call = call
        self._caches = caches
        self._info = session.sequence_info
        placeholders = gm.graph.find_nodes(op="placeholder")
        num_extra = len(placeholders) - 2 - (len(METADATA_ARGS) + len(caches) if caches else 0)
        self._extra_dims = [_token_dims(node) for node in placeholders[2 : 2 + num_extra]]
        self._output_dims = [_token_dims(node) for node in g.args(gm.graph.output_node())[0]]

    def __call__(self, batch: Batch, extra: Sequence[Tensor]) -> Sequence[Any]:
        if batch.num_tokens > 1:
            return self._call(*self._args(batch, extra))
        once = [_repeated(x.detach(), dims, 1) for x, dims in zip(extra, self._extra_dims, strict=True)]
        outputs = self._call(*self._args(batch, once))
        return [_repeated(x, dims, 2) for x, dims in zip(outputs, self._output_dims, strict=True)]

    def _args(self, batch: Batch, extra: Sequence[Tensor]) -> list[Tensor]:
        batch.nest_by(self._info.nest_sequences)
        named = self._info.named_args()
        first = [named[name].view(1, batch.num_tokens) for name in ("input_ids", "position_ids")]
        metadata = [named[name] for name in METADATA_ARGS] if self._caches else []
        return [*first, *extra, *metadata, *self._caches]


def _token_dims(node: Any) -> list[int]:
    """Dimensions of a tensor that count tokens."""
    if not g.is_tensor(node):
        return []
    return [dim for dim, size in enumerate(g.shape(node)) if isinstance(size, torch.SymInt)]


def _repeated(tensor: Any, dims: list[int], times: int) -> Any:
    """The first token ``times`` times."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    if not dims:
        return tensor
    return tensor.repeat([times if dim in dims else 1 for dim in range(tensor.dim())])


class _Inductor:
    """The graph compiled by Inductor when it is called first: for one token, and for any number above.

    Inductor may assume something about the number, such as that indices fit in 32 bits; where that does not
    hold, it is compiled again.
    """

    def __init__(self, gm: fx.GraphModule, session: CacheSession, mode: str) -> None:
        self._gm = gm
        self._session = session
        options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
        # Our ops read lengths on the host, which a graph of Inductor's would keep as they were.
        self._config = {**options, "triton.cudagraphs": False}
        self._mode = mode
        self._compiled: list[tuple[Callable[[int], bool], Callable[..., Any]]] = []
        self._by_tokens: dict[int, Callable[..., Any]] = {}

    def __call__(self, *args: Tensor) -> Any:
        num_tokens = args[0].shape[1]
        call = self._by_tokens.get(num_tokens)
        if call is None:
            call = next((call for holds, call in self._compiled if holds(num_tokens)), None)
            if call is None:
                call = self._compile(args)
            self._by_tokens[num_tokens] = call
        return call(*args)

    def _compile(self, args: Sequence[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # takes a second to import

        start = time.perf_counter()
        num_tokens = args[0].shape[1]
        env = ShapeEnv()
        mode = FakeTensorMode(shape_env=env)
        placeholders = self._gm.graph.find_nodes(op="placeholder")
        fakes = [
            mode.from_tensor(arg, symbolic_context=_symbols(arg, _token_dims(node) if num_tokens > 1 else []))
            for node, arg in zip(placeholders, args, strict=True)
        ]
        gm = g.copied(self._gm)  # Inductor edits it
        try:
            with tracing(TracingContext(mode)):
                call: Callable[..., Any] = compile_fx(gm, fakes, config_patches=self._config)  # type: ignore[assignment]
        except TorchDynamoException as err:
            raise UnsupportedError(
                f"Inductor cannot compile the graph in mode {self._mode!r} "
                f"({str(err).strip().splitlines()[0]}). Set another mode, or compile_backend torch-simple."
            ) from err
        size = fakes[0].shape[1]
        symbol = size.node.expr if isinstance(size, torch.SymInt) else None
        guards = [guard.expr for guard in env.guards]

        def holds(n: int) -> bool:
            if symbol is None or n == 1:
                return symbol is None and n == 1
            return all(bool(guard.subs(symbol, n)) for guard in guards)

        self._compiled.append((holds, call))
        shape = "1 token" if symbol is None else "2 tokens or more"
        self._session.compiles.append(CompileRecord(INDUCTOR, shape, time.perf_counter() - start))
        return call


def _symbols(tensor: Tensor, token_dims: Sequence[int]) -> StatelessSymbolicContext:
    dims = [DimDynamic.DUCK if dim in token_dims else DimDynamic.STATIC for dim in range(tensor.dim())]
    return StatelessSymbolicContext(dynamic_sizes=dims)


class _Captured:
    """A whole model through ``compile_model``; on CUDA decode steps are replays of graphs.

    Steps with prefill are not: a captured one gives the logits of the last tokens, not of all.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        ctx: TransformContext,
        caches: Sequence[Tensor],
        session: CacheSession,
        backend: str,
        weights: Mapping[str, Tensor],
    ) -> None:
        outputs = g.args(gm.graph.output_node())[0]
        placeholders = gm.graph.find_nodes(op="placeholder")
        if not caches or len(outputs) != 1 or len(placeholders) != 2 + len(METADATA_ARGS) + len(caches):
            raise ConfigError(
                f"compile_backend {backend!r} captures a whole model that returns logits alone, but this "
                f"graph is a piece of one or has {len(outputs)} outputs. torch.compile(..., fullgraph=True) "
                "shows graph breaks; without one, use compile_backend inductor or torch-simple."
            )
        start = time.perf_counter()
        _as_served(gm, ctx)
        # Its warm-up runs on page 1, which may have an owner here.
        kept = [cache[1].clone() for cache in caches]
        module, _ = Pipeline.of(ctx.config).since("compile").run(gm, ctx)
        for cache, page in zip(caches, kept, strict=True):
            cache[1] = page
        self._model = CachedModel(module, ctx.caches, session.sequence_info, ctx.vocab_size)
        self._weights = weights
        self._addresses = [tensor.data_ptr() for tensor in weights.values()]
        self._session = session
        session.captured.append(self._model)
        session.batch.was_overwritten()
        session.compiles.append(CompileRecord(backend, "decode", time.perf_counter() - start))

    def __call__(self, batch: Batch, extra: Sequence[Tensor]) -> Sequence[Tensor]:
        addresses = [tensor.data_ptr() for tensor in self._weights.values()]
        if addresses != self._addresses:
            moved = zip(self._weights, addresses, self._addresses, strict=True)
            names = [name for name, now, then in moved if now != then]
            raise SessionError(
                f"{names[0]} has moved in memory since its steps were captured, which read the old place. "
                "Write new weights into it (load_state_dict, copy_), or call torch._dynamo.reset()."
            )
        batch.nest_by(self._model.nest)
        self._session.last_decoder = self._model
        logits = self._model.forward()[None, : batch.num_tokens]
        # A copy, since the next replay overwrites its own result.
        return [logits.repeat(1, 2 if batch.num_tokens == 1 else 1, 1)]


def _as_served(gm: fx.GraphModule, ctx: TransformContext) -> None:
    """Give the graph the signature of the standalone path: tokens [b, 1] or [1, total], logits [1, n, vocab].

    The gather's input is there and not used: torch.compile gives the logits of all tokens.
    """
    output = gm.graph.output_node()
    (logits,) = g.args(output)[0]
    output.args = (logits,)
    ctx.vocab_size = int(g.shape(logits)[-1])
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders[:2]:
        users = list(node.users)
        with gm.graph.inserting_after(placeholders[-1]):
            packed = g.call_op(gm.graph, aten.reshape.default, node, [1, -1])
        for user in users:
            user.replace_input_with(node, packed)
    g.add_input(gm, "token_gather_indices", ctx.sequence_info.named_args()["token_gather_indices"])
    g.finish(gm)
