"""The pipeline and the registry: order, switches, reports, and one name for each transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from ad_flashinfer_pass import config as config_module
from ad_flashinfer_pass import pipeline, registry, restore, to_program, transforms
from ad_flashinfer_pass.config import (
    AutoDeployConfig,
    KvCacheConfig,
    TransformConfig,
    TuneAttention,
    default_transforms,
)
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.pipeline import Pipeline
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.registry import register
from tests.transforms.small_models import SmallModel, context, sdpa


def test_every_entry_of_the_default_pipeline_is_one_file_and_one_registration() -> None:
    """Names in default.yaml, files in transforms/ and registered names are the same."""
    names = set(default_transforms())
    assert {path.stem for path in Path(transforms.__path__[0]).glob("*.py")} - {"__init__"} == names
    assert set(registry._TRANSFORMS) == names
    assert set(transforms.__all__) == names


def test_a_second_transform_of_the_same_name_is_refused() -> None:
    """A name is registered once: a second copy of a module would otherwise take over unseen."""
    with pytest.raises(ValueError, match="transform 'match_attention' is already registered"):
        register("match_attention")(lambda model, ctx: (model, TransformReport("")))


def test_unknown_transform_lists_the_known() -> None:
    """Asking for a transform that does not exist names all that do."""
    with pytest.raises(KeyError, match=r"no transform 'nothing'; known: .*match_attention"):
        registry.get("nothing")


def test_transforms_run_in_the_order_of_their_stages() -> None:
    """Each enabled transform runs once, announced by name, timed and reported, in the order of the YAML."""
    announced: list[str] = []
    model, reports = pipeline.transform_module(SmallModel(sdpa), context().config, on_event=announced.append)
    assert announced == list(default_transforms())
    assert [report.name for report in reports] == announced
    assert all(report.seconds > 0 for report in reports)
    assert model.num_pages > 1


def test_a_device_that_is_not_given_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module or program on the CPU is served there, also where there is a GPU."""
    default: Any = config_module._default_device
    monkeypatch.setattr(config_module, "_default_device", default.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = AutoDeployConfig(max_seq_len=64)
    assert config.device == "cuda"
    model, _ = pipeline.transform_module(SmallModel(sdpa), config)
    assert model.device.type == "cpu"
    assert restore(to_program(model), max_seq_len=64).device.type == "cpu"
    captured = AutoDeployConfig(max_seq_len=64, compile_backend="torch-cudagraph")
    with pytest.raises(ConfigError, match="captures CUDA graphs, got device: cpu; set device: cuda, or"):
        pipeline.transform_module(SmallModel(sdpa), captured)
    tensor = torch.empty(0)
    assert pipeline.on_device_of(tensor, AutoDeployConfig(device="cuda:1")).device == "cuda:1"
    assert pipeline.on_device_of(tensor.to("meta"), config) is config
    assert pipeline.on_device_of(None, config) is config
    kept = AutoDeployConfig(
        max_seq_len=64,
        kv_cache_config=KvCacheConfig(dtype="fp8", k_scale=0.5),
        transforms={
            "fuse_gemms": TransformConfig(enabled=False),
            "tune_attention": TuneAttention(decode="xqa"),
        },
    )
    assert pipeline.on_device_of(tensor, kept) == kept.model_copy(update={"device": "cpu"})


def test_a_transform_can_be_switched_off() -> None:
    """A transform that others do not need is left out."""
    config = AutoDeployConfig(max_seq_len=64, transforms={"fuse_gemms": TransformConfig(enabled=False)})
    announced: list[str] = []
    pipeline.transform_module(SmallModel(sdpa), config, on_event=announced.append)
    assert announced == [name for name in default_transforms() if name != "fuse_gemms"]


def test_a_transform_can_be_moved_to_another_stage() -> None:
    """The stage of the config decides when a transform runs; within a stage the YAML's order holds."""
    ctx = context(transforms={"match_repeat_kv": {"stage": "post_export"}})
    announced = list(Pipeline.of(ctx.config))
    _, reports = Pipeline.of(ctx.config).run(SmallModel(sdpa), ctx)
    assert [report.name for report in reports] == announced
    assert announced.index("match_repeat_kv") == announced.index("eliminate_noops") + 1


def test_parts_of_the_pipeline() -> None:
    """A part begins or ends at a transform or at a stage; parts of parts keep the order."""
    names = list(default_transforms())
    off = [name for name, entry in default_transforms().items() if entry.stage == "post_load_fusion"]
    entries = {name: {"enabled": False} for name in off}
    whole = Pipeline.of(AutoDeployConfig(transforms=entries))  # type: ignore[arg-type]
    names = [name for name in names if name not in off]
    assert list(whole) == names
    fusion = names.index("insert_cached_attention")  # the stage post_load_fusion is empty here
    assert list(whole.before("post_load_fusion")) == list(whole.before("cache_init")) == names[:fusion]
    assert list(whole.since("post_load_fusion")) == names[fusion:]
    assert list(whole.since("post_export").before("pattern_matcher")) == names[1:4]
    assert list(whole.upto("functionalize").without("export_model")) == names[1:3]
    tuning = names.index("tune_attention")
    assert list(whole.since("tune_attention").before("compile_model")) == names[tuning:-1]


def test_a_run_of_a_part_goes_on_where_the_last_one_ended() -> None:
    """Two parts one after the other make the graph that the whole makes."""
    ctx, both = context(), context()
    whole = Pipeline.of(ctx.config).before("compile")
    at_once, _ = whole.run(SmallModel(sdpa), ctx)
    first, _ = whole.before("cache_init").run(SmallModel(sdpa), both)
    then, reports = whole.since("cache_init").run(first, both)
    assert isinstance(at_once, fx.GraphModule)
    assert isinstance(then, fx.GraphModule)
    assert str(then.graph) == str(at_once.graph)
    assert [report.name for report in reports] == list(whole.since("cache_init"))
