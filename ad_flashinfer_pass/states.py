"""Layers with a state as one op of the graph, in place of functions of transformers.

Each modeling file has its own copies of a few functions that compute a layer's recurrence, by loops over
chunks that an export would unroll. For the time of an export, those that are known compute by the op:

Before: out, _ = torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, ...)      hundreds of nodes
After:  out = ad_flashinfer.gated_delta_rule(query, key, value, g, beta, ...)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.known_code import digest

assert ops.__name__  # importing it registers torch.ops.ad_flashinfer
_KEPT_APART = ("cu_seqlens", "seq_idx", "initial_state", "initial_states")
"""What no caller gives who has no cache and no packed sequences."""


@contextmanager
def as_ops(model: nn.Module) -> Iterator[None]:
    """Within, the known functions that the modules of ``model`` call compute by ops of ``ad_flashinfer``."""
    modules = {
        name for module in model.modules() if (name := type(module).__module__).startswith("transformers.")
    }
    replaced = []
    try:
        for space in (vars(sys.modules[name]) for name in sorted(modules)):
            for name, known in _FUNCTIONS.items():
                function = space.get(name)
                if function is not None and known.is_code_of(function):
                    space[name] = known.by_the_op
                    replaced.append((space, name, function))
        yield
    finally:
        for space, name, function in replaced:
            space[name] = function


class _Function(NamedTuple):
    """A function of transformers' modeling files."""

    by_the_op: Callable[..., Any]
    """Takes what it takes."""
    parts: tuple[str, ...]
    """Functions beside it that it calls."""
    digests: tuple[str, ...]
    """Of the code that was read, 5.17 to 5.24: other code is another function."""

    def is_code_of(self, function: Any) -> bool:
        """Whether this is the function that was read."""
        space = getattr(inspect.unwrap(function), "__globals__", {})
        return all(part in space for part in self.parts) and (
            digest([function, *(space[part] for part in self.parts)]) in self.digests
        )


def _convolution(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    _check("causal_conv1d_fn", kwargs)
    if activation not in (None, "silu", "swish"):
        raise UnsupportedError(
            f"causal_conv1d_fn with activation {activation!r}: ad_flashinfer.causal_conv1d has silu."
        )
    name = None if activation is None else "silu"
    out: Tensor = torch.ops.ad_flashinfer.causal_conv1d(hidden_states.transpose(1, 2), weight, bias, name)
    return out.transpose(1, 2)


def _gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    _check("chunk_gated_delta_rule", kwargs)
    normalised = kwargs.get("use_qk_l2norm_in_kernel", False)
    return torch.ops.ad_flashinfer.gated_delta_rule(query, key, value, g, beta, normalised), None


def _kda(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    _check("chunk_kda", kwargs)
    normalised = kwargs.get("use_qk_l2norm_in_kernel", False)
    return torch.ops.ad_flashinfer.kda(query, key, value, g, beta, normalised), None


def _ssd_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    _check("mamba_chunk_scan_combined", kwargs)
    limits = (dt_limit[0], None if dt_limit[1] == float("inf") else dt_limit[1])
    out = torch.ops.ad_flashinfer.ssd_scan(hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, *limits)
    return (out, None) if return_final_states else out


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    _check("selective_scan_fn", kwargs)
    x, dt, B, C = (each.transpose(1, 2) for each in (hidden_states, dt, B, C))
    out = torch.ops.ad_flashinfer.selective_scan(x, dt, A, B, C, D, delta_bias, delta_softplus).transpose(
        1, 2
    )
    if z is not None:
        out = out * F.silu(z)
    return (out, None) if return_last_state else out


def _check(name: str, kwargs: dict[str, Any]) -> None:
    given = [key for key in _KEPT_APART if kwargs.get(key) is not None]
    if given or kwargs.get("output_final_state"):
        raise UnsupportedError(
            f"{name} with {', '.join(given) or 'output_final_state'}: export the model without a cache and "
            "without packed sequences; its states are kept by the runtime."
        )


_FUNCTIONS = {
    "causal_conv1d_fn": _Function(_convolution, (), ("46a64a533f7f9585", "c93514a2a7a80462")),
    "torch_chunk_gated_delta_rule": _Function(
        _gated_delta_rule, ("l2norm",), ("9a2e2b325c0f03fa", "29773abc75d3e3d0")
    ),
    "chunk_kimi_delta_attention": _Function(_kda, ("l2norm",), ("76abd503b6e9a101", "2c16c431cf5dec4b")),
    "mamba2_chunk_scan": _Function(
        _ssd_scan,
        ("pad_tensor_by_size", "reshape_into_chunks", "segment_sum"),
        ("35f083013f687881", "7dcf8dd2c68a7da6"),
    ),
    "mamba_selective_scan": _Function(
        _selective_scan, (), ("1a8368b02864f8ce", "079f3ddfc6b71abc", "eacdbd351a0eedce")
    ),
}
