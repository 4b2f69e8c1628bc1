"""The smallest thing that shows a wrong attention: its tensors in one step, and a script of ten lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ad_flashinfer_pass.files import write_file
from ad_flashinfer_pass.inspection.check.recording import ArgumentRecorder, CachedGraph, SiteValues
from ad_flashinfer_pass.inspection.check.steps import Step

_SCRIPT = '''"""Attention site {index} ({module}) in a {phase} step: the op beside attention in float64."""
import json, pathlib
import torch
from safetensors import safe_open
from ad_flashinfer_pass import ops  # registers the op
with safe_open(pathlib.Path(__file__).with_name("{file}"), framework="pt", device="{device}") as file:
    tensors = {{name: file.get_tensor(name) for name in file.keys()}}
    scalars = json.loads(file.metadata()["scalars"])
expected, rows = tensors.pop("expected"), tensors.pop("rows")
tensors["batch_info_host"] = tensors["batch_info_host"].cpu()
found = torch.ops.ad_flashinfer.{op}(**tensors, **scalars).flatten(0, 1)[rows].double()
print(f"largest error: {{(found - expected).abs().max() / expected.abs().max():.3g}} of the largest value")
'''


def write_reproducer(
    cached: CachedGraph,
    steps: Sequence[Step],
    site: SiteValues,
    wanted: Tensor,
    tolerance: float,
    name: tuple[int, str],
    directory: Path,
) -> Path:
    """Write the first step in which a site is wrong.

    Args:
        cached: the graph, on which nothing was run yet.
        steps: of the check.
        site: the wrong one.
        wanted: float64 results for the tokens of all steps.
        tolerance: share of the largest value by which a result may be off.
        name: index and module of the site.
        directory: made if it is not there.

    Returns:
        The script.
    """
    from safetensors.torch import save

    end = 0
    for step in steps:
        recorder = ArgumentRecorder(cached.gm, site.cached)
        cached.run(step, recorder)
        rows = step.rows()
        start, end = end, end + len(rows)
        expected = wanted[start:end]
        error = (recorder.result.flatten(0, 1)[rows].double() - expected).abs().max() / expected.abs().max()
        if not error <= tolerance:
            break
    tensors = {n: value.contiguous() for n, value in recorder.arguments.items() if isinstance(value, Tensor)}
    scalars = {n: value for n, value in recorder.arguments.items() if not isinstance(value, Tensor)}
    tensors |= {"expected": expected.contiguous(), "rows": torch.tensor(rows)}
    directory.mkdir(parents=True, exist_ok=True)
    index, module = name
    file = directory / f"site_{index}.safetensors"
    write_file(file, save(tensors, metadata={"scalars": json.dumps(scalars)}))
    script = directory / f"site_{index}.py"
    write_file(
        script,
        _SCRIPT.format(
            op=str(site.cached.target).split(".")[1],
            index=index,
            module=module,
            phase=step.phase,
            file=file.name,
            device=recorder.result.device,
        ),
    )
    return script
