"""FlashInfer's FA2 kernel: what no TRT-LLM kernel does, on compute capability 8.x and above.

Logit caps, prefill over an 8-bit cache, and every GPU that has no TRT-LLM kernel. It is planned on the host;
see ``fa``.
"""

from __future__ import annotations

from functools import partial

import torch

from ad_flashinfer_pass.kernels.attention import fa
from ad_flashinfer_pass.kernels.attention.capability import Capability, Since
from ad_flashinfer_pass.kernels.attention.provider import Provider

CAPABILITY = Capability(
    name="fa2",
    workspace_bytes=fa.WORKSPACE_BYTES,
    device_types=frozenset({"cuda"}),
    compute_majors=frozenset({8, 9, 10, 12}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    host_phases=frozenset({"prefill"}),
    kv_dtypes=dict.fromkeys(("prefill", "decode"), frozenset({torch.float8_e4m3fn})),
    head_dims=frozenset({64, 128, 256}),
    chunk=False,
    sinks=False,
    alibi=False,
    mixed_head_dims=False,
    modules=partial(fa.modules, "fa2"),
    since=(
        # Before, partial results took the group's size as often as they need, which is beyond our workspace.
        Since(
            "0.7.1",
            "plans for so many query heads a KV head",
            lambda site, compute_major: site.num_heads // site.num_kv_heads * site.head_dim > 2048,
        ),
    ),
    run_on=frozenset({90}),
)
prefill = partial(fa.prefill, "fa2")
decode = partial(fa.decode, "fa2")
PROVIDER = Provider(capability=CAPABILITY, prefill=prefill, decode=decode, is_timed=False)
