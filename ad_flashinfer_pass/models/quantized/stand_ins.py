"""What keeps a model that is being loaded small: a weight that was recognized gives way to one number.

transformers takes each tensor when it needs it, and hands the weight that it makes of some of them to the
module. If that is exactly what a quantized weight stands for, the module will be replaced: until then it
holds zeros that share one place in memory. Where transformers does otherwise, nothing is recognized, and the
weights are kept and compared later.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_IN_ORDER = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers then reads the tensors of one weight after those of another."""
_LOCK = threading.Lock()
_LOADING: ContextVar[StandIns | None] = ContextVar("loading", default=None)
"""Of a thread."""


@dataclass(frozen=True)
class Deferred:
    """A tensor that is read when transformers takes it, as it takes slices of safetensors files."""

    read: Callable[[str], Tensor]
    name: str

    def __getitem__(self, _: object) -> Tensor:
        return self.read(self.name)


class StandIns:
    """The weights of modules that were recognized.

    Args:
        is_made_of: whether a weight is exactly what these tensors are, by name.
    """

    def __init__(self, is_made_of: Callable[[Tensor, Mapping[str, Tensor]], bool]) -> None:
        self._is_made_of = is_made_of
        self._read: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._held: dict[tuple[nn.Module, str], set[str]] = {}

    def note(self, name: str, tensor: Tensor) -> None:
        """A quantized weight was read; it is kept until a module gets what was made of it."""
        self._read[name], self._versions[name] = tensor, tensor._version

    def holds(self, module: nn.Module, weight: str, names: Iterable[str]) -> bool:
        """Whether a weight was recognized as made of these."""
        return self._held.get((module, weight)) == set(names)

    def left_in(self, model: nn.Module) -> dict[str, set[str]]:
        """The modules of a model that still hold one number in place of a weight, and what it was made of."""
        paths = {module: path for path, module in model.named_modules()}
        return {paths[module]: names for (module, _), names in self._held.items() if module in paths}

    @contextmanager
    def while_loading(self) -> Iterator[None]:
        """Within, transformers loads the model, in this thread; one model at a time."""
        _listen()
        with _LOCK:
            before = os.environ.get(_IN_ORDER)
            os.environ[_IN_ORDER] = "1"
            token = _LOADING.set(self)
            try:
                yield
            finally:
                _LOADING.reset(token)
                self._read = {}
                if before is None:
                    del os.environ[_IN_ORDER]
                else:
                    os.environ[_IN_ORDER] = before

    def registered(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        """What a module holds in place of a parameter that transformers hands to it; None: that."""
        if parameter.is_meta or not self._read:
            return None
        read, self._read = self._read, {}
        was_written = any(tensor._version != self._versions[name] for name, tensor in read.items())
        if was_written or not self._is_made_of(parameter, read):
            return None
        self._held[module, name] = set(read)
        stand_in: Any = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        stand_in = nn.Parameter(stand_in, requires_grad=False)
        stand_in._is_hf_initialized = True  # as transformers marks what it has loaded
        return stand_in


@cache
def _listen() -> None:
    # Once: other threads, which make modules of their own, must not see hooks come and go.
    register_module_parameter_registration_hook(_registered)


def _registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    loading = _LOADING.get()
    return None if loading is None or parameter is None else loading.registered(module, name, parameter)
