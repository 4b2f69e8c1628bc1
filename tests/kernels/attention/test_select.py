"""The no-drop ledger: what a site needs and a provider lacks is named, whatever the item."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from ad_flashinfer_pass.errors import UnsupportedError
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention import reference, select, xqa
from ad_flashinfer_pass.kernels.attention.capability import Capability, Phase, Site, ledger
from ad_flashinfer_pass.kernels.attention.provider import Provider, _undeclared

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
        {"kv_dtypes": dict.fromkeys(("prefill", "decode"), frozenset({torch.float32}))},
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
    "is_latent": ({"is_latent": True}, {"is_latent": False}, "a latent"),
}
PHASES: tuple[Phase, ...] = ("prefill", "decode")


def test_every_item_of_a_site_is_in_the_ledger() -> None:
    """A new field of Site must be given a capability here, or a kernel could drop it unnoticed."""
    names = {field.name for field in fields(Site)}
    # num_kv_heads is judged with num_heads, those of the cache with its dtype; every kernel takes a scale.
    assert names - set(ITEMS) == {"num_kv_heads", "scale", "k_scale", "v_scale"}


@given(
    needed=st.sets(st.sampled_from(sorted(ITEMS))),
    lacking=st.sets(st.sampled_from(sorted(ITEMS))),
)
@settings(max_examples=100, deadline=None)
def test_exactly_the_items_needed_and_lacking_are_refused(needed: set[str], lacking: set[str]) -> None:
    """For any site and declaration, the refusals name each item that is needed and lacking, and no other."""
    site, capability = PLAIN, Capability(name="limited", is_latent=None)
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


def test_a_kernel_takes_latents_only_if_it_says_so() -> None:
    """One that knows nothing of them would read V where there is none."""
    latent = replace(PLAIN, is_latent=True)
    assert Capability(name="any").refusals(latent, "decode", CPU) == ["a latent"]
    only = Capability(name="only", is_latent=True)
    assert only.refusals(PLAIN, "decode", CPU) == ["no latent"]
    assert not only.refusals(latent, "decode", CPU)


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


def test_providers_have_a_function_for_each_phase_that_they_declare() -> None:
    """And no other; the table has each under its name."""
    for name, provider in select.PROVIDERS.items():
        found = {phase for phase in PHASES if getattr(provider, phase) is not _undeclared}
        assert (name, found) == (provider.name, provider.capability.phases)


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
    monkeypatch.setattr(select, "PROVIDERS", {c.name: Provider(capability=c) for c in capabilities})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("item", ITEMS)
def test_choose_names_the_site_and_the_item(item: str, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no provider has the item, the pass stops with where, what, who lacks it, and a way out."""
    needs, lacks, named = ITEMS[item]
    provide(monkeypatch, replace(Capability(name="limited"), **lacks))
    with pytest.raises(UnsupportedError) as raised:
        select.choose(replace(PLAIN, **needs), phase, CPU, "node attention_3 (model.py:12)")
    message = str(raised.value)
    assert message.startswith("node attention_3 (model.py:12): no kernel does all that this attention needs")
    assert f" for {phase} on cpu (limited: {named}" in message
    assert "Change kv_cache_config" in message
    assert "\n" not in message


def test_choose_takes_the_first_that_covers_the_phase_and_says_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Order is preference, phase by phase: a provider that lacks one is passed over, with the reason."""
    provide(
        monkeypatch,
        Capability(name="fast", phases=frozenset({"decode"})),
        Capability(name="able"),
        Capability(name="spare"),
    )
    name, reason = select.choose(PLAIN, "prefill", CPU, "node a")
    assert name == "able"
    assert reason == "covers every item of the site; not fast: phase prefill (it has decode)"
    assert select.choose(PLAIN, "decode", CPU, "node a") == ("fast", "covers every item of the site")


@pytest.mark.parametrize("phase", PHASES)
def test_choose_on_a_cpu_gives_the_reference(phase: Phase) -> None:
    """The kernels of a GPU are passed over because of the phase or the device, which the reason says."""
    name, reason = select.choose(PLAIN, phase, CPU, "node a")
    assert name == "reference"
    for other in select.PROVIDERS.keys() - {"reference"}:
        assert f"not {other}: " in reason
    assert "device cpu (it has cuda)" in reason
    assert "dtype" not in reason


def needing(*, is_aot: bool, is_compiled: bool, compiles: bool = True) -> Capability:
    """A provider with one module of FlashInfer."""
    spec: Any = SimpleNamespace(is_aot=is_aot, is_compiled=is_compiled)
    return Capability(name="a", modules=lambda site, major: [spec], compiles=compiles)


@pytest.mark.parametrize(
    ("capability", "refusal"),
    [
        (
            Capability(name="a", compute_majors=frozenset({9, 12})),
            "compute capability major 0 (it has 12, 9)",
        ),
        (needing(is_aot=False, is_compiled=True), "flashinfer-python is not installed"),
    ],
    ids=["compute_major", "flashinfer"],
)
def test_the_machine_is_judged(capability: Capability, refusal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that this machine cannot run refuses, and says what is lacking."""
    monkeypatch.setattr(modules, "installed", lambda: None)
    assert capability.refusals(PLAIN, "decode", CPU) == [refusal]


@pytest.mark.parametrize(
    ("capability", "nvcc", "disabled", "refusal"),
    [
        (needing(is_aot=True, is_compiled=True), None, True, None),
        (
            needing(is_aot=False, is_compiled=True),
            "nvcc",
            True,
            "its FlashInfer module is not prebuilt, and FLASHINFER_DISABLE_JIT is set",
        ),
        (
            needing(is_aot=False, is_compiled=False),
            None,
            False,
            "its FlashInfer module is not prebuilt, and there is no nvcc to build it",
        ),
        (needing(is_aot=False, is_compiled=False), "nvcc", False, None),
        (
            needing(is_aot=False, is_compiled=False, compiles=False),
            "nvcc",
            False,
            "its FlashInfer module is not built",
        ),
        (needing(is_aot=False, is_compiled=True, compiles=False), "nvcc", False, None),
    ],
    ids=["prebuilt", "no_jit", "no_nvcc", "compiled_at_first_call", "compiles_too_long", "was_compiled"],
)
def test_a_module_must_be_prebuilt_or_can_be_compiled(
    capability: Capability,
    nvcc: str | None,
    disabled: bool,
    refusal: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A provider whose module this machine can neither load nor make is passed over with the reason."""
    monkeypatch.setattr(modules, "problem", lambda: None)
    monkeypatch.setattr(modules, "nvcc", lambda: nvcc)
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "1" if disabled else "")
    assert capability.refusals(PLAIN, "decode", CPU) == ([] if refusal is None else [refusal])


def test_an_old_flashinfer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks what all providers call; the reason names both versions."""
    monkeypatch.setattr(modules, "installed", lambda: Version("0.6.1"))
    assert needing(is_aot=True, is_compiled=True).refusals(PLAIN, "decode", CPU) == [
        f"flashinfer-python 0.6.1 is installed, {modules.OLDEST_FLASHINFER} or newer is needed"
    ]


LLAMA = replace(
    PLAIN, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, num_heads=32, num_kv_heads=8, head_dim=128
)
LLAMA = replace(LLAMA, v_head_dim=128)
FP8 = replace(LLAMA, kv_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("version", "major", "site", "lacking"),
    [
        ("0.6.11.post3", 9, LLAMA, {"xqa": "0.6.17", "trtllm_gen": "0.6.15"}),
        ("0.6.11.post3", 9, FP8, {"trtllm_gen": "0.6.15"}),
        ("0.6.11.post3", 9, replace(FP8, has_sinks=True), {"xqa": "0.6.18", "trtllm_gen": "0.6.15"}),
        (
            "0.6.13",
            12,
            replace(FP8, sliding_window=8),
            {"xqa": "0.6.17", "fmha_v2": "0.6.14", "trtllm_gen": "0.6.15"},
        ),
        ("0.6.16.post4", 9, LLAMA, {"xqa": "0.6.17"}),
        ("0.6.17", 9, LLAMA, {}),
        ("0.6.17", 9, replace(FP8, has_sinks=True), {"xqa": "0.6.18"}),
        ("0.6.18", 9, replace(LLAMA, num_heads=32, num_kv_heads=1), {"fa2": "0.7.1"}),
        ("0.7.1", 9, replace(LLAMA, num_heads=32, num_kv_heads=1), {}),
        ("0.7.4", 12, replace(FP8, sliding_window=8, has_sinks=True), {}),
    ],
)
def test_what_a_version_lacks_is_refused_with_the_version_that_has_it(
    version: str, major: int, site: Site, lacking: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each provider's own table, by what the site needs and on which GPU."""
    monkeypatch.setattr(modules, "installed", lambda: Version(version))
    found = {name: p.capability.too_old(site, major) for name, p in select.PROVIDERS.items()}
    reasons = {name: reason for name, reasons in found.items() for reason in reasons}
    assert reasons.keys() == lacking.keys()
    for name, reason in reasons.items():
        assert reason.startswith(f"flashinfer-python {version} lacks ")
        assert reason.endswith(f"; {lacking[name]} has it")


@pytest.mark.parametrize(("version", "kernel"), [("0.6.16.post4", "split_decode"), ("0.6.17", "xqa")])
def test_what_a_version_lacks_goes_to_the_next_provider(
    version: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Hopper that can compile everything, and the reason is told."""
    monkeypatch.setattr(modules, "installed", lambda: Version(version))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec: Any = SimpleNamespace(is_aot=True)
    built = replace(xqa.CAPABILITY, modules=lambda site, major: [spec])
    monkeypatch.setitem(select.PROVIDERS, "xqa", replace(xqa.PROVIDER, capability=built))
    choice = select.choose(LLAMA, "decode", torch.device("cuda"), "node a")
    assert choice.kernel == kernel
    assert ("not xqa: flashinfer-python 0.6.16.post4 lacks decode whose" in choice.reason) == (
        kernel != "xqa"
    )


@pytest.mark.parametrize(("version", "has_extend"), [("0.6.16", False), ("0.6.17", True), (None, True)])
def test_extends_are_prefilled_where_the_version_has_no_kernel_for_them(
    version: str | None, has_extend: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without FlashInfer the graph is for another machine, which is taken to have it."""
    monkeypatch.setattr(modules, "installed", lambda: version and Version(version))
    assert select.extender("xqa 1=split_decode/4") == (xqa.extend if has_extend else None)


def test_a_plan_is_on_the_host_where_one_of_its_kernels_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a measured choice too, which names several."""
    slow = Capability(name="slow", host_phases=frozenset({"decode"}))
    monkeypatch.setitem(select.PROVIDERS, "slow", Provider(capability=slow))
    assert select.on_host("decode", "xqa 1=split_decode/16 4=slow/2") == ["slow"]
    assert select.on_host("decode", "xqa 1=split_decode/16") == []
    assert select.on_host("prefill", "reference") == ["reference"]


def test_modules_are_asked_only_of_a_site_that_could_run() -> None:
    """The question may take time, so a site that is refused anyway does not ask it."""

    def asked(site: Site, compute_major: int) -> list[Any]:
        raise AssertionError(f"asked for {site}")

    capability = Capability(name="a", page_sizes=frozenset({16}), modules=asked)
    assert "page size 32 (it has 16)" in capability.refusals(PLAIN, "decode", CPU)


def test_a_cache_of_another_dtype_needs_a_kernel_that_converts() -> None:
    """Both dtypes may be allowed, and still not together; a cache of the query's dtype always is."""
    site = replace(PLAIN, kv_dtype=torch.float16)
    both = frozenset({torch.float16, torch.float32})
    capability = Capability(name="a", dtypes=both, kv_dtypes={"prefill": frozenset({torch.float16})})
    assert Capability(name="a", dtypes=both).refusals(site, "decode", CPU) == []
    assert capability.refusals(site, "prefill", CPU) == []
    assert capability.refusals(site, "decode", CPU) == ["KV dtype torch.float16 (it has torch.float32)"]
    assert capability.refusals(PLAIN, "decode", CPU) == []


@pytest.mark.parametrize(("head_dim", "largest"), [(48, 128), (64, 128), (96, 64), (128, 64), (256, 32)])
def test_large_groups_are_limited_by_the_head_size(head_dim: int, largest: int) -> None:
    """XQA's tile of queries holds so many heads of each size, and the next larger group is refused."""
    capability = Capability(name="a", max_group_elements=xqa.CAPABILITY.max_group_elements)
    for group, expected in (
        (largest, []),
        (largest + 1, [f"{largest + 1} query heads a KV head of size {head_dim}"]),
    ):
        site = replace(PLAIN, num_heads=group, num_kv_heads=1, head_dim=head_dim, v_head_dim=head_dim)
        assert capability.refusals(site, "decode", CPU) == expected


SERVED = replace(PLAIN, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, head_dim=128, v_head_dim=128)


@pytest.mark.parametrize(
    ("changes", "major", "built", "prefill", "decode"),
    [
        ({}, 9, "fmha_v2 fa2 xqa", "fmha_v2", "xqa"),
        ({}, 9, "fa2 xqa", "tile_prefill", "xqa"),
        ({}, 9, "xqa", "tile_prefill", "xqa"),
        ({}, 9, "", "tile_prefill", "split_decode"),
        ({"sliding_window": 7, "has_sinks": True, "shares_kv": True}, 9, "fmha_v2 fa2 xqa", "fmha_v2", "xqa"),
        ({"has_sinks": True}, 9, "fa2 xqa", "tile_prefill", "xqa"),
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "xqa"),
        ({"kv_dtype": torch.float16}, 9, "fmha_v2 fa2 xqa", "reference", "reference"),
        ({"kv_dtype": torch.float8_e4m3fn}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "xqa"),
        ({"logit_cap": 50.0}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "split_decode"),
        ({"logit_cap": 50.0}, 9, "fmha_v2 fa3 fa2 xqa", "fa3", "split_decode"),
        ({}, 9, "fa3 fa2 xqa", "fa3", "xqa"),
        ({"kv_dtype": torch.float8_e4m3fn}, 9, "fa3 fa2 xqa", "tile_prefill", "xqa"),
        ({"logit_cap": 50.0}, 8, "fa3 fa2", "fa2", "fa2"),
        ({"chunk": 8}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "split_decode"),
        ({"has_alibi": True}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "split_decode"),
        ({"page_size": 24}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "split_decode"),
        ({"v_head_dim": 64}, 9, "fmha_v2 fa2 xqa", "tile_prefill", "split_decode"),
        ({}, 12, "fmha_v2 fa2 xqa", "fmha_v2", "xqa"),
        ({}, 12, "fa2 xqa", "tile_prefill", "xqa"),
        ({}, 10, "fmha_v2 fa2 xqa", "trtllm_gen", "trtllm_gen"),
        ({"kv_dtype": torch.float8_e4m3fn}, 10, "fa2", "tile_prefill", "trtllm_gen"),
        ({"logit_cap": 50.0}, 10, "fa2", "tile_prefill", "split_decode"),
        ({}, 8, "fmha_v2 fa2 xqa", "fa2", "fa2"),
        ({}, 7, "fmha_v2 fa2 xqa", "reference", "reference"),
    ],
)
def test_choices_on_a_gpu(
    changes: dict[str, Any],
    major: int,
    built: str,
    prefill: str,
    decode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What runs each phase of a site, by compute capability and by the modules that are there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(modules, "problem", lambda: None)
    monkeypatch.setattr(modules, "nvcc", lambda: None)
    for name, provider in select.PROVIDERS.items():
        if name == "trtllm_gen":
            continue
        spec = SimpleNamespace(is_aot=name in built.split(), is_compiled=False)
        needs_none = name in ("reference", "split_decode", "tile_prefill")
        given = None if needs_none else (lambda site, major, spec=spec: [spec])
        capability = replace(provider.capability, modules=given)
        monkeypatch.setitem(select.PROVIDERS, name, replace(provider, capability=capability))
    site, gpu = replace(SERVED, **changes), torch.device("cuda")
    chosen = [select.choose(site, phase, gpu, "node a") for phase in PHASES]
    assert [choice.kernel for choice in chosen] == [prefill, decode]
    if major == 9 and prefill == "tile_prefill" and not changes:
        assert "not fa3: its FlashInfer module is not prebuilt" in chosen[0].reason
