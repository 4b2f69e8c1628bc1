"""What every op promises to torch.library: opcheck, fakes that agree with the real op, declared mutation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.ir import FallbackKernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only

from ad_flashinfer_pass import ops

NAMES = ["attention", "prepare_metadata", "append_kv", "cached_attention", "sequence_length"]
DTYPES = [torch.float32, torch.bfloat16]
# (head_dim, v_head_dim)
HEAD_SIZES = [(8, 8), (8, 4)]
PAGE, PAGES = 4, 7
Sample = tuple[tuple[Any, ...], dict[str, Any]]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# One prefill of 3 tokens, one extend of 2 on 4, one decode on 6.
BATCH_INFO = int32(1, 3, 1, 2, 1, 1, 16, 4, 2, 4, 3, 1)
CU_SEQLEN = int32(0, 3, 5, 6, 0)
INPUT_POS = int32(0, 4, 6, 0)
SEQ_LEN_WITH_CACHE = int32(3, 6, 7, 0)
CACHE_LOC = int32(5, 2, 6, 3, 1, 0)
CU_NUM_PAGES = int32(0, 1, 3, 5, 0)
BLOCK_TABLE = torch.tensor([[5, 0], [2, 6], [3, 1], [0, 0]], dtype=torch.int32)
TOKENS = 6


def random(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def attention(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Sample:
    q, k = random(2, 5, 4, head_dim, dtype=dtype), random(2, 5, 2, head_dim, dtype=dtype)
    v = random(2, 2, 5, v_head_dim, dtype=dtype).transpose(1, 2)
    options = {"scale": 0.5, "sinks": torch.zeros(4), "sliding_window": 3, "logit_cap": 5.0}
    return (q, k, v, None, True), options


def prepare_metadata(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Sample:
    positions = torch.zeros(1, TOKENS + 1, dtype=torch.int64)
    return (positions, BATCH_INFO, CU_SEQLEN, INPUT_POS, CACHE_LOC, CU_NUM_PAGES, 2, PAGE), {}


def append_kv(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Sample:
    k = random(1, TOKENS, 2, head_dim, dtype=dtype)
    v = random(1, 2, TOKENS, v_head_dim, dtype=dtype).transpose(1, 2)
    return (k, v, torch.tensor([20, 21, 22, 24, 25, 6]), pool(dtype)), {}


def cached_attention(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Sample:
    q = random(1, 4, TOKENS, head_dim, dtype=dtype).transpose(1, 2)
    metadata = (BATCH_INFO, CU_SEQLEN, SEQ_LEN_WITH_CACHE, BLOCK_TABLE)
    options = {"sliding_window": 3, "logit_cap": 5.0, "sinks": torch.zeros(4)}
    return (q, pool(dtype), *metadata, 0.5, v_head_dim), options


def sequence_length(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> Sample:
    return (torch.arange(10).expand(2, 10)[:, :5],), {}


def pool(dtype: torch.dtype) -> Tensor:
    return random(PAGES, 2, 2, PAGE, 8, dtype=dtype)


SAMPLES: dict[str, Callable[..., Sample]] = {
    "attention": attention,
    "prepare_metadata": prepare_metadata,
    "append_kv": append_kv,
    "cached_attention": cached_attention,
    "sequence_length": sequence_length,
}
grid = pytest.mark.parametrize(
    ("name", "dtype", "sizes"),
    [
        pytest.param(name, dtype, sizes, id=f"{name}-{str(dtype)[6:]}-d{sizes[0]}-v{sizes[1]}")
        for name in NAMES
        for dtype in DTYPES
        for sizes in HEAD_SIZES
        if name != "prepare_metadata" or (dtype, sizes) == (DTYPES[0], HEAD_SIZES[0])
    ],
)


def overload(name: str) -> Any:
    return getattr(torch.ops.ad_flashinfer, name).default


@grid
def test_opcheck(name: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Schema, autograd registration, fake and dynamic-shape tracing pass torch's own checks."""
    args, kwargs = SAMPLES[name](dtype, *sizes)
    torch.library.opcheck(overload(name), args, kwargs)


@grid
def test_fake_agrees_with_real(name: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """The fake gives the shape, dtype, strides and device that the real op gives."""
    args, kwargs = SAMPLES[name](dtype, *sizes)
    real, _ = tree_flatten(overload(name)(*args, **kwargs))
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        fake, _ = tree_flatten(overload(name)(*fake_args, **fake_kwargs))
    assert [facts(t) for t in fake] == [facts(t) for t in real]


def facts(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


@pytest.mark.parametrize("name", NAMES)
def test_only_append_kv_declares_a_write_and_only_to_the_cache(name: str) -> None:
    """The one written argument of the four ops is append_kv's kv_cache, and nothing returned aliases."""
    schema = overload(name)._schema
    written = [arg.name for arg in schema.arguments if arg.alias_info and arg.alias_info.is_write]
    assert written == (["kv_cache"] if name == "append_kv" else [])
    assert not any(result.alias_info for result in schema.returns)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_not_written(name: str) -> None:
    """Every argument but append_kv's kv_cache is bitwise the same after the call, and that one is not."""
    args, kwargs = SAMPLES[name](torch.float32, 8, 8)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    overload(name)(*args, **kwargs)
    changed = [
        i
        for i, (a, b) in enumerate(zip(args, before, strict=True))
        if isinstance(a, Tensor) and not torch.equal(a, b)
    ]
    assert changed == ([3] if name == "append_kv" else [])


@pytest.mark.parametrize("name", NAMES)
def test_public_function_is_the_op(name: str) -> None:
    """``ops.<name>`` is callable, has the op's contract as its docstring, and takes the op's arguments."""
    function = getattr(ops, name)
    assert "Args:" in function.__doc__
    code = function.__code__
    assert list(code.co_varnames[: code.co_argcount]) == [
        arg.name for arg in overload(name)._schema.arguments
    ]


def test_no_argument_has_a_name_that_inductor_takes_for_its_own() -> None:
    """It hands defaults of an op on by name, beside what it calls the op itself."""
    taken = set(inspect.signature(FallbackKernel.create).parameters) - {"args", "kwargs"}
    for name in ops.__all__:
        if name not in ("STATES", "TOKEN_BY_TOKEN"):
            schema = getattr(torch.ops.ad_flashinfer, name).default._schema
            assert taken.isdisjoint(arg.name for arg in schema.arguments), name
