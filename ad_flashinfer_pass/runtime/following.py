"""What the other ranks of a model do: each step that the first one tells them."""

from __future__ import annotations

import gc

import torch

from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.ranks import Ranks


def follow(model: CachedModel, ranks: Ranks) -> None:
    """Do what the first rank says, until it ends."""
    gc.collect()
    gc.freeze()  # this process does nothing else: what is here stays, see ``new_objects_alone``
    while True:
        for name, *given in ranks.hear():
            match name:
                case "nest":
                    model.nest(*given)
                case "clear_pages":
                    model.clear_pages(*given)
                case "step":
                    _step(model, ranks, *given)
                case "end":
                    ranks.close()
                    return


def _step(model: CachedModel, ranks: Ranks, num_tokens: int, is_greedy: bool | None) -> None:
    logits, info = model.forward(), model.sequence_info
    if not num_tokens:
        return
    with torch.inference_mode():
        if is_greedy is None:
            tokens = torch.empty_like(info.tokens[:num_tokens])
            ranks.share_tokens(tokens)
            info.advance(tokens)
        elif not model.sample_and_advance(is_greedy=is_greedy):
            info.sample_and_advance(logits[:num_tokens], is_greedy=is_greedy)
