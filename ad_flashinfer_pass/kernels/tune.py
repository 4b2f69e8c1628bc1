"""Kernels chosen by measurement, at warm-up, before anything is captured.

For each kind of linear and number of tokens, torch and the candidates of ``small_gemm`` run over the model's
own weights, in a captured graph, one weight after the other as a decode step does: what fits in the L2
cache here fits there, too. The fastest is kept, and remembered on disk by GPU, versions and kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ad_flashinfer_pass.kernels import small_gemm
from ad_flashinfer_pass.kernels.measure import microseconds, read_choices, write_choices
from ad_flashinfer_pass.kernels.small_gemm import Around, Config
from ad_flashinfer_pass.ops.linear import by_torch

_MIN_GAIN = 0.99
"""A kernel of ours must take less than this share of torch's time, or noise would decide."""


class LinearKind(NamedTuple):
    """Linears that a kernel runs alike; see ``ops.linear``."""

    num_tokens: int
    shape: tuple[int, ...]
    """Of the weight."""
    dtype: torch.dtype
    device: torch.device
    has_norm: bool
    has_residual: bool
    gated: bool


_CHOSEN: dict[LinearKind, Config] = {}


def chosen_linear(
    num_tokens: int, weight: Tensor, has_norm: bool, has_residual: bool, gated: bool
) -> Config | None:
    """The kernel of ours for such a linear; None for torch's own."""
    shape = tuple(weight.shape)
    return _CHOSEN.get(
        LinearKind(num_tokens, shape, weight.dtype, weight.device, has_norm, has_residual, gated)
    )


def tune_linears(
    linears: Iterable[tuple[Tensor, bool, bool, bool]],
    token_counts: Sequence[int],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Choose for every kind of linear and every number of tokens.

    Args:
        linears: (weight, has a norm, has a residual, is gated) of each; weights [rows, depth], bfloat16 or
            float16, on one CUDA device.
        token_counts: the numbers of tokens that will be captured; those above ``small_gemm.MAX_TOKENS`` are
            left to torch.
        on_progress: called with (done, all).

    Returns:
        A line for each kind, with the times.
    """
    weights: dict[LinearKind, list[Tensor]] = {}
    for weight, *features in linears:
        for n in token_counts:
            if n <= small_gemm.MAX_TOKENS:
                kind = LinearKind(n, tuple(weight.shape), weight.dtype, weight.device, *features)
                weights.setdefault(kind, []).append(weight)
    known, notes = read_choices(), []
    for index, (kind, same) in enumerate(weights.items()):
        key = _key(kind, len(same))
        if key not in known:
            with torch.cuda.device_of(same[0]):
                known[key] = _measured(kind, same)
        if known[key]["config"] is not None:
            _CHOSEN[kind] = Config(*known[key]["config"])
        notes.append(_note(key, known[key]))
        on_progress(index + 1, len(weights))
    write_choices(known)
    return notes


def _measured(kind: LinearKind, weights: Sequence[Tensor]) -> dict[str, Any]:
    """The fastest configuration, None for torch's own kernels, and the microseconds of both."""
    rows = kind.shape[0] // (2 if kind.gated else 1)
    options = {"dtype": kind.dtype, "device": kind.device}
    x = torch.randn(kind.num_tokens, kind.shape[1], **options)  # type: ignore[call-overload]
    residual = torch.zeros(kind.num_tokens, rows, **options) if kind.has_residual else None  # type: ignore[call-overload]
    norm = torch.ones(kind.shape[1], **options) if kind.has_norm else None  # type: ignore[call-overload]
    around = Around(None, norm, 1e-6, residual, kind.gated)
    torch_time = microseconds([partial(by_torch, x, weight, *around) for weight in weights])
    times = {
        config: microseconds([partial(small_gemm.run, x, weight, around, config) for weight in weights])
        for config in small_gemm.candidates(kind.num_tokens, rows, kind.shape[1], kind.gated)
    }
    best = min(times, key=lambda config: times[config], default=None)
    ours = None if best is None else times[best]
    is_faster = ours is not None and ours < _MIN_GAIN * torch_time
    return {
        "config": list(best) if best is not None and is_faster else None,
        "ours": ours,
        "torch": torch_time,
    }


def _key(kind: LinearKind, num_weights: int) -> str:
    """What a measurement depends on."""
    around = [name for name, has in zip(("norm", "residual", "swiglu"), kind[4:], strict=True) if has]
    what = f"{kind.num_tokens} tokens, {num_weights} weights {list(kind.shape)} {kind.dtype}"
    versions = f"torch {torch.__version__} triton {triton.__version__}"
    return f"{torch.cuda.get_device_name(kind.device)}, {versions}: {' + '.join([what, *around])}"


def _note(key: str, found: dict[str, Any]) -> str:
    ours = "no candidate" if found["ours"] is None else f"ours {found['ours']:.1f}"
    kernel = "torch" if found["config"] is None else f"small_gemm {tuple(found['config'])}"
    return f"{key.partition(': ')[2]}: {kernel} (torch {found['torch']:.1f}, {ours} us)"
