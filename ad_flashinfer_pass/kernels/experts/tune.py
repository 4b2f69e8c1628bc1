"""Kernels of experts chosen by measurement, for each number of tokens; see ``kernels.measure``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ad_flashinfer_pass.kernels.experts import by_torch, select
from ad_flashinfer_pass.kernels.experts.arguments import DEFAULT, Projection, arguments
from ad_flashinfer_pass.kernels.kernel_plan import Kernel
from ad_flashinfer_pass.kernels.measure import Measured, compile_together, fastest, microseconds

Weights = Mapping[str, Any]
"""By argument of ``ops.experts``; a tensor, or None."""
_LAYERS = 6
"""Of a kind that are timed in turn: together far more than an L2 cache holds."""


class ExpertsKind(NamedTuple):
    """Layers of experts that a kernel runs alike."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype
    """Of the weights."""
    x_dtype: torch.dtype
    by_blocks: bool
    """Each block of a float8 weight has a scale."""
    group: int
    """Elements of a row that share a scale, of 4 bits; else 0."""
    has_zero_points: bool
    options: tuple[tuple[str, Any], ...]
    """The arguments of ``ops.quantized_experts`` that are no tensors."""

    @property
    def quantization(self) -> str:
        """Of activations."""
        found: str = dict(self.options).get("input_quantization", "none")
        return found

    def __str__(self) -> str:
        blocks = " by blocks" if self.by_blocks else f" by groups of {self.group}" if self.group else ""
        blocks += " with zero points" if self.has_zero_points else ""
        if self.quantization != "none":
            blocks += f", activations {self.quantization}"
        sizes = f"{self.top_k} of {self.num_experts} experts {self.width} x {self.hidden}"
        return f"{sizes} {self.dtype}{blocks}"


def _kind(top_k: int, x_dtype: torch.dtype, weights: Weights, options: Mapping[str, Any]) -> ExpertsKind:
    up, down = (weights[f"{name}_proj"] for name in ("gate_up", "down"))
    if options["is_transposed"]:
        up, down = up.mT, down.mT
    parts = [
        Projection(weight, None, weights.get(f"{name}_scale"))
        for name, weight in (("gate_up", up), ("down", down))
    ]
    num_experts, hidden, _ = down.shape
    return ExpertsKind(
        num_experts,
        top_k,
        hidden,
        parts[1].depth,
        down.dtype,
        x_dtype,
        any(part.is_by_blocks for part in parts),
        parts[1].group,
        weights.get("down_zero_point") is not None,
        tuple(options.items()),
    )


class ExpertsLayers:
    """The layers of experts of a model: a ``Subject``, whose sizes are numbers of tokens.

    Args:
        layers: of each the experts of a token, the dtype of what comes in, the weights and scales as
            ``ops.quantized_experts`` takes them by name, on one CUDA device, and its arguments that are no
            tensors.
    """

    default = DEFAULT

    def __init__(self, layers: Sequence[tuple[int, torch.dtype, Weights, Mapping[str, Any]]]) -> None:
        self.row = [(_kind(*layer), layer[2]) for layer in layers]
        self.kinds = list(dict.fromkeys(kind for kind, _ in self.row))
        self.device = layers[0][2]["down_proj"].device

    def alike(self, size: int) -> int:
        """See ``Subject``; each is measured."""
        return size

    def key(self, size: int) -> str:
        """See ``Subject``."""
        counts = Counter(kind for kind, _ in self.row)
        return f"{size} tokens, " + ", ".join(f"{count} x {kind}" for kind, count in counts.items())

    def candidates(self, size: int) -> list[str]:
        """See ``Subject``; those of any kind, of which the default is the first of each."""
        return list(dict.fromkeys(chain.from_iterable(self._of(kind, size) for kind in self.kinds)))

    def measure(self, size: int, kernels: list[str]) -> Measured:
        """See ``Subject``; tokens choose their experts at random, which is the worst for their number."""
        chosen, notes = [], []
        for kind in self.kinds:
            layers = [weights for other, weights in self.row if other == kind][:_LAYERS]
            launched = [self._launch(kind, size, weights) for weights in layers]
            tried = [name for name in self._of(kind, size) if name in kernels]
            compiled = [partial(launched[0], name) for name in tried if name != "torch"]
            compile_together(compiled, self.device)
            times = {name: [microseconds([partial(run, name) for run in launched])] for name in tried}
            chosen.append(fastest(times, self.default))
            shown = ", ".join(f"{name} {us:.1f}" for name, (us,) in times.items())
            notes.append(f"{size} tokens, {kind}: {chosen[-1]} ({shown} us)")
        return Measured(chosen, notes)

    def _of(self, kind: ExpertsKind, size: int) -> list[str]:
        bits = 4 if kind.group else 8 * kind.dtype.itemsize
        sizes = (size, kind.top_k, kind.num_experts)
        found = select.candidates(*sizes, self.device, bits, kind.by_blocks, kind.quantization)
        # torch has none for quantized weights: it would copy those of each token's experts.
        others = ["torch"] if bits > 8 else []
        return [self.default, *map(str, found[1:]), *others]

    def _launch(self, kind: ExpertsKind, size: int, weights: Weights) -> Callable[[str], Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        new = {"device": self.device, "generator": generator}
        hidden = torch.randn(size, kind.hidden, **new).to(kind.x_dtype)
        best, index = torch.rand(size, kind.num_experts, **new).topk(kind.top_k)
        routing, options = (hidden, index, best.to(kind.x_dtype)), {**weights, **dict(kind.options)}
        in_float32 = options.pop("in_float32")
        x = arguments(*routing, **options)

        def run(kernel: str) -> Tensor:
            if kernel == "torch":
                return by_torch.run(*routing, **options, in_float32=in_float32)
            return select.run(x, Kernel.parse(kernel))

        return run
