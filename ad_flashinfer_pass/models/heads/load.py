"""``load_head``: from the name of a checkpoint to a head on the device of its model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.models.heads.eagle3 import load_eagle3
from ad_flashinfer_pass.models.heads.head import DraftHead
from ad_flashinfer_pass.models.heads.mtp import load_mtp
from ad_flashinfer_pass.models.quiet import quiet_transformers
from ad_flashinfer_pass.models.source import find_source

_LOADERS = {"eagle3": load_eagle3, "mtp": load_mtp}


def load_head(kind: Literal["eagle3", "mtp"], name: str, model: nn.Module) -> DraftHead:
    """The head of a checkpoint, on the device and in the dtype of the model's embeddings.

    Args:
        kind: its layout.
        name: directory or hub id.
        model: of transformers, that it guesses for.

    Raises:
        ConfigError: there is no such checkpoint, or it does not go with the model.
        LoadError: a tensor is missing or is another one, or a file is damaged.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    with ExitStack() as stack, quiet_transformers():
        source = find_source(AutoDeployConfig(model=name, device="cpu"), stack)
        head = _LOADERS[kind](source.directory, model, weight.dtype)
    return head.to(weight.device)
