"""The first layers of a model that stand for all of them.

Layers are of one kind if they have the same modules, weights of the same shapes, the same settings, and the
same entries in the lists of config.json that have one entry a layer. A setting that counts the layers, such
as ``layer_idx``, is none. The first layers stand for all if each kind is among them twice, or as often as the
model has it.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError
from ad_flashinfer_pass.models.layers import Layers
from ad_flashinfer_pass.models.source import first_line
from ad_flashinfer_pass.models.weightless import load_weightless

_ENOUGH = 2


def first_layers(config: AutoDeployConfig, wanted: int | None = None) -> tuple[AutoDeployConfig, Layers]:
    """Cut a model down to its first layers.

    Args:
        config: of the whole model; only its config.json is read.
        wanted: how many layers. Default: as few as stand for all.

    Returns:
        The config of the model that is left, and what was taken and why.

    Raises:
        ConfigError: ``wanted`` is more than there are, or the model cannot be cut there.
        LoadError: the model cannot be read.
    """
    whole: Any = load_weightless(config)[0]
    kinds = kinds_of_layers(whole)
    count = len(kinds)
    if wanted is not None and not 1 <= wanted <= max(count, 1):
        raise ConfigError(f"--layers {wanted}: {config.model} has {count} layers.")
    enough = _enough(kinds)
    taken = enough if wanted is None else wanted
    num_kinds = len(set(kinds))
    if taken == count:
        return config, Layers(
            count, count, "asked for" if wanted else "no fewer show each kind of them twice"
        )
    cut = config.model_copy(
        update={"model_kwargs": _merged(config.model_kwargs, _num_layers(whole.config, taken))}
    )
    try:
        found = kinds_of_layers(load_weightless(cut)[0], whole)
    except AdFlashinferError as err:
        found, reason = [], first_line(err)
    else:
        reason = "its first layers would be others in a model of fewer"
    if found != kinds[:taken]:
        if wanted is not None:
            raise ConfigError(f"--layers {wanted}: {config.model} cannot be cut there: {reason}")
        return config, Layers(count, count, reason)
    if wanted is not None:
        return cut, Layers(taken, count, "asked for")
    shown = "all are of one kind" if num_kinds == 1 else f"they show each of the {num_kinds} kinds"
    return cut, Layers(taken, count, f"{shown}, and drawn weights prove no more in further ones")


def kinds_of_layers(model: nn.Module, whole: nn.Module | None = None) -> list[str]:
    """A text for each layer that is equal for layers of one kind; empty if the layers are not known.

    Args:
        model: of transformers.
        whole: the model of which it is the first layers; there it shows which settings count the layers.
    """
    found, shown = _layers(model), _layers(model if whole is None else whole)
    counting = {key for key in shown[0] if _counts([layer.get(key) for layer in shown])} if shown else set()
    return [repr([each for each in layer.items() if each[0] not in counting]) for layer in found]


def _layers(model: nn.Module) -> list[dict[tuple[str, ...], Any]]:
    """The settings of each layer by name: its entries in lists of the config, then those of its modules."""
    whole_config: Any = model.config
    config = whole_config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    # Of the decoder alone: an encoder of pictures may by chance have as many layers.
    decoder = model.get_decoder()  # type: ignore[operator]
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        return []
    entries = config.to_dict().items()
    lists = {(key,): value for key, value in entries if isinstance(value, list) and len(value) == count}
    return [
        {key: value[index] for key, value in lists.items()}
        | {
            (str(number), *key): value
            for number, stack in enumerate(stacks)
            for key, value in _settings(stack[index]).items()
        }
        for index in range(count)
    ]


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Class, plain attributes and shapes of every module of a layer, by the module's name and theirs."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, "class"] = type(module).__qualname__
        for key, value in vars(module).items():
            if not key.startswith("_") and (isinstance(value, (bool, int, float, str)) or value is None):
                found[name, key] = value
        for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            found[name, key] = tuple(tensor.shape)
    return found


def _counts(values: list[Any]) -> bool:
    """Whether these are 0, 1, 2, ..., or begin with another number."""
    first = values[0]
    return type(first) is int and len(values) > 1 and values == list(range(first, first + len(values)))


def _enough(kinds: list[str]) -> int:
    """How many of the first layers have each kind twice, or as often as there are."""
    missing = Counter({kind: min(_ENOUGH, count) for kind, count in Counter(kinds).items()})
    for index, kind in enumerate(kinds):
        missing[kind] -= 1
        if all(count <= 0 for count in missing.values()):
            return index + 1
    return len(kinds)


def _num_layers(config: PretrainedConfig, count: int) -> dict[str, Any]:
    """The keys of config.json for fewer layers."""
    text = config.get_text_config(decoder=True)
    change = {text.attribute_map.get("num_hidden_layers", "num_hidden_layers"): count}
    part = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    return change if text is config or part is None else {part: change}


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    return {
        key: _merged(old[key], new[key])
        if isinstance(value, dict) and isinstance(old.get(key), dict)
        else value
        for key, value in both.items()
    }
