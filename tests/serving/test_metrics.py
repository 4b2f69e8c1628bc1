"""What the server shows of the engine."""

from __future__ import annotations

import pytest

pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families

from ad_flashinfer_pass.runtime.engine import Engine
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.serving.metrics import ServerMetrics
from tests.runtime.guesser import Guesser
from tests.runtime.toy_model import ToyModel


def shown(engine: Engine) -> dict[str, float]:
    text = ServerMetrics(engine).exposition()[0].decode()
    families = text_string_to_metric_families(text)
    return {
        f"{sample.name.removeprefix('ad_flashinfer_pass_')}{''.join(sample.labels.values())}": sample.value
        for family in families
        for sample in family.samples
    }


def test_drafts_are_counted_by_position() -> None:
    """As ``Metrics`` has them; without a drafter there is nothing to count."""
    model = ToyModel(
        has_states=False, num_drafts=3, tokens_per_page=8, drafter=lambda info: Guesser(info, 0.7)
    )
    engine = Engine(model)
    engine.add_request([1, 2], SamplingParams(max_new_tokens=30))
    while engine.has_work:
        engine.step()
    metrics, found = engine.metrics, shown(engine)
    assert found["verify_steps_total"] == metrics.num_verify_steps > 0
    assert found["verified_total"] == metrics.num_verified
    assert tuple(found[f"accepted_drafts_total{place}"] for place in (1, 2, 3)) == metrics.num_accepted
    assert not any("drafts" in name for name in shown(Engine(ToyModel())))
