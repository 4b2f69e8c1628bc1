"""Small bfloat16 models on the GPU: cached tokens against the uncached model, captured against eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig, CompileBackend, KvCacheConfig, KvDtype
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.workspaces import GraphState
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.cuda_graph import CudaGraphModule
from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, VOCAB, compared
from tests import architectures
from tests.gpu.test_conformance import skipped_if_not_built

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 12},
    "Qwen3Config": {"head_dim": 128},
    # No TRT-LLM kernel has its logit cap.
    "Gemma2Config": {"sliding_window": 12, "query_pre_attn_scalar": 64},
}


def model_of(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **CONFIGS[name], **changes})
    attention = "eager" if name == "Gemma2Config" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to("cuda", torch.bfloat16).eval().requires_grad_(False)


def transformed(
    model: nn.Module, backend: CompileBackend, kv_dtype: KvDtype = "auto", **options: Any
) -> tuple[CachedModel, list[TransformReport]]:
    config = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        compile_backend=backend,
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=128,
        cuda_graph_batch_sizes=[1, 3, 8] if backend == "torch-cudagraph" else None,
        kv_cache_config=KvCacheConfig(dtype=kv_dtype),
        **options,
    )
    return transform_module(model, config)


def test_a_wide_model_is_exported() -> None:
    """Its bfloat16 logits differ by more than a thousandth if torch takes another kernel of attention."""
    sizes = {
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "initializer_range": 0.02,
    }
    cached, _ = transformed(model_of("LlamaConfig", **sizes), "torch-simple")
    assert cached.caches


def generate(model: CachedModel) -> list[list[int]]:
    """Greedy tokens of each prompt; half of the prompts join late, and each has its own length."""
    engine = Engine(model)
    tokens: dict[int, list[int]] = {}
    waiting = list(enumerate(PROMPTS))
    order: dict[int, int] = {}
    step = 0
    while engine.has_work or waiting:
        while waiting and (waiting[0][0] < 4 or step >= waiting[0][0]):
            index, prompt = waiting.pop(0)
            params = SamplingParams(max_new_tokens=NEW_TOKENS - index)
            order[engine.add_request(prompt, params)] = index
        for output in engine.step():
            if output.completion is not None:
                assert output.completion.error is None
                tokens[order[output.request_id]] = list(output.completion.token_ids)
        step += 1
    return [tokens[index] for index in sorted(tokens)]


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generates_the_tokens_of_the_uncached_model(name: str, backend: CompileBackend) -> None:
    """Each token is the uncached model's best, or as good to within the rounding of its logits."""
    model = model_of(name)
    cached, reports = transformed(model, backend)
    assert_decodes_with({"split_decode"} if name == "Gemma2Config" else {"xqa"}, reports)
    assert_same_tokens(model, generate(cached))


def test_prefill_may_have_another_kernel_than_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is built, the reference prefills and XQA decodes, also within one mixed step."""
    kept = {name: select.PROVIDERS[name] for name in ("xqa", "reference")}
    monkeypatch.setattr(select, "PROVIDERS", kept)
    model = model_of("LlamaConfig")
    cached, reports = transformed(model, "torch-cudagraph")
    assert_decodes_with({"xqa"}, reports)
    assert any(note.startswith("prefill: reference, 3 sites") for report in reports for note in report.notes)
    assert_same_tokens(model, generate(cached))


def assert_decodes_with(kernels: set[str], reports: list[TransformReport]) -> None:
    notes = [
        note for report in reports for note in report.notes if note.startswith(("prefill: ", "decode: "))
    ]
    print(*notes, sep="\n")
    assert {note.split()[1].rstrip(",") for note in notes if note.startswith("decode")} <= kernels, notes


def assert_same_tokens(model: nn.Module, generated: list[list[int]]) -> None:
    """Compare with the uncached model on the same GPU, given the same tokens so far.

    bfloat16 puts an error on its logits, measured against float32. The cached model has one as large, so a
    token may differ where the best two logits are nearer than twice that.
    """
    found = compared(model, generated)
    print(
        f"{found['num_different']} of {found['num_tokens']} tokens, at most {found['largest_share']:.2f} off"
    )
    assert found["largest_share"] <= 2.0
    assert found["num_different"] <= found["num_tokens"] // 20


@pytest.mark.parametrize("new", [(4, 4, 4, 4), (2, 4, 3, 4)], ids=["uniform", "ragged"])
def test_extends_by_xqa_equal_the_uncached_model(new: tuple[int, ...]) -> None:
    """Drafts on pasts at and beside the edges of pages: logits of the last of them, within the rounding."""
    model = model_of("LlamaConfig", num_attention_heads=8, head_dim=128)
    settings = {"insert_cached_attention": {"max_extend_len": 4}}
    cached, reports = transformed(model, "torch-simple", transforms=settings)
    assert "extends of up to 4 tokens: xqa, 3 sites" in [note for r in reports for note in r.notes]
    exact = copy.deepcopy(model).float()
    rows = architectures.random_prompts([100] * 4, VOCAB)
    pasts = (31, 32, 33, 90)
    for index, (row, past) in enumerate(zip(rows, pasts, strict=True)):
        cached.step([SequenceStep(row[:past], 0, pages_of(index))])
    with skipped_if_not_built():
        logits = cached.step(
            [
                SequenceStep(row[past : past + n], past, pages_of(index))
                for index, (row, past, n) in enumerate(zip(rows, pasts, new, strict=True))
            ]
        )
    for found, row, past, n in zip(logits.float(), rows, pasts, new, strict=True):
        ids = torch.tensor([row[: past + n]], device="cuda")
        with torch.inference_mode():
            uncached, wide = (m(ids).logits[0].float() for m in (model, exact))
        rounding = (uncached - wide).abs().max()
        assert (found - uncached[-1]).abs().max() <= 2 * rounding


def pages_of(index: int) -> list[int]:
    """Four pages of each sequence."""
    return list(range(1 + 4 * index, 5 + 4 * index))


def check_replays_equal_eager(cached: CachedModel) -> None:
    """Every replay of a whole generation gives the bits of the eager graph on the same padded inputs."""
    module = cached.module
    assert isinstance(module, CudaGraphModule)
    replay = module.forward

    def both(**inputs: Tensor) -> Tensor:
        num_replays = module.num_replays
        result = replay(**inputs)
        if module.num_replays > num_replays:
            # The eager run writes the same K and V to the same slots once more.
            with GraphState().begin_capture():  # its plans are those of a graph
                assert torch.equal(result, module.eager(**inputs))
        return result

    module.forward = both  # type: ignore[method-assign]
    generate(cached)
    assert module.num_replays > NEW_TOKENS // 2
    assert all(reason.endswith("which reads lengths on the host") for reason in module.fallbacks)


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [*((name, "auto") for name in CONFIGS), ("LlamaConfig", "fp8"), ("Qwen3Config", "fp8")],
)
def test_captured_equals_eager_exactly(name: str, kv_dtype: KvDtype) -> None:
    """Whatever attention decodes by."""
    cached, reports = transformed(model_of(name), "torch-cudagraph", kv_dtype)
    print(*(note for report in reports for note in report.notes if "sites: " in note), sep="\n")
    check_replays_equal_eager(cached)
