"""A model on another GPU than the current one, and inputs that lie on another GPU than the model."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from ad_flashinfer_pass.config import AutoDeployConfig, TransformConfig
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests.gpu.test_end_to_end import generate, model_of
from tests.gpu.test_graphs import PLAIN, check_replays, graphs

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("moved", ["kv_cache_1", "seq_len_with_cache", "cu_num_pages"])
def test_an_input_on_another_gpu_is_named_and_not_read(moved: str) -> None:
    """Neither a graph nor an eager step reads it; with the old one back, the same graph replays."""
    # FlashInfer's TRT-LLM kernels serve one GPU a process, this one any.
    module, info, caches = graphs(PLAIN, {"decode": "split_decode"}, [1], [], FIRST)
    module.capture(info, caches)
    steps = [SequenceStep([3], 40, [5, 6])]
    info.nest_sequences(steps, pad_to=module.bucket(steps))
    inputs = {**info.named_args(), **caches}
    with torch.inference_mode():
        expected = module.eager(**inputs).clone()
        with pytest.raises(
            ValueError, match=r"is on cuda:[01], other inputs of this op on cuda:[01]: move it"
        ):
            module(**{**inputs, moved: inputs[moved].to(SECOND)})
        assert module.fallbacks == {f"moved since capture: {moved}": 1}
        assert module.num_replays == 0
        assert torch.equal(module(**inputs), expected)
    assert module.num_replays == 1


def test_replays_while_another_gpu_is_the_current_one() -> None:
    """Captured and replayed on the second GPU, each replay as eager and within the bound."""
    torch.cuda.set_device(FIRST)
    module, info, caches = graphs(PLAIN, {"decode": "split_decode"}, [1, 2, 4, 8], [], SECOND)
    check_replays(module, info, caches, PLAIN, with_prefill=False)
    assert torch.cuda.current_device() == 0


def test_generates_the_same_on_either_gpu() -> None:
    """The whole engine, with TRT-LLM kernels and graphs, on the GPU that is not the current one too."""
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        first, second = pool.map(_generated, ["cuda:0", "cuda:1"], chunksize=1)
    assert first == second


def _generated(device: str) -> list[list[int]]:
    assert torch.cuda.current_device() == 0
    config = AutoDeployConfig(
        device=device,
        dtype="bfloat16",
        compile_backend="torch-cudagraph",
        max_batch_size=8,
        max_seq_len=128,
        max_num_tokens=128,
        cuda_graph_batch_sizes=[1, 3, 8],
        # Which kernel is chosen by its time is not the same in both processes.
        transforms={
            "tune_attention": TransformConfig(enabled=False),
            "fuse_small_batch": TransformConfig(enabled=False),
        },
    )
    cached, _ = transform_module(model_of("LlamaConfig").to(device), config)
    assert {cache.device for cache in cached.caches.values()} == {torch.device(device)}
    torch.cuda.set_device(0)  # as another model's pass in the same process does
    return generate(cached)
