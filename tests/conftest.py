"""What must be set before any test imports Triton."""

from __future__ import annotations

import os

import torch

# Read when Triton is imported, for its own functions, and when one of our kernels is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
