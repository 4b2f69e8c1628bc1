"""Where the kernels of an op are launched."""

from __future__ import annotations

import torch
from torch import Tensor


def launching(device: torch.device, **inputs: Tensor) -> torch.cuda.device:
    """Make a CUDA device the current one, which is where Triton and FlashInfer launch their kernels.

    Args:
        device: of the op.
        inputs: its tensors by name. A kernel would get their addresses alone, and one of another GPU's memory
            ends the process's use of the GPU.

    Raises:
        ValueError: an input is on another device.
    """
    for name, tensor in inputs.items():
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, other inputs of this op on {device}: move it there."
            )
    return torch.cuda.device(device)
