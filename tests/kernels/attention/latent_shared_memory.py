"""Prints a JSON list: bytes of shared memory that the latent decode kernel takes, by Triton's compiler.

    python -m tests.kernels.attention.latent_shared_memory '[[is_large, rows, rank, rest], ...]'

In a process of its own: where kernels are interpreted, they cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from ad_flashinfer_pass.kernels.attention.latent import default_config
from ad_flashinfer_pass.kernels.attention.latent_kernel import attend
from ad_flashinfer_pass.kernels.attention.latent_prefill import block_of


def shared_memory(is_large: bool, rows: int, rank: int, rest: int) -> int:
    """Of so many rows that read the same keys, in bfloat16, on capability 9.0, which is large, or 12.0."""
    config = default_config(rows, rank, rest, is_large)
    blocks = {"RANK_BLOCK": block_of(rank), "REST_BLOCK": block_of(rest), "BLOCK": config.block, "PAGE": 32}
    sizes = {"HEADS": 128, "ROWS": config.rows, "RANK": rank, "REST": rest, **blocks, "SEQS": 0, "LEVELS": 0}
    given: dict[str, Any] = {**sizes, "ONE_BYTE": False}
    given |= dict.fromkeys(("cu_seqlen", "sinks", "tiles", "WINDOW", "CHUNK", "CAP"))
    pointers = dict.fromkeys(("query", "kv_cache", "out"), "*bf16")
    pointers |= dict.fromkeys(("sums_of_parts", "stats_of_parts"), "*fp32")
    types = {**pointers, "lengths": "*i32", "block_table": "*i32", "scale": "fp32", "v_scale": "fp32"}
    names = attend.arg_names
    source = ASTSource(
        attend,
        {name: "constexpr" if name in given else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in given.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "cache_page", "cache_slot")},
    )
    target = GPUTarget("cuda", 90 if is_large else 120, 32)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return int(compile(source, target=target, options=options).metadata.shared)


if __name__ == "__main__":
    print(json.dumps([shared_memory(*case) for case in json.loads(sys.argv[1])]))
