"""Weights that have shapes and no memory, in the place of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig

from ad_flashinfer_pass.models.quantized.modules import QuantizedExperts, QuantizedLinear
from ad_flashinfer_pass.models.quantized.random import drawn_of


def built_on_meta(hf_config: PretrainedConfig, settings: dict[str, Any]) -> nn.Module:
    """A model whose weights are on meta, and whose buffers are on the CPU."""
    # On meta as soon as they are registered, so that no more than one is ever in memory, none is drawn.
    hook = register_module_parameter_registration_hook(_on_meta)
    try:
        module: nn.Module = AutoModelForCausalLM.from_config(hf_config, **settings)
    finally:
        hook.remove()
    return module


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta:  # the same weight, registered a second time, stays the same
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


class DrawnWeights(Mapping[Tensor, Tensor]):
    """Random weights of a module, each drawn when it is asked for: the same each time.

    Args:
        module: its weights are the keys.
        deviation: of matrices; norms are 1, biases 0.
        device: where they are drawn.
    """

    def __init__(self, module: nn.Module, deviation: float, device: torch.device) -> None:
        self._deviation, self._device = deviation, device
        self._places: dict[Tensor, tuple[nn.Module, str, str]] = {}
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                self._places.setdefault(parameter, (owner, name, f"{path}.{name}"))

    def __getitem__(self, weight: Tensor) -> Tensor:
        owner, name, path = self._places[weight]
        generator = torch.Generator(self._device).manual_seed(crc32(path.encode()))
        if isinstance(owner, QuantizedLinear | QuantizedExperts) and name != "bias":
            return drawn_of(owner, name, self._device, self._deviation, generator)
        new = torch.empty(weight.shape, dtype=weight.dtype, device=self._device)
        if weight.dim() < 2:
            return new.fill_(0.0 if name.endswith("bias") else 1.0)
        # Smaller embeddings leave the say to the layers.
        share = 0.1 if isinstance(owner, nn.Embedding) else 1.0
        return new.normal_(std=share * self._deviation, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def with_fake_weights(module: nn.Module, device: torch.device) -> dict[Tensor, Tensor]:
    """Replace the parameters of a module by fake tensors of a device; to torch.export they are like others.

    Returns:
        What they stand for: the parameters, by the fake ones.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[nn.Parameter, nn.Parameter] = {}  # a weight that two modules share stays one
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in fakes:
                fake = FakeTensor(mode, parameter.detach().to("meta"), device)
                fakes[parameter] = nn.Parameter(fake, requires_grad=False)
            setattr(owner, name, fakes[parameter])
    return {fake: parameter for parameter, fake in fakes.items()}
