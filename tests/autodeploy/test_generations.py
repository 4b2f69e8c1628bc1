"""The plugin on the stand-in of every generation: the same logits as the dense model, whatever the step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.autodeploy import scenario, standin
from tests.autodeploy.standin import GENERATIONS, Generation, capture

LENGTHS = [75, 80, 140, 40]


@pytest.fixture(params=GENERATIONS, ids=str)
def generation(request: pytest.FixtureRequest) -> Iterator[Generation]:
    with standin.installed(request.param):
        yield request.param


@pytest.mark.parametrize("fuse", [False, True], ids=["", "rope"])
def test_a_model_through_resize_capture_and_every_kind_of_step(generation: Generation, fuse: bool) -> None:
    """Every step equals the dense model: eagerly before the resize; after it with decode captured and padded
    to its bucket, prefill and mixed steps piecewise and padded."""
    model = scenario.Deployment(generation, fuse=fuse)
    assert model.fused == (2 if fuse else 0)
    model.cm.initialize(24)
    with torch.no_grad():
        first = scenario.Requests(model, LENGTHS, 24, seed=1)
        scenario.morning(first, extend=generation.extend)
        first.check_untouched()
        model.info.set_max_num_tokens_sample()
        model.run()
        before = {name: cache.data_ptr() for name, cache in model.cm.caches.items()}
        model.cm.resize(48)
        assert all(cache.data_ptr() != before[name] for name, cache in model.cm.caches.items())

        decode = capture.CapturedGraph(model.gm, model.info, lambda: model.cm.named_args)
        decode.capture([1, 2, 4, 8])
        mixed = None
        if model.utils is not None:
            mixed = capture.PiecewiseGraph(model.gm, model.utils, lambda: model.cm.named_args)
            model.info.nest_sequences([standin.interface.Request([1] * 127, 0, range(4)), scenario.DUMMY])
            mixed.capture(128)
        model.cm.poison()
        for seed in (2, 3):
            requests = scenario.Requests(model, LENGTHS, 48, seed)
            scenario.morning(requests, decode=decode, mixed=mixed, extend=generation.extend)
            requests.check_untouched()
            model.cm.poison()
    assert decode.num_replays == 12
    assert mixed is None or mixed.num_replays >= 8


@pytest.mark.parametrize("generation", GENERATIONS[-2:], ids=str)
def test_steps_of_drafts_are_captured_whole(generation: Generation) -> None:
    """Extends alone count as decode (DualModeCapturedGraph): one graph, for other lengths and pages."""
    with standin.installed(generation), torch.no_grad():
        model = scenario.Deployment(generation, fuse=True)
        model.cm.initialize(48)

        def drafts(past: int, first_page: int) -> list[standin.interface.Request]:
            pages = [[first_page + 6 * i + j for j in range(5)] for i in range(2)]
            return [standin.interface.Request([1, 2, 3], past, one) for one in pages]

        model.info.nest_sequences(drafts(0, 8), num_extend=2)
        args = model.cm.named_args
        for _ in range(3):
            model.gm(**args)
        graph = torch.cuda.CUDAGraph() if capture.IS_CUDA else None
        if graph is not None:
            torch.cuda.synchronize()
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
