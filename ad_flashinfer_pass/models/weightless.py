"""A model without its weights: enough to export, transform and plan, in a few hundred MiB for any size."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from ad_flashinfer_pass.config import AutoDeployConfig
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
        # On meta as soon as they are registered, so that no more than one is ever in memory, none is drawn.
        hook = register_module_parameter_registration_hook(_on_meta)
        try:
            with model_building(source, hf_config, "memory"):
                module = AutoModelForCausalLM.from_config(hf_config, **settings)
        finally:
            hook.remove()
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
    return _with_fake_weights(module.eval()), config


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if parameter is None or parameter.is_meta:  # the same weight, registered a second time, stays the same
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _with_fake_weights(module: nn.Module) -> nn.Module:
    """Weights on meta as fake tensors of the CPU: to torch.export they are like any others."""
    mode, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
    fakes: dict[nn.Parameter, nn.Parameter] = {}  # a weight that two modules share stays one
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter not in fakes:
                fake = FakeTensor(mode, parameter.detach(), cpu)
                fakes[parameter] = nn.Parameter(fake, requires_grad=False)
            setattr(owner, name, fakes[parameter])
    return module
