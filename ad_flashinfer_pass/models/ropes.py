"""Rotary embeddings whose frequencies depend on the length of the sequence, as graphs.

transformers has two: longrope takes one set of frequencies up to ``original_max_position_embeddings`` tokens
and another beyond; dynamic NTK changes its base with every token beyond ``max_position_embeddings``. Both
look at the longest sequence of the batch, branch on it in Python and keep what they found in the module. For
the time of an export they are functions of ``ops.sequence_length``, each token's own, so that a sequence gets
what transformers gives it alone. Where ``max_seq_len`` is so small that nothing changes, they are constant.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ad_flashinfer_pass.errors import ExportError

_KINDS = ("longrope", "dynamic")


@contextmanager
def by_own_length(model: nn.Module, max_seq_len: int) -> Iterator[None]:
    """Let each token's frequencies follow its own sequence, while the context lasts."""
    changed = [
        module for module in model.modules() if any(kind in _KINDS for kind in _kinds(module).values())
    ]
    try:
        for module in changed:
            module.forward = _forward(module, max_seq_len)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)  # it may not have come so far


def recomputes_at(model: nn.Module, max_seq_len: int) -> int | None:
    """The length beyond which transformers' generate computes the cache anew; None if it does not.

    Phi-3 and its kin do so once, when a sequence grows out of the first set of frequencies; others go on with
    keys of both sets. Old versions of transformers drop the cache, too, but go on with the last token alone.
    """
    limits = {
        _limit(module, name)
        for module in model.modules()
        for name, kind in _kinds(module).items()
        if kind == "longrope"
    }
    limits = {limit for limit in limits if limit < max_seq_len}
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if not limits or prepare is None:
        return None
    limit = min(limits)
    past, cache = torch.empty(1, 1, limit, 1, device="meta"), DynamicCache()
    cache.update(past, past, 0)
    takes = inspect.signature(prepare).parameters
    name = "cache" if "cache" in takes else "past_key_values"
    ids = torch.zeros(1, limit + 1, dtype=torch.int64)
    given = prepare(ids, next_sequence_length=1, attention_mask=torch.ones_like(ids), **{name: cache})
    return None if given.get(name) is cache else limit


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The rope types of a rotary embedding by layer type, None if it has one for all; empty if it is none."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return kinds
    return {None: kinds} if isinstance(kinds, str) else {}


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _limit(module: Any, layer_type: str | None) -> int:
    """Tokens up to which the frequencies are those that the module was made with."""
    if _kinds(module)[layer_type] == "dynamic":
        return int(module.config.max_position_embeddings)
    return int(_parameters(module, layer_type)["original_max_position_embeddings"])


def _forward(module: nn.Module, max_seq_len: int) -> Callable[..., Any]:
    """The module's forward as a function of each token's length."""
    plain = inspect.unwrap(type(module).forward)
    # On the device before the export: a captured graph copies nothing from the host.
    device = next((buffer.device for buffer in module.buffers()), None)
    shorter = {name: _first_frequencies(module, name).to(device) for name in _kinds(module)}
    longer = {
        name: ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=limit + 1, **_named(name))[0]
        for name, kind in _kinds(module).items()
        if kind == "longrope" and (limit := _limit(module, name)) < max_seq_len
    }

    def rotated(
        x: Tensor, position_ids: Tensor, layer_type: str | None, inv_freq: Tensor, length: int
    ) -> Any:
        """What the module gives with these frequencies, and where it asks for the length, with this one."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        stand_in = copy.copy(module)  # nothing is assigned to a module that is being exported
        vars(stand_in)[f"{prefix}inv_freq"] = inv_freq
        with _LengthIs(position_ids, length):
            return plain(stand_in, x, position_ids, **_named(layer_type))

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind = _kinds(module)[layer_type]
        if kind not in _KINDS:
            return plain(module, x, position_ids, **_named(layer_type))
        first, limit = shorter[layer_type], _limit(module, layer_type)
        if max_seq_len <= limit:
            return rotated(x, position_ids, layer_type, first, limit)
        farthest = position_ids.amax(0) if position_ids.dim() > 2 else position_ids  # of a token's axes
        lengths = torch.ops.ad_flashinfer.sequence_length(farthest)
        is_longer = (lengths > limit)[..., None]
        if kind == "longrope":
            pair = (
                rotated(x, position_ids, layer_type, inv_freq, length)
                for inv_freq, length in ((first, limit), (longer[layer_type], limit + 1))
            )
            return tree_map(lambda short, long: torch.where(is_longer, long, short), *pair)
        init = ROPE_INIT_FUNCTIONS["dynamic"]
        scaled, _ = init(module.config, x.device, seq_len=lengths[..., None], **_named(layer_type))
        return rotated(x, position_ids, layer_type, torch.where(is_longer, scaled, first), limit)

    for name, kind in _kinds(module).items():
        if kind == "dynamic" and _limit(module, name) < max_seq_len:
            _check_follows_tokens(
                module, name, partial(rotated, layer_type=name, length=_limit(module, name))
            )
    return forward


def _first_frequencies(module: nn.Module, layer_type: str | None) -> Tensor:
    """float32 [head_dim / 2]: those that the module was made with; in some versions on the host for ever."""
    found: Tensor = getattr(module, f"{'' if layer_type is None else layer_type + '_'}original_inv_freq")
    return found


def _named(layer_type: str | None) -> dict[str, str]:
    return {} if layer_type is None else {"layer_type": layer_type}


def _check_follows_tokens(module: nn.Module, layer_type: str | None, rotated: Callable[..., Any]) -> None:
    """Refuse a rotary embedding whose code has one set of frequencies for all tokens."""
    first = _first_frequencies(module, layer_type)
    x, positions = first.new_zeros(1), torch.arange(1, 4, device=first.device)[None]
    each = first / positions[..., None]
    try:
        found = rotated(x, positions, inv_freq=each)
    except (RuntimeError, IndexError):  # shapes that do not fit
        found = ()
    alone = [tree_leaves(rotated(x, positions[:, i : i + 1], inv_freq=each[0, i])) for i in range(3)]
    wanted = [torch.cat(parts, dim=-2) for parts in zip(*alone, strict=True)]
    leaves = tree_leaves(found)
    if len(leaves) != len(wanted) or not all(map(torch.allclose, leaves, wanted)):
        limit = _limit(module, layer_type)
        raise ExportError(
            f"{type(module).__name__} has rope_type dynamic: beyond {limit} tokens each sequence has "
            f"frequencies of its own, and its code in transformers {transformers.__version__} takes "
            f"one set for all. Set max_seq_len to {limit} at most, or upgrade transformers."
        )


class _LengthIs(TorchFunctionMode):
    """``torch.max(position_ids) + 1`` is a number that is known."""

    def __init__(self, position_ids: Tensor, length: int) -> None:
        super().__init__()
        self._position_ids, self._length = position_ids, length

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.max, Tensor.max) and len(args) == 1 and args[0] is self._position_ids:
            return self._length - 1
        return func(*args, **(kwargs or {}))
