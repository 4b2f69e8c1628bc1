"""Where in a model of transformers the weights of a checkpoint lie."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

from ad_flashinfer_pass.experts import goes_through_the_interface
from ad_flashinfer_pass.models.quantized.layout import Layout
from ad_flashinfer_pass.models.quantized.scheme import Scheme

EXPERT = re.compile(r"(?P<layer>.*)\.experts\.(?P<number>\d+)\.(?P<part>\w+)")
PARTS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}
"""The projections of an expert that is stored by itself, by the names of its linears."""


class Modules:
    """The modules of a model by the names of their weights, as transformers takes them.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._modules = dict(model.named_modules())
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._reversed = [each.reverse_transform() for each in self._renamings[::-1]]
        self._sources: dict[type, str] = {}
        self._experts: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for path, module in self._modules.items():
            if goes_through_the_interface(module):
                self._experts[_numbers(path)].append(path)

    def linear(self, name: str) -> str | None:
        """The linear whose weight has this name, if its model calls it."""
        path = self.path(name.removesuffix(".weight"))
        return path if path is not None and self.is_called_linear(path) else None

    def is_called_linear(self, path: str) -> bool:
        """Whether it is a linear, and not one by whose weight another multiplies, as Mamba's mixers do."""
        parent, _, name = path.rpartition(".")
        kind = type(self._modules[parent])
        if kind not in self._sources:  # all of its file is parsed for it
            self._sources[kind] = inspect.getsource(kind)
        return type(self._modules[path]) is nn.Linear and f"self.{name}.weight @" not in self._sources[kind]

    def experts(self, name: str) -> str | None:
        """The experts of which this weight is one, or of one of them: of its layer, if that has no others."""
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None:
            path = self.path(name.rpartition(".")[0])
            is_known = path is not None and path in self._experts[_numbers(path)]
            return path if is_known and hasattr(self._modules[path or ""], name.rpartition(".")[2]) else None
        found = self._experts.get(_numbers(match["layer"]), [])
        return found[0] if len(found) == 1 and match["part"] in PARTS else None

    def has_layer_of(self, name: str) -> bool:
        """Whether a tensor is of a layer that the model has."""
        parts = _renamed(name, self._renamings).split(".")
        known = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in self._modules)
        return known == len(parts) - 1 or any(part.isdigit() for part in parts[:known])

    def variants(self, name: str) -> Iterator[str]:
        """The names of a module with and without the prefix of its model, as transformers takes either.

        Also in the words of checkpoints, if they are others than transformers'.
        """
        for each in dict.fromkeys((name, _renamed(name, self._reversed))):
            yield from (each, self._prefix + each, each.removeprefix(self._prefix))

    def scheme(self, layout: Layout, path: str) -> Scheme | None:
        """How a linear, or experts together or one by one, are quantized; None: by one name, they are not."""
        is_linear = type(self._modules[path]) is nn.Linear
        ends = ("",) if is_linear else ("", ".gate_up_proj", ".0.gate_proj", ".0.w1")
        schemes = []
        for name in self.variants(path):
            groups = (layout.group_of(name + end) for end in ends)
            schemes.append(next((group.scheme for group in groups if group is not None), None))
        return None if None in schemes else schemes[0]

    def path(self, name: str) -> str | None:
        """Of the module of this name."""
        names = (*self.variants(_renamed(name, self._renamings)), *self.variants(name))
        return next((each for each in names if each in self._modules), None)


def _renamed(name: str, renamings: Iterable[WeightTransform]) -> str:
    """Of a module, as transformers renames its weight."""
    name += ".weight"
    for each in renamings:
        name, _ = each.rename_source_key(name)
    return name.removesuffix(".weight")


def linears_of(model: Any, layout: Layout) -> dict[str, tuple[nn.Linear, Scheme]]:
    """The linears of a model that a layout says are quantized, by name."""
    modules, head = Modules(model), model.get_output_embeddings() if layout.head_is_plain else None
    return {
        path: (module, scheme)
        for path, module in model.named_modules()
        if module is not head
        and modules.is_called_linear(path)
        and (scheme := modules.scheme(layout, path)) is not None
    }


def experts_of(model: nn.Module, layout: Layout) -> dict[str, tuple[Any, Scheme]]:
    """The experts of a model that a layout says are quantized, by name."""
    modules = Modules(model)
    return {
        path: (module, scheme)
        for path, module in model.named_modules()
        if goes_through_the_interface(module) and (scheme := modules.scheme(layout, path)) is not None
    }


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())
