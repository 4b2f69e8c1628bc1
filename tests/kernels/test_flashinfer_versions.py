"""Every call into FlashInfer, against the signatures of every version that the caller declares.

``flashinfer_signatures.json`` has, of each function that is called, its signatures by the version that
brought them (null: it was not there), and the versions that were looked at. It is what ``signatures()`` says
where one of them is installed (``pip install --no-deps --target FOLDER flashinfer-python==VERSION``, with
apache-tvm-ffi, requests, filelock, einops, tqdm, tabulate and click); no GPU is needed.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from ad_flashinfer_pass.kernels import modules, workspaces
from ad_flashinfer_pass.kernels.attention import fa, fa2, fa3, fmha_v2, select, trtllm_gen, xqa
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec
from ad_flashinfer_pass.kernels.workspaces import GraphState

RECORD = json.loads(Path(__file__).with_name("flashinfer_signatures.json").read_text())
VERSIONS: list[str] = RECORD["versions"]
FUNCTIONS: dict[str, dict[str, str | None]] = RECORD["functions"]

HEADS, KV_HEADS, DIM, PAGE, PAGES, WIDTH = 4, 2, 64, 16, 12, 3
SITE = Site(
    dtype=torch.bfloat16,
    kv_dtype=torch.float8_e4m3fn,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    v_head_dim=DIM,
    page_size=PAGE,
    scale=0.2,
    sliding_window=9,
    has_sinks=True,
)


def signatures() -> dict[str, str | None]:
    """Of the FlashInfer that is installed, as the record has them."""
    found: dict[str, str | None] = {}
    for path in FUNCTIONS:
        where, _, name = path.partition(":")
        target: Any = importlib.import_module(where)
        for part in name.split("."):
            target = getattr(target, part, None)
        found[path] = None if target is None else _text(inspect.signature(target))
    return found


def _text(signature: inspect.Signature) -> str:
    """Names in order, ``=`` after those with a default, ``*`` before those by name alone."""
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    defaults = [p if p.default is p.empty else p.replace(default=None) for p in plain]
    names = str(inspect.Signature(defaults))[1:-1].replace("=None", "=")
    return names.replace(",", "")


def _signature(text: str) -> inspect.Signature:
    scope: dict[str, Any] = {}
    exec(f"def recorded({', '.join(text.replace('=', '=None').split())}): ...", scope)
    return inspect.signature(scope["recorded"])


def recorded(path: str, version: str) -> str | None:
    """The signature of a function in a version."""
    since = [v for v in FUNCTIONS[path] if Version(v) <= Version(version)]
    return FUNCTIONS[path][max(since, key=Version)]


@pytest.fixture
def calls(version: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A FlashInfer whose functions take what the version's take, compute nothing and are noted here."""
    noted: list[str] = []
    classes: dict[str, type] = {}
    for path in FUNCTIONS:
        where, _, name = path.partition(":")
        parts = where.split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module not in sys.modules or not hasattr(sys.modules[module], "_is_recorded"):
                made = ModuleType(module)
                made._is_recorded = True  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, module, made)
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], made)
        text = recorded(path, version)
        if text is None:
            continue
        owner, _, method = name.rpartition(".")
        if owner:
            classes.setdefault(owner, type(owner, (), {}))
            setattr(sys.modules[where], owner, classes[owner])
        setattr(classes[owner] if owner else sys.modules[where], method, _function(path, text, noted))
    monkeypatch.setattr(modules, "installed", lambda package="flashinfer-python": Version(version))
    monkeypatch.setattr(modules, "_device", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    for kernel, attribute, value in (
        (fa, "WORKSPACE_BYTES", 16),
        (fmha_v2, "_WORKSPACE_BYTES", 16),
        (trtllm_gen, "_WORKSPACE_BYTES", 16),
    ):
        monkeypatch.setattr(kernel, attribute, value)
    for cached in (fa._module, fmha_v2._module):
        cached.cache_clear()
    workspaces.release()
    return noted


def _function(path: str, text: str, noted: list[str]) -> Callable[..., Any]:
    signature = _signature(text)

    def function(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        noted.append(path)
        return None if path.endswith("__init__") else bound.arguments.get("out", SimpleNamespace(name=path))

    return function


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor, AttentionSpec]:
    """Query, cache, lengths, block table of three sequences, and all that the kernels take of a site."""
    query = torch.zeros(3, HEADS, DIM, dtype=torch.bfloat16)
    cache = torch.zeros(PAGES, 2, KV_HEADS, PAGE, DIM).to(torch.float8_e4m3fn)
    lens = torch.tensor([5, 20, 33], dtype=torch.int32)
    table = torch.arange(3 * WIDTH, dtype=torch.int32).view(3, WIDTH)
    sinks = torch.zeros(HEADS)
    return query, cache, lens, table, AttentionSpec(0.2, 9, None, None, 0.5, 2.0, sinks=sinks)


def _in_reach(name: str, version: str) -> bool:
    return all(
        Version(since.version) <= Version(version) for since in select.PROVIDERS[name].capability.since
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_all_calls_fit_every_version(version: str, calls: list[str]) -> None:
    """With every argument that is ever passed; what a provider declares as newer is not called before."""
    query, cache, lens, table, spec = batch()
    bounds = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    xqa.modules(SITE, 9)
    xqa.decode(query, cache, lens, table, spec, split_factor=2)
    if select.extender("xqa") is not None:
        xqa.extend_modules(SITE, 4)
        for num_tokens, starts in ((12, [0, 4, 8, 12]), (7, [0, 4, 5, 7])):
            new = torch.zeros(num_tokens, HEADS, DIM, dtype=torch.bfloat16)
            cu_seqlen = torch.tensor(starts, dtype=torch.int32)
            xqa.extend(new, cache, cu_seqlen, lens, table, spec, max_len=4)
    fmha_v2.modules(SITE, 9)
    fmha_v2.prefill(query, cache, bounds, lens, table, spec)
    for provider in (fa2, fa3):
        provider.CAPABILITY.modules(SITE, 9)
        provider.prefill(query, cache, bounds, lens, table, spec)
    fa2.decode(query, cache, lens, table, spec)
    with GraphState().begin_capture():
        fa2.decode(query, cache, lens, table, spec)
    expected = {
        path for path in FUNCTIONS if recorded(path, version) is not None and "trtllm_batch" not in path
    }
    if _in_reach("trtllm_gen", version):
        trtllm_gen.prefill(query, cache, bounds, lens, table, spec)
        trtllm_gen.decode(query, cache, lens, table, spec)
        expected |= {path for path in FUNCTIONS if "trtllm_batch" in path}
    assert set(calls) == expected, "the record has functions that are not called"


@pytest.mark.parametrize("version", ["0.6.15.post1"])
def test_a_call_that_the_version_does_not_have_would_fail(version: str, calls: list[str]) -> None:
    """The stand-ins are as strict as the functions."""
    query, cache, lens, table, spec = batch()
    cu_seqlen = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    with pytest.raises(TypeError, match="q_cu_seq_lens"):
        xqa.extend(query, cache, cu_seqlen, lens, table, spec, max_len=2)
    assert not calls


def test_every_declared_version_was_looked_at() -> None:
    """The oldest, and each from which on something is there; a declaration is no guess."""
    declared = {
        since.version for name in select.PROVIDERS for since in select.PROVIDERS[name].capability.since
    }
    declared |= {modules.OLDEST_FLASHINFER, xqa.EXTEND_SINCE.version, "0.7.0"}
    assert declared <= set(VERSIONS)
    assert sorted(VERSIONS, key=Version) == VERSIONS


def test_the_record_is_that_of_the_flashinfer_that_is_installed() -> None:
    """Where one is, of a version that was recorded."""
    pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    version = str(modules.installed())
    if version not in VERSIONS:
        pytest.skip(f"flashinfer-python {version} is not in the record")
    assert signatures() == {path: recorded(path, version) for path in FUNCTIONS}
