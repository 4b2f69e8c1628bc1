"""Kernels for many tokens of each sequence, beside the ops on a CPU; interpreted where there is no GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass import ops  # noqa: E402
from ad_flashinfer_pass.kernels.state import prefill, step  # noqa: E402

# The interpreter multiplies bfloat16 by its bits.
DTYPE, TOLERANCE = (torch.bfloat16, 5e-2) if DEVICE.type == "cuda" else (torch.float32, 1e-4)
# Sequences: shorter than a convolution, one that goes on for a chunk and a part of one, none, padding, one
# that goes on with less than a convolution, one of two chunks. What begins does so in a slot that holds NaN.
LENS, SLOTS, INPUT_POS = (1, 70, 0, 5, 2, 128), (1, 3, 0, 0, 4, 2), (0, 9, 0, 0, 1, 0)
NUM = sum(LENS)
BEYOND = 3
"""Tokens behind them."""


def random(*sizes: int) -> Tensor:
    return torch.randn(sizes).to(DTYPE)


def part(*sizes: int) -> Tensor:
    """As a part of a larger tensor, whose rows lie further apart."""
    return random(*sizes[:-1], 2 * sizes[-1])[..., sizes[-1] :]


def pool(*sizes: int) -> Tensor:
    states = torch.randn(6, *sizes)
    states[[0, 1, 2, 5]] = float("nan")
    return states


def metadata() -> list[Tensor]:
    """cu_seqlen, input_pos and slot_idx."""
    starts = torch.tensor([0, *LENS]).cumsum(0).int()
    return [starts, torch.tensor(INPUT_POS, dtype=torch.int32), torch.tensor(SLOTS)]


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if DEVICE.type == "cpu":
        from contextlib import nullcontext

        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())


def check(kernel: Any, cached: Any, tokens: list[Tensor], options: list[Any], states: Tensor) -> None:
    """That the kernel, of out, tokens, pool and so on, gives what the op gives, and leaves what it leaves."""
    info = torch.tensor([len(LENS), NUM, 0, 0, 0], dtype=torch.int32)
    after, (starts, past, slots) = states.clone(), metadata()
    wanted = cached(*(x[None] for x in tokens), *options, after, info, starts, past, slots)[0]

    found = torch.full_like(wanted, 7).to(DEVICE)
    on_device = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (states, slots, past, starts)]
    kernel(found[:NUM], *(x.to(DEVICE)[:NUM] for x in tokens), *on_device)

    assert_near(found[:NUM].cpu(), wanted[:NUM])
    assert (found[NUM:] == 7).all()
    kept = [1, 2, 3, 4, 5]  # what padding leaves in slot 0 means nothing
    assert_near(on_device[0].cpu()[kept], after[kept])


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Within the rounding of sums whose terms are as large as the numbers are where they do not cancel."""
    size = max(1.0, float(wanted.float().nan_to_num().square().mean().sqrt()))
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * size, equal_nan=True)
    error = (found.float() - wanted.float()).nan_to_num().norm()
    assert error < TOLERANCE / 2 * wanted.float().nan_to_num().norm()


@pytest.mark.parametrize(("channels", "width"), [(70, 4), (130, 3), (20, 12)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution(channels: int, width: int, silu: bool) -> None:
    weight, bias = random(channels, width), random(channels) if silu else None
    activation = "silu" if silu else None
    on_device: Any = [None if x is None else x.to(DEVICE) for x in (weight, bias)]

    def kernel(out: Tensor, x: Tensor, *rows: Tensor) -> None:
        prefill.convolve(out, x, on_device[0], on_device[1], activation, *rows)

    options, states = [weight, bias, activation], pool(channels, width - 1).to(DTYPE)
    check(kernel, ops.cached_causal_conv1d, [part(NUM + BEYOND, channels)], options, states)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("by", "k_dim", "v_dim", "group"), [(prefill, 64, 48, 1), (prefill, 48, 64, 2), (prefill, 12, 16, 2)]
)
def test_delta_rule(by: Any, k_dim: int, v_dim: int, group: int, normalise: bool) -> None:
    num, heads = NUM + BEYOND, 2 * group
    query, key, value = part(num, 2, k_dim), part(num, 2, k_dim), part(num, heads, v_dim)
    if not normalise:
        key /= key.norm(dim=-1, keepdim=True)
    tokens = [query, key, value, -torch.randn(num, heads).exp() / 10, part(num, heads).sigmoid()]

    def kernel(*args: Tensor) -> None:
        by.delta_rule(normalise, *args)

    check(kernel, ops.cached_gated_delta_rule, tokens, [normalise], pool(heads, k_dim, v_dim))


def test_delta_rule_with_a_decay_of_each_row() -> None:
    num = NUM + BEYOND
    query, key, value = part(num, 2, 16), part(num, 2, 16), part(num, 2, 16)
    tokens = [query, key, value, -torch.randn(num, 2, 16).exp(), part(num, 2).sigmoid()]

    def kernel(*args: Tensor) -> None:
        step.delta_rule(True, *args)

    check(kernel, ops.cached_kda, tokens, [True], pool(2, 16, 16))


def test_delta_rule_of_the_same_key_again_and_again() -> None:
    """Without a decay each token learns all, so that the powers of what is inverted reach 10^17."""
    num = NUM + BEYOND
    key = random(1, 1, 48).expand(num, 2, 48)
    tokens = [part(num, 2, 48), key, part(num, 2, 48), torch.zeros(num, 2), random(num, 2) * 0 + 1]

    def kernel(*args: Tensor) -> None:
        prefill.delta_rule(True, *args)

    check(kernel, ops.cached_gated_delta_rule, tokens, [True], pool(2, 48, 48))


@pytest.mark.parametrize(
    ("has_more", "softplus", "limits"), [(True, True, (0.1, 2.0)), (False, False, (0.0, None))]
)
@pytest.mark.parametrize(("by", "head_dim", "state"), [(prefill, 16, 8), (prefill, 40, 24), (step, 16, 8)])
def test_ssd(by: Any, head_dim: int, state: int, has_more: bool, softplus: bool, limits: Any) -> None:
    num = NUM + BEYOND
    dt = part(num, 4) if softplus else part(num, 4).exp() / 10
    tokens = [part(num, 4, head_dim), dt, part(num, 2, state), part(num, 2, state)]
    more: list[Any] = [random(4), random(4)] if has_more else [None, None]
    a = -torch.randn(4).exp()
    constants: Any = [None if x is None else x.to(DEVICE) for x in (a, *more)]

    def cached(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
        return ops.cached_ssd_scan(x, dt, a, b, c, more[0], more[1], softplus, limits[0], limits[1], *rest)

    def kernel(*args: Tensor) -> None:
        by.ssd(constants, softplus, limits, *args)

    check(kernel, cached, tokens, [], pool(4, head_dim, state))


@pytest.mark.parametrize("has_more", [False, True])
def test_selective(has_more: bool) -> None:
    num, channels, state = NUM + BEYOND, 70, 12
    tokens = [part(num, channels), part(num, channels), part(num, state), part(num, state)]
    more: list[Any] = [random(channels), random(channels)] if has_more else [None, None]
    a = -torch.randn(channels, state).exp()
    constants: Any = [None if x is None else x.to(DEVICE) for x in (a, *more)]

    def cached(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
        return ops.cached_selective_scan(x, dt, a, b, c, more[0], more[1], True, *rest)

    def kernel(*args: Tensor) -> None:
        step.selective(constants, True, *args)

    check(kernel, cached, tokens, [], pool(channels, state))
