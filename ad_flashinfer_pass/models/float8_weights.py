"""Float8 weights of a checkpoint: checked with their scales, dequantized, and put into linears as stored.

transformers loads the dequantized model, so that its renaming and its checks hold for these weights as for
all others. Then each of its linears whose weight is float8 is replaced, once that weight is found in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

import ad_flashinfer_pass.ops  # noqa: F401 -- registers the op
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.kernels.linear.float8 import dequantized
from ad_flashinfer_pass.models.float8_layout import Group, Layout
from ad_flashinfer_pass.models.quantization import Quantized, Stored

REAL = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""As safetensors names them."""
_WEIGHT = ".weight"


class QuantizedLinear(nn.Module):
    """A linear that computes by ``ops.quantized_linear``; its arguments are those of the op.

    Args:
        weight: float8_e4m3fn [rows, depth].
        weight_scale: of all of it, of its rows or of its blocks.
        input_scale: one number.
        bias: [rows].
        activation: how what it is given is quantized.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        activation: str,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(weight_scale, requires_grad=False)
        for name, tensor in (("input_scale", input_scale), ("bias", bias)):
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., depth] -> [..., rows]."""
        out: Tensor = torch.ops.ad_flashinfer.quantized_linear(
            x, self.weight, self.weight_scale, self.input_scale, self.bias, self.activation
        )
        return out

    def extra_repr(self) -> str:
        """For print."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.activation}"


class Float8(NamedTuple):
    """A float8 weight and its scales, by the names of their tensors."""

    weight: str
    weight_scale: str
    input_scale: str | None
    group: Group


class Float8Weights:
    """The float8 weights of a checkpoint, each with scales that are there, of their shape, and above 0.

    Args:
        directory: of the checkpoint.
        tensors: all of it, by name.
        quantized: what its files say; the layout is known.
        dtype: that of the dequantized weights.

    Raises:
        LoadError: names the tensor that is missing or damaged, or float8 where the files say otherwise.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, Stored], quantized: Quantized, dtype: torch.dtype
    ) -> None:
        assert isinstance(quantized.layout, Layout)
        self.directory = directory
        self.quantized = quantized
        self.layout = quantized.layout
        self.dtype = dtype
        self._tensors = tensors
        self._opened = {
            file: safe_open(file, framework="pt") for file in {stored.file for stored in tensors.values()}
        }
        self.found = {
            name: self._scales_of(name) for name, stored in tensors.items() if stored.dtype == "F8_E4M3"
        }

    def plain(self) -> dict[str, Stored]:
        """The tensors without the scales, float8 as if it were dequantized."""
        scales = {name for each in self.found.values() for name in (each.weight_scale, each.input_scale)}
        return {
            name: stored._replace(dtype="F32") if name in self.found else stored
            for name, stored in self._tensors.items()
            if name not in scales
        }

    def read(self, name: str) -> Tensor:
        """A tensor, dequantized if it is a float8 weight.

        Raises:
            LoadError: the weight is not finite.
        """
        if name not in self.found:
            return self._stored(name)
        weight = dequantized(self._stored(name), self._stored(self.found[name].weight_scale), torch.float32)
        if not weight.isfinite().all():
            raise self._error(name, "is not finite everywhere")
        return weight.to(self.dtype)

    def check_modules(self, model: nn.Module, dequantize: bool) -> None:
        """That each float8 weight that lies in the model is that of a linear, and the others are to be plain.

        Args:
            model: without weights.
            dequantize: it may be of anything.

        Raises:
            LoadError: names the tensor.
        """
        modules, prefix = dict(model.named_modules()), getattr(model, "base_model_prefix", "")
        for name in self.found:
            module = self._module(name, modules, prefix)
            is_linear = module is not None and type(modules[module]) is nn.Linear
            if not dequantize and not is_linear and _lies_in(name, modules):
                raise LoadError(
                    f"{self.directory}: the weights are {self.quantized}, but tensor {name!r} is not that of "
                    "a linear (experts and embeddings are not), and only linears stay float8; set dequantize "
                    "(--dequantize) to read all of them as plain weights."
                )
        self._check_others(model, modules, prefix)

    def put_into(self, model: nn.Module) -> None:
        """Replace the linears whose weights these are.

        Raises:
            LoadError: a linear holds something else than the dequantized weight.
        """
        modules, prefix = dict(model.named_modules()), getattr(model, "base_model_prefix", "")
        for name, float8 in self.found.items():
            module = self._module(name, modules, prefix)
            if module is None:
                continue
            linear = modules[module]
            assert isinstance(linear, nn.Linear)
            if not torch.equal(linear.weight, self.read(name).to(linear.weight.dtype)):
                raise self._error(name, f"was changed by transformers before it came to {module!r}")
            scale = None if float8.input_scale is None else self._stored(float8.input_scale)
            replaced = QuantizedLinear(
                self._stored(name),
                self._stored(float8.weight_scale),
                scale,
                linear.bias,
                float8.group.activation,
            )
            model.set_submodule(module, replaced)
            del linear, modules[module]

    def _check_others(self, model: nn.Module, modules: Mapping[str, nn.Module], prefix: str) -> None:
        """That the files want the other linears to be plain."""
        taken = {self._module(name, modules, prefix) for name in self.found}
        for module in linears_of(model, self.layout):
            if module not in taken and all(self.layout.group_of(name) for name in _variants(module, prefix)):
                names = [name + _WEIGHT for name in _variants(module, prefix)]
                name = next((name for name in names if name in self._tensors), names[0])
                found = self._tensors[name].dtype if name in self._tensors else "shared with another tensor"
                raise self._error(name, f"is {found}, though the files say that it is quantized")

    def _scales_of(self, name: str) -> Float8:
        stored, base = self._tensors[name], name.removesuffix(_WEIGHT)
        if base == name or len(stored.shape) != 2:
            raise self._error(
                name, f"is F8_E4M3 of shape {list(stored.shape)}, but not the weight of a linear"
            )
        group = self.layout.group_of(base)
        if group is None:
            raise self._error(name, "is F8_E4M3, though the files say that it is not quantized")
        scale, given = f"{base}.{self.layout.scale}", f"{base}.input_scale"
        self._check_scale(scale, group.scale_shapes(*stored.shape))
        has_input = group.activation == "tensor"
        if has_input:
            self._check_scale(given, [[], [1]])
        return Float8(name, scale, given if has_input else None, group)

    def _check_scale(self, name: str, shapes: list[list[int]]) -> None:
        stored = self._tensors.get(name)
        if stored is None:
            raise self._error(name, f"of shape {shapes[-1]} is missing")
        if stored.dtype not in REAL or list(stored.shape) not in shapes:
            raise self._error(
                name,
                f"must be a real number of shape {shapes[-1]}, found {stored.dtype} {list(stored.shape)}",
            )
        values = self._stored(name).double()
        wrong = values[~((values > 0) & (values < math.inf))]
        if len(wrong):
            raise self._error(name, f"must be above 0 and finite, found {wrong[0].item()}")

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._opened[self._tensors[name].file].get_tensor(name)
        return tensor

    def _module(self, name: str, modules: Mapping[str, nn.Module], prefix: str) -> str | None:
        return next((each for each in _variants(name.removesuffix(_WEIGHT), prefix) if each in modules), None)

    def _error(self, name: str, what: str) -> LoadError:
        return LoadError(
            f"{self.directory}: the weights are {self.quantized}, but tensor {name!r} {what}; the checkpoint "
            "is incomplete, damaged or of a kind that is not supported."
        )


def quantize_like(model: nn.Module, layout: Layout) -> None:
    """Replace the linears that a layout names by quantized ones with weights on meta."""
    for name, (linear, group) in linears_of(model, layout).items():
        shape = linear.weight.shape
        (*_, scale_shape) = group.scale_shapes(*shape)
        replaced = QuantizedLinear(
            torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"),
            torch.empty(scale_shape, device="meta"),
            torch.empty(1, device="meta") if group.activation == "tensor" else None,
            linear.bias,
            group.activation,
        )
        model.set_submodule(name, replaced)


def linears_of(model: Any, layout: Layout) -> dict[str, tuple[nn.Linear, Group]]:
    """The linears of a model that a layout says are quantized, by name."""
    head = model.get_output_embeddings() if layout.head_is_plain else None
    return {
        name: (module, group)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and (group := layout.group_of(name)) is not None
    }


def _variants(name: str, prefix: str) -> Iterator[str]:
    """The names of a module with and without the prefix of its model, as transformers takes either."""
    yield from (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


def _lies_in(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor is of a layer that the model has."""
    parts = name.split(".")
    known = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
    return known == len(parts) - 1 or any(part.isdigit() for part in parts[:known])
