"""``doctor``: what this machine can run, what it lacks and how to get it, and what never ran on a GPU."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from packaging.version import Version
from pydantic import BaseModel

from ad_flashinfer_pass import autodeploy_hook
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.files import cache_folder
from ad_flashinfer_pass.kernels import modules, prebuilt
from ad_flashinfer_pass.kernels.attention import select, trtllm_gen
from ad_flashinfer_pass.kernels.attention.capability import PHASES, Phase, Site

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKAGES = ("torch", "transformers", "triton", "flashinfer-python", "flashinfer-cubin", "tensorrt-llm")
# Llama 3.1 8B: what is said of a provider is said of sites like these.
_SITES = {
    kv: Site(
        dtype=torch.bfloat16,
        kv_dtype=dtype,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        v_head_dim=128,
        page_size=32,
        scale=128**-0.5,
    )
    for kv, dtype in (("bfloat16", torch.bfloat16), ("fp8", torch.float8_e4m3fn))
}


class Check(BaseModel):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "missing", "note"]
    """missing: something cannot run without it."""
    found: str
    remedy: str | None = None
    """A command, or what to do."""


class ProviderState(BaseModel):
    """What one kernel provider can do on one GPU, for attention like that of Llama 3.1 8B."""

    name: str
    phase: Phase
    kv_dtype: str
    """bfloat16 or fp8."""
    refusals: list[str]
    """Why it cannot; empty if it can."""
    is_chosen: bool
    """It would run the phase."""
    was_run: bool
    """This package's tests have run on this kind of GPU."""


class Gpu(BaseModel):
    """One CUDA device."""

    index: int
    name: str
    sm: int
    """Compute capability: 90 is 9.0."""
    memory_gib: float
    providers: list[ProviderState]


class Diagnosis(BaseModel):
    """Everything that ``doctor`` found."""

    python: str
    packages: dict[str, str | None]
    """Version, or None if it is not installed."""
    checks: list[Check]
    gpus: list[Gpu]
    run_on_hardware: list[str]
    """Of each provider, the kinds of GPU on which this package's tests ran it, or that it never ran."""
    autodeploy: list[str]
    """Whether TensorRT-LLM's AutoDeploy imports the plugin."""


def diagnose(kernel_dir: Path | None = None) -> Diagnosis:
    """Look at this machine; compiles nothing and allocates nothing on a device.

    Args:
        kernel_dir: a folder that ``prebuild`` made, to be looked at too.
    """
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    checks = [
        _torch_check(),
        *_models_check(),
        *_flashinfer_checks(has_gpu=bool(gpus)),
        *(_module_checks() if gpus else []),
        *(_peer_checks(len(gpus)) if len(gpus) > 1 else []),
        _cache_check(),
    ]
    return Diagnosis(
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        checks=[*checks, *([] if kernel_dir is None else [_folder_check(kernel_dir, gpus)])],
        gpus=gpus,
        run_on_hardware=[_runs(name) for name in select.PROVIDERS if name != "reference"],
        autodeploy=_autodeploy(),
    )


def _runs(name: str) -> str:
    run_on = select.PROVIDERS[name].capability.run_on
    where = ", ".join(f"SM{sm}" for sm in sorted(run_on))
    return f"{name}: run on {where} alone" if run_on else f"{name}: never run on hardware"


def _version(package: str) -> str | None:
    if package == "torch":  # which says for what it was built, as its files' names do not
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _peer_checks(count: int) -> list[Check]:
    """Whether the GPUs map each other's memory, over which models of several ranks sum."""
    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    without = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not without:
        return [Check(name="peer access", state="ok", found=f"between all {count} GPUs")]
    shown = ", ".join(f"cuda:{one} to cuda:{other}" for one, other in without[:4])
    return [
        Check(
            name="peer access",
            state="note",
            found=f"not from {shown}{' and more' if len(without) > 4 else ''}: NCCL makes the sums of ranks",
            remedy="nvidia-smi topo -p2p r shows why; take GPUs that NVLink joins",
        )
    ]


def _torch_check() -> Check:
    if torch.cuda.is_available():
        return Check(name="CUDA", state="ok", found=f"torch for CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        found = "torch is built for CPUs; the reference kernels run"
        remedy = "with an NVIDIA GPU: pip install torch --index-url https://download.pytorch.org/whl/cu130"
        return Check(name="CUDA", state="note", found=found, remedy=remedy)
    found = f"torch for CUDA {torch.version.cuda}, but no GPU or no driver; the reference kernels run"
    return Check(
        name="CUDA", state="note", found=found, remedy="nvidia-smi shows whether the driver sees a GPU"
    )


def _models_check() -> list[Check]:
    """Whether models can be loaded and exported; TensorRT-LLM's transformers may be too old for that."""
    try:
        importlib.import_module("ad_flashinfer_pass.models")
    except (ConfigError, ImportError) as err:
        return [Check(name="models", state="note", found=f"none can be loaded here: {err}")]
    return []


def _flashinfer_checks(*, has_gpu: bool) -> list[Check]:
    """What FlashInfer, and our Triton kernels, need; without a GPU nothing is missing."""
    problem = modules.problem()
    found = f"flashinfer-python {_version('flashinfer-python')}"
    checks = [
        Check(name="FlashInfer", state="ok", found=found)
        if problem is None
        else Check(name="FlashInfer", state="missing", found=problem, remedy=modules.remedy()),
        _nvcc_check(),
        _tool("ninja", "FlashInfer compiles with it", "pip install ninja"),
        _tool(os.environ.get("CC", "cc"), "Triton compiles launchers with it", "apt-get install gcc"),
    ]
    if all(check.state == "ok" for check in checks):
        found = "can compile modules here, for GPUs of other machines too"
        checks.append(Check(name="prebuild", state="ok", found=found))
    checks += _version_checks()
    if _version("triton") is None:
        remedy = f"pip install triton{'' if platform.system() == 'Linux' else ' (on Linux)'}"
        checks.append(Check(name="Triton", state="missing", found="not installed", remedy=remedy))
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        found = "FLASHINFER_DISABLE_JIT is set: only prebuilt modules are loaded"
        checks.append(Check(name="FlashInfer's compiler", state="note", found=found, remedy=_PREBUILD))
    if has_gpu:
        return checks
    return [c.model_copy(update={"state": "note" if c.state == "missing" else c.state}) for c in checks]


def _version_checks() -> list[Check]:
    """What providers would have with a newer FlashInfer; what they refuse goes to the next one."""
    return [
        Check(name=name, state="note", found=reason, remedy=modules.remedy(since.version))
        for name, provider in select.PROVIDERS.items()
        for since in provider.since
        if modules.problem() is None and (reason := since.lacking()) is not None
    ]


_PREBUILD = (
    "ad-flashinfer-pass prebuild -c CONFIG --sm SM -o FOLDER, where there is nvcc; then kernel_dir: FOLDER"
)


def _folder_check(folder: Path, gpus: list[Gpu]) -> Check:
    """Whether ``kernel_dir: folder`` would be accepted on every GPU of this machine."""
    try:
        made = prebuilt.read_manifest(folder)
    except ConfigError as err:
        return Check(name="kernel_dir", state="missing", found=str(err), remedy=_PREBUILD)
    what = f"{len(made.modules)} modules for SM{made.sm} of flashinfer-python {made.flashinfer}"
    here = {f"GPU {gpu.index} is SM{gpu.sm}" for gpu in gpus if gpu.sm != made.sm}
    if _version("flashinfer-python") != made.flashinfer:
        here.add(f"flashinfer-python {_version('flashinfer-python') or 'is not installed'} is here")
    lost = [m.name for m in made.modules if not (folder / m.name / f"{m.name}.so").exists()]
    problems = [*sorted(here), *(f"{name} is missing" for name in lost)]
    if problems:
        found = f"{what}; {', '.join(problems)}"
        return Check(name="kernel_dir", state="missing", found=found, remedy=_PREBUILD)
    return Check(name="kernel_dir", state="ok", found=what)


def _nvcc_check() -> Check:
    compiler = modules.nvcc()
    if compiler is None:
        remedy = f"install the CUDA toolkit, or {_PREBUILD}"
        return Check(
            name="nvcc", state="missing", found="FlashInfer cannot compile modules here", remedy=remedy
        )
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    release = next((word.strip(",") for line, word in _after("release", said)), None)
    found = f"{compiler}, release {release}"
    if release and torch.version.cuda and Version(release).major != Version(torch.version.cuda).major:
        remedy = f"install the toolkit of CUDA {torch.version.cuda}, or set CUDA_HOME to it"
        found = f"{found}; torch is for CUDA {torch.version.cuda}"
        return Check(name="nvcc", state="note", found=found, remedy=remedy)
    return Check(name="nvcc", state="ok", found=found)


def _after(word: str, text: str) -> list[tuple[str, str]]:
    """Each line with the word after ``word`` in it."""
    lines = [(line, line.split()) for line in text.splitlines()]
    return [(line, words[words.index(word) + 1]) for line, words in lines if word in words[:-1]]


def _tool(name: str, use: str, remedy: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name=name, state="missing", found=f"not found; {use}", remedy=remedy)
    return Check(name=name, state="ok", found=path)


def _module_checks() -> list[Check]:
    """What is not compiled at its first use, and has to be there before."""
    majors = {torch.cuda.get_device_capability(index)[0] for index in range(torch.cuda.device_count())}
    checks = []
    slow = {"fmha_v2": "prefill", "fa3": "prefill under a logit cap or in float16"}
    for name, what in slow.items() if 9 in majors and modules.problem() is None else ():
        lacks = _refusals(name, "prefill", "bfloat16", torch.device("cuda"))
        state: Literal["ok", "note"] = "note" if lacks else "ok"
        found = f"{', '.join(lacks)}; {what} goes to the next provider" if lacks else "built"
        remedy = f"{_PREBUILD}; ten and more processor minutes" if lacks else None
        checks.append(Check(name=name, state=state, found=found, remedy=remedy))
    cubins, python = _version("flashinfer-cubin"), _version("flashinfer-python")
    if 10 in majors and cubins != python:
        here = "is not installed" if cubins is None else f"{cubins} is not of flashinfer-python {python}"
        found = f"flashinfer-cubin {here}: binaries of trtllm_gen are fetched at the first call"
        checks.append(Check(name="cubins", state="note", found=found, remedy=trtllm_gen.BINARIES))
    return checks


def _cache_check() -> Check:
    """What is kept for the next start: exported graphs, compiled pieces, times of kernels."""
    folder = cache_folder("graphs")
    if folder is None:
        found = "nothing is kept for the next start: ~/.cache/ad-flashinfer-pass is not yours alone"
        remedy = "chmod 700 ~/.cache/ad-flashinfer-pass, or set XDG_CACHE_HOME to a folder of your own"
        return Check(name="cache", state="note", found=found, remedy=remedy)
    size = sum(file.lstat().st_size for file in folder.parent.rglob("*") if file.is_file())
    return Check(name="cache", state="ok", found=f"{folder.parent}, {size / 2**20:.0f} MiB")


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    device, sm = torch.device("cuda", index), 10 * properties.major + properties.minor
    states = []
    for kv in _SITES:
        for phase in PHASES:
            refused = {name: _refusals(name, phase, kv, device) for name in select.PROVIDERS}
            chosen = next(name for name, reasons in refused.items() if not reasons)
            states += [
                ProviderState(
                    name=name,
                    phase=phase,
                    kv_dtype=kv,
                    refusals=reasons,
                    is_chosen=name == chosen,
                    was_run=sm in select.PROVIDERS[name].capability.run_on,
                )
                for name, reasons in refused.items()
            ]
    gib = properties.total_memory / 2**30
    return Gpu(index=index, name=properties.name, sm=sm, memory_gib=round(gib, 1), providers=states)


def _refusals(name: str, phase: Phase, kv: str, device: torch.device) -> list[str]:
    return select.PROVIDERS[name].capability.refusals(_SITES[kv], phase, device)


def as_tables(found: Diagnosis) -> list[RenderableType]:
    """The diagnosis for a terminal."""
    from rich.table import Table
    from rich.text import Text

    checks = Table("state", "what", "found", "what to do", title="This machine")
    checks.add_row("", "Python", found.python, "")
    for name, installed in found.packages.items():
        checks.add_row("", name, installed or "not installed", "")
    styles = {"ok": "", "missing": "red", "note": "yellow"}
    for check in found.checks:
        checks.add_row(Text(check.state, styles[check.state]), check.name, check.found, check.remedy or "")
    for line in found.autodeploy:
        checks.add_row("", "AutoDeploy", line, "")
    tables: list[RenderableType] = [checks]
    for gpu in found.gpus:
        title = f"GPU {gpu.index}: {gpu.name}, SM{gpu.sm}, {gpu.memory_gib} GiB; attention as in Llama 3.1 8B"
        kernels = Table("cache", "phase", "kernel", "can", "run on this kind of GPU", title=title)
        for state in gpu.providers:
            can = "chosen" if state.is_chosen else ", ".join(state.refusals) or "yes"
            kernels.add_row(state.kv_dtype, state.phase, state.name, can, "yes" if state.was_run else "never")
        tables.append(kernels)
    tables.append(f"What this package's tests ran on hardware: {'; '.join(found.run_on_hardware)}.")
    return tables


def _autodeploy() -> list[str]:
    """Whether AutoDeploy's import hook is installed, and whether it is on."""
    hook = autodeploy_hook
    path = next((Path(entry) / hook.PTH for entry in sys.path if (Path(entry) / hook.PTH).is_file()), None)
    imported = hook.PLUGIN in sys.modules
    on = any(isinstance(finder, hook.Finder) for finder in sys.meta_path)
    return [
        f"AutoDeploy import hook: {path or 'not installed; install this package with pip'}",
        f"{hook.VARIABLE}: {os.environ.get(hook.VARIABLE) or 'not set'}; in this process the plugin is "
        + ("imported" if imported else "imported with AutoDeploy" if on else "not active"),
    ]
