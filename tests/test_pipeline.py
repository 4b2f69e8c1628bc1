"""The pipeline and the registry: order, switches, reports, and one name for each transform."""

from __future__ import annotations

from pathlib import Path

import pytest

from ad_flashinfer_pass import pipeline, registry, transforms
from ad_flashinfer_pass.config import AutoDeployConfig, TransformConfig, default_transforms
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


def test_a_transform_can_be_switched_off() -> None:
    """A transform that others do not need is left out."""
    config = AutoDeployConfig(max_seq_len=64, transforms={"fuse_gemms": TransformConfig(enabled=False)})
    announced: list[str] = []
    pipeline.transform_module(SmallModel(sdpa), config, on_event=announced.append)
    assert announced == [name for name in default_transforms() if name != "fuse_gemms"]


def test_a_transform_can_be_moved_to_another_stage() -> None:
    """The stage of the config decides when a transform runs; within a stage the YAML's order holds."""
    ctx = context(transforms={"match_repeat_kv": {"stage": "post_export"}})
    announced: list[str] = []
    pipeline.run(SmallModel(sdpa), ctx, announced.append)
    assert announced.index("match_repeat_kv") == announced.index("eliminate_noops") + 1
