"""Quantized weights of a checkpoint: checked with their scales, dequantized, and put into modules as stored.

transformers loads the dequantized model, so that its renaming and its checks hold for these weights as for
all others. Then each of its modules whose weight is quantized is replaced, once that weight is found in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.models.quantization import Quantized, Stored
from ad_flashinfer_pass.models.quantized.layout import Layout
from ad_flashinfer_pass.models.quantized.modules import (
    Projections,
    QuantizedLinear,
    names_of,
    put_together,
    quantized_experts,
)
from ad_flashinfer_pass.models.quantized.places import (
    EXPERT,
    PARTS,
    Modules,
    experts_of,
    linears_of,
)
from ad_flashinfer_pass.models.quantized.scheme import REAL, Part, Scheme
from ad_flashinfer_pass.models.quantized.stand_ins import Deferred, StandIns

_DAMAGED = "the checkpoint is incomplete, damaged or of a kind that is not supported"
_DEQUANTIZE = "set dequantize (--dequantize) to read all of them as plain weights"


class Found(NamedTuple):
    """A quantized weight: the start of the names of its tensors, and how it is stored."""

    base: str
    scheme: Scheme
    parts: tuple[str, ...]
    """The ends of the names of those that are there."""
    sizes: tuple[int, ...]
    """[..., rows, depth]."""


class QuantizedWeights:
    """The quantized weights of a checkpoint, each with scales that are there, of their shape and range.

    Args:
        directory: of the checkpoint.
        tensors: all of it, by name.
        quantized: what its files say; the layout is known.
        dtype: that of the dequantized weights.
        dequantize: all of them are to become plain.

    Raises:
        LoadError: names the tensor that is missing or damaged, or quantized where the files say otherwise.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, Stored],
        quantized: Quantized,
        dtype: torch.dtype,
        dequantize: bool,
    ) -> None:
        assert isinstance(quantized.layout, Layout)
        self.directory = directory
        self.quantized = quantized
        self.layout = quantized.layout
        self.dtype = dtype
        self.dequantize = dequantize
        self.stand_ins = StandIns(self._is_made_of)
        self.fault: LoadError | None = None
        self._no_biases: set[str] = set()
        self._tensors = tensors
        self._opened = {
            file: safe_open(file, framework="pt") for file in {stored.file for stored in tensors.values()}
        }
        found = (self._find(name, stored) for name, stored in tensors.items())
        self.found = {each.base + each.scheme.plain: each for each in found if each is not None}
        if not self.found:
            raise LoadError(
                f"{directory}: the weights are {quantized}, but no tensor is one of such; {_DAMAGED}."
            )

    def plain(self) -> dict[str, Stored]:
        """The tensors of the unquantized model, without what makes up the quantized ones."""
        parts = {each.base + part for each in self.found.values() for part in each.parts} | self._no_biases
        plain = {name: stored for name, stored in self._tensors.items() if name not in parts}
        for name, each in self.found.items():
            *more, rows, depth = each.sizes
            shape = (*more, depth, rows) if each.scheme.is_of_experts else each.sizes
            plain[name] = Stored(self._tensors[each.base + each.scheme.weight].file, "F32", shape)
        return plain

    def read(self, name: str) -> Tensor:
        """A tensor of the unquantized model.

        Raises:
            LoadError: it is a quantized weight, and not finite.
        """
        if name not in self.found:
            return self._stored(name)
        each = self.found[name]
        weight = each.scheme.dequantized(self._parts(each))
        if not torch.stack(weight.aminmax()).isfinite().all():  # in one pass; it lets no NaN through
            raise self._error(each.base + each.scheme.weight, "is not finite everywhere")
        weight = weight.to(self.dtype)
        return weight.mT.contiguous() if each.scheme.is_of_experts else weight

    def deferred(self, name: str) -> Deferred:
        """The tensor that ``read`` gives, for transformers; what it raises there is in ``fault``."""
        return Deferred(self._read_for_transformers, name)

    def _read_for_transformers(self, name: str) -> Tensor:
        try:
            tensor = self.read(name)
        except LoadError as err:  # transformers does not let it through
            self.fault = err
            raise
        if name in self.found and not self.dequantize:
            self.stand_ins.note(name, tensor)
        return tensor

    def check_modules(self, model: nn.Module) -> None:
        """That each weight that lies in the model is one of linears or experts, and the others are plain.

        Args:
            model: without weights.

        Raises:
            LoadError: names the tensor.
        """
        modules = Modules(model)
        for name, each in self.found.items():
            known = modules.linear(name) or modules.experts(name)
            if not self.dequantize and known is None and modules.has_layer_of(name):
                raise self._refusal(
                    each,
                    "is not that of a linear that its model calls (Mamba's dt_proj is not), or of experts "
                    f"(embeddings are not); {_DEQUANTIZE}",
                )
            if not self.dequantize and each.scheme.only_dequantized and known is not None:
                raise self._refusal(each, f"is of numbers that no kernel here computes with; {_DEQUANTIZE}")
            bias = each.base + ".bias"  # GPTQ's libraries give each linear one
            has_bias = known is None or getattr(model.get_submodule(known), "bias", None) is not None
            if bias in self._tensors and not has_bias and not self._stored(bias).any():
                self._no_biases.add(bias)
        self._check_others(model, modules)

    def put_into(self, model: nn.Module) -> None:
        """Replace the modules whose weights these are.

        Raises:
            LoadError: one holds something else than the dequantized weight, or its experts are not alike.
        """
        modules = Modules(model)
        experts: dict[str, list[str]] = defaultdict(list)
        for name, each in self.found.items():
            if (path := modules.linear(name)) is not None:
                linear = model.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                self._check_held(linear, "weight", [name], path)
                operands = each.scheme.operands(self._parts(each))
                model.set_submodule(path, QuantizedLinear(operands, linear.bias, each.scheme.activation))
                del linear
            elif (path := modules.experts(name)) is not None:
                experts[path].append(name)
        for path, names in experts.items():
            module: Any = model.get_submodule(path)
            schemes = {self.found[name].scheme for name in names}
            if len(schemes) > 1:
                raise self._refusal(
                    self.found[names[0]], f"is quantized otherwise than others of {path!r}; {_DEQUANTIZE}"
                )
            (scheme,) = schemes
            read = self._experts_together if scheme.is_of_experts else self._experts_one_by_one
            model.set_submodule(
                path, quantized_experts(module, path, read(module, path, names), scheme.activation)
            )
            del module
        for path, made_of in self.stand_ins.left_in(model).items():
            each = self.found[min(made_of)]
            raise self._refusal(each, f"came to {path!r} by another name; {_DEQUANTIZE}")

    def _experts_together(self, module: Any, path: str, names: list[str]) -> Projections:
        found = {}
        for name in names:
            part = name.rpartition(".")[2]
            self._check_held(module, part, [name], path)
            found[part] = self.found[name].scheme.operands(self._parts(self.found[name]))
        wanted = names_of(module)
        if set(found) != set(wanted):
            raise self._error(names[0], f"is quantized, but not all of {', '.join(wanted)} beside it")
        into, out_of = wanted
        return Projections(found[into], found[out_of])

    def _experts_one_by_one(self, module: Any, path: str, names: list[str]) -> Projections:
        into, out_of = names_of(module)
        wanted = ("gate", "up", "down") if module.has_gate else ("up", "down")
        by_number = _by_number(names)
        experts = []
        for index in range(getattr(module, out_of).shape[0]):
            parts = by_number.get(index, {})
            if set(parts) != set(wanted):
                raise self._error(names[0], f"is quantized, but not all of expert {index} of {path!r}")
            found = {part: self.found[name] for part, name in parts.items()}
            experts.append({part: each.scheme.operands(self._parts(each)) for part, each in found.items()})
            scales = [experts[-1][part].input_scale for part in wanted[:-1]]
            if scales[0] is not None and scales[0] != scales[-1]:
                raise self._refusal(
                    found["up"],
                    f"has another input_scale than its gate, which multiplies the same; {_DEQUANTIZE}",
                )
        for weight, ends in ((into, wanted[:-1]), (out_of, wanted[-1:])):
            made_of = [name for parts in by_number.values() for end, name in parts.items() if end in ends]
            self._check_held(module, weight, made_of, path)
        return put_together(experts)

    def _check_held(self, module: nn.Module, weight: str, names: list[str], path: str) -> None:
        held = self.stand_ins.holds(module, weight, names)
        if not held and not self._is_made_of(
            getattr(module, weight), {name: self.read(name) for name in names}
        ):
            each = self.found[names[0]]
            raise self._error(
                each.base + each.scheme.weight, f"was changed by transformers before it came to {path!r}"
            )

    @staticmethod
    def _is_made_of(weight: Tensor, read: Mapping[str, Tensor]) -> bool:
        """Whether a weight is the one that was read, or has those of experts one after the other."""
        by_number = _by_number(read)
        if not by_number:
            (first, *more) = read.values()
            return not more and torch.equal(weight, first.to(weight.dtype))
        if weight.ndim != 3 or sorted(by_number) != list(range(len(weight))):
            return False
        for number, parts in by_number.items():
            rows = torch.cat([read[parts[part]] for part in ("gate", "up", "down") if part in parts])
            if not torch.equal(weight[number], rows.to(weight.dtype)):
                return False
        return True

    def _check_others(self, model: nn.Module, modules: Modules) -> None:
        """That the files want the other linears and experts to be plain."""
        if not self.layout.names_all:
            return
        taken = {modules.linear(name) or modules.experts(name) for name in self.found}
        linears = linears_of(model, self.layout)
        for path in (*linears, *experts_of(model, self.layout)):
            if path not in taken:
                names = [name + ".weight" for name in modules.variants(path)] if path in linears else [path]
                name = next((name for name in names if name in self._tensors), names[0])
                found = "shared with another tensor" if path in linears else "plain"
                found = self._tensors[name].dtype if name in self._tensors else found
                raise self._error(name, f"is {found}, though the files say that it is quantized")

    def _find(self, name: str, stored: Stored) -> Found | None:
        """The weight that a tensor shows."""
        for scheme in self.layout.schemes:
            base = name.removesuffix(scheme.weight)
            if base == name:
                continue
            sizes = scheme.sizes(stored.shape)
            wanted = scheme.parts(*sizes)[scheme.weight] if sizes is not None else None
            if scheme.weight == ".weight" and stored.dtype in REAL:
                return None  # plain
            group = self.layout.group_of(base)
            if group is None:
                raise self._error(name, f"is {stored.dtype}, though the files say that it is not quantized")
            if group.scheme != scheme:
                continue
            if wanted is None or stored.dtype not in wanted.dtypes:
                raise self._error(
                    name, f"is {stored.dtype} of shape {list(stored.shape)}, but not the weight of a linear"
                )
            assert sizes is not None
            parts = scheme.parts(*sizes)
            there = tuple(part for part in parts if self._check_part(base + part, parts[part]))
            found = Found(base, scheme, there, sizes)
            if (fault := scheme.fault(self._parts(found))) is not None:
                raise self._error(base + fault[0], fault[1])
            return found
        return None

    def _check_part(self, name: str, part: Part) -> bool:
        stored = self._tensors.get(name)
        if stored is None:
            if part.is_optional:
                return False
            raise self._error(name, f"of shape {part.shapes[-1]} is missing")
        if stored.dtype not in part.dtypes or list(stored.shape) not in part.shapes:
            kind = "a real number" if part.dtypes == tuple(REAL) else " or ".join(part.dtypes)
            raise self._error(
                name, f"must be {kind} of shape {part.shapes[-1]}, found {stored.dtype} {list(stored.shape)}"
            )
        if part.rule is not None:
            values = self._stored(name)
            values = values.double() if values.is_floating_point() else values
            wrong = values[~part.rule.is_kept(values)]
            if len(wrong):
                raise self._error(name, f"must be {part.rule.text}, found {wrong[0].item()}")
        return True

    def _parts(self, each: Found) -> dict[str, Tensor]:
        return {part: self._stored(each.base + part) for part in each.parts}

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._opened[self._tensors[name].file].get_tensor(name)
        return tensor

    def _error(self, name: str, what: str) -> LoadError:
        return LoadError(
            f"{self.directory}: the weights are {self.quantized}, but tensor {name!r} {what}; {_DAMAGED}."
        )

    def _refusal(self, each: Found, what: str) -> LoadError:
        name = each.base + each.scheme.weight
        return LoadError(f"{self.directory}: the weights are {self.quantized}, but tensor {name!r} {what}.")


def _by_number(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """The weights of experts that are stored one by one, by number and part; empty if one is not."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None or match["part"] not in PARTS:
            return {}
        found[int(match["number"])][PARTS[match["part"]]] = name
    return found
