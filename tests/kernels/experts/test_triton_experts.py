"""The kernels of experts against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from ad_flashinfer_pass.kernels.experts import gemv, grouped, select, top_k  # noqa: E402
from ad_flashinfer_pass.kernels.experts.arguments import DEFAULT, Experts, arguments  # noqa: E402
from ad_flashinfer_pass.kernels.kernel_plan import Kernel  # noqa: E402
from ad_flashinfer_pass.ops.experts import experts, quantized_experts  # noqa: E402

# The interpreter multiplies bfloat16 by its bits.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
EXPERTS, TOP_K, HIDDEN, WIDTH = 7, 3, 48, 40
KERNELS = [
    Kernel("gemv", gemv.Config(16, 32, 2, 32, 32, 2)),
    Kernel("grouped", grouped.Config(16, 32, 32, 2, 2, 32, 32)),
    Kernel("grouped", grouped.Config(64, 32, 16, 4, 3, 32, 32)),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "transposed, alternating, scaled and cut": {
        "is_transposed": True,
        "is_concatenated": False,
        "alpha": 1.702,
        "beta": 1.0,
        "limit": 0.5,
    },
    "no gate": {"has_gate": False, "activation": "relu2"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu"},
    "weights of the input": {"activation": "relu", "weigh_input": True},
    "a projection of its own": {"up_proj": True},
}


def inputs(tokens: int, options: dict[str, Any], *, bias: bool) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of ``ops.experts``: those that are tensors, and the others."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE, DTYPE)

    given = {key: value for key, value in options.items() if key != "up_proj"}
    weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    has_two, rows = "up_proj" in options, 2 * WIDTH if given.get("has_gate", True) else WIDTH
    shapes = [(WIDTH if has_two else rows, HIDDEN), (HIDDEN, WIDTH)]
    projections = [random(EXPERTS, *shape) for shape in shapes]
    if given.get("is_transposed"):
        projections = [weight.mT.contiguous() for weight in projections]
    biases = [random(EXPERTS, rows), random(EXPERTS, HIDDEN)] if bias else [None, None]
    up = random(EXPERTS, WIDTH, HIDDEN) if has_two else None
    routing = [random(tokens, HIDDEN) * HIDDEN**0.5, index.to(DEVICE), weights.to(DEVICE, DTYPE)]
    return [*routing, *projections, *biases, up], given


def assert_near(found: Tensor, tensors: list[Any], options: dict[str, Any]) -> None:
    """To three roundings: between the projections, of the second one's result, and of the sum."""
    wide: list[Any] = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]
    wanted = experts(*wide, **options)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() <= 1.5 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_experts(name: str, kernel: Kernel) -> None:
    tensors, options = inputs(5, OPTIONS[name], bias=True)
    assert_near(select.run(arguments(*tensors, **options), kernel), tensors, options)


@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [*((1, kernel) for kernel in KERNELS), *((70, kernel) for kernel in KERNELS[1:])],
    ids=str,
)
def test_numbers_of_tokens(tokens: int, kernel: Kernel) -> None:
    tensors, options = inputs(tokens, {}, bias=False)
    assert_near(select.run(arguments(*tensors, **options), kernel), tensors, options)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_all_tokens_may_choose_one_expert_and_choose_it_twice(kernel: Kernel) -> None:
    tensors, options = inputs(6, {}, bias=False)
    tensors[1][:] = EXPERTS - 1
    assert_near(select.run(arguments(*tensors, **options), kernel), tensors, options)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("scaling", ["expert", "row", "block"])
def test_float8(scaling: str, kernel: Kernel) -> None:
    """The sizes are more than one block, and no multiple of it."""
    generator = torch.Generator().manual_seed(0)
    number, (hidden, width) = 3, (160, 128) if scaling == "block" else (80, 64)

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randn(number, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        sizes = {"expert": (1, 1), "row": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}[scaling]
        return numbers.to(DEVICE), (torch.rand(number, *sizes, generator=generator) / 16).to(DEVICE)

    (up, up_scale), (down, down_scale) = weight(2 * width, hidden), weight(hidden, width)
    weights, index = torch.rand(5, number, generator=generator).topk(2)
    x = torch.randn(5, hidden, generator=generator).to(DEVICE, DTYPE)
    scales: dict[str, Any] = {"gate_up_scale": up_scale, "down_scale": down_scale}
    routing = (index.to(DEVICE), weights.to(DEVICE, DTYPE))
    found = select.run(arguments(x, *routing, up, down, **scales), kernel)
    wanted = quantized_experts(x.double(), routing[0], routing[1].double(), up, down, **scales)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() <= 1.5 * torch.finfo(DTYPE).eps


@pytest.fixture
def rounds_to_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry of a rounding to float8: torch rounds in its place."""
    if DEVICE.type == "cuda":
        return
    plain = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target != tl.float8e4nv:
            return plain(data, source, target, rounding_mode)
        rounded = torch.from_numpy(data.astype("float32")).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


W8A8 = [
    Kernel("grouped_w8a8", grouped.Config(16, 32, 32, 2, 2, 32, 64)),
    Kernel("grouped_w8a8", grouped.Config(16, 128, 128, 4, 2, 64, 128)),
    Kernel("grouped_w8a8", grouped.Config(64, 128, 64, 4, 2, 256, 32)),
]


@pytest.mark.parametrize("kernel", W8A8, ids=str)
@pytest.mark.parametrize("options", [{}, {"weigh_input": True, "activation": "relu2", "has_gate": False}])
@pytest.mark.parametrize(
    ("scaling", "quantization"),
    [("expert", "tensor"), ("row", "token"), ("block", "block"), ("block", "token"), ("row", "block")],
)
def test_activations_in_float8(
    scaling: str, quantization: str, options: dict[str, Any], kernel: Kernel, rounds_to_float8: None
) -> None:
    """Much nearer to what the op says in float64 than that is to activations of 16 bits.

    Few roundings to float8 fall otherwise, of numbers that lie between two.
    """
    generator = torch.Generator().manual_seed(0)
    number, hidden, width = 3, 160, 144

    def weight(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randn(number, rows, columns, generator=generator).to(torch.float8_e4m3fn)
        sizes = {"expert": (1, 1), "row": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}[scaling]
        return numbers.to(DEVICE), (torch.rand(number, *sizes, generator=generator) / 16).to(DEVICE)

    has_gate = options.get("has_gate", True)
    (up, up_scale), (down, down_scale) = weight(width, hidden), weight(hidden, width)
    args: dict[str, Any] = {"gate_up_scale": up_scale, "down_scale": down_scale, **options}
    if has_gate:
        args["up_proj"], args["up_scale"] = weight(width, hidden)
    if quantization == "tensor":
        args["gate_up_input_scale"] = (torch.rand(number, generator=generator) / 100 + 0.003).to(DEVICE)
        args["down_input_scale"] = (torch.rand(number, generator=generator) / 100 + 0.003).to(DEVICE)
    weights, index = torch.rand(5, number, generator=generator).topk(2)
    x = torch.randn(5, hidden, generator=generator).to(DEVICE, DTYPE)
    routing = (index.to(DEVICE), weights.to(DEVICE, DTYPE))
    args["input_quantization"] = quantization
    found = select.run(arguments(x, *routing, up, down, **args), kernel)
    wanted = quantized_experts(x.double(), routing[0], routing[1].double(), up, down, **args)
    for name in ("gate_up_input_scale", "down_input_scale", "input_quantization"):
        args.pop(name, None)
    plain = quantized_experts(x.double(), routing[0], routing[1].double(), up, down, **args)
    errors = [((result.double() - wanted).norm() / wanted.norm()).item() for result in (found, plain)]
    assert errors[0] < min(0.02, 0.4 * errors[1])


@pytest.mark.parametrize(
    "kernel", [Kernel("gemv", gemv.Config(64, 256, 2, 64, 64, 2)), *KERNELS[1:]], ids=str
)
@pytest.mark.parametrize(("numbers", "group"), [("e2m1", 32), ("integers", 64), ("zero points", 128)])
def test_4_bits(numbers: str, group: int, kernel: Kernel) -> None:
    """Gate and up alternate or not."""
    generator = torch.Generator().manual_seed(0)
    number, size = 3, 128
    options: dict[str, Any] = {"is_concatenated": numbers != "e2m1", "limit": 2.0, "alpha": 1.7}

    def weight(rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
        packed = torch.randint(256, (number, rows, size // 2), generator=generator, dtype=torch.uint8)
        shape = (number, rows, size // group)
        scale, zero = torch.rand(shape, generator=generator).to(DTYPE) / 64, None
        if numbers == "e2m1":
            scale = torch.randint(118, 122, shape, generator=generator, dtype=torch.uint8)
        elif numbers == "zero points":
            zero = torch.randint(16, shape, generator=generator, dtype=torch.uint8).to(DEVICE)
        return packed.to(DEVICE), scale.to(DEVICE), zero

    (up, up_scale, up_zero), (down, down_scale, down_zero) = weight(2 * size), weight(size)
    weights, index = torch.rand(3, number, generator=generator).topk(2)
    x, biases = (
        torch.randn(3, size, generator=generator).to(DEVICE, DTYPE),
        torch.randn(number, 2 * size, generator=generator),
    )
    biases = biases.to(DEVICE, DTYPE)
    scales: dict[str, Any] = {
        "gate_up_scale": up_scale,
        "down_scale": down_scale,
        "gate_up_zero_point": up_zero,
        "down_zero_point": down_zero,
    }
    given: list[Any] = [x, index.to(DEVICE), weights.to(DEVICE, DTYPE), up, down, biases, biases[:, :size]]
    options |= scales
    found = select.run(arguments(*given, **options), kernel)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    wanted = quantized_experts(*wide, **options)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() <= 1.5 * torch.finfo(DTYPE).eps


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_biases_may_have_any_strides(kernel: Kernel) -> None:
    tensors, options = inputs(5, {}, bias=True)
    tensors[5:7] = [torch.stack([bias, bias], -1)[..., 0] for bias in tensors[5:7]]
    assert_near(select.run(arguments(*tensors, **options), kernel), tensors, options)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", ["no gate", "transposed, alternating, scaled and cut"])
def test_a_token_that_is_not_a_number_stays_so_and_is_alone_in_it(name: str, kernel: Kernel) -> None:
    tensors, options = inputs(5, OPTIONS[name], bias=False)
    before = select.run(arguments(*tensors, **options), kernel)
    tensors[0][2, 0] = torch.nan
    after = select.run(arguments(*tensors, **options), kernel)
    assert after[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("kernel", KERNELS[:2], ids=str)
def test_what_the_gate_multiplies_may_lie_otherwise_than_the_gate(kernel: Kernel) -> None:
    tensors, options = inputs(5, OPTIONS["a projection of its own"], bias=True)
    tensors[-1] = tensors[-1].mT.contiguous().mT
    assert_near(select.run(arguments(*tensors, **options), kernel), tensors, options)


def test_the_first_candidate_is_the_default() -> None:
    tensors, options = inputs(3, {}, bias=False)
    x: Experts = arguments(*tensors, **options)
    first = select.candidates(3, TOP_K, EXPERTS, DEVICE)[0]
    assert torch.equal(select.run(x, Kernel(DEFAULT)), select.run(x, first))


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("tokens", [1, 16, 200, 1000, 9000])
@pytest.mark.parametrize("size", [1, 2])
def test_candidates_fit_in_the_shared_memory(
    size: int, tokens: int, kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a GPU of compute capability 8.9 or 12.0, an A100, an H200, for which they were chosen."""
    memory = SimpleNamespace(shared_memory_per_block_optin=kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    quantized = (8, True, "block") if size == 1 else ()
    found, chosen = (
        [
            grouped.Config(*kernel.options)
            for kernel in select.candidates(tokens, 8, 128, device, *quantized)
            if kernel.name.startswith("grouped")
        ]
        for device in (torch.device("cuda"), torch.device("cpu"))
    )
    assert all(0 < config.stages * grouped._bytes_of_stage(config, size) <= kib * 1024 for config in found)
    assert kib < 227 or found == chosen


@pytest.mark.parametrize("columns", [8, 60])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE], ids=str)
def test_top_k_is_that_of_torch(dtype: torch.dtype, columns: int) -> None:
    """Infinities, NaN and equal numbers included; no column is named twice."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(6, columns, generator=generator).to(DEVICE, dtype)
    x[0, 1:] = -torch.inf
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 5] = torch.inf
    x[4, 7] = -torch.tensor(torch.nan)
    values, index = top_k.run(x, 8, "none", dtype)
    wanted, _ = torch.topk(x, 8)
    assert torch.equal(values.nan_to_num(9e4), wanted.nan_to_num(9e4))
    assert torch.equal(x.gather(1, index).nan_to_num(9e4), wanted.nan_to_num(9e4))
    assert all(len(set(row)) == 8 for row in index.tolist())


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("softmax", ["all", "chosen"])
def test_top_k_with_its_softmax_is_that_of_torch(softmax: str, k: int) -> None:
    x = 8 * torch.randn(7, 60, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    x[0, 3] = torch.nan
    x[1, 4:] = -torch.inf
    values, index = top_k.run(x.to(DTYPE), k, softmax, torch.float32)
    wanted, columns = torch.topk(x.to(DTYPE).double(), k)
    of = wanted if softmax == "chosen" else x.to(DTYPE).double()
    wanted = of.softmax(-1)[:, :k] if softmax == "chosen" else of.softmax(-1).gather(1, columns)
    torch.testing.assert_close(values.double(), wanted, equal_nan=True, atol=1e-6, rtol=1e-5)
    assert torch.equal(index[2:], columns[2:])
