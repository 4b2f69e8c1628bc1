"""Experts on a GPU: the kernels of each dtype against float32 on the CPU, and whole models of experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.config import CompileBackend
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, compared, controls
from tests import architectures
from tests.gpu.test_end_to_end import check_replays_equal_eager, transformed

assert ops.__name__  # importing it registers the op
EXPERTS_OP = torch.ops.ad_flashinfer.experts
HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 48, 7, 3


def inputs(tokens: int, width: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    projections = [
        torch.randn(EXPERTS, *shape, generator=generator) / 8
        for shape in ((2 * width, HIDDEN), (HIDDEN, width))
    ]
    return torch.randn(tokens, HIDDEN, generator=generator), index, weights, *projections


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        pytest.param(torch.bfloat16, WIDTH, id="bfloat16"),
        pytest.param(torch.bfloat16, 42, id="bfloat16_unaligned"),
        pytest.param(torch.float32, WIDTH, id="float32"),
    ],
)
def test_captured_equals_eager_and_the_cpu(dtype: torch.dtype, width: int, tokens: int, kernel: str) -> None:
    """A graph that was captured with other tokens gives what float32 gives, but for rounding."""
    hidden, index, weights, *projections = inputs(tokens, width, seed=0)
    static = [hidden.cuda().to(dtype), index.cuda(), weights.cuda().to(dtype)]
    projections = [weight.cuda().to(dtype) for weight in projections]
    EXPERTS_OP(*static, *projections, plan=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = EXPERTS_OP(*static, *projections, plan=kernel)
    for buffer, other in zip(static, inputs(tokens, width, seed=1), strict=False):
        buffer.copy_(other)
    graph.replay()
    wanted = EXPERTS_OP(
        *(x.cpu().float() if x.is_floating_point() else x.cpu() for x in (*static, *projections))
    )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for found in (captured, EXPERTS_OP(*static, *projections, plan=kernel)):
        assert float((found.cpu().float() - wanted).norm() / wanted.norm()) < tolerance


FAMILIES = [
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "olmoe",
    "llama4_text",
]


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph", "torch-opt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_as_near_to_float32_as_the_uncached_model(family: str, backend: CompileBackend) -> None:
    """A rounding may send a token to another expert, in the uncached model as in ours: errors are compared.

    Those of the logits against float32, given the same tokens; and a token that is not the uncached model's
    best is as good to within twice its own error. Where it is in ours alone, which one of some thirty models
    shows, two other models must be as near.
    """
    if not _is_near(family, backend, seed=0):
        assert _is_near(family, backend, seed=1)
        assert _is_near(family, backend, seed=2)


def _is_near(family: str, backend: CompileBackend, seed: int) -> bool:
    config = architectures.small_config(family, vocab_size=512, hidden_size=256, intermediate_size=512)
    attention = "eager" if family == "gpt_oss" else "sdpa"
    model: nn.Module = architectures.random_model(config, attention, seed=seed)
    model = model.to(device="cuda", dtype=torch.bfloat16)
    cached, reports = transformed(model, backend)
    (tuned,) = [report for report in reports if report.name == "tune_experts"]
    assert tuned.num_matches
    assert not tuned.skipped
    generated = architectures.generated_by_engine(cached, PROMPTS, NEW_TOKENS)
    found = {**compared(model, generated), **controls(model, cached, generated)}
    shown = {key: found[key] for key in ("largest_share", "num_different", "error_ratio")}
    print(family, backend, seed, shown)
    return bool(found["largest_share"] <= 2.0 and found["error_ratio"] <= 1.25)


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_models_equal_eager_exactly(family: str) -> None:
    """Prefill, mixed steps and decode."""
    config = architectures.small_config(family, vocab_size=512, hidden_size=256, intermediate_size=512)
    model: nn.Module = architectures.random_model(config, "eager" if family == "gpt_oss" else "sdpa")
    cached, _ = transformed(model.to(device="cuda", dtype=torch.bfloat16), "torch-cudagraph")
    check_replays_equal_eager(cached)
