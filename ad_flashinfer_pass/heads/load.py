"""``load_head``: from the name of a checkpoint to a head on the device of its model."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.heads.eagle3 import load_eagle3
from ad_flashinfer_pass.heads.mtp import load_mtp
from ad_flashinfer_pass.models.quiet import quiet_transformers
from ad_flashinfer_pass.models.source import find_source
from ad_flashinfer_pass.runtime.drafts.head import DraftHead


def load_head(kind: str, name: str, model: nn.Module) -> DraftHead:
    """The head of a checkpoint, on the device and in the dtype of the model's embeddings.

    Args:
        kind: eagle3 or mtp.
        name: directory or hub id.
        model: of transformers, that it guesses for.

    Raises:
        ConfigError: there is no such checkpoint, or it does not go with the model.
        LoadError: a tensor is missing or is another one, or a file is damaged.
    """
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    with ExitStack() as stack, quiet_transformers():
        source = find_source(AutoDeployConfig(model=name, device="cpu"), stack)
        load = {"eagle3": load_eagle3, "mtp": load_mtp}[kind]
        head = load(source.directory, model, weight.dtype)
    return head.to(weight.device)
