"""Weights from safetensors, with every tensor accounted for.

transformers draws random values for tensors that a checkpoint lacks; here that is an error, as is a
tensor of another shape or a file that is cut short. Pickled checkpoints are refused: reading one
can run any code.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ad_flashinfer_pass.errors import LoadError, is_out_of_memory
from ad_flashinfer_pass.models.cache_scales import is_cache_scale
from ad_flashinfer_pass.models.quantization import Quantized, Stored, find_quantized_tensor
from ad_flashinfer_pass.models.quantized.formats import SUPPORTED
from ad_flashinfer_pass.models.quantized.scheme import REAL
from ad_flashinfer_pass.models.quantized.weights import QuantizedWeights

logger = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_AGAIN = "the checkpoint is incomplete or damaged: fetch it again"
_OTHER_CONFIG = "the checkpoint is incomplete or belongs to another config.json"

Shape = tuple[int, ...]


class Weights(NamedTuple):
    """The safetensors files of a checkpoint, by their headers."""

    directory: Path
    files: list[Path]
    tensors: dict[str, Stored]
    """By name; of a tensor that several files hold, the one that the index names."""
    is_plain: bool
    """Whether transformers, which reads every tensor of every file, finds these and no other."""


def read_headers(directory: Path) -> Weights:
    """What the safetensors files of a checkpoint hold, each with a whole header and a whole body.

    Raises:
        LoadError: there are none, one is missing or cannot be read to its end, or the index is wrong.
    """
    weight_map: dict[str, str] = {}
    is_plain = True
    if (directory / _SINGLE).is_file():
        files = [directory / _SINGLE]
    elif (directory / _INDEX).is_file():
        weight_map, is_plain = _read_index(directory / _INDEX)
        files = sorted({directory / name for name in weight_map.values()})
    else:
        raise LoadError(_no_weights(directory))
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in weight_map and directory / weight_map[name] != file:
                is_plain = False
            else:
                tensors[name] = stored
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise LoadError(
            f"{directory / weight_map[absent[0]]}: holds no tensor {absent[0]!r}, which {_INDEX} says"
            f"{_and_more(absent)}; {_AGAIN}."
        )
    return Weights(directory, files, tensors, is_plain)


def load_weights(
    directory: Path,
    hf_config: PretrainedConfig,
    reports: list[str],
    quantized: Quantized | None = None,
    dequantize: bool = False,
    **settings: Any,
) -> tuple[nn.Module, Weights]:
    """The causal language model with the weights of a checkpoint, on the CPU, and what the files hold.

    Args:
        directory: of the checkpoint.
        hf_config: what the model is built from; config.json is not read again.
        reports: the messages of transformers while this runs, see ``quiet_transformers``.
        quantized: what the files beside the weights say of them. Those of linears and experts stay quantized.
        dequantize: no, all of them become plain.
        settings: passed on to transformers: dtype, attn_implementation, trust_remote_code.

    Raises:
        LoadError: a tensor is missing, left over, quantized, of another shape or no real number, or a file
            is missing or damaged.
    """
    weights = stored = read_headers(directory)
    packed = None
    if quantized is None:
        quantized = find_quantized_tensor(weights.tensors)
    if quantized is not None:
        if isinstance(quantized.layout, str):
            refuse_quantized(directory, quantized)
        if settings["dtype"] == "auto":
            settings["dtype"] = _dtype(hf_config, weights.tensors)
        packed = QuantizedWeights(directory, weights.tensors, quantized, settings["dtype"], dequantize)
        packed.check_modules(_without_weights(hf_config, settings))
        stored = weights._replace(tensors=packed.plain(), is_plain=False)
    try:
        loading = nullcontext() if packed is None else packed.stand_ins.while_loading()
        with warnings.catch_warnings(), loading:
            warnings.simplefilter("ignore")  # of casts, which are refused below with names
            loaded: Any = _from_pretrained(
                stored,
                hf_config,
                settings,
                None if packed is None else packed.deferred,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # likewise, as info has them
            )
    except RuntimeError as err:
        if is_out_of_memory(err):
            raise
        if packed is not None and packed.fault is not None:
            raise packed.fault from None
        raise LoadError(f"{directory}: {_conversion_failure(stored.tensors, reports, err)}") from err
    module, info = loaded
    if packed is not None and packed.fault is not None:
        raise packed.fault
    _check_mismatched(directory, info["mismatched_keys"])
    _check_missing(directory, info["missing_keys"], module)
    _check_left_out(stored, info["unexpected_keys"], module)
    _check_kinds(stored, info["unexpected_keys"], module)
    _note_untied(directory, module)
    if packed is not None and not dequantize:
        packed.put_into(module)
    return module, weights


def refuse_quantized(directory: Path, quantized: Quantized) -> None:
    """Raise: these weights cannot be read.

    Raises:
        LoadError: always.
    """
    raise LoadError(
        f"{directory}: the weights are {quantized}{f', and {why}' if (why := quantized.layout) else ''}, "
        "which is not supported; give a checkpoint of float32, bfloat16 or float16 weights, or one of "
        f"{SUPPORTED}, or set skip_loading_weights (--random-weights) to run without them."
    )


def _from_pretrained(
    weights: Weights,
    hf_config: PretrainedConfig,
    settings: dict[str, Any],
    read: Callable[[str], Any] | None,
    **options: Any,
) -> Any:
    if weights.is_plain:
        return AutoModelForCausalLM.from_pretrained(
            str(weights.directory), config=hf_config, use_safetensors=True, **options, **settings
        )
    opened = {file: safe_open(file, framework="pt") for file in weights.files}
    tensors = {
        name: opened[stored.file].get_tensor(name) if read is None else read(name)
        for name, stored in weights.tensors.items()
    }
    # transformers takes tensors in place of files only from who knows the class of the model.
    like = _without_weights(hf_config, settings)
    own = hf_config if type(hf_config) is type(like.config) else hf_config.get_text_config()
    return type(like).from_pretrained(None, config=own, state_dict=tensors, **options, **settings)


def _without_weights(hf_config: PretrainedConfig, settings: dict[str, Any]) -> Any:
    """The model on meta."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config), **{**settings, "dtype": torch.float32}
        )


def _dtype(hf_config: PretrainedConfig, tensors: Mapping[str, Stored]) -> torch.dtype:
    """What transformers takes a model to be: as its config says, else as the first real tensor."""
    said = getattr(hf_config, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    real = (stored.dtype for name, stored in tensors.items() if stored.dtype in REAL and "scale" not in name)
    return REAL[next(real, "F32")]


def _read_index(index: Path) -> tuple[dict[str, str], bool]:
    """weight_map, and whether the index has the metadata without which transformers does not read it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        names = set(weight_map.values())
        missing = sorted(index.parent / name for name in names if not (index.parent / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LoadError(f"{index}: must map tensors to files in weight_map; {_AGAIN}.") from None
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise LoadError(f"{index}: weight_map: must name files of its own folder, got {name!r}.")
    if missing:
        raise LoadError(
            f"{missing[0]}: {_INDEX} names this file, but it is not there{_and_more(missing)}; {_AGAIN}."
        )
    return weight_map, isinstance(content.get("metadata"), dict)


def _header(file: Path) -> dict[str, Stored]:
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                part = opened.get_slice(name)
                found[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as err:
        if is_out_of_memory(err):
            raise
        raise LoadError(f"{file}: {str(err).rstrip('.')}; {_AGAIN}.") from None
    return found


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


def _check_left_out(weights: Weights, unexpected: set[str], module: nn.Module) -> None:
    """Refuse tensors of modules that the model has; those of whole modules that it lacks are a warning."""
    modules = {name for name, _ in module.named_modules()}
    computed = {name for name, _ in module.named_buffers()}
    others = []
    for name in sorted(unexpected):
        if name in computed or is_cache_scale(name) or _is_constant(name, weights.tensors):
            continue
        parts = name.split(".")
        known = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
        # A number in the name of a module is that of a layer: what lies in one changes what it computes.
        if known and (known == len(parts) - 1 or any(part.isdigit() for part in parts[:known])):
            raise LoadError(
                f"{weights.directory}: tensor {name!r} would be left out, though the model has "
                f"{'.'.join(parts[:known])!r}; the checkpoint belongs to another config.json or another "
                "version of transformers, or is quantized."
            )
        others.append(name)
    if others:
        logger.warning(
            "%s: %d tensors that the model does not have were left out: %s%s",
            weights.directory,
            len(others),
            others[0],
            _and_more(others),
        )


def _is_constant(name: str, tensors: Mapping[str, Stored]) -> bool:
    """Whether old versions of transformers stored this, and none reads it: masks and rotary frequencies."""
    if re.search(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids)$", name):
        return True
    same = [stored for key, stored in tensors.items() if key.endswith(name) or name.endswith(key)]
    return re.search(r"attn\.bias$|attention\.bias$", name) is not None and len(same[0].shape) == 4


def _check_kinds(weights: Weights, unexpected: set[str], module: nn.Module) -> None:
    """Refuse what transformers casts to real numbers without a word: integers, booleans, complex numbers."""
    state = module.state_dict()
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    for name, stored in weights.tensors.items():
        if stored.dtype in REAL:
            continue
        names = (name, prefix + name, name.removeprefix(prefix))
        target = next((state[each] for each in names if each in state), None)
        is_left_out = target is None and (not name.endswith(".weight") or not unexpected.isdisjoint(names))
        if not is_left_out and (target is None or target.is_floating_point()):
            raise LoadError(
                f"{stored.file}: tensor {name!r} is {stored.dtype}, but a weight must be one of "
                f"{', '.join(REAL)}; {_OTHER_CONFIG}."
            )


def _note_untied(directory: Path, module: Any) -> None:
    """transformers keeps two matrices that config.json ties, if they differ."""
    head = module.get_output_embeddings()
    is_tied = getattr(module.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if is_tied and head is not None and head.weight is not module.get_input_embeddings().weight:
        logger.warning(
            "%s: config.json says tie_word_embeddings, but the checkpoint has a head of its own that differs "
            "from the embeddings; it is used",
            directory,
        )


def _conversion_failure(tensors: Mapping[str, Stored], reports: list[str], err: RuntimeError) -> str:
    """Which tensor kept transformers from assembling a fused one, such as stacked experts."""
    found = _odd_tensor({name: stored.shape for name, stored in tensors.items()})
    if found:
        return f"{found}; {_OTHER_CONFIG}."
    fused = re.search(r"^(\S+)\s*\|\s*\S*CONVERSION", "\n".join(reports), re.MULTILINE)
    if fused:
        return f"tensor {fused[1]!r} cannot be assembled from the checkpoint; {_OTHER_CONFIG}."
    return f"{' '.join(str(err).split())}; {_OTHER_CONFIG}."


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
