"""What must be set before any test runs, or imports Triton."""

from __future__ import annotations

import os
from functools import wraps

import torch

from ad_flashinfer_pass import config

# Read when Triton is imported, for its own functions, and when one of our kernels is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Where there is a GPU, the tests of it say so.
config._default_device = wraps(config._default_device)(lambda: "cpu")
