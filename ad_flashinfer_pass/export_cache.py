"""Exported graphs of transformers' models, kept on disk by all that they depend on.

A graph depends on the code of the model, on what its modules hold beside the weights' numbers, on the
settings of the export, and on who exports: torch, transformers and this package. All of it is in the key of
the file. A model that holds or runs code of somebody else, such as a hook, is exported each time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass import saved_graph
from ad_flashinfer_pass.errors import ConfigError, LoadError
from ad_flashinfer_pass.files import cache_folder, write_file
from ad_flashinfer_pass.kernels.modules import installed

logger = logging.getLogger(__name__)

FOLDER = "graphs"
_MOST = 64
"""Graphs that are kept, the latest."""
_PACKAGE = Path(__file__).parent
_CODE = ("torch", "transformers", _PACKAGE.name)
_PACKAGES = ("torch", "transformers", "triton")
_HAVE_NO_SAY = frozenset(
    (
        "_modules generation_config name_or_path _name_or_path _is_hf_initialized _weight_conversions "
        "_use_kernels"
    ).split()
)
"""What is told elsewhere, or of how weights were read. Kernels that transformers puts in are functions."""


class _UnknownError(Exception):
    """What a key cannot name."""


def key_of(module: nn.Module, **settings: object) -> str | None:
    """All that the graph of a module depends on, as a digest; None if that cannot be told.

    Args:
        module: a model of transformers.
        settings: of the export.
    """
    kinds = {kind for each in module.modules() for kind in type(each).__mro__ if kind is not object}
    told = _Told()
    try:
        files = sorted({file for kind in kinds for file in _files(kind)})
        state = {name: told.module(each) for name, each in module.named_modules(remove_duplicate=False)}
    except _UnknownError:
        return None
    found = hashlib.sha256()
    own = {
        *_PACKAGE.rglob("*.py"),
        *_PACKAGE.glob("*/*.py"),
    }  # transforms may be a link, which rglob does not follow
    for file in (*files, *sorted(own)):
        found.update(file.read_bytes())
    versions = [platform.python_version(), *(str(installed(package)) for package in _PACKAGES)]
    found.update(json.dumps([versions, settings, state]).encode())
    return found.hexdigest()


def load(key: str, owner: nn.Module) -> fx.GraphModule | None:
    """The graph that was kept under a key, on the tensors of a module; None if there is none."""
    file = _file(key)
    if file is None or not file.is_file():
        return None
    try:
        return saved_graph.load(file, owner, key)
    except LoadError as err:
        logger.warning("%s; it is made again", err)
        return None


def store(key: str, gm: fx.GraphModule, owner: nn.Module) -> None:
    """Keep a graph under a key if that can be done, and let go of the oldest."""
    file = _file(key)
    if file is None:
        return
    with suppress(saved_graph.CannotSaveError, ConfigError, OSError):
        write_file(file, saved_graph.dumps(gm, owner, key))
        kept = sorted(file.parent.glob("*.safetensors"), key=lambda each: each.stat().st_mtime)
        for old in kept[:-_MOST]:
            old.unlink()


def _file(key: str) -> Path | None:
    folder = cache_folder(FOLDER)
    return None if folder is None else folder / f"{key}.safetensors"


def _files(kind: type) -> Iterator[Path]:
    """The source of a class, unless a version names it; refused if it is not what the class does.

    Somebody may have put a method of their own in place of one, or a function into a model's module.
    """
    for method in filter(inspect.isfunction, vars(kind).values()):
        _root(method)
    if _root(kind) == "transformers":
        module = sys.modules[kind.__module__]
        functions = vars(module).values() if ".models." in kind.__module__ else ()
        for function in filter(inspect.isfunction, functions):
            if str(function.__module__).partition(".")[0] not in sys.stdlib_module_names:
                _root(function)
        yield Path(str(module.__file__))


def _root(thing: Any) -> str:
    """The package of a class or function."""
    root = str(thing.__module__).partition(".")[0]
    if root not in _CODE:
        raise _UnknownError
    return root


class _Told:
    """Values as JSON that differs if they do."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}
        self._alive: list[Any] = []

    def module(self, module: nn.Module) -> Any:
        """What a module holds beside other modules."""
        return [f"{type(module)}", self._held(module)]

    def _held(self, thing: Any) -> list[Any]:
        return [[name, self._value(value)] for name, value in vars(thing).items() if name not in _HAVE_NO_SAY]

    def _value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, Enum)):
            return repr(value)
        if isinstance(value, Mapping):
            return [f"{type(value)}", *([self._value(key), self._value(item)] for key, item in value.items())]
        if isinstance(value, (list, tuple)):
            return [f"{type(value)}", *map(self._value, value)]
        if isinstance(value, (set, frozenset)):
            return [f"{type(value)}", *sorted(map(repr, map(self._value, value)))]
        if isinstance(value, type) or inspect.isfunction(value):
            if _root(value) and "<" not in value.__qualname__:
                return f"{value.__module__}.{value.__qualname__}"
            raise _UnknownError
        is_new = id(value) not in self._objects
        self._alive.append(value)  # so that no other gets its number
        number = self._objects.setdefault(id(value), len(self._objects))
        if not is_new:
            return number
        if isinstance(value, Tensor):
            what = [number, str(value.dtype), list(value.shape), list(value.stride()), str(value.device)]
            return what if isinstance(value, nn.Parameter) else [*what, _content(value)]
        if _root(type(value)) and hasattr(value, "__dict__"):
            return [number, f"{type(value)}", self._held(value)]
        raise _UnknownError


def _content(tensor: Tensor) -> str:
    """The numbers of a buffer, from which a graph may have constants."""
    if type(tensor) is not Tensor or tensor.is_meta:
        raise _UnknownError
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
