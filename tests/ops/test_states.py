"""Ops with a state: what transformers' functions compute, and the same in pieces, from slots."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.runtime.sequence_info import SequenceInfo, SequenceStep

LONGEST = 150
"""Tokens: three chunks."""
Args = dict[str, Any]


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def per_head(batch: int, num: int, *sizes: int) -> Tensor:
    return random(batch, num, 4, *sizes)


def convolution(batch: int, num: int) -> Args:
    return {"x": random(batch, num, 6), "weight": random(6, 4), "bias": random(6), "activation": "silu"}


def delta_rule(batch: int, num: int) -> Args:
    query, key = random(batch, num, 2, 8), random(batch, num, 2, 8)
    g, beta = -per_head(batch, num).exp(), per_head(batch, num).sigmoid()
    return {"query": query, "key": key, "value": per_head(batch, num, 6), "g": g, "beta": beta}


def kimi_delta_rule(batch: int, num: int) -> Args:
    query, key, g = (per_head(batch, num, 8) for _ in range(3))
    return delta_rule(batch, num) | {"query": query, "key": key, "g": -g.exp()}


def ssd(batch: int, num: int) -> Args:
    matrices = {name: random(batch, num, 2, 8) for name in "BC"}
    heads = {"A": -random(4).exp(), "D": random(4), "dt_bias": random(4)}
    return {"hidden_states": per_head(batch, num, 6), "dt": per_head(batch, num), **heads, **matrices}


def selective(batch: int, num: int) -> Args:
    matrices = {name: random(batch, num, 8) for name in "BC"}
    channels = {"A": -random(6, 8).exp(), "D": random(6), "dt_bias": random(6)}
    return {"hidden_states": random(batch, num, 6), "dt": random(batch, num, 6), **channels, **matrices}


class Case(NamedTuple):
    """An op with arguments, and the function of transformers that computes the same."""

    args: Callable[[int, int], Args]
    state: str
    """The argument of the cached op that is its pool."""
    slot: tuple[int, ...]
    """Shape of one state."""
    module: str
    function: str
    names: Mapping[str, str] = MappingProxyType({})
    """Of arguments, there."""
    options: Mapping[str, Any] = MappingProxyType({})
    """Of the op."""
    given: Mapping[str, Any] = MappingProxyType({})
    """For the function."""
    channels_first: bool = False


CASES = {
    "causal_conv1d": Case(
        convolution,
        "conv_state",
        (6, 3),
        "lfm2",
        "causal_conv1d_fn",
        names={"x": "hidden_states"},
        channels_first=True,
    ),
    "gated_delta_rule": Case(
        delta_rule,
        "recurrent_state",
        (4, 8, 6),
        "qwen3_next",
        "torch_chunk_gated_delta_rule",
        options={"use_qk_l2norm": True},
        given={"use_qk_l2norm_in_kernel": True},
    ),
    "kda": Case(
        kimi_delta_rule,
        "recurrent_state",
        (4, 8, 6),
        "kimi_linear",
        "chunk_kimi_delta_attention",
        options={"use_qk_l2norm": True},
        given={"use_qk_l2norm_in_kernel": True},
    ),
    "ssd_scan": Case(
        ssd,
        "recurrent_state",
        (4, 6, 8),
        "mamba2",
        "mamba2_chunk_scan",
        options={"dt_softplus": True, "dt_min": 0.1, "dt_max": 2.0},
        given={"chunk_size": 32, "dt_softplus": True, "dt_limit": (0.1, 2.0)},
    ),
    "selective_scan": Case(
        selective,
        "recurrent_state",
        (6, 8),
        "mamba",
        "mamba_selective_scan",
        names={"dt_bias": "delta_bias"},
        options={"dt_softplus": True},
        given={"delta_softplus": True},
        channels_first=True,
    ),
}
every_op = pytest.mark.parametrize("name", CASES)


def arguments(name: str, batch: int, num: int, *, seed: int = 0) -> Args:
    torch.manual_seed(seed)
    return {**CASES[name].args(batch, num), **CASES[name].options}


def by_token(args: Args, num: int) -> set[str]:
    return {name for name, arg in args.items() if isinstance(arg, Tensor) and arg.shape[1:2] == (num,)}


@every_op
@pytest.mark.parametrize("num", [1, 5, 64, LONGEST])
def test_computes_what_transformers_computes(name: str, num: int) -> None:
    """On sequences shorter and longer than a chunk."""
    case, args = CASES[name], arguments(name, 2, num)
    module = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    function = inspect.unwrap(getattr(module, case.function))
    given = {key: arg for key, arg in args.items() if key not in case.options} | dict(case.given)
    if case.module == "qwen3_next" and "repeat_interleave" not in inspect.getsource(function):  # before 5.23
        given |= {key: given[key].repeat_interleave(2, 2) for key in ("query", "key")}
    if case.channels_first:
        given |= {key: given[key].transpose(1, 2) for key in by_token(args, num)}
    wanted = function(**{case.names.get(key, key): arg for key, arg in given.items()})
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    wanted = wanted.transpose(1, 2) if case.channels_first else wanted

    found = getattr(ops, name)(**args)

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Of each step: the slot of each sequence and its new tokens, ordered prefill, extend, decode.
STEPS = [
    [(2, 7), (5, 70)],
    [(1, 9), (2, 3), (5, 1)],
    [(1, 66), (2, 1), (5, 1)],
    [(5, 2), (1, 1), (2, 1)],
    [(1, 1), (2, 1), (5, 1)],
    # Slot 2 has a new owner, whose prompt is of one token.
    [(1, 1), (2, 1), (5, 1)],
    [(5, 2), (1, 1), (2, 1)],
]
NEW_OWNER = 5


def defaults(name: str) -> Args:
    """Of the source op's arguments, which its cached op has none for."""
    schema = getattr(torch.ops.ad_flashinfer, name).default._schema
    return {arg.name: arg.default_value for arg in schema.arguments}


def metadata(step: list[tuple[int, int]], past: dict[int, int]) -> dict[str, Tensor]:
    info = SequenceInfo(
        max_seq_len=256,
        max_batch_size=4,
        max_num_tokens=256,
        tokens_per_block=256,
        device=torch.device("cpu"),
    )
    info.nest_sequences([SequenceStep([0] * num, past[slot], [slot + 1]) for slot, num in step])
    args = info.named_args()
    slots = torch.zeros_like(args["input_pos"], dtype=torch.int64)
    slots[: len(step)] = torch.tensor([slot for slot, _ in step])
    return {key: args[key] for key in ("batch_info_host", "cu_seqlen", "input_pos")} | {"slot_idx": slots}


@every_op
def test_in_pieces_it_is_what_it_is_over_whole_sequences(name: str) -> None:
    """Prompts, chunks and single tokens together, padding behind them, in a pool that is full of NaN."""
    case = CASES[name]
    whole = {slot: arguments(name, 1, LONGEST) for slot in (1, 2, 5)}
    names = by_token(whole[1], LONGEST)
    for slot, args in whole.items():
        args |= {key: arguments(name, 1, LONGEST, seed=slot)[key] for key in names}
    wanted = {slot: getattr(ops, name)(**args) for slot, args in whole.items()}
    pool = torch.full((6, *case.slot), float("nan"))
    past = dict.fromkeys(whole, 0)

    for number, step in enumerate(STEPS):
        if number == NEW_OWNER:
            past[2] = 0
        spans = {slot: slice(past[slot], past[slot] + num) for slot, num in step}
        packed = {
            key: torch.cat(
                [*(whole[slot][key][:, span] for slot, span in spans.items()), whole[1][key][:, :2]], 1
            )
            for key in names
        }
        cached = getattr(torch.ops.ad_flashinfer, f"cached_{name}")
        found = cached(
            **{**defaults(name), **whole[1], **packed}, **{case.state: pool}, **metadata(step, past)
        )
        expected = torch.cat([wanted[slot][:, span] for slot, span in spans.items()], 1)
        torch.testing.assert_close(found[:, :-2], expected, rtol=1e-4, atol=1e-4)
        past |= {slot: span.stop for slot, span in spans.items()}

    assert pool[[0, 3, 4]].isnan().all()  # nobody's


@every_op
@pytest.mark.parametrize("step", [[(1, 4), (2, 3)], [(1, 1), (2, 1)]], ids=["prefill", "decode"])
def test_nothing_of_the_device_is_read_on_the_host(name: str, step: list[tuple[int, int]]) -> None:
    """On meta, where there is nothing to read, and the fakes agree; so that a CUDA graph can hold it."""
    tokens = sum(num for _, num in step)
    case, args = CASES[name], arguments(name, 1, tokens)
    given = {**defaults(name), **args, case.state: torch.zeros(6, *case.slot), **metadata(step, {1: 0, 2: 0})}
    on_meta = {
        key: arg.to("meta") if isinstance(arg, Tensor) and key != "batch_info_host" else arg
        for key, arg in given.items()
    }

    found = getattr(ops, f"cached_{name}")(**on_meta)

    real = getattr(ops, f"cached_{name}")(**given)
    assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schemas, fakes, and what is written."""
    case, args = CASES[name], arguments(name, 1, 5)
    args = {key: arg.to(dtype) if isinstance(arg, Tensor) else arg for key, arg in args.items()}
    source = getattr(torch.ops.ad_flashinfer, name).default
    torch.library.opcheck(source, (), args)
    pool = {case.state: torch.zeros(6, *case.slot)}
    cached = getattr(torch.ops.ad_flashinfer, f"cached_{name}").default
    torch.library.opcheck(
        cached, (), {**defaults(name), **args, **pool, **metadata([(1, 4), (2, 1)], {1: 0, 2: 3})}
    )
