"""The fused rotation and append: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels.attention import reference  # noqa: E402
from ad_flashinfer_pass.kernels.cache import prepare_ragged_metadata, rope_append  # noqa: E402

PAGE, POISON = 8, 7.0


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def angles(positions: Tensor, rotary_dim: int) -> Tensor:
    """Of each pair, [tokens, rotary_dim // 2]."""
    inverse = 10000.0 ** (-torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim)
    return positions[:, None] * inverse


def pool(pages: int, heads: int, width: int, dtype: torch.dtype = torch.float32, layers: int = 3) -> Tensor:
    """The middle layer of a pool of several, which holds POISON."""
    shape = (pages, layers, 2, heads, PAGE, width)
    return torch.full(shape, POISON, device=DEVICE).to(dtype)[:, layers // 2]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 80), (32, 8, 32), (2, 2, 24)])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotation_is_that_of_transformers(
    heads: int, kv_heads: int, head_dim: int, partial: float, interleaved: bool
) -> None:
    """Q as returned and K as cached equal Llama's and GPT-J's rotation; V and what is not rotated stay."""
    rotary_dim = int(head_dim * partial)
    q, k = normal(1, 5, heads, head_dim), normal(1, 5, kv_heads, head_dim, seed=1)
    v = normal(1, 5, kv_heads, head_dim, seed=2)
    positions = torch.tensor([3, 0, 11, 900, 4], device=DEVICE)
    slots = torch.tensor([9, 8, 39, 16, 17], device=DEVICE)
    theta = angles(positions, rotary_dim)

    def expected(x: Tensor) -> Tensor:
        part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if interleaved:
            part = rotate_interleaved(part, theta.sin()[None], theta.cos()[None])
        else:
            table = torch.cat((theta, theta), -1)[None]
            part, _ = rotate_halves(part, part, table.cos(), table.sin(), unsqueeze_dim=2)
        return torch.cat((part, rest), -1)

    cache = pool(5, kv_heads, head_dim)
    got = rope_append.rope_append(q, k, v, cache, slots, theta.cos(), theta.sin(), interleaved=interleaved)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected(q))
    written = cache.transpose(2, 3)[slots // PAGE, :, slots % PAGE]
    torch.testing.assert_close(written[:, 0], expected(k)[0])
    assert torch.equal(written[:, 1], v[0])
    written.fill_(POISON)
    cache.transpose(2, 3)[slots // PAGE, :, slots % PAGE] = written
    assert bool((cache == POISON).all()), "a slot that is no token's was written"
    torch.testing.assert_close(reference.rotate(q[0], theta.cos(), theta.sin(), interleaved), expected(q)[0])


def test_strided_inputs_and_both_ways_to_give_angles() -> None:
    """Views of one fused projection and of a repeated table by position, against rows by token."""
    fused = normal(2, 3, 8, 16)
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    positions = torch.tensor([5, 6, 7, 0, 1, 2], dtype=torch.int32, device=DEVICE)
    slots = torch.arange(8, 14, device=DEVICE)
    theta = angles(positions, 16)
    table = angles(torch.arange(10, device=DEVICE), 16).repeat(1, 2)
    caches = pool(3, 2, 16), pool(3, 2, 16)
    one = rope_append.rope_append(
        q.contiguous(), k.contiguous(), v.contiguous(), caches[0], slots, theta.cos(), theta.sin()
    )
    two = rope_append.rope_append(
        q, k, v, caches[1], slots, table.cos()[:, :8], table.sin()[:, :8], positions
    )
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(caches[0], caches[1])


def test_slots_by_block_table_and_padding() -> None:
    """Slots that count from the start of a sequence; padding is rotated but written nowhere."""
    q, k, v = normal(1, 5, 2, 16), normal(1, 5, 1, 16, seed=1), normal(1, 5, 1, 16, seed=2)
    table = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0, 0, 1, 1, 99], dtype=torch.int32, device=DEVICE)
    within = torch.tensor([7, 8, 0, 1, -1], dtype=torch.int32, device=DEVICE)
    theta = angles(torch.arange(5, device=DEVICE), 16)
    by_table, by_slot = pool(4, 1, 16), pool(4, 1, 16)
    got = rope_append.rope_append(
        q, k, v, by_table, within, theta.cos(), theta.sin(), block_table=table, table_rows=rows
    )
    slots = torch.tensor([3 * PAGE + 7, PAGE, 2 * PAGE, 2 * PAGE + 1, -1], device=DEVICE)
    assert torch.equal(got, rope_append.rope_append(q, k, v, by_slot, slots, theta.cos(), theta.sin()))
    assert torch.equal(by_table, by_slot)
    assert bool((by_slot[0] == POISON).all()), "padding was written"
    plain = pool(4, 1, 16)
    rope_append.append(k, v, plain, within, block_table=table, table_rows=rows)
    assert torch.equal(plain[3, 0, 0, 7], k[0, 0, 0])
    assert torch.equal(plain[1, 1, 0, 0], v[0, 1, 0])
    assert bool((plain[0] == POISON).all())


@pytest.mark.parametrize("rotary_dim", [24, 12])
def test_heads_are_normed_before(rotary_dim: int) -> None:
    q, k, v = normal(1, 3, 5, 24), normal(1, 3, 2, 24, seed=1), normal(1, 3, 2, 24, seed=2)
    slots, theta = torch.tensor([9, 8, 39], device=DEVICE), angles(torch.arange(3, device=DEVICE), rotary_dim)
    weights = normal(24, seed=3), normal(24, seed=4)
    caches = pool(5, 2, 24), pool(5, 2, 24)
    table = theta.cos(), theta.sin()
    got = rope_append.rope_append(q, k, v, caches[0], slots, *table, norms=(*weights, 1e-6))
    q, k = (torch.nn.functional.rms_norm(x, (24,), w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    torch.testing.assert_close(got, rope_append.rope_append(q, k, v, caches[1], slots, *table))
    torch.testing.assert_close(*caches)


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rope"])
def test_what_is_behind_the_last_token_of_a_page_is_cleared(rotated: bool) -> None:
    """Of the tokens asked for only, in their own page only: later reads may multiply it by zero."""
    q, k = normal(1, 6, 2, 16), normal(1, 6, 1, 16, seed=1) + 3
    table = torch.tensor([[3, 1, 1], [2, 2, 2], [4, 4, 4]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([0, 0, 0, 1, 1, 2], dtype=torch.int32, device=DEVICE)
    within = torch.tensor([6, 7, 8, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    cache = pool(5, 1, 16)
    still = torch.zeros(6, 8, device=DEVICE)
    options: Any = {"block_table": table, "table_rows": rows, "clear_before": 5}
    if rotated:
        rope_append.rope_append(q, k, k, cache, within, still + 1, still, **options)
    else:
        rope_append.append(k, k, cache, within, **options)
    slots = cache.transpose(2, 3)[..., 0, :]  # [pages, 2, slots, elements]
    assert bool((slots[1, :, 1:] == 0).all()), "behind token 8 of the first sequence"
    assert bool((slots[2, :, 2:] == 0).all()), "behind token 1 of the second"
    assert bool((slots[3, :, :6] == POISON).all())
    assert bool((slots[4, :, 4:] == POISON).all()), "a decode clears nothing"
    assert bool((slots[0] == POISON).all())
    written = [(3, 6), (3, 7), (1, 0), (2, 0), (2, 1), (4, 3)]
    for token, (page, slot) in enumerate(written):
        torch.testing.assert_close(slots[page, :, slot], k[0, token].expand(2, -1))


def test_8_bit_cache_divides_by_its_scales_and_clamps() -> None:
    """K and V have scales of their own, and what 8 bits cannot hold becomes the largest number they can."""
    k = torch.tensor([1e4, -1e4, 3.0, 8.0], device=DEVICE).view(1, 1, 1, 4)
    cache = pool(2, 1, 4, torch.float8_e4m3fn, 1)
    slots, still = torch.tensor([8], device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    rope_append.rope_append(k, k, k, cache, slots, still + 1, still, k_scale=2.0, v_scale=0.5)
    assert cache[1, 0, 0, 0].tolist() == [448.0, -448.0, 1.5, 4.0]
    assert cache[1, 1, 0, 0].tolist() == [448.0, -448.0, 6.0, 16.0]


def test_what_does_not_fit_is_refused() -> None:
    """A table that repeats its angles, and a block table without rows."""
    x, cache, slots = normal(1, 1, 1, 16), pool(2, 1, 16), torch.tensor([8], device=DEVICE)
    table = torch.ones(1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="one element a pair"):
        rope_append.rope_append(x, x, x, cache, slots, table, table)
    with pytest.raises(ValueError, match="come together"):
        rope_append.append(x, x, cache, slots, block_table=torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    "lengths", [[(0, 1)], [(0, 17)], [(3, 1), (15, 1), (16, 1)], [(0, 5), (0, 16), (7, 2), (4, 1)]], ids=str
)
def test_ragged_metadata_is_that_of_the_reference(lengths: list[tuple[int, int]]) -> None:
    """Table, rows and positions are equal, whatever lies behind the lengths of the inputs."""
    draw = torch.Generator().manual_seed(0)

    def filled(values: list[int], size: int) -> Tensor:
        tail = torch.randint(0, 30, (size - len(values),), generator=draw).tolist()
        return torch.tensor([*values, *tail], dtype=torch.int32, device=DEVICE)

    new = [n for _, n in lengths]
    pages = [
        [int(p) for p in torch.randint(0, 90, (-(-(a + n) // PAGE),), generator=draw)] for a, n in lengths
    ]
    inputs = (
        filled([sum(new[:i]) for i in range(len(new) + 1)], 7),
        filled([a + n for a, n in lengths], 6),
        filled([page for one in pages for page in one], 40),
        filled([sum(map(len, pages[:i])) for i in range(len(pages) + 1)], 7),
    )
    num_tokens = sum(new)
    results = []
    for prepare in (prepare_ragged_metadata.prepare, reference.prepare_ragged_metadata):
        table = torch.full((6, 5), 77, dtype=torch.int32, device=DEVICE)
        rows, positions = (torch.full((64,), 77, dtype=torch.int32, device=DEVICE) for _ in range(2))
        prepare(len(lengths), *inputs, table, rows, positions)
        results.append((table, rows, positions))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    table, rows, positions = results[0]
    assert positions[:num_tokens].tolist() == [p for a, n in lengths for p in range(a, a + n)]
    assert rows[:num_tokens].tolist() == [i for i, n in enumerate(new) for _ in range(n)]
    for row, one in zip(table.tolist(), [*pages, *[[]] * (6 - len(pages))], strict=True):
        assert row == one + [one[-1] if one else 0] * (5 - len(one)), "behind the last page stands that page"
