"""``load_model``: a Hugging Face checkpoint, or random weights, as a module ready to export."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import (
    AdFlashinferError,
    CapacityError,
    ConfigError,
    LoadError,
    is_out_of_memory,
    is_panic,
)
from ad_flashinfer_pass.models.cache_scales import with_cache_scales
from ad_flashinfer_pass.models.checkpoint import load_weights, refuse_quantized
from ad_flashinfer_pass.models.fake_weights import DrawnWeights, built_on_meta, with_fake_weights
from ad_flashinfer_pass.models.generation_file import (
    Found,
    named_eos_token_ids,
    read_generation_config,
)
from ad_flashinfer_pass.models.json_file import Fields, check_types, read_json
from ad_flashinfer_pass.models.moving import move_weights
from ad_flashinfer_pass.models.quantization import Quantized, find_quantized
from ad_flashinfer_pass.models.quantized.on_meta import quantize_like
from ad_flashinfer_pass.models.quantized.random import draw
from ad_flashinfer_pass.models.quiet import quiet_transformers
from ad_flashinfer_pass.models.source import (
    UNEXPECTED_VALUE,
    Source,
    build_settings,
    check_architecture,
    fetch,
    find_source,
    first_line,
    raw_config,
    read_config,
    unfit_values,
    with_max_seq_len,
)

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SEED = 0
# A tokenizer needs one of these; from tokenizer_config.json alone transformers makes an empty one.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_TOKENIZER_SETTINGS = "tokenizer_config.json"


class _TokenizerFields(Fields):
    """Of tokenizer_config.json, what transformers uses unchecked, at times long after reading it."""

    tokenizer_class: str | None = None
    model_max_length: float | None = None
    eos_token: str | dict[str, Any] | None = None
    bos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    split_special_tokens: bool = False
    padding_side: Literal["left", "right"] = "right"
    model_input_names: list[str] = Field(default_factory=list)
    added_tokens_decoder: dict[str, Any] | None = None
    chat_template: str | list[dict[str, Any]] | dict[str, str] | None = None


@dataclass(frozen=True)
class LoadedModel:
    """What the pass starts from."""

    module: nn.Module
    """The causal language model of transformers, in eval mode, without gradients, on its device."""
    config: PretrainedConfig
    """Its config.json, with model_kwargs applied."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where the checkpoint has none: prompts are then token ids."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text: of generation_config.json, else of config.json, and the tokenizer's."""
    generation: Found
    """What generation_config.json says or, without one, config.json."""
    name: str
    """``model`` as the configuration gives it."""
    resolved: AutoDeployConfig
    """The configuration, where it says nothing as the files of the model decide: max_seq_len, and the scales
    of an fp8 cache."""
    stored: Mapping[Tensor, Tensor] | None = None
    """Of a model of several ranks, what the fake weights of the module stand for, on the CPU; those of a
    checkpoint stay in its file until they are read."""


def load_model(config: AutoDeployConfig) -> LoadedModel:
    """Load what ``config.model`` names, checked tensor by tensor.

    With ``skip_loading_weights`` the weights are drawn on ``config.device``: the same for the same
    config.json, dtype and kind of device, and for any number of ranks above one.

    Raises:
        ConfigError: the model cannot be found, or a key does not fit it.
        LoadError: the model is of a kind that has no KV cache to page, or its files are incomplete,
            damaged, pickled or quantized.
        CapacityError: the device cannot hold the weights.
    """
    device = _checked_device(config.device)
    with ExitStack() as stack, quiet_transformers() as reports:
        source = find_source(config, stack)
        raw = raw_config(source, config)
        quantized = find_quantized(source, raw)
        if quantized is not None and not config.skip_loading_weights and isinstance(quantized.layout, str):
            refuse_quantized(source.directory, quantized)
        hf_config = read_config(source, config)
        check_architecture(hf_config, config)
        resolved = with_max_seq_len(hf_config, config)
        tokenizer = _load_tokenizer(source, config, hf_config)
        generation = read_generation_config(source.directory, source.config_file, raw)
        eos_token_ids = _eos_token_ids(source, raw, hf_config, generation, tokenizer)
        with model_building(source, hf_config, f"{device}"):
            module, resolved = _build(source, hf_config, resolved, device, reports, quantized)
            stored = None if config.world_size == 1 else _stored(module, hf_config, device)
    if quantized is not None and config.skip_loading_weights and isinstance(quantized.layout, str):
        logger.warning(
            "%s: the weights are %s; random weights of the unquantized model are drawn in their place",
            config.model,
            quantized,
        )
    return LoadedModel(
        module=module,
        config=hf_config,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        generation=generation,
        name=config.model,
        resolved=resolved,
        stored=stored,
    )


@contextmanager
def model_building(source: Source, hf_config: PretrainedConfig, place: str) -> Iterator[None]:
    """Turn what building a model of transformers raises into one line.

    Args:
        source: of the model.
        hf_config: what it is built from.
        place: the device that takes the weights.

    Raises:
        CapacityError: memory does not suffice.
        LoadError: config.json has a value that the code of the model cannot use.
    """
    try:
        yield
    except AdFlashinferError:
        raise
    except (*UNEXPECTED_VALUE, MemoryError) as err:
        if is_out_of_memory(err):
            raise CapacityError(
                f"{source.config_file}: {place} cannot hold the model ({first_line(err)}); free memory "
                "there, or set another device or a smaller dtype."
            ) from None
        raise LoadError(f"{source.config_file}: {unfit_values(hf_config, err)}") from err


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu, cuda or cuda:N, got {name!r}.")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"device {name!r}: {first_line(err)}; set device: cpu.") from None
    return device


def _build(
    source: Source,
    hf_config: PretrainedConfig,
    config: AutoDeployConfig,
    device: torch.device,
    reports: list[str],
    quantized: Quantized | None,
) -> tuple[nn.Module, AutoDeployConfig]:
    """The module, and the config with the scales that its checkpoint has."""
    settings = build_settings(hf_config, config)
    if config.skip_loading_weights and config.world_size > 1:
        module = built_on_meta(hf_config, settings)
        if quantized is not None and not isinstance(quantized.layout, str) and not config.dequantize:
            quantize_like(module, quantized.layout)
    elif config.skip_loading_weights:
        redrawn = "initializer_range" not in config.model_kwargs
        module = _random_module(hf_config, device, redrawn, settings)
        if quantized is not None and not isinstance(quantized.layout, str) and not config.dequantize:
            quantize_like(module, quantized.layout)
            draw(module, device, hf_config.get_text_config(decoder=True).hidden_size ** -0.5)
    else:
        settings.setdefault("dtype", "auto")
        module, weights = load_weights(
            source.directory, hf_config, reports, quantized, config.dequantize, **settings
        )
        text = hf_config.get_text_config(decoder=True)
        config = with_cache_scales(config, source.directory, weights.tensors, text)
    module = module.eval().requires_grad_(False)
    # Of several ranks each takes a part alone to its device, once it is known which.
    return module if config.world_size > 1 else move_weights(module, device), config


def _stored(module: nn.Module, hf_config: PretrainedConfig, device: torch.device) -> Mapping[Tensor, Tensor]:
    """Put fake weights into a module, and its buffers on a device. Returns what the weights stand for."""
    is_drawn = any(parameter.is_meta for parameter in module.parameters())
    stored: Mapping[Tensor, Tensor] = with_fake_weights(module, device)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))
    if is_drawn:
        deviation = hf_config.get_text_config(decoder=True).hidden_size ** -0.5
        stored = DrawnWeights(module, deviation, device)
    return stored


def _random_module(
    hf_config: PretrainedConfig,
    device: torch.device,
    redrawn: bool,
    settings: dict[str, Any],
) -> nn.Module:
    """A module with seeded weights whose greedy text is not one token for ever.

    The usual initializer_range of 0.02 makes the layers of a small model add next to nothing to the
    embedding, and a model with tied embeddings then repeats its last token. With a deviation of
    hidden_size ** -0.5 each layer keeps the scale of its input, and smaller embeddings leave the
    say to the layers.
    """
    text = hf_config.get_text_config(decoder=True)
    if redrawn and hasattr(text, "initializer_range"):
        text.initializer_range = text.hidden_size**-0.5
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), device:
        torch.manual_seed(_SEED)
        module = AutoModelForCausalLM.from_config(hf_config, **settings)
    if redrawn:
        with torch.no_grad():
            module.get_input_embeddings().weight.mul_(0.1)
    return module


def _load_tokenizer(
    source: Source, config: AutoDeployConfig, hf_config: PretrainedConfig
) -> PreTrainedTokenizerBase | None:
    directory = source.directory
    if config.tokenizer is not None:
        directory = Path(os.path.expanduser(config.tokenizer))
        if not directory.is_dir():
            directory = fetch(config.tokenizer, [], "tokenizer", config.trust_remote_code)
    if not any(any(directory.glob(pattern)) for pattern in _VOCABULARY_FILES):
        if config.tokenizer is None:
            return None
        raise ConfigError(f"tokenizer {config.tokenizer!r}: no tokenizer.json is there.")
    settings = directory / _TOKENIZER_SETTINGS
    if settings.is_file():
        check_types(settings, read_json(settings), _TokenizerFields)
    try:
        return AutoTokenizer.from_pretrained(
            str(directory),
            # Of the model, where it is the model's own: config.json is not read again.
            config=hf_config if config.tokenizer is None else None,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
        )
    except BaseException as err:  # tokenizers raises Exception itself
        if not isinstance(err, Exception) and not is_panic(err):
            raise
        raise LoadError(f"the tokenizer cannot be read: {_tokenizer_fault(directory, err)}") from None


def _tokenizer_fault(directory: Path, err: BaseException) -> str:
    """The file that keeps a tokenizer from being read, if one is damaged by itself, and why."""
    for file in sorted(directory.glob("*.json")):
        if file.name.startswith(("tokenizer", "vocab", "special_tokens", "added_tokens")):
            try:
                read_json(file)
            except LoadError as found:
                return str(found)
    try:
        if (directory / "tokenizer.json").is_file():
            Tokenizer.from_file(str(directory / "tokenizer.json"))
    except BaseException as found:  # as above
        if not isinstance(found, Exception) and not is_panic(found):
            raise
        return f"{directory / 'tokenizer.json'}: {first_line(found)}"
    return f"{directory / _TOKENIZER_SETTINGS} or special_tokens_map.json: {first_line(err)}"


def _eos_token_ids(
    source: Source,
    raw: dict[str, Any],
    hf_config: PretrainedConfig,
    generation: Found,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[int, ...]:
    """What the files name: a class of transformers has a default of its own, which fits no checkpoint."""
    text = hf_config.get_text_config(decoder=True)
    parts = [
        raw[key] for key in hf_config.sub_configs if getattr(hf_config, key, None) is text and raw.get(key)
    ]
    places = [(source.config_file, part) for part in (raw, *parts)]
    if generation.config is not None:
        places.insert(0, (generation.file, {"eos_token_id": generation.config.eos_token_id}))
    ids = next((ids for file, part in places if (ids := named_eos_token_ids(file, part))), ())
    own = getattr(tokenizer, "eos_token_id", None)
    return ids if own is None else tuple(dict.fromkeys((*ids, own)))
