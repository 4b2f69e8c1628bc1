"""FlashInfer's FA3 kernel: prefill that FMHA v2 cannot do, on compute capability 9.x.

Logit caps, float16 and other page sizes. It is planned on the host; see ``fa``. A module takes about twelve
processor minutes, so it is chosen only where that is built. It does not decode: it neither splits the keys
of a sequence among thread blocks nor shares them among the query heads of a group, so that FA2 is faster.

Source: FlashInfer 0.7.2, include/flashinfer/attention/scheduler.cuh, PrefillSM90Plan.
"""

from __future__ import annotations

from functools import partial

import torch

from ad_flashinfer_pass.kernels.attention import fa
from ad_flashinfer_pass.kernels.attention.capability import Capability
from ad_flashinfer_pass.kernels.attention.provider import Provider

CAPABILITY = Capability(
    name="fa3",
    workspace_bytes=fa.WORKSPACE_BYTES,
    phases=frozenset({"prefill"}),
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({9}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    host_phases=frozenset({"prefill"}),
    kv_dtypes={},
    head_dims=frozenset({64, 128, 256}),
    chunk=False,
    sinks=False,
    alibi=False,
    mixed_head_dims=False,
    modules=partial(fa.modules, "fa3"),
    run_on=frozenset({90}),
    compiles=False,
)
prefill = partial(fa.prefill, "fa3")
PROVIDER = Provider(capability=CAPABILITY, prefill=prefill)
