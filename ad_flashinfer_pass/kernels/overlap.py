"""Launches that overlap: a kernel is set up while the one before it still runs.

This is programmatic dependent launch, of compute capability 9.0 and above; a captured graph keeps it. A
kernel that is launched with ``options`` calls ``await_turn`` in every program, before it reads or writes any
memory. That returns when the kernel before it in the stream has ended and all that it wrote can be seen, as
without overlap; only then may the kernel after it be set up, too. So nothing but the setting up overlaps, of
two kernels at a time. Other kernels need not know: one of them starts when the one before it has ended, and
lets the next start when it has ended itself.

Worth it between kernels of few large programs. Not with one sequence, whose kernels have thousands of small
programs, nor is it to let the next kernel start before one's own turn, or to ask for its weights before its
turn. Each was tried on an H200; no benchmark of this repository shows it alone.

Source: "Programmatic Dependent Launch and Synchronization", CUDA C++ Programming Guide 13.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_TOKENS = range(2, 129)
"""Of a step whose kernels overlap."""


def options(device: torch.device, num_tokens: int, *, is_early: bool = True) -> dict[str, bool]:
    """Arguments of a launch, for a kernel that has the parameter OVERLAPS and calls ``await_turn``.

    Args:
        device: where it runs.
        num_tokens: of the step.
        is_early: whether it is set up early itself, or only lets the kernel after it be.
    """
    if device.type != "cuda" or num_tokens not in _TOKENS or torch.cuda.get_device_capability(device)[0] < 9:
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": is_early}


@triton.jit
def await_turn(OVERLAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the end of the kernel before, and let the next one be set up."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
