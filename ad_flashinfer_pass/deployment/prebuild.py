"""``prebuild``: the FlashInfer modules that a config needs on a kind of GPU, compiled without one.

The result is a folder: one library a module, and ``manifest.json``. A machine that has no compiler and no
network uses it with ``kernel_dir: FOLDER``; see ``kernels.prebuilt``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, KernelError
from ad_flashinfer_pass.files import write_file
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention import select
from ad_flashinfer_pass.kernels.attention.capability import PHASES, Phase, Site
from ad_flashinfer_pass.kernels.attention.provider import Provider
from ad_flashinfer_pass.kernels.prebuilt import MANIFEST, Manifest, NeededModule, read_manifest

if TYPE_CHECKING:
    from flashinfer.jit.core import JitSpec
    from rich.console import RenderableType

# What FlashInfer's modules take from the driver. They are linked with it, and on a machine without a driver
# there may be no stub of it either.
_DRIVER_SYMBOLS = (
    "cuCtxGetCurrent cuCtxGetDevice cuDeviceGet cuDeviceGetAttribute cuFuncSetAttribute cuGetErrorName "
    "cuGetErrorString cuGetProcAddress_v2 cuInit cuKernelGetFunction cuLaunchKernel cuLaunchKernelEx "
    "cuLibraryGetKernel cuLibraryLoadData cuModuleGetFunction cuModuleLoadData cuModuleUnload "
    "cuTensorMapEncodeIm2col cuTensorMapEncodeTiled"
).split()


def needed_modules(
    config: AutoDeployConfig,
    sm: int,
    skip: Collection[str] = (),
    on_event: Callable[[str], None] | None = None,
) -> tuple[dict[str, JitSpec], list[NeededModule], list[str]]:
    """The modules that a config needs on a kind of GPU; nothing is compiled, and no weights are read.

    Args:
        config: the model and its cache.
        sm: compute capability, 90 for 9.0.
        skip: providers that are not to be used; the next one takes their sites.
        on_event: called with the name of each phase as it begins.

    Returns:
        Modules by name, the same as records, and notes.

    Raises:
        ConfigError: an unknown provider, no such compute capability, or FlashInfer is missing or too old.
        TransformError: the pass refuses the model.
    """
    from ad_flashinfer_pass.inspection.stages import run_stages

    unknown = sorted(set(skip) - set(select.PROVIDERS))
    if unknown:
        raise ConfigError(f"no kernel provider {unknown[0]!r}; there are {', '.join(select.PROVIDERS)}.")
    select.check_sm(sm)
    problem = modules.problem()
    if problem is not None:
        raise ConfigError(f"{problem}: {modules.remedy()}.")
    ctx = run_stages(config, stages=["insert_cached_attention"], on_event=on_event, sm=sm).ctx
    max_extend_len = ctx.sequence_info.max_extend_len
    specs: dict[str, JitSpec] = {}
    users: dict[str, list[tuple[str, Phase]]] = {}
    notes: dict[str, None] = {}
    with target(sm):
        for phase in PHASES:
            for cached_site in ctx.sites:
                provider = _provider(cached_site.site, phase, sm, skip)
                found = _modules(provider, cached_site.site, sm)
                if phase == "decode" and max_extend_len and select.extender(provider.name):
                    found += provider.extend_modules(cached_site.site, max_extend_len)
                if not found:
                    notes[f"{phase} by {provider.name}: {provider.without_modules}"] = None
                for spec in found:
                    specs[spec.name] = spec
                    users.setdefault(spec.name, []).append((provider.name, phase))
    records = [
        NeededModule(
            name=name,
            provider=found[0][0],
            phases=list(dict.fromkeys(phase for _, phase in found)),
            num_sites=max(sum(phase == p for _, p in found) for phase in PHASES),
        )
        for name, found in users.items()
    ]
    return specs, records, list(notes)


def _provider(site: Site, phase: Phase, sm: int, skip: Collection[str]) -> Provider:
    """The first provider that declares all of a site, and that this version of FlashInfer has."""
    return next(
        provider
        for name, provider in select.PROVIDERS.items()
        if name not in skip
        and not provider.capability.refusals(site, phase, torch.device("cpu"), sm)
        and not provider.capability.too_old(site, sm // 10)
    )


def _modules(provider: Provider, site: Site, sm: int) -> list[JitSpec]:
    make = provider.capability.modules
    return [] if make is None else list(make(site, sm // 10))


def prebuild(
    config: AutoDeployConfig,
    sm: int,
    folder: Path,
    *,
    skip: Collection[str] = (),
    jobs: int | None = None,
    on_event: Callable[[str], None] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Manifest:
    """Compile what a config needs into a folder; modules that are there already are kept.

    Args:
        config: the model and its cache.
        sm: compute capability, 90 for 9.0.
        folder: made if it does not exist.
        skip: see ``needed_modules``.
        jobs: modules compiled at once; default: the number of processors.
        on_event: called with the name of each phase as it begins.
        on_line: told about each module.

    Raises:
        ConfigError: as ``needed_modules``; the folder is for another GPU or FlashInfer; or no nvcc.
        KernelError: modules do not compile; all others are in the folder.
    """
    compiler = modules.nvcc()
    if compiler is None:
        raise ConfigError("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to where it is.")
    specs, records, notes = needed_modules(config, sm, skip, on_event)
    try:
        lines = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as err:
        raise ConfigError(f"nvcc: {compiler} cannot be run ({err}).") from None
    made = Manifest(
        sm=sm,
        flashinfer=version("flashinfer-python"),
        nvcc=lines.strip().splitlines()[-1],
        modules=[],
        notes=notes,
    )
    kept = {module.name: module for module in _kept(folder, made)}
    folder.mkdir(parents=True, exist_ok=True)
    todo = [record for record in records if record.name not in kept]
    if on_event is not None:
        on_event(f"compile {len(todo)} of {len(records)} modules")
    home = os.environ.get("CUDA_HOME") or str(Path(compiler).resolve().parents[1])
    failed = []
    with (
        target(sm),
        _linkable(),
        _environment("CUDA_HOME", home),
        ThreadPoolExecutor(jobs or os.cpu_count()) as pool,
    ):
        building = [pool.submit(_built, record, specs[record.name], folder) for record in todo]
        for index, future in enumerate(as_completed(building)):
            try:
                record = future.result()
            except KernelError as err:
                failed.append(str(err))
                continue
            kept[record.name] = record
            made = made.model_copy(update={"modules": list(kept.values())})
            write_file(folder / MANIFEST, made.model_dump_json(indent=1) + "\n")
            if on_line is not None:
                on_line(f"{index + 1} of {len(todo)}: {record.name}: {record.seconds:.0f} s")
    if failed:
        raise KernelError("; ".join(failed))
    return made.model_copy(update={"modules": list(kept.values())})


def _built(record: NeededModule, spec: JitSpec, folder: Path) -> NeededModule:
    start = perf_counter()
    try:
        spec.write_ninja()  # older versions would keep that of another architecture
        spec.build(verbose=False)
    except RuntimeError as err:
        lines = [line for line in str(err).splitlines() if "error:" in line] or str(err).splitlines()
        raise KernelError(f"module {record.name} does not compile: {'; '.join(lines[:3])}") from err
    target_file = folder / spec.name / f"{spec.name}.so"
    target_file.parent.mkdir(exist_ok=True)
    write_file(target_file, spec.jit_library_path.read_bytes())
    return record.model_copy(update={"seconds": round(perf_counter() - start, 1)})


def _kept(folder: Path, wanted: Manifest) -> list[NeededModule]:
    """Modules that the folder has already; it must be of the same kind."""
    if not (folder / MANIFEST).exists():
        return []
    found = read_manifest(folder)
    if (found.sm, found.flashinfer) != (wanted.sm, wanted.flashinfer):
        raise ConfigError(
            f"{folder} holds kernels for compute capability {found.sm} of FlashInfer {found.flashinfer}, not "
            f"{wanted.sm} of {wanted.flashinfer}: give another folder."
        )
    return [module for module in found.modules if (folder / module.name / f"{module.name}.so").exists()]


@contextmanager
def target(sm: int) -> Iterator[None]:
    """FlashInfer compiles for that compute capability."""
    from flashinfer.compilation_context import CompilationContext
    from flashinfer.jit.core import current_compilation_context

    archs = current_compilation_context.TARGET_CUDA_ARCHS
    before = set(archs)
    # From 9 on, what these kernels use is of one compute capability only, which the letter says.
    arch = f"{sm // 10}.{sm % 10}{'a' if sm >= 90 else ''}"
    try:
        with _environment("FLASHINFER_CUDA_ARCH_LIST", arch):
            archs.clear()  # in place: FlashInfer's modules hold it by other names
            archs.update(CompilationContext().TARGET_CUDA_ARCHS)
            yield
    finally:
        archs.clear()
        archs.update(before)


@contextmanager
def _linkable() -> Iterator[None]:
    """Let modules be linked with the driver's library where there is no driver."""
    with tempfile.TemporaryDirectory() as stub:
        source, library = Path(stub, "driver.c"), Path(stub, "libcuda.so")
        source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in _DRIVER_SYMBOLS))
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as err:
            raise ConfigError(
                f"the C compiler {compiler} cannot be run ({err}): set CC to one that can."
            ) from None
        # Searched after the folders that FlashInfer names, so that a driver that is there wins.
        paths = os.pathsep.join([stub, *filter(None, [os.environ.get("LIBRARY_PATH")])])
        with _environment("LIBRARY_PATH", paths):
            yield


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def as_json(sm: int, found: list[NeededModule], notes: list[str]) -> str:
    """What is needed, for machines."""
    return json.dumps(
        {"sm": sm, "modules": [module.model_dump() for module in found], "notes": notes}, indent=2
    )


def as_tables(found: list[NeededModule], notes: list[str]) -> list[RenderableType]:
    """What is needed, for a terminal."""
    from rich.table import Table

    table = Table("module", "provider", "phases", "sites", "compiled in")
    for module in found:
        seconds = "" if module.seconds is None else f"{module.seconds:.0f} s"
        table.add_row(module.name, module.provider, ", ".join(module.phases), str(module.num_sites), seconds)
    return [table, *notes]
