"""What a refused mask looks like, in words, and what its owner can do."""

from __future__ import annotations

import torch
from torch import Tensor


def describe(visible: Tensor) -> str:
    """One or two sentences on a mask, bool [rows, heads, size, size]; empty if it looks causal."""
    if bool((visible != visible[:1]).any()):
        return "It differs between the rows of a batch; it must be the same for all sequences."
    if bool((visible != visible[:, :1]).any()):
        head = int((visible[0] != visible[0, :1]).flatten(1).any(1).nonzero()[0])
        return f"Head {head} differs from head 0; all heads of a layer must see the same keys."
    mask = visible[0, 0]
    size = mask.shape[0]
    q, k = torch.arange(size)[:, None], torch.arange(size)
    unseen = (~mask.any(1)).nonzero()
    if len(unseen):
        return f"Query {int(unseen[0])} sees no key at all, not even its own; every token must see itself."
    if bool((mask & (k > q)).any()):
        return _looking_ahead(mask, k <= q)
    return _looking_back(mask, k <= q)


def _looking_ahead(mask: Tensor, causal: Tensor) -> str:
    size = mask.shape[0]
    lag = torch.arange(size)[:, None] - torch.arange(size)
    if bool(mask.all()):
        return "All tokens see each other, as in an encoder; only causal attention has a cache."
    width = int(mask[0].sum())
    if torch.equal(mask, lag.abs() < width):
        return f"The window of {width} is open to both sides; only a window of past tokens has a cache."
    prefix = causal.clone()
    prefix[:width, :width] = True
    if torch.equal(mask, prefix) or torch.equal(mask, causal | (torch.arange(size) < width)):
        return (
            f"The first {width} tokens see each other in both directions (prefix-LM); a cache needs "
            "causal attention over the prefix too."
        )
    if torch.equal(mask, lag >= -(width - 1)):
        return f"Each query sees {width - 1} later tokens; the diagonal is off by {width - 1}."
    return "Queries see later tokens; only causal attention has a cache."


def _looking_back(mask: Tensor, causal: Tensor) -> str:
    size = mask.shape[0]
    if torch.equal(mask, causal):
        return ""
    if not bool(mask.diagonal().all()):
        return "A query does not see its own token; every token must see itself."
    hidden = (causal & ~mask)[-1].nonzero().flatten()
    columns = (mask | ~causal).all(0)
    lags = [mask.diagonal(-lag) for lag in range(size)]
    if all(bool((line == line[0]).all()) for line in lags):
        return "Visibility depends on the distance in another way than a window, as in dilated attention."
    first = mask.to(torch.uint8).argmax(1)
    starts = [query for query in range(1, size) if first[query] == query]
    if starts and torch.equal(mask, causal & (torch.arange(size) >= first[:, None])):
        return (
            f"Blocks of unequal length begin at tokens {', '.join(map(str, starts[:4]))} (documents by "
            "constant); pass each document as a sequence of its own."
        )
    if len(hidden) and bool((~columns).sum() == len(hidden)):
        keys = ", ".join(map(str, hidden[:4].tolist()))
        return f"Keys {keys} are hidden from all later queries, as by padding; export without a padding mask."
    return ""
