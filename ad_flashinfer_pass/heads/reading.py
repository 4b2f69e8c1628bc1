"""What the layouts of heads have in common: the model, the tensors of a checkpoint, and what is made of them.

The decoder layer of a head, with norm and lm_head, is a causal language model of transformers with one layer,
so that masks and rotary embeddings are those of transformers, and the pass treats it as any other model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ad_flashinfer_pass.errors import ConfigError, LoadError, is_out_of_memory
from ad_flashinfer_pass.models.checkpoint import Shape, read_headers
from ad_flashinfer_pass.models.quantization import Stored
from ad_flashinfer_pass.models.quantized.scheme import REAL

_OTHER = "the checkpoint is incomplete, or is of another model"


class Body(nn.Module):
    """What the pass transforms: a token's embedding and a hidden state, side by side, to logits.

    Args:
        model: of transformers, with one layer.
        join: makes what its layer reads of both; None: the layer does so.
    """

    def __init__(self, model: Any, join: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.join = model, join
        self.config = copy.deepcopy(model.config)
        self.config.hidden_size *= 2

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, vocabulary] of inputs_embeds [b, s, 2 * d]."""
        joined = inputs_embeds if self.join is None else self.join(inputs_embeds)
        logits: Tensor = self.model(inputs_embeds=joined, position_ids=position_ids, use_cache=False).logits
        return logits


class Target(NamedTuple):
    """The model that a head guesses for."""

    model: Any
    """Of transformers."""
    decoder: Any
    layers: str
    """Path of its layers."""
    config: Any
    """Of its text stack."""
    embed: nn.Module

    @classmethod
    def of(cls, model: Any) -> Target:
        """Raises:
        ConfigError: it has no layers that are known by number.
        """
        config = model.config.get_text_config(decoder=True)
        decoder = model.get_decoder()
        stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
        paths = [
            path for path, m in model.named_modules() if m in stacks and len(m) == config.num_hidden_layers
        ]
        if len(paths) != 1:
            raise ConfigError(
                f"speculative_config: {type(model).__name__} has {len(paths)} lists of "
                f"{config.num_hidden_layers} layers, so that it is not known which of them a head reads; use "
                "another drafter."
            )
        return cls(model, decoder, paths[0], config, model.get_input_embeddings())

    def path_of(self, module: nn.Module) -> str:
        """The path of a module of it."""
        return next(path for path, each in self.model.named_modules() if each is module)


class Tensors:
    """The tensors of a head's checkpoint.

    Args:
        directory: of safetensors.
        stored: what its files hold.
        names: what is read, by name: what it is called here.
        places: how names begin here: how they begin there, the longer ones first.
    """

    def __init__(
        self,
        directory: Path,
        stored: Mapping[str, Stored],
        names: Mapping[str, str],
        places: Mapping[str, str],
    ) -> None:
        self.directory, self._stored, self._places = directory, stored, places
        self._files = {here: there for there, here in names.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, shape: Shape, kinds: Sequence[str] = tuple(REAL)) -> Tensor:
        """One of them.

        Args:
            name: as it is called here.
            shape: that it must have.
            kinds: dtypes that it may have, as safetensors calls them.

        Raises:
            LoadError: it is missing, or is another one.
        """
        if name not in self:
            raise LoadError(
                f"{self.directory}: tensor {self._known_as(name)!r} of shape {list(shape)} is missing; "
                f"{_OTHER}."
            )
        stored = self._stored[self._files[name]]
        if stored.shape != shape or stored.dtype not in kinds:
            raise LoadError(
                f"{stored.file}: tensor {self._files[name]!r} must have shape {list(shape)} and be one of "
                f"{', '.join(kinds)}, found {list(stored.shape)} and {stored.dtype}; {_OTHER}."
            )
        return self._read(name)

    def model(self, kind: Any, config: Any, lent: Sequence[str], **settings: Any) -> Any:
        """A model of transformers with those that are called as its own.

        Args:
            kind: its class.
            config: what it is built from.
            lent: parameters that may be missing.
            settings: dtype and attn_implementation.

        Raises:
            LoadError: others are missing, or some have another shape or are no real numbers.
        """
        for there in self._files.values():
            stored = self._stored[there]
            if stored.dtype not in REAL:
                raise LoadError(
                    f"{stored.file}: tensor {there!r} is {stored.dtype}, but a head's weights must be one of "
                    f"{', '.join(REAL)}; give a checkpoint that is not quantized."
                )
        given = {name: self._read(name) for name in self._files}
        try:
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=given,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **settings,
            )
        except RuntimeError as err:
            if is_out_of_memory(err):
                raise
            raise LoadError(f"{self.directory}: {' '.join(str(err).split())}; {_OTHER}.") from None
        wrong = sorted(info["mismatched_keys"])
        if wrong:
            name, found, wanted = wrong[0]
            raise LoadError(
                f"{self.directory}: tensor {self._files.get(name, name)!r} must have shape {list(wanted)}, "
                f"found {list(found)}; {_OTHER}."
            )
        for what, names in (
            ("is missing", info["missing_keys"]),
            ("is none of a head", info["unexpected_keys"]),
        ):
            names = sorted({*names}.difference(lent))
            if names:
                name = self._known_as(names[0])
                raise LoadError(f"{self.directory}: tensor {name!r} {what}; {_OTHER}.")
        return model

    def _known_as(self, name: str) -> str:
        """What a tensor is called in the checkpoint, or would be."""
        here = next((here for here in self._places if name.startswith(here)), "")
        return self._files.get(name, self._places.get(here, "") + name.removeprefix(here))

    def _read(self, name: str) -> Tensor:
        there = self._files[name]
        with safe_open(self._stored[there].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(there)
        return tensor


def headers(directory: Path) -> Mapping[str, Stored]:
    """What the files of a checkpoint hold, by name; see ``checkpoint.read_headers``."""
    return read_headers(directory).tensors


def embedding(weight: Tensor, dtype: torch.dtype) -> nn.Embedding:
    """An embedding of these weights."""
    return nn.Embedding.from_pretrained(weight.to(dtype))
