"""Kernels of linears chosen by measurement, for each block of token counts; see ``kernels.measure``.

For each kind of linear, torch and the candidates of ``small_gemm`` run over the model's own weights, in a
captured graph, one weight after the other: what does not fit in the L2 cache in a step does not fit here. How
a kernel begins and ends beside others shows only among them: so those that are nearly as fast as the fastest
then take its place, kind by kind, in a graph of all linears of the model in their order. Numbers of tokens
that ``small_gemm`` pads to the same block, as 2 to 16, share what was found for the largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.kernel_plan import Kernel
from ad_flashinfer_pass.kernels.linear import small_gemm
from ad_flashinfer_pass.kernels.linear.by_torch import by_torch
from ad_flashinfer_pass.kernels.linear.quantized import Quantization
from ad_flashinfer_pass.kernels.linear.small_gemm import Around, Config, Numbers
from ad_flashinfer_pass.kernels.measure import Measured, compile_together, fastest, microseconds

_MIN_GAIN = 0.99
"""A kernel of ours must take less than this share of torch's time, or noise would decide."""
_NEARLY = 1.25
"""Kernels that take up to so many times the time of the fastest are tried among the others ..."""
_TRIED = 6
"""... so many of them."""
_MIN_GAIN_OF_ALL = 0.997
"""Of the time of all linears, for what replaces the kernel that is the fastest alone."""


class LinearKind(NamedTuple):
    """Linears that a kernel runs alike; see ``ops.linear``."""

    shape: tuple[int, int]
    """Rows and elements of a row."""
    dtype: torch.dtype
    """Of x."""
    quantization: tuple[str, str] | None
    """What of the weight shares a scale, and how activations are quantized; None: the weight has the dtype
    of x. Groups of a row: the weight is of 4 bits; else float8."""
    has_norm: bool
    has_residual: bool
    gated: bool

    def __str__(self) -> str:
        around = {"norm": self.has_norm, "residual": self.has_residual, "swiglu": self.gated}
        if self.quantization is not None:
            scaling, activation = self.quantization
            bits = "4 bits" if self.group else "float8"
            around[f"{bits} by {scaling}, activations {activation}"] = True
        return " + ".join(
            [f"{list(self.shape)} {self.dtype}", *(name for name, has in around.items() if has)]
        )

    @property
    def group(self) -> int:
        """Elements that share a scale, of 4 bits; else 0."""
        scaling = "" if self.quantization is None else self.quantization[0]
        return int(scaling.rpartition(" ")[2]) if scaling.startswith("group") else 0

    @property
    def numbers(self) -> Numbers:
        """What small_gemm multiplies."""
        if self.quantization is None:
            return "w16a16"
        return "w4a16" if self.group else "w8a16"


class Linear(NamedTuple):
    """One linear of a model."""

    weight: Tensor
    """[rows, depth], on a CUDA device."""
    dtype: torch.dtype
    """bfloat16 or float16, of x; of the weight, too, if it is not quantized."""
    quantization: Quantization | None
    has_norm: bool
    has_residual: bool
    gated: bool

    @property
    def kind(self) -> LinearKind:
        """What decides which kernel is the fastest."""
        how = self.quantization
        return LinearKind(
            (len(self.weight), self.weight.shape[1] * (2 if self.weight.dtype == torch.uint8 else 1)),
            self.dtype,
            None if how is None else (how.scaling(self.weight), how.activation),
            *self[3:],
        )


class Linears:
    """The linears of a model: a ``Subject``, whose sizes are numbers of tokens.

    Args:
        linears: in the order in which they run.
    """

    default = "torch"

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.row = [(linear.kind, linear) for linear in linears]
        self.kinds = list(dict.fromkeys(kind for kind, _ in self.row))
        self.device = linears[0].weight.device
        self.max_tokens = max(small_gemm.max_tokens(kind.numbers) for kind in self.kinds)
        """Of a step whose linears may run by our kernels."""

    def alike(self, size: int) -> int:
        """See ``Subject``."""
        return small_gemm.token_block(size)

    def key(self, size: int) -> str:
        """See ``Subject``."""
        counts = Counter(kind for kind, _ in self.row)
        return f"{size} tokens, " + ", ".join(f"{count} x {kind}" for kind, count in counts.items())

    def candidates(self, size: int) -> list[str]:
        """Those of any kind; more tokens are left to torch."""
        if size > self.max_tokens:
            return []
        of_kinds = (_named(small_gemm.all_candidates, kind, size) for kind in self.kinds)
        return list(dict.fromkeys(chain.from_iterable(of_kinds)))

    def measure(self, size: int, kernels: list[str]) -> Measured:
        """See ``Subject``."""
        launches = {kind: _Launches(kind, size, self.device) for kind in self.kinds}
        compile_together(
            chain.from_iterable(launches[kind].compiled(linear) for kind, linear in dict(self.row).items()),
            self.device,
        )
        times = {
            kind: launches[kind].times([linear for other, linear in self.row if other == kind])
            for kind in self.kinds
        }

        def of_all(choice: dict[LinearKind, str]) -> float:
            launched = [launches[kind].launch(linear, choice[kind]) for kind, linear in self.row]
            return len(launched) * microseconds(launched)

        chosen = {
            kind: fastest({k: [t] for k, t in of_kind.items()}, "torch", _MIN_GAIN)
            for kind, of_kind in times.items()
        }
        total = total_alone = of_all(chosen)
        for kind in self.kinds:
            for kernel in _nearly_as_fast(times[kind], chosen[kind]):
                other = {**chosen, kind: kernel}
                if (time := of_all(other)) < _MIN_GAIN_OF_ALL * total:
                    chosen, total = other, time
        notes = [
            f"{size} tokens: {len(self.row)} linears take {total:.0f} us by torch's and small_gemm's "
            f"kernels, {total_alone:.0f} by those that are the fastest alone"
        ]
        for kind, of_kind in times.items():
            ours = {kernel: time for kernel, time in of_kind.items() if kernel != "torch"}
            best = ours.get(chosen[kind], min(ours.values(), default=None))
            shown = "no candidate" if best is None else f"ours {best:.1f}"
            shown = f"torch {of_kind['torch']:.1f}, {shown} us"
            notes.append(f"{size} tokens, {kind}: {chosen[kind]} ({shown})")
        return Measured([chosen[kind] for kind in self.kinds], notes)


class _Launches:
    """The linears of a kind, with inputs of random numbers."""

    def __init__(self, kind: LinearKind, num_tokens: int, device: torch.device) -> None:
        self.kind = kind
        self.rows, depth = kind.shape[0] // (2 if kind.gated else 1), kind.shape[1]
        new = partial(torch.empty, dtype=kind.dtype, device=device)
        self.x = new(num_tokens, depth).normal_()
        residual = new(num_tokens, self.rows).zero_() if kind.has_residual else None
        norm = new(depth).fill_(1) if kind.has_norm else None
        self.around = Around(None, norm, 1e-6, residual, kind.gated)

    def launch(self, linear: Linear, kernel: str) -> Callable[[], Tensor]:
        (name, options), how = Kernel.parse(kernel), linear.quantization
        if name == "torch":
            return partial(by_torch, self.x, linear.weight, *self.around, how)
        config, is_w8a8 = Config(*options), name == "small_gemm_w8a8"
        return partial(small_gemm.run, self.x, linear.weight, self.around, config, how, is_w8a8)

    @cached_property
    def kernels(self) -> list[str]:
        """torch and each candidate."""
        (num_tokens, depth), kind = self.x.shape, self.kind
        by_blocks = kind.quantization is not None and kind.quantization[0] == "block"
        fitting = partial(
            small_gemm.candidates,
            rows=self.rows,
            depth=depth,
            gated=kind.gated,
            by_blocks=by_blocks,
            group=kind.group,
            shared_bytes=small_gemm.shared_bytes_of(self.x.device),
        )
        return _named(fitting, kind, num_tokens)

    def compiled(self, linear: Linear) -> list[Callable[[], Tensor]]:
        """A launch of each candidate that Triton compiles."""
        return [self.launch(linear, kernel) for kernel in self.kernels if kernel != "torch"]

    def times(self, linears: Sequence[Linear]) -> dict[str, float]:
        """Microseconds of a launch by torch and by each candidate."""
        return {k: microseconds([self.launch(linear, k) for linear in linears]) for k in self.kernels}


def _named(candidates: Callable[..., list[Config]], kind: LinearKind, num_tokens: int) -> list[str]:
    """torch, and the kernels of ``small_gemm`` in the configurations that ``candidates`` gives."""
    numbers: dict[str, Numbers] = {"small_gemm": kind.numbers}
    if kind.numbers == "w8a16" and kind.quantization is not None and num_tokens > 1:
        scaling, activation = kind.quantization
        if scaling != "block" and activation in ("tensor", "token"):
            numbers["small_gemm_w8a8"] = "w8a8"
    found = [
        str(Kernel(name, config))
        for name, of in numbers.items()
        for config in candidates(num_tokens, numbers=of)
    ]
    return ["torch", *found]


def _nearly_as_fast(times: Mapping[str, float], best: str) -> list[str]:
    """The others that are worth trying among all linears, the fastest first."""
    near = [kernel for kernel in times if kernel != best and times[kernel] < _NEARLY * times[best]]
    return sorted(near, key=lambda kernel: times[kernel])[:_TRIED]
