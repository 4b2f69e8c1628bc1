"""A model on another GPU than the current one, and inputs that lie on another GPU than the model."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ad_flashinfer_pass.build import build_model
from ad_flashinfer_pass.config import AutoDeployConfig, TransformConfig
from ad_flashinfer_pass.kernels import symmetric_memory
from ad_flashinfer_pass.kernels.collectives import Processes
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.ranks import _init
from ad_flashinfer_pass.runtime.sampling import SamplingParams
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


def test_sums_are_the_same_on_both_gpus() -> None:
    """By NCCL and over symmetric memory, eager and in graphs: the bits of one rounding of the exact sum."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_check_sums, (f"file://{folder}/ranks",), nprocs=2)


def _check_sums(rank: int, address: str) -> None:
    _init(address, rank, 2, "cuda")
    ranks, device = Processes(), torch.device("cuda", rank)
    for shape in ((1, 1, 4096), (1, 32, 4096), (7, 64), (1, 300, 1000), (1024, 8192)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(device, dtype)
            parts = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(parts, x)
            wanted = (parts[0].double() + parts[1].double()).to(dtype)
            for kernel in ("torch", *symmetric_memory.kernels(2, x.nbytes, dtype)):
                assert torch.equal(ranks.all_reduce(x, kernel), wanted), (kernel, shape, dtype)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    out = ranks.all_reduce(ranks.all_reduce(x, kernel), kernel)
                x.neg_()
                graph.replay()
                graph.replay()
                assert torch.equal(out, (-wanted + -wanted)), (kernel, shape, dtype)
                x.neg_()
    width = 66
    x = torch.full((3, 65 if rank else 66), float(rank), device=device)
    gathered = ranks.all_gather(x, 131)
    assert gathered.shape == (3, 131)
    assert torch.equal(gathered[0], torch.cat([torch.zeros(width), torch.ones(131 - width)]).to(device))
    dist.destroy_process_group()


def test_two_ranks_serve_a_thousand_steps_captured_as_eagerly() -> None:
    """Random requests, which come and go; the demo in bfloat16. Most texts are the same, and those of one
    GPU: linears of a padded step, and sums in another order, round another way.
    """
    generator = random.Random(5)
    prompts = [[generator.randrange(3, 900) for _ in range(generator.randrange(1, 60))] for _ in range(160)]
    lengths = [generator.randrange(1, 60) for _ in prompts]
    captured, num_steps = _served(prompts, lengths, world_size=2, compile_backend="torch-cudagraph")
    assert num_steps >= 1000
    eager, _ = _served(prompts, lengths, world_size=2, compile_backend="torch-simple")
    one, _ = _served(prompts, lengths, compile_backend="torch-simple")
    for others in (captured, one):
        assert sum(a == b for a, b in zip(eager, others, strict=True)) > 0.7 * len(one)


def _served(prompts: list[list[int]], lengths: list[int], **config: Any) -> tuple[list[list[int]], int]:
    deploy = AutoDeployConfig(
        device="cuda",
        dtype="bfloat16",
        max_batch_size=4,
        max_seq_len=128,
        max_num_tokens=64,
        generation_config="none",
        # Which kernel is chosen by its time is not the same in each build.
        transforms={
            "tune_attention": TransformConfig(enabled=False),
            "fuse_small_batch": TransformConfig(enabled=False),
        },
        **config,
    )
    llm = build_model(deploy)
    sampling = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in lengths]
    results = llm.generate(prompts, sampling)
    assert [result.error for result in results if result.error] == []
    if config["compile_backend"] == "torch-cudagraph":
        assert llm.model.num_replays > 900
    return [result.token_ids for result in results], llm.engine.metrics.num_steps
