"""A convolution of each channel over a token and those before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ad_flashinfer_pass.kernels.state.slots import Batch

ACTIVATIONS = {None: lambda x: x, "silu": F.silu}


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """``ops.causal_conv1d``."""
    width, num = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    windows = torch.stack([padded[:, at : at + num] for at in range(width)], -1)
    return _result(windows, weight, bias, activation)


def cached_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, pool: Tensor, batch: Batch
) -> Tensor:
    """``ops.cached_causal_conv1d``: prompts and single tokens alike by one gather, or by two kernels."""
    num_long, long_tokens, num_decode = batch.counts()
    num, back = num_long + num_decode, weight.shape[1] - 1
    tokens, sequences = x.flatten(0, 1), batch.rows(0, num)
    if x.is_cuda and back:
        from ad_flashinfer_pass.kernels.state import prefill, step  # need triton

        out = torch.empty_like(tokens)
        long, one_each = slice(long_tokens), slice(long_tokens, long_tokens + num_decode)
        options = (weight, bias, activation, pool)
        if num_long:
            starts = batch.cu_seqlen[: num_long + 1]
            prefill.convolve(out[long], tokens[long], *options, *batch.rows(0, num_long), starts)
        if num_decode:
            step.convolve(out[one_each], tokens[one_each], *options, *batch.rows(num_long, num_decode))
        out[one_each.stop :] = 0
        return out.view(x.shape)
    starts = batch.cu_seqlen[: num + 1].long()
    # Of each sequence, what its slot holds and then its tokens: where the last of them are, counted from
    # the sequence's first token.
    memory = torch.cat([sequences.read(pool).transpose(1, 2).flatten(0, 1).to(x.dtype), tokens])

    def rows(of: Tensor, place: Tensor) -> Tensor:
        """Where ``memory`` has the tokens at these places of these sequences."""
        return torch.where(place < 0, (of + 1) * back + place, num * back + starts[of] + place)

    token = torch.arange(tokens.shape[0], device=x.device)
    of = torch.searchsorted(starts[1:], token, right=True)
    is_token = (of < num)[:, None]
    of = of.clamp(max=num - 1)
    place = token - starts[of]
    window = torch.arange(-back, 1, device=x.device)
    found = memory[rows(of[:, None], place[:, None] + window)]
    lens, all_rows = starts.diff(), torch.arange(num, device=x.device)
    kept = memory[rows(all_rows[:, None], lens[:, None] + window[:-1])]
    sequences.write(pool, kept.transpose(1, 2))
    result = _result(found.transpose(1, 2), weight, bias, activation).masked_fill(~is_token, 0)
    return result.view(x.shape)


def _result(windows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """From the tokens of each window, [..., channels, width]; sums are in float32 at least."""
    dtype = torch.promote_types(windows.dtype, torch.float32)
    result = (windows.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        result = result + bias.to(dtype)
    return ACTIVATIONS[activation](result.to(windows.dtype))
