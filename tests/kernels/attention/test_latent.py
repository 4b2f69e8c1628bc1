"""Our kernels over a latent against float64: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.attention import latent, reference  # noqa: E402
from ad_flashinfer_pass.kernels.attention.latent import Config  # noqa: E402
from ad_flashinfer_pass.kernels.attention.spec import AttentionSpec  # noqa: E402
from tests.kernels.paged_batch import Features, PagedBatch, Shape  # noqa: E402

MLA = Shape(
    num_heads=6,
    num_kv_heads=1,
    head_dim=40,
    v_head_dim=32,
    page_size=16,
    dtype=torch.float16,  # the interpreter's bfloat16 dot is wrong
    is_latent=True,
)
# One program a tile and several, tiles of a part of the heads and of several tokens, blocks of a part of a
# page and of several.
LAUNCHES = [(1, Config(16, 16, 4, 2)), (3, Config(16, 16, 4, 2)), (32, Config(64, 32, 4, 2))]
DECODES = [(n - 1, 1) for n in (1, 16, 17, 40)]
CHUNKS = [(0, 12), (30, 5), (3, 2)]
FEATURES = [
    Features(),
    Features(sliding_window=12),
    Features(sliding_window=1),
    Features(chunk=9),
    Features(logit_cap=2.0, has_sinks=True),
]
Launch = tuple[int | None, Config | None]


def attend(batch: PagedBatch, features: Features, launch: Launch) -> Tensor:
    """The new tokens, appended by the reference, attended by the kernel: by decode if each has one."""
    shape, n = batch.shape, len(batch.lengths)
    table, slots = batch.prepare(batch.args["position_ids"])
    new = [tokens for _, tokens in batch.lengths]
    key = torch.cat([x[-tokens:] for x, tokens in zip(batch.key, new, strict=True)])[None]
    reference.append(key, key[..., : shape.v_head_dim], slots, batch.kv_cache, shape.k_scale, shape.k_scale)
    spec = AttentionSpec(
        features.scale,
        features.sliding_window,
        features.logit_cap,
        features.chunk,
        shape.k_scale,
        shape.k_scale,
        shape.v_head_dim,
        batch.sinks.to(DEVICE) if features.has_sinks else None,
    )
    query, pool = torch.cat(batch.query).to(DEVICE), batch.memory.to(DEVICE)[:, 0]
    lens, table = batch.args["seq_len_with_cache"][:n].to(DEVICE), table[:n].to(DEVICE)
    splits, config = launch
    if set(new) == {1}:
        return latent.decode(query, pool, lens, table, spec, splits, config=config).cpu()
    bounds = batch.args["cu_seqlen"][: n + 1].to(DEVICE)
    return latent.prefill(query, pool, bounds, lens, table, spec, splits, config=config).cpu()


def check(lengths: list[tuple[int, int]], shape: Shape, features: Features, launch: Launch) -> None:
    batch = PagedBatch(lengths, shape)
    if shape.kv_dtype is not None:  # what the pages hold is what counts; V is a view of K
        for x in batch.key:
            x.copy_((x / shape.k_scale).to(shape.kv_dtype).to(x.dtype) * shape.k_scale)
    out = attend(batch, features, launch)
    # Softmax weights and result are rounded to half precision: values are of size 1.
    wanted = torch.cat(batch.expected(features))
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("features", "launch"),
    [
        *((features, LAUNCHES[1]) for features in FEATURES),
        *((Features(), launch) for launch in LAUNCHES[::2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decode", "chunks"])
def test_equals_the_formula(lengths: list[tuple[int, int]], features: Features, launch: Launch) -> None:
    """Every feature, however many parts; nothing is read that no sequence owns."""
    check(lengths, MLA, features, launch)


@pytest.mark.parametrize("lengths", [DECODES, CHUNKS], ids=["decode", "chunks"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 20},
        {"num_heads": 1},
        {"head_dim": 32},
        {"head_dim": 24, "v_head_dim": 16},
        {"head_dim": 80, "v_head_dim": 48},
        {"page_size": 5},
        {"kv_dtype": torch.float8_e4m3fn, "k_scale": 0.25},
    ],
    ids=str,
)
def test_sizes(lengths: list[tuple[int, int]], changes: dict[str, object]) -> None:
    """Heads that fill no tile and several, no part that is not V, sizes that are no powers of two, 8 bits."""
    check(lengths, replace(MLA, **changes), Features(), (4, None))  # type: ignore[arg-type]


def test_rows_without_tokens() -> None:
    """A captured step has more rows than sequences: those without tokens are passed over."""
    batch = PagedBatch([(0, 7), (5, 3)], MLA)
    plain = attend(batch, Features(), (2, None))
    args = batch.args
    n = len(batch.lengths)
    table, _ = batch.prepare(args["position_ids"])
    bounds = torch.tensor([0, 7, 7, 10, 10], dtype=torch.int32)
    lens = torch.tensor([7, 0, 8, 0], dtype=torch.int32)
    rows = table[:n].new_zeros((4, table.shape[1]))
    rows[0], rows[2] = table[0], table[1]
    spec = AttentionSpec(0.3, v_head_dim=32)
    given = (torch.cat(batch.query), batch.kv_cache, bounds, lens, rows)
    prefill: Any = latent.prefill
    padded = prefill(*(x.to(DEVICE) for x in given), spec, 2).cpu()
    torch.testing.assert_close(padded, plain)


def test_the_tiles_fit_into_shared_memory() -> None:
    """As Triton says when it compiles for a GPU."""
    cases = [(True, 64, 512, 128), (False, 64, 512, 64)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.attention.latent_shared_memory", json.dumps(cases)],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=True,
    )
    for (is_large, rows, rank, rest), taken in zip(cases, json.loads(run.stdout), strict=True):
        config = latent.default_config(rows, rank, rest, is_large)
        assert taken <= latent.shared_bytes(config, rank, rest) <= latent.SHARED_BYTES[is_large]


def test_every_size_that_is_declared_has_tiles() -> None:
    for width in latent.CAPABILITY.head_dims or ():
        for rank in range(8, width + 1, 8):
            for rows, is_large in itertools.product((1, 32, 64), (False, True)):
                config = latent.default_config(rows, rank, width - rank, is_large)
                assert latent.shared_bytes(config, rank, width - rank) <= latent.SHARED_BYTES[is_large]
