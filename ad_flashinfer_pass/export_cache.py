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
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

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
_CALLED = frozenset(
    (
        "torch.nn.functional transformers.masking_utils transformers.integrations.moe "
        "transformers.integrations.sdpa_attention"
    ).split()
)
"""What models call beside the functions that stand in their modules."""
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
    told = _Told(module)
    try:
        code, files = _code(kinds)
        state = {name: told.module(each) for name, each in module.named_modules(remove_duplicate=False)}
        around = _around()
    except _UnknownError:
        return None
    found = hashlib.sha256()
    own = {
        *_PACKAGE.rglob("*.py"),
        *_PACKAGE.glob("*/*.py"),
    }  # transforms may be a link, which rglob does not follow
    for file in (*sorted(files), *sorted(own)):
        found.update(file.read_bytes())
    versions = [platform.python_version(), *(str(installed(package)) for package in _PACKAGES)]
    found.update(json.dumps([versions, around, settings, code, state]).encode())
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


def _around() -> list[str]:
    """What torch is told for all models, of which a graph has traces."""
    if torch.nn.modules.module._has_any_global_hook() or torch.overrides._get_current_function_mode_stack():
        raise _UnknownError
    kinds = ("cpu", "cuda")
    casts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return [f"{torch.get_default_dtype()}", f"{casts}", f"{torch.are_deterministic_algorithms_enabled()}"]


def _code(kinds: set[type]) -> tuple[list[Any], set[Path]]:
    """The functions of classes and of the modules that they call, and the files of those of transformers.

    Somebody may have put a method of their own in place of one, or a function into a module.
    """
    code = [[f"{kind}", _functions(vars(kind))] for kind in sorted(kinds, key=str)]
    modules = {
        kind.__module__ for kind in kinds if _root(kind) == "transformers"
    } | _CALLED & sys.modules.keys()
    for name in sorted(modules):
        if ".models." in name or name in _CALLED:
            code.append([name, _functions(vars(sys.modules[name]))])
    return code, {Path(str(sys.modules[name].__file__)) for name in modules}


def _functions(space: Mapping[str, Any]) -> list[Any]:
    """Where the code of each function stands, whatever it says, and numbers; refused if not of ours."""
    found: list[Any] = []
    for name, value in sorted(space.items()):
        if isinstance(value, (partial, nn.Module)):
            raise _UnknownError
        if isinstance(value, (bool, int, float, str)) and not name.startswith("__"):
            found.append([name, repr(value)])
        if name.startswith("ALL_") and isinstance(value, Mapping):  # of transformers' interfaces
            found.append([name, _functions(value)])
        parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
        for each in parts:
            while each is not None:
                each = getattr(each, "__func__", each)
                if inspect.isfunction(each):
                    home = str(each.__globals__["__name__"])
                    if home.partition(".")[0] not in sys.stdlib_module_names:
                        _root(each)
                        found.append([name, home, each.__qualname__, each.__code__.co_firstlineno])
                each = vars(each).get("__wrapped__") if callable(each) and hasattr(each, "__dict__") else None
    return found


def _root(thing: Any) -> str:
    """The package of a class or function, which may bear the name of another that it wraps."""
    roots = {str(thing.__module__).partition(".")[0]}
    if inspect.isfunction(thing):
        roots.add(str(thing.__globals__["__name__"]).partition(".")[0])
    if not roots <= {*_CODE}:
        raise _UnknownError
    return roots.pop()


class _Told:
    """Values as JSON that differs if they do."""

    def __init__(self, whole: nn.Module) -> None:
        self._own = {id(part) for part in (*whole.modules(), *whole.parameters())}
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
                return [f"{value.__module__}.{value.__qualname__}", _functions({"": value})]
            raise _UnknownError
        if isinstance(value, partial):
            return ["partial", *map(self._value, (value.func, value.args, value.keywords))]
        if inspect.isbuiltin(value) and _root(value):  # as torch's gelu
            return f"{value.__module__}.{value.__qualname__}"
        is_new = id(value) not in self._objects
        self._alive.append(value)  # so that no other gets its number
        number = self._objects.setdefault(id(value), len(self._objects))
        if not is_new:
            return number
        if isinstance(value, Tensor):
            what = [number, str(value.dtype), list(value.shape), list(value.stride()), str(value.device)]
            is_weight = type(value) in (nn.Parameter, FakeTensor) and id(value) in self._own
            return what if is_weight else [*what, _content(value)]
        if isinstance(value, nn.Module) and id(value) not in self._own:
            raise _UnknownError  # its weights are constants of the graph
        if _root(type(value)) and hasattr(value, "__dict__"):
            return [number, f"{type(value)}", self._held(value)]
        raise _UnknownError


def _content(tensor: Tensor) -> str:
    """The numbers of a buffer, from which a graph may have constants."""
    if type(tensor) is not Tensor or tensor.is_meta:
        raise _UnknownError
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
