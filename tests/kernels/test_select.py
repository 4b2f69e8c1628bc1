"""The no-drop ledger: what a site needs and a provider lacks is named, whatever the item."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import reference, select
from ad_flashinfer_pass.kernels.capability import Capability, Site, ledger

CPU = torch.device("cpu")
PLAIN = Site(
    dtype=torch.float32,
    kv_dtype=torch.float32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    v_head_dim=16,
    page_size=32,
    scale=0.25,
)
# Item of a site -> (how a site needs it, how a provider says that it lacks it, how the refusal names it).
ITEMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dtype": ({"dtype": torch.bfloat16}, {"dtypes": frozenset({torch.float32})}, "dtype torch.bfloat16"),
    "kv_dtype": (
        {"kv_dtype": torch.float16},
        {"kv_dtypes": frozenset({torch.float32})},
        "KV dtype torch.float16",
    ),
    "num_heads": ({"num_heads": 8, "num_kv_heads": 1}, {"max_group": 4}, "8 query heads a KV head"),
    "head_dim": ({"head_dim": 80, "v_head_dim": 80}, {"head_dims": frozenset({16, 64})}, "head size 80"),
    "v_head_dim": ({"v_head_dim": 8}, {"mixed_head_dims": False}, "mixed_head_dims"),
    "page_size": ({"page_size": 24}, {"page_sizes": frozenset({16, 32})}, "page size 24"),
    "sliding_window": ({"sliding_window": 7}, {"sliding_window": False}, "sliding_window"),
    "logit_cap": ({"logit_cap": 50.0}, {"logit_cap": False}, "logit_cap"),
    "chunk": ({"chunk": 8}, {"chunk": False}, "chunk"),
    "has_sinks": ({"has_sinks": True}, {"sinks": False}, "sinks"),
    "has_alibi": ({"has_alibi": True}, {"alibi": False}, "alibi"),
    "shares_kv": ({"shares_kv": True}, {"shared_kv": False}, "shared_kv"),
}


def test_every_item_of_a_site_is_in_the_ledger() -> None:
    """A new field of Site must be given a capability here, or a kernel could drop it unnoticed."""
    names = {field.name for field in fields(Site)}
    # num_kv_heads is judged with num_heads; every kernel takes the scale as an argument.
    assert names - set(ITEMS) == {"num_kv_heads", "scale"}


@given(
    needed=st.sets(st.sampled_from(sorted(ITEMS))),
    lacking=st.sets(st.sampled_from(sorted(ITEMS))),
)
@settings(max_examples=100, deadline=None)
def test_exactly_the_items_needed_and_lacking_are_refused(needed: set[str], lacking: set[str]) -> None:
    """For any site and declaration, the refusals name each item that is needed and lacking, and no other."""
    site, capability = PLAIN, Capability(name="limited")
    for item in sorted(needed):
        site = replace(site, **ITEMS[item][0])
    for item in sorted(lacking):
        capability = replace(capability, **ITEMS[item][1])
    refusals = capability.refusals(site, "decode", CPU)
    # Another head size of K alone also makes the head sizes differ, and the reverse.
    expected = {item for item in needed & lacking if item != "v_head_dim"}
    if "v_head_dim" in lacking and site.head_dim != site.v_head_dim:
        expected.add("v_head_dim")
    assert len(refusals) == len(expected)
    for item in expected:
        assert any(text.startswith(ITEMS[item][2]) for text in refusals), item


@pytest.mark.parametrize(
    ("capability", "refusal"),
    [
        (Capability(name="decoder", phases=frozenset({"decode"})), "phase prefill (it has decode)"),
        (Capability(name="gpu", device_types=frozenset({"cuda"})), "device cpu (it has cuda)"),
    ],
    ids=["phase", "device"],
)
def test_phase_and_device_are_judged(capability: Capability, refusal: str) -> None:
    """A provider that lacks the phase or the device refuses, and says what it has."""
    assert capability.refusals(PLAIN, "prefill", CPU) == [refusal]


def test_a_provider_that_declares_all_refuses_nothing() -> None:
    """The reference covers every item in both phases."""
    site = PLAIN
    for needs, _, _ in ITEMS.values():
        site = replace(site, **needs)
    for phase in ("prefill", "decode"):
        assert reference.CAPABILITY.refusals(site, phase, CPU) == []


def test_ledger_lists_what_must_be_honoured() -> None:
    """The report of a site holds its items, and none that asks for nothing."""
    site = replace(PLAIN, sliding_window=7, has_sinks=True)
    assert ledger(site) == {
        "dtype": "torch.float32",
        "kv_dtype": "torch.float32",
        "num_heads": "4",
        "num_kv_heads": "4",
        "head_dim": "16",
        "v_head_dim": "16",
        "page_size": "32",
        "scale": "0.25",
        "sliding_window": "7",
        "has_sinks": "True",
    }


def provide(monkeypatch: pytest.MonkeyPatch, *capabilities: Capability) -> None:
    """Make these the only providers, in this order."""
    modules = {c.name: SimpleNamespace(CAPABILITY=c) for c in capabilities}
    monkeypatch.setattr(select, "PROVIDERS", modules)


@pytest.mark.parametrize("item", ITEMS)
def test_choose_names_the_site_and_the_item(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no provider has the item, the pass stops with where, what, who lacks it, and a way out."""
    needs, lacks, named = ITEMS[item]
    provide(monkeypatch, replace(Capability(name="limited"), **lacks))
    with pytest.raises(UnsupportedError) as raised:
        select.choose(replace(PLAIN, **needs), CPU, "node attention_3 (model.py:12)")
    message = str(raised.value)
    assert message.startswith("node attention_3 (model.py:12): no kernel does all that this attention needs")
    assert f"limited: prefill: {named}" in message
    assert f"decode: {named}" in message
    assert "Change kv_cache_config" in message
    assert "\n" not in message


def test_choose_takes_the_first_that_covers_and_says_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Order is preference: a provider that lacks an item in one phase is passed over, with the reason."""
    provide(
        monkeypatch,
        Capability(name="fast", phases=frozenset({"decode"})),
        Capability(name="able"),
        Capability(name="spare"),
    )
    name, reason = select.choose(PLAIN, CPU, "node a")
    assert name == "able"
    assert reason == "covers every item of the site; not fast: prefill: phase prefill (it has decode)"


def test_choose_on_a_cpu_gives_the_reference() -> None:
    """The providers of the package cover a plain site on a CPU."""
    assert select.choose(PLAIN, CPU, "node a") == ("reference", "covers every item of the site")
