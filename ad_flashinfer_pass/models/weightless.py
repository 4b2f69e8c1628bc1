"""A model without its weights: enough to export, transform and plan, in a few hundred MiB for any size."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.models.fake_weights import built_on_meta, with_fake_weights
from ad_flashinfer_pass.models.loading import model_building
from ad_flashinfer_pass.models.quantization import find_quantized
from ad_flashinfer_pass.models.quantized.layout import Layout
from ad_flashinfer_pass.models.quantized.on_meta import quantize_like
from ad_flashinfer_pass.models.quiet import quiet_transformers
from ad_flashinfer_pass.models.source import (
    build_settings,
    check_architecture,
    find_source,
    raw_config,
    read_config,
    with_max_seq_len,
)

logger = logging.getLogger(__name__)


def load_weightless(config: AutoDeployConfig) -> tuple[nn.Module, AutoDeployConfig]:
    """The causal language model of ``config.model`` with fake weights, which have shapes and no memory.

    Buffers, such as rotary frequencies, are real: masks and constants are computed from them. All of it
    is on the CPU, whatever ``config.device`` says. Only config.json and its like are read; of a model
    that is quantized in a way that cannot be read, it is the unquantized one. With it comes the config with
    max_seq_len resolved.

    Raises:
        ConfigError: the model cannot be found, or a key does not fit it.
        LoadError: the model is of a kind that has no KV cache to page.
    """
    with ExitStack() as stack, quiet_transformers():
        source = find_source(config.model_copy(update={"skip_loading_weights": True}), stack)
        hf_config = read_config(source, config)
        check_architecture(hf_config, config)
        config = with_max_seq_len(hf_config, config)
        quantized = find_quantized(source, raw_config(source, config))
        settings = build_settings(hf_config, config)
        with model_building(source, hf_config, "memory"):
            module: Any = built_on_meta(hf_config, settings)
    layout = None if quantized is None else quantized.layout
    if isinstance(layout, Layout):
        if not config.dequantize:
            quantize_like(module, layout)
    elif quantized is not None:
        dtype = str(module.dtype).removeprefix("torch.")
        logger.warning(
            "%s: the weights are %s; what follows describes the unquantized model, with weights of %s",
            config.model,
            quantized,
            dtype,
        )
    with_fake_weights(module.eval(), torch.device("cpu"))
    return module, config
