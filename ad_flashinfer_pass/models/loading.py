"""``load_model``: a Hugging Face checkpoint, or random weights, as a module ready to export."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import CapacityError, ConfigError, LoadError
from ad_flashinfer_pass.models.checkpoint import load_weights
from ad_flashinfer_pass.models.generation_file import (
    GENERATION_FILE,
    named_eos_token_ids,
    read_generation_config,
)
from ad_flashinfer_pass.models.quiet import quiet_transformers
from ad_flashinfer_pass.models.source import (
    Source,
    check_architecture,
    check_max_seq_len,
    fetch,
    find_source,
    first_line,
    raw_config,
    read_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SEED = 0
# A tokenizer needs one of these; from tokenizer_config.json alone transformers makes an empty one.
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


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
    generation_config: GenerationConfig | None
    """generation_config.json; None where the checkpoint has none."""
    name: str
    """``model`` as the configuration gives it."""


def load_model(config: AutoDeployConfig) -> LoadedModel:
    """Load what ``config.model`` names, checked tensor by tensor.

    With ``skip_loading_weights`` the weights are drawn on ``config.device``: the same for the same
    config.json, dtype and kind of device.

    Raises:
        ConfigError: the model cannot be found, or a key does not fit it.
        LoadError: the model is of a kind that has no KV cache to page, or its files are incomplete,
            damaged or pickled.
        CapacityError: the device cannot hold the weights.
    """
    device = _checked_device(config.device)
    with ExitStack() as stack, quiet_transformers() as reports:
        source = find_source(config, stack)
        hf_config = read_config(source, config)
        check_architecture(hf_config, config)
        check_max_seq_len(hf_config, config)
        tokenizer = _load_tokenizer(source, config)
        generation_config = read_generation_config(source.directory)
        eos_token_ids = _eos_token_ids(source, config, hf_config, generation_config, tokenizer)
        module = _build(source, hf_config, config, device, reports)
    return LoadedModel(
        module=module,
        config=hf_config,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        generation_config=generation_config,
        name=config.model,
    )


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
) -> nn.Module:
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.dtype != "auto":
        settings["dtype"] = getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        settings["attn_implementation"] = config.attn_implementation
    try:
        if config.skip_loading_weights:
            redrawn = "initializer_range" not in config.model_kwargs
            module = _random_module(hf_config, device, redrawn, settings)
        else:
            check_not_quantized(hf_config)
            settings.setdefault("dtype", "auto")
            module = load_weights(source.directory, hf_config, reports, **settings)
        return module.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError as err:
        raise CapacityError(
            f"{config.model}: {device} cannot hold the weights ({first_line(err)}); free memory "
            "there, or set another device or a smaller dtype."
        ) from None
    except (OSError, ValueError, ImportError) as err:
        raise LoadError(f"{config.model}: {' '.join(str(err).split())}") from err


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


def check_not_quantized(hf_config: PretrainedConfig) -> None:
    """Refuse checkpoints with quantized weights.

    Raises:
        LoadError: names the method.
    """
    quantization = getattr(hf_config, "quantization_config", None)
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "?"
    raise LoadError(
        f"the checkpoint is quantized (quant_method {method!r}), which is not supported; give one "
        "with float32, bfloat16 or float16 weights."
    )


def _load_tokenizer(source: Source, config: AutoDeployConfig) -> PreTrainedTokenizerBase | None:
    directory = source.directory
    if config.tokenizer is not None:
        directory = Path(config.tokenizer).expanduser()
        if not directory.is_dir():
            directory = fetch(config.tokenizer, [], "tokenizer", config.trust_remote_code)
    if not any(any(directory.glob(pattern)) for pattern in _VOCABULARY_FILES):
        if config.tokenizer is None:
            return None
        raise ConfigError(f"tokenizer {config.tokenizer!r}: no tokenizer.json is there.")
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError) as err:
        raise LoadError(f"{directory}: the tokenizer cannot be read: {first_line(err)}") from None


def _eos_token_ids(
    source: Source,
    config: AutoDeployConfig,
    hf_config: PretrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[int, ...]:
    """What the files name: a class of transformers has a default of its own, which fits no checkpoint."""
    raw = raw_config(source, config)
    text = hf_config.get_text_config(decoder=True)
    parts = [
        raw[key] for key in hf_config.sub_configs if getattr(hf_config, key, None) is text and raw.get(key)
    ]
    places = [(source.config_file, part) for part in (raw, *parts)]
    if generation_config is not None:
        places.insert(
            0, (source.directory / GENERATION_FILE, {"eos_token_id": generation_config.eos_token_id})
        )
    ids = next((ids for file, part in places if (ids := named_eos_token_ids(file, part))), ())
    own = getattr(tokenizer, "eos_token_id", None)
    return ids if own is None else tuple(dict.fromkeys((*ids, own)))
