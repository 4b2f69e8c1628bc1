"""Weights from safetensors, with every tensor accounted for.

transformers draws random values for tensors that a checkpoint lacks; here that is an error, as is a
tensor of another shape or a file that is cut short. Pickled checkpoints are refused: reading one
can run any code.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ad_flashinfer_pass.errors import LoadError

logger = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_AGAIN = "the checkpoint is incomplete or damaged: fetch it again"
_OTHER_CONFIG = "the checkpoint is incomplete or belongs to another config.json"

Shape = tuple[int, ...]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each with a whole header and a whole body.

    Raises:
        LoadError: there are none, one is missing, or one cannot be read to its end.
    """
    if (directory / _SINGLE).is_file():
        files = [directory / _SINGLE]
    elif (directory / _INDEX).is_file():
        files = _shards(directory / _INDEX)
    else:
        raise LoadError(_no_weights(directory))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as err:
            raise LoadError(f"{file}: {str(err).rstrip('.')}; {_AGAIN}.") from None
    return files


def load_weights(
    directory: Path, hf_config: PretrainedConfig, reports: list[str], **settings: Any
) -> nn.Module:
    """The causal language model with the weights of a checkpoint, on the CPU.

    Args:
        directory: of the checkpoint.
        hf_config: what the model is built from; config.json is not read again.
        reports: the messages of transformers while this runs, see ``quiet_transformers``.
        settings: passed on to transformers: dtype, attn_implementation, trust_remote_code.

    Raises:
        LoadError: a tensor is missing or of another shape, or a file is missing or damaged.
    """
    files = weight_files(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=hf_config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in info, and refused below with names
            **settings,
        )
    except RuntimeError as err:
        raise LoadError(f"{directory}: {_conversion_failure(files, reports, err)}") from err
    module, info = loaded
    _check_mismatched(directory, info["mismatched_keys"])
    _check_missing(directory, info["missing_keys"], module)
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%s: tensors that the model does not have were left out: %s%s",
            directory,
            unexpected[0],
            _and_more(unexpected),
        )
    return module


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise LoadError(f"{index}: must map tensors to files in weight_map; {_AGAIN}.") from None
    files = sorted(index.parent / name for name in names)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise LoadError(
            f"{missing[0]}: {_INDEX} names this file, but it is not there{_and_more(missing)}; {_AGAIN}."
        )
    return files


def _no_weights(directory: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        return (
            f"{directory}: weights must be safetensors, found only {pickles[0]}, a pickle, which "
            "can run code when it is read; if you trust it, convert it: AutoModelForCausalLM."
            "from_pretrained(...).save_pretrained(...)."
        )
    return (
        f"{directory}: neither {_SINGLE} nor {_INDEX} is there; fetch the weights, or set "
        "skip_loading_weights (--random-weights) to run without them."
    )


def _check_mismatched(directory: Path, mismatched: set[tuple[str, Shape, Shape]]) -> None:
    if not mismatched:
        return
    name, found, expected = sorted(mismatched)[0]
    raise LoadError(
        f"{directory}: tensor {name!r} must have shape {list(expected)}, found {list(found)}"
        f"{_and_more(list(mismatched))}; {_OTHER_CONFIG}."
    )


def _check_missing(directory: Path, missing: set[str], module: nn.Module) -> None:
    if not missing:
        return
    name = sorted(missing)[0]
    expected = list(module.state_dict()[name].shape)
    raise LoadError(
        f"{directory}: tensor {name!r} of shape {expected} is missing{_and_more(list(missing))}; "
        f"{_OTHER_CONFIG}."
    )


def _conversion_failure(files: list[Path], reports: list[str], err: RuntimeError) -> str:
    """Which tensor kept transformers from assembling a fused one, such as stacked experts."""
    found = _odd_tensor(_shapes(files))
    if found:
        return f"{found}; {_OTHER_CONFIG}."
    fused = re.search(r"^(\S+)\s*\|\s*\S*CONVERSION", "\n".join(reports), re.MULTILINE)
    if fused:
        return f"tensor {fused[1]!r} cannot be assembled from the checkpoint; {_OTHER_CONFIG}."
    return f"{' '.join(str(err).split())}; {_OTHER_CONFIG}."


def _shapes(files: list[Path]) -> dict[str, Shape]:
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    return shapes


def _odd_tensor(shapes: dict[str, Shape]) -> str | None:
    """The first tensor that is missing or misshapen beside those named alike but for numbers."""
    families: dict[str, dict[Shape, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        numbers = tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name))
        families[re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)][numbers] = shape
    places: dict[str, set[Shape]] = defaultdict(set)
    for family, members in families.items():
        places[family.rpartition("{}")[0]] |= set(members)
    for family, members in sorted(families.items()):
        usual = Counter(members.values()).most_common(1)[0][0]
        for numbers, shape in sorted(members.items()):
            if shape != usual:
                name = family.format(*numbers)
                return f"tensor {name!r} must have shape {list(usual)}, found {list(shape)}"
        for numbers in sorted(places[family.rpartition("{}")[0]] - set(members)):
            return f"tensor {family.format(*numbers)!r} of shape {list(usual)} is missing"
    return None


def _and_more(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
