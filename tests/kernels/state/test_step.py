"""The kernels for one token of each sequence, beside torch; in Triton's interpreter where there is no GPU."""

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

from ad_flashinfer_pass.kernels.state import (  # noqa: E402
    causal_conv1d,
    delta_rule,
    selective_scan,
    slots,
    ssd_scan,
    step,
)

# Sequences: one goes on, one begins in a slot that holds NaN, two rows of padding.
SLOTS, INPUT_POS = (3, 1, 0, 0), (9, 0, 0, 0)
NUM = len(SLOTS)


def random(*sizes: int) -> Tensor:
    return torch.randn(sizes, device=DEVICE)


def part(*sizes: int) -> Tensor:
    """As a part of a larger tensor, whose rows lie further apart."""
    wide = random(*sizes[:-1], 2 * sizes[-1])
    return wide[..., sizes[-1] :]


def rows() -> tuple[Tensor, Tensor]:
    input_pos = torch.tensor(INPUT_POS, dtype=torch.int32, device=DEVICE)
    return torch.tensor(SLOTS, device=DEVICE), input_pos


def pool(*sizes: int) -> Tensor:
    states = random(5, *sizes)
    states[:3] = float("nan")
    return states


def assert_same(found: Tensor, found_pool: Tensor, wanted: Tensor, wanted_pool: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    kept = [1, 2, 3, 4]  # what padding leaves in slot 0 means nothing
    torch.testing.assert_close(found_pool[kept], wanted_pool[kept], rtol=1e-4, atol=1e-4, equal_nan=True)


def by_torch(recurrence: slots.Recurrence, states: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Results, of the shape of the values or hidden states, and the pool afterwards."""
    after, info = states.clone(), torch.tensor([0, 0, 0, 0, NUM], dtype=torch.int32)
    batch = slots.Batch(info, torch.arange(NUM + 1, dtype=torch.int32, device=DEVICE), *reversed(rows()))
    out = torch.empty_like(tokens[2] if len(tokens) == 5 else tokens[0])[None]
    slots.cached_scan(recurrence._replace(step=None), after, batch, out, *(x[None] for x in tokens))
    return out[0], after


@pytest.fixture(autouse=True)
def _on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if DEVICE.type == "cpu":
        from contextlib import nullcontext

        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())


@pytest.mark.parametrize(("channels", "width"), [(70, 4), (16, 2), (1030, 3)])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution(channels: int, width: int, silu: bool) -> None:
    x, weight, bias = part(NUM, channels), random(channels, width), random(channels) if silu else None
    states, activation = pool(channels, width - 1), "silu" if silu else None
    after, info = states.clone(), torch.tensor([0, 0, 0, 0, NUM], dtype=torch.int32)
    batch = slots.Batch(info, torch.arange(NUM + 1, dtype=torch.int32, device=DEVICE), *reversed(rows()))
    # One token more that is padding, so that torch computes it on a GPU, too.
    more = torch.cat([x, x[:1]])[None]
    wanted = causal_conv1d.cached_convolve(more, weight, bias, activation, after, batch)[0, :-1]

    found = torch.empty_like(wanted)
    step.convolve(found, x, weight, bias, activation, states, *rows())

    assert_same(found, states, wanted, after)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("k_dim", "v_dim", "group"), [(16, 16, 1), (12, 20, 2), (128, 128, 2)])
def test_delta_rule(k_dim: int, v_dim: int, group: int, by_row: bool) -> None:
    heads = 2 * group
    query, key, value = part(NUM, 2, k_dim), part(NUM, 2, k_dim), part(NUM, heads, v_dim)
    g = -random(*((NUM, heads, k_dim) if by_row else (NUM, heads))).exp()
    tokens = (query, key, value, g, part(NUM, heads).sigmoid())
    states = pool(heads, k_dim, v_dim)
    wanted = by_torch(delta_rule.recurrence(True, g[None]), states, *tokens)

    found = torch.empty_like(wanted[0])
    step.delta_rule(True, found, *tokens, states, *rows())

    assert_same(found, states, *wanted)


CONSTANTS: list[Any] = [(True, True, (0.1, 2.0)), (False, False, (0.0, None))]


@pytest.mark.parametrize(("has_more", "softplus", "limits"), CONSTANTS)
@pytest.mark.parametrize(("head_dim", "state"), [(16, 8), (20, 12), (64, 128)])
def test_ssd(head_dim: int, state: int, has_more: bool, softplus: bool, limits: Any) -> None:
    tokens = (part(NUM, 4, head_dim), part(NUM, 4), part(NUM, 2, state), part(NUM, 2, state))
    more: Any = (random(4), random(4)) if has_more else (None, None)
    a, states = -random(4).exp(), pool(4, head_dim, state)
    wanted = by_torch(ssd_scan.recurrence(a, more[0], more[1], softplus, limits), states, *tokens)

    found = torch.empty_like(wanted[0])
    step.ssd((a, *more), softplus, limits, found, *tokens, states, *rows())

    assert_same(found, states, *wanted)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_time_step_that_is_not_a_number_is_seen(softplus: bool) -> None:
    """Also where it would be cut to a limit, and nothing else of its token is wrong."""
    x, dt, b, c = random(NUM, 4, 16), random(NUM, 4), random(NUM, 2, 8), random(NUM, 2, 8)
    dt[0] = float("nan")
    found, states = torch.empty_like(x), random(5, 4, 16, 8)
    step.ssd((-random(4).exp(), None, None), softplus, (0.0, 2.0), found, x, dt, b, c, states, *rows())
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize(("has_more", "softplus", "limits"), CONSTANTS)
@pytest.mark.parametrize(("channels", "state"), [(16, 8), (70, 16)])
def test_selective(channels: int, state: int, has_more: bool, softplus: bool, limits: Any) -> None:
    dt = part(NUM, channels) if softplus else part(NUM, channels).exp()
    tokens = (part(NUM, channels), dt, part(NUM, state), part(NUM, state))
    more: Any = (random(channels), random(channels)) if has_more else (None, None)
    a, states = -random(channels, state).exp(), pool(channels, state)
    wanted = by_torch(selective_scan.recurrence(a, more[0], more[1], softplus), states, *tokens)

    found = torch.empty_like(wanted[0])
    step.selective((a, *more), softplus, found, *tokens, states, *rows())

    assert_same(found, states, *wanted)
