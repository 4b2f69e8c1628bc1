"""``cache_latent``: a latent is cached as one and computes the same; what looks alike stays as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_flashinfer_pass import restore, to_program
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.deployment.calibrate import calibrate
from ad_flashinfer_pass.inspection.check.check import check_prepared, prepare
from ad_flashinfer_pass.pipeline import Pipeline, transform_module
from ad_flashinfer_pass.records import TransformReport
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from tests.architectures import (
    generated_by_engine,
    generated_by_transformers,
    random_model,
    random_prompts,
    small_config,
)
from tests.test_mutations import cut_elsewhere, looked_through, transposed_up
from tests.transforms.latent_models import Form, LatentModel
from tests.transforms.serving import assert_serves_like
from tests.transforms.small_models import aten, context


def served(form: Form, **config: Any) -> tuple[CachedModel, TransformReport]:
    """The cached model, which serves like the dense one, and what the transform says."""
    dense = LatentModel(form)
    model, reports = transform_module(dense, context(**config).config)
    assert_serves_like(model, dense)
    return model, next(report for report in reports if report.name == "cache_latent")


FORMS = {
    "plain": Form(),
    "written": Form(join="write"),
    "rope_first": Form(rope_first=True, join="write"),
    "k_then_v": Form(split="k_then_v"),
    "v_then_k": Form(split="v_then_k", normed=False),
    "two_projections": Form(split="two"),
    "bias": Form(has_bias=True),
    "no_rope": Form(rope=0),
    "window": Form(window=4),
    "sinks": Form(flaw="sinks"),
    "float8": Form(quantized="row"),
    "float8_blocks": Form(quantized="block"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_latent_is_cached_as_one(form: Form) -> None:
    """In any layout, with biases, windows and sinks; the pool has one row of latent and rest a token."""
    model, report = served(form)
    assert report.num_matches == 1
    assert [tuple(pool.shape[1:]) for pool in model.paged] == [(1, 1, 5, form.rank + form.rope)]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    form=st.builds(
        Form,
        heads=st.integers(1, 5),
        rank=st.integers(1, 24),
        nope=st.integers(1, 12),
        rope=st.sampled_from([0, 2, 4, 8]),
        value=st.integers(1, 12),
        q_rank=st.sampled_from([0, 7]),
        has_bias=st.booleans(),
        normed=st.booleans(),
        rope_first=st.booleans(),
        split=st.sampled_from(["by_head", "k_then_v", "v_then_k", "two"]),
        join=st.sampled_from(["cat", "write"]),
    )
)
def test_of_any_size(form: Form) -> None:
    """Random ranks, heads and sizes serve like the dense model; a latent that is not worth it is none."""
    _, report = served(form)
    assert report.num_matches == (form.heads > 1 and form.is_narrow)


FLAWS = {
    "other_latent": "K is linear in .*, V in ",
    "activation": r"silu .*computes each head's own elements",
    "factor_of_heads": r"mul.* computes each head's own elements",
    "rope_of_heads": r"mul.* computes each head's own elements",
    "heads_in_other_order": r"index.* computes each head's own elements",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_is_no_latent_is_cached_for_each_head(flaw: str) -> None:
    """It serves all the same, and the report says why."""
    model, report = served(Form(flaw=flaw))
    assert report.num_matches == 0
    (skip,) = report.skipped
    assert "K and V are cached for each head, because " in skip.reason
    assert re.search(FLAWS[flaw], skip.reason), skip.reason
    assert [pool.shape[1] for pool in model.paged] == [2]


def test_a_bias_beside_sinks_is_seen_by_the_softmax() -> None:
    """A bias of K is the same in all logits but the sink's."""
    _, report = served(Form(flaw="sinks", has_bias=True))
    assert "has a bias" in report.skipped[0].reason


def test_a_latent_that_no_kernel_of_the_gpu_reads_stays_expanded() -> None:
    """Of 672 elements, beside K and V that split_decode reads; one of 480, or in float32, is taken."""
    shape = {"heads": 16, "nope": 128, "rope": 32, "value": 128}
    for rank, dtype, taken in ((640, "bfloat16", 0), (448, "bfloat16", 1), (640, "float32", 1)):
        model = LatentModel(Form(rank=rank, **shape)).to(getattr(torch, dtype))  # type: ignore[arg-type]
        ctx = context(dtype=dtype, kv_cache_config={"tokens_per_block": 32})
        ctx.target, ctx.sm = torch.device("cuda"), 90
        pipeline = Pipeline.of(ctx.config)
        _, reports = pipeline.upto("insert_cached_attention").run(model, ctx)
        (report,) = (each for each in reports if each.name == "cache_latent")
        assert report.num_matches == taken
        assert [skip.reason.partition("because ")[2][:24] for skip in report.skipped] == (
            [] if taken else ["no kernel of the GPU has"]
        )


def test_an_8_bit_latent() -> None:
    """One scale for the row, that of K; what it holds is what a float8 can."""
    cache = {"tokens_per_block": 5, "dtype": "fp8", "k_scale": 0.25, "v_scale": 9.0}
    dense = LatentModel(Form())
    model, _ = transform_module(dense, context(kv_cache_config=cache).config)
    assert model.paged[0].dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert_serves_like(model, dense, tolerance=0.3)


def test_a_saved_program_has_its_latent(tmp_path: Path) -> None:
    """Its pool and its one scale are told by its inputs, and it serves like the dense model."""
    dense = LatentModel(Form())
    cache = {"tokens_per_block": 5, "dtype": "fp8", "k_scale": 0.25, "v_scale": 9.0}
    config = context(kv_cache_config=cache).config
    model, _ = transform_module(dense, config)
    file = tmp_path / "latent.pt2"
    torch.export.save(to_program(model), file)
    restored = restore(file, config)
    assert [tuple(pool.shape[1:]) for pool in restored.paged] == [(1, 1, 5, 22)]
    with torch.no_grad():
        assert_serves_like(restored, dense, tolerance=0.3)


def test_calibration_measures_the_row(tmp_path: Path) -> None:
    """One scale, which K and V have."""
    torch.manual_seed(0)
    config = small_config("youtu", fewest_layers=1)
    config.architectures = ["YoutuForCausalLM"]
    config.save_pretrained(tmp_path)
    keys: dict[str, Any] = {"model": str(tmp_path), "skip_loading_weights": True, "max_seq_len": 64}
    found = calibrate(AutoDeployConfig(**keys), [list(range(2, 40))])
    assert found.k_scale == found.v_scale
    assert len(found.k_scale) == config.num_hidden_layers


FAULTS = {
    "wrong_split": cut_elsewhere,
    "transposed": transposed_up,
    "activation_absorbed": looked_through(aten.silu),
    "rotation_absorbed": looked_through(aten.mul),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site agrees with its own arguments, so that what departs lies before the insertion."""
    flaws = {"activation_absorbed": "activation", "rotation_absorbed": "rope_of_heads"}
    model = LatentModel(Form(rank=10, value=10, flaw=flaws.get(fault, "")))
    config = context().config
    assert check_prepared(prepare(model, config), "right").is_ok
    FAULTS[fault](monkeypatch)
    report = check_prepared(prepare(model, config), "wrong")
    assert report.first is not None
    assert "before the insertion" in report.first


@pytest.mark.parametrize("family", ["deepseek_v2", "minicpm3", "kimi_linear", "longcat_flash"])
def test_families_generate_the_tokens_of_transformers(family: str) -> None:
    """A complex rotation, longrope, no rotation beside recurrent layers, scaled latents."""
    changes: dict[str, Any] = {}
    if family == "minicpm3":
        factors = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}
        changes["rope_parameters"] = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 24,
            "factor": 4.0,  # transformers 5.17 reads it whatever the kind
            **factors,
        }
    dense = random_model(small_config(family, fewest_layers=2, **changes))
    prompts = random_prompts([5, 17, 1, 30], 128)
    wanted = generated_by_transformers(dense, prompts, 8)
    model, reports = transform_module(dense, context(max_batch_size=4).config)
    (report,) = (each for each in reports if each.name == "cache_latent")
    assert report.num_matches == len(model.paged) > 0
    assert not report.skipped
    assert all(pool.shape[1:] == (1, 1, 5, 24) for pool in model.paged)
    assert generated_by_engine(model, prompts, 8) == wanted
