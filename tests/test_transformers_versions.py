"""What docs/architectures.json says of each version of transformers, against the one that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures import changed, render, try_family
from tests import architectures

RESULTS = json.loads((Path(__file__).parents[1] / "docs" / "architectures.json").read_text())
OUTCOMES: dict[str, dict[str, str]] = RESULTS["outcomes"]
HERE = architectures.minor_version()


@pytest.fixture
def listed() -> dict[str, str]:
    """The outcomes of this version."""
    if HERE not in OUTCOMES:
        pytest.skip(f"nothing is listed of transformers {HERE}: run benchmarks/architectures.py with it")
    return OUTCOMES[HERE]


def test_all_families_of_this_version_are_listed(listed: dict[str, str]) -> None:
    """A family that came or went is seen here first."""
    assert set(listed) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", changed(OUTCOMES))
def test_a_family_that_a_version_changed_is_as_listed(family: str, listed: dict[str, str]) -> None:
    """Served with one version and refused with another."""
    if family not in listed:
        pytest.skip(f"transformers {HERE} has no {family}")
    row = try_family(family)
    assert row.outcome == listed[family], row.detail


def test_the_readme_names_the_versions_that_were_tried() -> None:
    first, *_, last = sorted(OUTCOMES, key=Version)
    assert f"transformers {first} to {last}" in (Path(__file__).parents[1] / "README.md").read_text()


def test_what_differs_between_versions_is_found_and_shown() -> None:
    """A family that only one version has is no difference."""
    outcomes = {"5.9": {"a": "same", "b": "same"}, "5.10": {"b": "refused", "c": "same"}}
    assert changed(outcomes) == {"b": {"5.9": "same", "5.10": "refused"}}
    page = render({**RESULTS, "outcomes": outcomes})
    assert "| 5.9 | 2 | 0 | 0 |\n| 5.10 | 1 | 1 | 0 |" in page
    assert "| family | 5.9 | 5.10 |\n|---|---|---|\n| b | same | refused |" in page


def test_no_listed_version_has_defects_and_the_page_is_that_of_the_file() -> None:
    """A run with defects is mended, not kept."""
    assert not any("defect" in families.values() for families in OUTCOMES.values())
    assert (Path(__file__).parents[1] / "docs" / "architectures.md").read_text() == render(RESULTS)
