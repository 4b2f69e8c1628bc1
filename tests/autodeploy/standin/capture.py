"""CUDA graphs as AutoDeploy makes them: whole for decode, piecewise for the rest.

AD/compile/backends/torch_cudagraph.py, AD/compile/piecewise_utils.py, AD/compile/piecewise_runner.py. On a
CPU nothing is captured, but the rules about addresses are kept: static inputs by identity, and a replayed
static segment gives back the tensors of its capture, whatever was passed through it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

if TYPE_CHECKING:
    from tests.autodeploy.standin import Generation

IS_CUDA = torch.cuda.is_available()


class DynamicOpPolicy(Enum):
    """piecewise_utils.py of summer 2026."""

    OUT_BUFFER = auto()
    METADATA_WRAPPER = auto()
    EAGER = auto()


def piecewise_utils(generation: Generation) -> dict[str, Any]:
    """The tables of AD/compile/piecewise_utils.py, with the in-tree entries that matter to our names."""
    attention = [
        "auto_deploy::flashinfer_attention_mha_with_cache",
        "auto_deploy::torch_cached_attention_with_cache",
        "auto_deploy::trtllm_attention_mha_with_cache",
    ]
    prep = ["auto_deploy::flashinfer_attention_prepare_metadata", "auto_deploy::mamba_ssm_prepare_metadata"]
    persistent = ["auto_deploy::trtllm_attention_prepare_metadata"]
    if not generation.policies:  # with _SKIP_OUT_DYNAMIC_OPS computed at import
        return {
            "_CACHED_ATTENTION_OPS": attention,
            "_METADATA_PREP_OPS": prep,
            "_PERSISTENT_BUFFER_OPS": persistent,
            "_SKIP_OUT_DYNAMIC_OPS": {*prep, *persistent},
        }
    table = dict.fromkeys(attention, DynamicOpPolicy.OUT_BUFFER)
    table |= dict.fromkeys(prep, DynamicOpPolicy.METADATA_WRAPPER)
    table |= dict.fromkeys(persistent, DynamicOpPolicy.EAGER)
    return {"_DYNAMIC_OP_POLICIES": table, "DynamicOpPolicy": DynamicOpPolicy}


def policy_of(utils: Any, node: fx.Node) -> DynamicOpPolicy | None:
    """How an op is classified; None: static, it would be captured."""
    if node.op != "call_function":
        return None
    name = node.target.name() if hasattr(node.target, "name") else str(node.target)
    if hasattr(utils, "_DYNAMIC_OP_POLICIES"):
        return next((p for k, p in utils._DYNAMIC_OP_POLICIES.items() if _matches(name, k)), None)
    if any(_matches(name, k) for k in utils._PERSISTENT_BUFFER_OPS):
        return DynamicOpPolicy.EAGER
    if any(_matches(name, k) for k in utils._METADATA_PREP_OPS):
        return DynamicOpPolicy.METADATA_WRAPPER
    if any(_matches(name, k) for k in utils._CACHED_ATTENTION_OPS):
        return DynamicOpPolicy.OUT_BUFFER
    return None


def _matches(op_name: str, registered: str) -> bool:
    """_matches_op_name: the registered name in the op's, or its base name."""
    return registered in op_name or registered.split("::")[-1] in op_name


class CapturedGraph:
    """Decode, one graph a batch size; ``CapturedGraph`` of torch_cudagraph.py."""

    def __init__(self, model: nn.Module, info: Any, named_args: Callable[[], dict[str, Tensor]]) -> None:
        self.model, self.info, self.named_args = model, info, named_args
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self.num_replays = 0

    def capture(self, batch_sizes: list[int]) -> None:
        """Largest first; static inputs by identity; three warm-ups."""
        sizes = sorted(batch_sizes, reverse=True)
        self.info.set_generate_only_batch(sizes[0])
        args = self.named_args()
        self._inputs = [args[name].clone() for name in ("input_ids", "position_ids")]
        self._static = {
            name: value for name, value in args.items() if name not in ("input_ids", "position_ids")
        }
        pool = None
        for size in sizes:
            self.info.set_generate_only_batch(size)
            self._copy(size)
            run = partial(self.model, *(x[:size] for x in self._inputs), **self._static)
            for _ in range(3):
                run()
            if not IS_CUDA:
                self._graphs[size] = (run, run())
                continue
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                out = run()
            torch.cuda.synchronize()
            pool = pool or graph.pool()
            self._graphs[size] = (graph, out)

    def _copy(self, size: int) -> None:
        args = self.named_args()
        for buffer, name in zip(self._inputs, ("input_ids", "position_ids"), strict=True):
            buffer[:size].copy_(args[name])

    def replay(self, size: int) -> Tensor:
        """The graph of a batch size, which the caller has padded to."""
        args = self.named_args()
        moved = [name for name, value in self._static.items() if args[name] is not value]
        assert not moved, f"static inputs are other objects now: {moved}"
        self._copy(size)
        graph, out = self._graphs[size]
        self.num_replays += 1
        if not IS_CUDA:
            return graph()
        graph.replay()
        return out.clone()


class PiecewiseGraph:
    """Prefill and mixed steps, split at dynamic ops; one capture of each static segment a token bucket.

    ``split_graph_at_dynamic_ops``, ``ADPiecewiseRunner``, ``DynamicOpWrapper``, ``MetadataWrapper``. The
    inputs of a replay have the size of the step, not of the bucket (``DualModeCapturedGraph``).
    """

    def __init__(self, gm: fx.GraphModule, utils: Any, named_args: Callable[[], dict[str, Tensor]]) -> None:
        self.named_args = named_args
        self.policies: dict[str, DynamicOpPolicy] = {}
        parts: dict[fx.Node, int] = {}
        part, dynamic = 0, {}
        for node in gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            policy = policy_of(utils, node)
            parts[node] = part = part + (policy is not None)
            if policy is not None:
                dynamic[part] = policy
                part += 1
        self.split = split_module(gm, gm, lambda node: parts.get(node, 0), keep_original_order=True)
        self.policies = {f"submod_{i}": policy for i, policy in dynamic.items()}
        for name, policy in self.policies.items():
            if policy is DynamicOpPolicy.OUT_BUFFER:
                self._check_out(getattr(self.split, name))
        self._captured: dict[tuple[str, int], Any] = {}
        self._pool: Any = None
        self.num_replays = 0

    @staticmethod
    def _check_out(submodule: fx.GraphModule) -> None:
        """``_inject_out_param``: RuntimeError without ``out`` in the schema; it must be left unfilled."""
        (node,) = (n for n in submodule.graph.nodes if n.op == "call_function")
        names = [arg.name for arg in node.target._schema.arguments]
        assert names[-1] == "out", f"{node.target} has no out= at the end of its schema"
        assert len(node.args) < len(names), "out= must be left unfilled"

    def capture(self, num_tokens: int) -> None:
        """Warm up twice, then capture every static segment."""
        for phase in ("warmup", "warmup", "capture"):
            self._run(num_tokens, phase)

    def replay(self, num_tokens: int) -> Tensor:
        """Replay the static segments and run the dynamic ops."""
        self.num_replays += 1
        return self._run(num_tokens, "replay")

    def _run(self, num_tokens: int, phase: str) -> Tensor:
        args = self.named_args()
        values: dict[fx.Node, Any] = {}
        for node in self.split.graph.nodes:
            if node.op == "placeholder":
                values[node] = args[str(node.target)]
            elif node.op == "get_attr":
                values[node] = getattr(self.split, str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            elif node.op == "call_function":  # getitem of a segment's results
                pick: Any = node.target
                values[node] = pick(*fx.node.map_arg(node.args, values.__getitem__))
            else:
                call = fx.node.map_arg(node.args, values.__getitem__)
                values[node] = self._segment(str(node.target), call, num_tokens, phase)
        raise AssertionError("a graph has an output")

    def _segment(self, name: str, args: Any, num_tokens: int, phase: str) -> Any:
        submodule, policy, key = getattr(self.split, name), self.policies.get(name), (name, num_tokens)
        if phase == "warmup":
            return submodule(*args)
        if policy is None:
            return self._static_segment(submodule, args, key, phase)
        if policy is DynamicOpPolicy.OUT_BUFFER:
            return self._with_out(submodule, args, key, phase)
        result = submodule(*args)
        if policy is DynamicOpPolicy.METADATA_WRAPPER:
            return self._stable(result, key, phase)
        return result

    def _static_segment(self, submodule: nn.Module, args: Any, key: Any, phase: str) -> Any:
        """ADPiecewiseRunner: a replay reads what lies where the inputs of the capture were, and gives the
        outputs of the capture, even those that only pass through."""
        if phase == "capture":
            if IS_CUDA:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool):
                    out = submodule(*args)
                self._pool = self._pool or graph.pool()
                self._captured[key] = (graph, out, args)
            else:
                out = submodule(*args)
                self._captured[key] = (submodule, out, args)
            return out
        graph, out, captured = self._captured[key]
        if IS_CUDA:
            graph.replay()
            return out
        fresh = submodule(*captured)
        for old, new in zip(_flat(out), _flat(fresh), strict=True):
            if old.data_ptr() != new.data_ptr() and not any(
                new.data_ptr() == a.data_ptr() for a in _tensors(captured)
            ):
                old.copy_(new)
        return out

    def _with_out(self, submodule: fx.GraphModule, args: Any, key: Any, phase: str) -> Tensor:
        """DynamicOpWrapper and ``_coalesce_output``."""
        if phase == "capture":
            self._captured[key] = torch.full_like(submodule(*args), float("nan"))
        out = self._captured[key]
        (node,) = (n for n in submodule.graph.nodes if n.op == "call_function")
        env = dict(zip(submodule.graph.find_nodes(op="placeholder"), args, strict=True))
        env |= {n: getattr(submodule, str(n.target)) for n in submodule.graph.find_nodes(op="get_attr")}
        call = fx.node.map_arg(node.args, env.__getitem__)
        returned = node.target(*call, out=out)
        assert returned.numel() == 0, "with out=, an op returns nothing that aliases it"
        return out

    def _stable(self, result: Any, key: Any, phase: str) -> Any:
        """MetadataWrapper: clones, with the first dimension padded to 64; what is behind is zero."""
        if phase == "capture":
            self._captured[key] = tuple(
                torch.zeros(-(-x.shape[0] // 64) * 64, *x.shape[1:], dtype=x.dtype, device=x.device)
                for x in result
            )
        for stable, fresh in zip(self._captured[key], result, strict=True):
            stable.zero_()
            stable[: fresh.shape[0]].copy_(fresh)
        return self._captured[key]


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in _flat(values) if isinstance(x, Tensor)]


def _flat(values: Any) -> list[Any]:
    return [y for x in values for y in _flat(x)] if isinstance(values, (tuple, list)) else [values]
