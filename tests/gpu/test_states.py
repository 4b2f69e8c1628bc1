"""The ops with a state on a GPU: as on the CPU, and captured once for steps of any lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass import ops
from tests.ops.test_states import CASES, arguments, by_token, defaults, metadata

pytestmark = pytest.mark.gpu

# Of each step: the slot of each sequence, its new tokens and those before them. Slot 0 is padding, so that
# all steps of a kind have as many tokens.
PREFILL = [
    [(0, 4, 0), (1, 70, 0), (2, 66, 0)],
    [(0, 7, 0), (2, 3, 66), (1, 130, 70)],
    [(0, 50, 0), (1, 9, 0), (2, 81, 69)],
]
DECODE = [
    [(0, 1, 0), (1, 1, 0), (2, 1, 0)],
    [(1, 1, 1), (2, 1, 1), (0, 1, 0)],
    [(2, 1, 0), (0, 1, 0), (1, 1, 2)],
]


def on_gpu(args: dict[str, Any]) -> dict[str, Any]:
    return {
        name: arg.cuda() if isinstance(arg, Tensor) and name != "batch_info_host" else arg
        for name, arg in args.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("name", CASES)
def test_replays_give_what_the_cpu_gives(
    name: str, steps: list[list[tuple[int, int, int]]], dtype: torch.dtype
) -> None:
    """Of one captured step; pools are full of NaN at first, and what is nobody's stays so."""
    case, cached = CASES[name], getattr(ops, f"cached_{name}")
    tokens = sum(num for _, num, _ in steps[0])

    def drawn(seed: int) -> dict[str, Any]:
        args = arguments(name, 1, tokens, seed=seed).items()
        return {key: arg.to(dtype) if isinstance(arg, Tensor) and key != "A" else arg for key, arg in args}

    fixed, names = drawn(0), by_token(arguments(name, 1, 140), 140)
    state = torch.full((6, *case.slot), float("nan"), dtype=dtype if case.state == "conv_state" else None)
    pool, buffers, result, graph = state.cuda(), on_gpu(fixed), torch.empty(0), None
    for number, step in enumerate(steps):
        own = {key: drawn(number)[key] for key in names}
        meta = metadata([(slot, num) for slot, num, _ in step], {slot: past for slot, _, past in step})
        if graph is None:
            given = {**defaults(name), **buffers, **on_gpu(meta)}
            cached(**given, **{case.state: pool.clone()})
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = cached(**given, **{case.state: pool})
        for key, arg in {**own, **meta}.items():
            given[key].copy_(arg)
        graph.replay()
        wanted = cached(**{**defaults(name), **fixed, **own, **meta}, **{case.state: state})
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(result.cpu(), wanted, atol=tolerance, rtol=tolerance)
    assert pool[[3, 4, 5]].isnan().all()


@pytest.mark.parametrize(("head_dim", "state"), [(64, 128), (128, 256), (64, 16)])
def test_ssd_of_published_widths(head_dim: int, state: int) -> None:
    """Prompts in bfloat16 are as near to float64 as the sum in float32 rounded, but for a factor."""
    torch.manual_seed(0)
    x, b, c = (torch.randn(1, 250, *sizes) for sizes in ((8, head_dim), (2, state), (2, state)))
    tokens = [each.bfloat16() for each in (x, torch.rand(1, 250, 8) * 4 - 4, b, c)]
    a, d = -torch.rand(8) * 8, torch.randn(8)

    def run(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
        constants = (each.to(x.device) for each in (a, d))
        args: Any = (x, dt, next(constants), b, c, next(constants), None, True, 0.0, None)
        return ops.cached_ssd_scan(*args, *rest)

    check_error(run, tokens, (8, head_dim, state))


@pytest.mark.parametrize(("alike", "decay"), [(0.0, 0.1), (0.9, 0.1), (0.0, 20.0)])
@pytest.mark.parametrize("size", [128, 64, 48])
def test_gated_delta_rule_of_published_widths(size: int, alike: float, decay: float) -> None:
    """Likewise, also where keys are alike, so that what is inverted is large, or little is kept."""
    torch.manual_seed(0)
    query, value = torch.randn(1, 250, 4, size), torch.randn(1, 250, 8, size)
    key = torch.randn(1, 250, 4, size) * (1 - alike) + torch.randn(1, 1, 4, size) * alike
    tokens = [each.bfloat16() for each in (query, key, value)]
    tokens += [-torch.rand(1, 250, 8) * decay, torch.rand(1, 250, 8).bfloat16()]

    def run(*args: Any) -> Tensor:
        given = [*args[:5], True, *args[5:]]
        return ops.cached_gated_delta_rule(*given)

    check_error(run, tokens, (8, size, size))


def check_error(run: Any, tokens: list[Tensor], slot: tuple[int, ...]) -> None:
    """Of prompts of 90 and 160 tokens, beside float64; root mean squares, and so of the states."""
    meta = metadata([(1, 90), (2, 160)], {1: 0, 2: 0})
    rest = [meta[name] for name in ("batch_info_host", "cu_seqlen", "input_pos", "slot_idx")]
    exact_pool, pool = torch.zeros(3, *slot, dtype=torch.float64), torch.zeros(3, *slot).cuda()
    exact = run(*(each.double() for each in tokens), exact_pool, *rest)
    found = run(*(each.cuda() for each in tokens), pool, rest[0], *(each.cuda() for each in rest[1:]))
    for given, wanted in ((found, exact), (pool, exact_pool)):
        error = (given.double().cpu() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.02
