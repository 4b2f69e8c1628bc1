"""Kernels chosen by measurement, at warm-up, before anything is captured.

For each number of tokens and kind of linear, torch and the candidates of ``small_gemm`` run over the model's
own weights, in a captured graph, one weight after the other: what does not fit in the L2 cache in a step does
not fit here. How a kernel begins and ends beside others shows only among them: so those that are nearly as
fast as the fastest then take its place, kind by kind, in a graph of all linears of the model in their order.
What is chosen is remembered on disk by GPU, versions, linears and candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ad_flashinfer_pass.kernels.linear import small_gemm
from ad_flashinfer_pass.kernels.linear.by_torch import by_torch
from ad_flashinfer_pass.kernels.linear.small_gemm import Around, Config
from ad_flashinfer_pass.kernels.measure import microseconds, read_choices, write_choices

_MIN_GAIN = 0.99
"""A kernel of ours must take less than this share of torch's time, or noise would decide."""
_NEARLY = 1.25
"""Kernels that take up to so many times the time of the fastest are tried among the others."""
_MIN_GAIN_OF_ALL = 0.997
"""Of the time of all linears, for what replaces the kernel that is the fastest alone."""


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


_Row = list[tuple[LinearKind, Tensor]]
"""The linears of a model for one number of tokens, in their order, by kind and weight."""

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
    """Choose for every number of tokens and kind of linear.

    Args:
        linears: (weight, has a norm, has a residual, is gated) of each, in the order in which they run;
            weights [rows, depth], bfloat16 or float16, on one CUDA device.
        token_counts: the numbers of tokens that will be captured; those above ``small_gemm.MAX_TOKENS`` are
            left to torch.
        on_progress: called with (done, all) numbers of tokens.

    Returns:
        For each number of tokens a line with the time of all linears, and one for each kind with its times.
    """
    linears, known, notes = list(linears), read_choices(), []
    counts = [n for n in token_counts if n <= small_gemm.MAX_TOKENS] if linears else []
    for index, n in enumerate(counts):
        row = [(LinearKind(n, tuple(w.shape), w.dtype, w.device, *around), w) for w, *around in linears]
        kinds, key = list(dict.fromkeys(kind for kind, _ in row)), _key(row)
        if key not in known:
            with torch.cuda.device_of(row[0][1]):
                known[key] = _measured(row, kinds)
        found = known[key]
        notes.append(
            f"{n} tokens: {len(row)} linears take {found['all']:.0f} us by torch's and small_gemm's kernels, "
            f"{found['all_alone']:.0f} by those that are the fastest alone"
        )
        for kind, of_kind in zip(kinds, found["kinds"], strict=True):
            if of_kind["config"] is not None:
                _CHOSEN[kind] = Config(*of_kind["config"])
            notes.append(_note(kind, of_kind))
        on_progress(index + 1, len(counts))
    write_choices(known)
    return notes


class _Launches:
    """The linears of a kind, with inputs of random numbers."""

    def __init__(self, kind: LinearKind) -> None:
        self.kind, self.rows = kind, kind.shape[0] // (2 if kind.gated else 1)
        options = {"dtype": kind.dtype, "device": kind.device}
        self.x = torch.randn(kind.num_tokens, kind.shape[1], **options)  # type: ignore[call-overload]
        residual = torch.zeros(kind.num_tokens, self.rows, **options) if kind.has_residual else None  # type: ignore[call-overload]
        norm = torch.ones(kind.shape[1], **options) if kind.has_norm else None  # type: ignore[call-overload]
        self.around = Around(None, norm, 1e-6, residual, kind.gated)

    def launch(self, weight: Tensor, config: Config | None) -> Callable[[], Tensor]:
        if config is None:
            return partial(by_torch, self.x, weight, *self.around)
        return partial(small_gemm.run, self.x, weight, self.around, config)

    def times(self, weights: Sequence[Tensor]) -> dict[Config | None, float]:
        """Microseconds of a launch by torch, None, and by each candidate."""
        kind = self.kind
        found = small_gemm.candidates(kind.num_tokens, self.rows, kind.shape[1], kind.gated)
        configs: list[Config | None] = [None, *found]
        return {c: microseconds([self.launch(weight, c) for weight in weights]) for c in configs}


def _measured(row: _Row, kinds: Sequence[LinearKind]) -> dict[str, Any]:
    """For each kind the configuration, None for torch's kernels, and the times that led there."""
    launches = {kind: _Launches(kind) for kind in kinds}
    times = {kind: launches[kind].times([w for other, w in row if other == kind]) for kind in kinds}

    def of_all(choice: dict[LinearKind, Config | None]) -> float:
        return len(row) * microseconds([launches[kind].launch(w, choice[kind]) for kind, w in row])

    alone = {kind: _fastest(times[kind]) for kind in kinds}
    chosen, total = alone, of_all(alone)
    total_alone = total
    for kind in kinds:
        for config in _nearly_as_fast(times[kind], alone[kind]):
            other = {**chosen, kind: config}
            if (time := of_all(other)) < _MIN_GAIN_OF_ALL * total:
                chosen, total = other, time
    return {
        "all": total,
        "all_alone": total_alone,
        "kinds": [
            {"config": chosen[kind], "torch": of_kind[None], "ours": _ours(of_kind, chosen[kind])}
            for kind, of_kind in times.items()
        ],
    }


def _fastest(times: Mapping[Config | None, float]) -> Config | None:
    best = min(times, key=lambda config: times[config])
    return best if times[best] < _MIN_GAIN * times[None] else None


def _nearly_as_fast(times: Mapping[Config | None, float], best: Config | None) -> list[Config | None]:
    """The others that are worth trying among all linears, the fastest first."""
    near = [config for config in times if config != best and times[config] < _NEARLY * times[best]]
    return sorted(near, key=lambda config: times[config])


def _ours(times: Mapping[Config | None, float], chosen: Config | None) -> float | None:
    """The time of the chosen configuration, or of the best that was not chosen; None: there is none."""
    if chosen is not None:
        return times[chosen]
    return min((time for config, time in times.items() if config is not None), default=None)


def _key(row: _Row) -> str:
    """What a measurement depends on."""
    device, num_tokens = row[0][0].device, row[0][0].num_tokens
    counts = Counter(kind for kind, _ in row)
    what = ", ".join(f"{count} x {_described(kind)}" for kind, count in counts.items())
    tried = len(small_gemm.all_candidates(num_tokens))
    versions = f"torch {torch.__version__} triton {triton.__version__}"
    return f"{torch.cuda.get_device_name(device)}, {versions}, {tried} ways: {num_tokens} tokens, {what}"


def _described(kind: LinearKind) -> str:
    around = {"norm": kind.has_norm, "residual": kind.has_residual, "swiglu": kind.gated}
    return " + ".join([f"{list(kind.shape)} {kind.dtype}", *(name for name, has in around.items() if has)])


def _note(kind: LinearKind, found: dict[str, Any]) -> str:
    ours = "no candidate" if found["ours"] is None else f"ours {found['ours']:.1f}"
    kernel = "torch" if found["config"] is None else f"small_gemm {tuple(found['config'])}"
    times = f"torch {found['torch']:.1f}, {ours} us"
    return f"{kind.num_tokens} tokens, {_described(kind)}: {kernel} ({times})"
