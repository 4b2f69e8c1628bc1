"""The plugin on the stand-in of every generation: the same logits as the dense model, whatever the step."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.errors import KernelError
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention.xqa import EXTEND_SINCE
from tests.autodeploy import scenario, standin
from tests.autodeploy.standin import GENERATIONS, Generation, capture
from tests.autodeploy.standin.interface import Request

LENGTHS = [75, 80, 140, 40]
SCHEDULES = int(os.environ.get("SCHEDULES", "8"))
BUCKETS = (8, 32, 128)


@pytest.fixture(params=GENERATIONS, ids=str)
def generation(request: pytest.FixtureRequest) -> Iterator[Generation]:
    with standin.installed(request.param):
        yield request.param


def captured(model: scenario.Deployment) -> dict[str, Any]:
    """Decode of 1, 2, 4 and 8 sequences, and one piecewise graph for all buckets."""
    decode = capture.CapturedGraph(model.gm, model.info, lambda: model.cm.named_args)
    decode.capture([1, 2, 4, 8])
    mixed = capture.PiecewiseGraph(model.gm, model.utils, lambda: model.cm.named_args)
    for bucket in sorted(BUCKETS, reverse=True):
        tokens = Request([1] * (bucket - 1), 0, range(-(-bucket // scenario.PAGE)))
        model.info.nest_sequences([tokens, scenario.DUMMY])
        mixed.capture(bucket)
    model.cm.poison()
    return {"decode": decode, "mixed": mixed}


def test_a_model_through_resize_capture_and_every_kind_of_step(generation: Generation) -> None:
    """Every step equals the dense model: eagerly before the resize; after it with decode captured and padded
    to its bucket, prefill and mixed steps piecewise."""
    model = scenario.Deployment(generation)
    assert model.num_rotations == 0
    model.cm.initialize(24)
    with torch.no_grad():
        first = scenario.Requests(model, LENGTHS, 24, seed=1)
        scenario.morning(first)
        first.check_untouched()
        model.info.set_max_num_tokens_sample()
        model.run()
        before = {name: cache.data_ptr() for name, cache in model.cm.caches.items()}
        model.cm.resize(48)
        assert all(cache.data_ptr() != before[name] for name, cache in model.cm.caches.items())
        graphs = captured(model)
        for seed in (2, 3):
            requests = scenario.Requests(model, LENGTHS, 48, seed)
            scenario.morning(requests, **graphs)
            requests.check_untouched()
            model.cm.poison()
    assert graphs["decode"].num_replays == 12
    assert graphs["mixed"].num_replays >= 8


def test_random_schedules(generation: Generation) -> None:
    """Steps of 1 token to the bucket in random order; every logit, and every page that is no token's.

    ``SCHEDULES=1000`` for a long run.
    """
    model = scenario.Deployment(generation)
    model.cm.initialize(48)
    with torch.no_grad():
        graphs = captured(model)
        mixed = dict.fromkeys(BUCKETS, graphs["mixed"])
        for seed in range(SCHEDULES):
            draw = random.Random(seed)
            lengths = [draw.randint(1, scenario.MAX_SEQ_LEN) for _ in range(draw.randint(1, 6))]
            requests = scenario.Requests(model, lengths, 48, seed)
            scenario.schedule(requests, draw, decode=graphs["decode"], mixed=mixed)
            requests.check_untouched()
            model.cm.poison()


def test_what_a_metadata_op_returns_lies_at_one_address(generation: Generation) -> None:
    """For steps of all sizes, in every pool: a replayed segment passes on the tensors of its capture."""
    model = scenario.Deployment(generation)
    model.cm.initialize(24)
    prepare = [node for node in model.gm.graph.nodes if "prepare_metadata" in str(node.target)]
    assert len(prepare) == (2 if generation.window_pools else 1)
    for node in prepare:
        seen = set()
        for size in (1, 2, 60, 127, 128, 200):
            model.info.nest_sequences([Request([1] * min(size, 150), 0, range(5))])
            args = model.cm.named_args
            results = node.target(*(args[arg.name] for arg in node.args))
            seen.add(tuple((x.data_ptr(), x.shape, x.stride()) for x in results))
        assert len(seen) == 1


@pytest.mark.parametrize("rope", ["table", "indexed"])
def test_inductor_finds_the_sizes_that_the_fakes_promise(generation: Generation, rope: str) -> None:
    """``torch.compile(dynamic=True)``, as compile_backend torch-compile and torch-opt call it; more tokens a
    step than pages in all sequences, so that cache_loc says nothing about the width of a block table."""
    model = scenario.Deployment(generation, max_tokens=400, rope=rope)
    model.cm.initialize(24)
    # Each with memory of its own: torch 2.13 fails on aliases of one pool with sizes that are not constant.
    model.cm.caches = {name: cache.clone() for name, cache in model.cm.caches.items()}
    model.cm.pools = list(model.cm.caches.values())
    compiled = torch.compile(model.gm, dynamic=True)
    with torch.no_grad():
        requests = scenario.Requests(model, LENGTHS, 24, seed=7)
        run = partial(_call, compiled, model)
        requests.step({0: 40, 1: 33}, how=run)
        requests.step({2: 64, 0: 1, 1: 1}, how=run)
        for _ in range(2):
            requests.step({0: 1, 1: 1, 2: 1}, how=run)
        requests.check_untouched()


def _call(compiled: Any, model: scenario.Deployment) -> torch.Tensor:
    return compiled(**model.cm.named_args)


def test_steps_of_drafts_are_captured_whole(generation: Generation) -> None:
    """Extends alone count as decode (DualModeCapturedGraph): one graph, for other lengths and pages."""
    with torch.no_grad():
        model = scenario.Deployment(generation)
        model.cm.initialize(48)
        model.info.set_max_draft_len(2)

        def drafts(past: int, first_page: int) -> list[Request]:
            pages = [[first_page + 6 * i + j for j in range(5)] for i in range(2)]
            return [Request([1, 2, 3], past, one) for one in pages]

        model.info.nest_sequences(drafts(0, 8), num_extend=2)
        args = model.cm.named_args
        for _ in range(3):
            model.gm(**args)
        graph = torch.cuda.CUDAGraph() if capture.IS_CUDA else None
        if graph is not None:
            torch.cuda.synchronize()
            planned = {"fa2", "fa3"} & {str(arg) for node in model.gm.graph.nodes for arg in node.args}
            by_xqa = generation.window_pools and modules.has(
                EXTEND_SINCE.version
            )  # knows the bound of drafts
            if planned and not by_xqa:  # and FMHA v2 is not built
                with pytest.raises(KernelError, match="plans each step on the host"), torch.cuda.graph(graph):
                    model.gm(**args)
                return
            with torch.cuda.graph(graph):
                out = model.gm(**args)
        model.cm.poison()
        requests = scenario.Requests(model, [90, 130], 48, seed=6)
        requests.step({0: 64, 1: 100})
        for _ in range(4):
            requests.step(
                {0: 3, 1: 3}, num_extend=2, how=None if graph is None else partial(_replayed, graph, out)
            )
        requests.check_untouched()


def _replayed(graph: torch.cuda.CUDAGraph, out: torch.Tensor) -> torch.Tensor:
    graph.replay()
    return out.clone()
