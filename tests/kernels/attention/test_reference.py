"""The reference kernels against torch's dense attention in float64, and the pool they write."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.runtime.sequence_info import BatchInfo
from tests.kernels.paged_batch import POISON, Features, PagedBatch, Shape

# float32: sums of a few hundred products. 16 bits: the probabilities may be rounded too, on values of up
# to 4, so a few units in the last place.
BOUNDS = {
    torch.float32: 1e-5,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
FEATURES = {
    "plain": Features(),
    "window_within_a_page": Features(sliding_window=3),
    "window_over_pages": Features(sliding_window=7),
    "window_of_one": Features(sliding_window=1),
    "chunk": Features(chunk=4),
    "logit_cap": Features(logit_cap=1.5, scale=1.0),
    "sinks": Features(has_sinks=True),
    "alibi": Features(has_alibi=True),
    "all": Features(sliding_window=7, chunk=11, logit_cap=1.5, has_sinks=True, has_alibi=True),
}


def mixed_lengths(page_size: int) -> list[tuple[int, int]]:
    """(past, new): mid-page, at a page edge and one past it, for prefill, extend and decode."""
    p = page_size
    prefill = [(0, 2), (0, max(2, p)), (0, p + 1), (0, 2 * p + 3)]
    extend = [(p, 2), (max(1, p - 1), 2), (p + 1, 2 * p + 2), (2 * p, p + 1)]
    decode = [(0, 1), (p - 1, 1), (p, 1), (2 * p + 1, 1)]
    return prefill + extend + decode


def check(batch: PagedBatch, features: Features) -> None:
    bound = BOUNDS[batch.shape.dtype]
    for index, (found, wanted) in enumerate(zip(batch.run(features), batch.expected(features), strict=True)):
        torch.testing.assert_close(
            found.double(),
            wanted,
            atol=bound,
            rtol=bound,
            msg=f"(past, new) = {batch.lengths[index]}: {{}}".format,
        )


@pytest.mark.parametrize("page_size", [1, 5, 16, 64], ids="page_size_{}".format)
@pytest.mark.parametrize("heads", HEADS)
def test_mixed_batch_equals_dense_attention(heads: str, page_size: int) -> None:
    """Prefill, extend and decode in one call, on shuffled pages, give what dense attention gives."""
    num_heads, num_kv_heads = HEADS[heads]
    shape = Shape(num_heads=num_heads, num_kv_heads=num_kv_heads, page_size=page_size)
    check(PagedBatch(mixed_lengths(page_size), shape), Features())


@pytest.mark.parametrize("features", FEATURES)
def test_features_equal_the_formula(features: str) -> None:
    """Window, chunk, cap, sinks and slopes do what their formulas say, in every phase."""
    check(PagedBatch(mixed_lengths(5), Shape()), FEATURES[features])


@pytest.mark.parametrize("features", ["plain", "window_over_pages", "all"])
def test_neighbours_of_equal_lengths(features: str) -> None:
    """Each is attended by itself, whether or not they are computed together."""
    lengths = [(0, 6), (0, 6), (0, 6), (0, 5), (0, 6), (9, 4), (9, 4), (10, 3), (10, 3)]
    check(PagedBatch(lengths, Shape()), FEATURES[features])


@pytest.mark.parametrize(
    "lengths",
    [[(0, 6)], [(0, 5), (0, 12)], [(9, 11)], [(3, 2), (10, 7)], [(9, 1)], [(0, 1), (4, 1), (5, 1), (30, 1)]],
    ids=["prefill", "two_prefills", "extend", "two_extends", "decode", "four_decodes"],
)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_each_phase_alone(lengths: list[tuple[int, int]], features: str) -> None:
    """A step of one phase needs nothing from the others; a decode step has the shape [b, 1]."""
    check(PagedBatch(lengths, Shape()), FEATURES[features])


@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes(dtype: torch.dtype, features: str) -> None:
    """16-bit inputs cost a few units of their own precision, no more: logits and softmax are float32."""
    check(PagedBatch(mixed_lengths(5), Shape(dtype=dtype)), FEATURES[features])


def test_a_cache_of_another_dtype_only_rounds_k_and_v() -> None:
    """With a bfloat16 cache under a float32 model the result is that of rounded K and V."""
    batch = PagedBatch(mixed_lengths(5), Shape(kv_dtype=torch.bfloat16))
    batch.key = [key.bfloat16().float() for key in batch.key]
    batch.value = [value.bfloat16().float() for value in batch.value]
    check(batch, Features())


@pytest.mark.parametrize("features", ["plain", "all"])
@pytest.mark.parametrize(("k_scale", "v_scale"), [(1.0, 1.0), (0.0078125, 2.5)])
def test_an_8_bit_cache_only_rounds_k_and_v(k_scale: float, v_scale: float, features: str) -> None:
    """The result is that of K and V rounded to 8 bits after division by their scales, which may differ."""
    fp8 = torch.float8_e4m3fn
    batch = PagedBatch(mixed_lengths(5), Shape(kv_dtype=fp8, k_scale=k_scale, v_scale=v_scale))
    batch.key = [(key / k_scale).clamp(-448, 448).to(fp8).float() * k_scale for key in batch.key]
    batch.value = [(value / v_scale).to(fp8).float() * v_scale for value in batch.value]
    check(batch, FEATURES[features])


def test_append_saturates_in_8_bits() -> None:
    """Beyond 448 units of the scale lies 448, not NaN; NaN itself is kept, so that it is seen."""
    values = torch.tensor([1e4, -1e4, 449.0, 1.0, float("inf"), float("nan")])
    key = values.view(1, 1, 1, 6)
    cache = torch.zeros(2, 2, 1, 4, 6).to(torch.float8_e4m3fn)
    ops.append_kv(key, key, torch.tensor([4]), cache, 1.0, 0.5)
    ops.append_kv(key.bfloat16(), key.bfloat16(), torch.tensor([5]), cache, 1.0, 0.5)
    for slot in (0, 1):
        assert cache[1, 0, 0, slot, :5].tolist() == [448.0, -448.0, 448.0, 1.0, 448.0]
        assert cache[1, 1, 0, slot, :5].tolist() == [448.0, -448.0, 448.0, 2.0, 448.0]
        assert cache[1, :, 0, slot, 5].isnan().all()


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(16, 8), (8, 16)], ids=["v_narrower", "v_wider"])
@pytest.mark.parametrize("features", ["plain", "all"])
def test_value_heads_of_another_size(head_dim: int, v_head_dim: int, features: str) -> None:
    """The narrower of K and V is neither padded with what lies beside it nor cut."""
    shape = Shape(head_dim=head_dim, v_head_dim=v_head_dim)
    check(PagedBatch(mixed_lengths(5), shape), FEATURES[features])


@pytest.mark.parametrize("features", ["plain", "all"])
def test_strided_pool(features: str) -> None:
    """A pool whose pages alternate with other layers' is read and written by its strides."""
    batch = PagedBatch(mixed_lengths(5), Shape(layers_between_pages=3))
    assert not batch.kv_cache.is_contiguous()
    check(batch, FEATURES[features])
    assert torch.all(batch.memory[:, [0, 2]] == POISON), "another layer's pages were written"


def test_only_the_new_slots_are_written() -> None:
    """A step writes the slots of its new tokens and leaves every other byte of the pool alone."""
    batch = PagedBatch(mixed_lengths(5), Shape())
    before = batch.kv_cache.clone()
    batch.run(Features())
    expected = before
    for index, (past, new) in enumerate(batch.lengths):
        for position in range(past, past + new):
            page, offset = batch.slot(index, position)
            expected[page, 0, :, offset] = batch.key[index][position]
            expected[page, 1, :, offset] = batch.value[index][position]
    assert torch.equal(batch.kv_cache, expected)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_append_writes_exactly_its_slots(data: st.DataObject) -> None:
    """For any slots, head sizes and strides, K and V land in their slots and nothing else changes."""
    page_size = data.draw(st.sampled_from([1, 3, 16]), "page_size")
    head_dim, v_head_dim = data.draw(st.sampled_from([(4, 4), (4, 2), (2, 4)]), "head sizes")
    num_pages, heads = 4, 2
    slots = data.draw(
        st.lists(st.integers(0, num_pages * page_size - 1), min_size=1, max_size=6, unique=True), "slots"
    )
    memory = torch.randn(num_pages, data.draw(st.sampled_from([1, 2]), "layers"), 2, heads, page_size, 4)
    kv_cache, expected = memory[:, -1], memory.clone()
    # Projections come as transposed views, so K and V are given with the strides of [b, heads, s, d].
    key, value = (torch.randn(1, heads, len(slots), dim).transpose(1, 2) for dim in (head_dim, v_head_dim))
    ops.append_kv(key, value, torch.tensor(slots), kv_cache)
    for token, slot in enumerate(slots):
        page, offset = divmod(slot, page_size)
        expected[page, -1, 0, :, offset, :head_dim] = key[0, token]
        expected[page, -1, 1, :, offset, :v_head_dim] = value[0, token]
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("lengths", [[(0, 3), (4, 2), (6, 1)], [(4, 1), (6, 1)]], ids=["mixed", "decode"])
def test_padding_tokens_touch_only_the_scratch_page(lengths: list[tuple[int, int]]) -> None:
    """Tokens past those of the batch are written to page 0, read nothing and give zeros."""
    batch = PagedBatch(lengths, Shape())
    total = sum(new for _, new in lengths)
    padded = torch.zeros(1, total + 3, dtype=torch.int64)
    block_table, slots = batch.prepare(padded)
    assert slots[total:].tolist() == [0, 0, 0]
    tokens = torch.randn(1, total + 3, 4, 16)
    before = batch.kv_cache.clone()
    ops.append_kv(tokens[:, :, :2], tokens[:, :, 2:], slots, batch.kv_cache)
    owned = {page for pages in batch.pages for page in pages}
    others = [page for page in range(1, len(before)) if page not in owned]
    assert torch.equal(batch.kv_cache[others], before[others])
    args = batch.args
    out = ops.cached_attention(
        tokens,
        batch.kv_cache,
        args["batch_info_host"],
        args["cu_seqlen"],
        args["seq_len_with_cache"],
        block_table,
        0.3,
        16,
    )
    assert torch.all(out[:, total:] == 0)
    assert torch.all(out[:, :total] != 0)


sequences = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=5
)  # (past, new tokens)


@given(
    lengths=sequences,
    page_size=st.sampled_from([1, 2, 5, 16]),
    padding=st.integers(0, 3),
    spare=st.sampled_from([0, 9]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_prepare_metadata_equals_a_plain_loop(
    lengths: list[tuple[int, int]], page_size: int, padding: int, spare: int, seed: int
) -> None:
    """Block table and slots are those of a loop over tokens; stale entries are not read."""
    max_batch_size, max_blocks = 6, 24
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-(past + new) // page_size) for past, new in lengths]
    ids = (torch.randperm(sum(num_pages), generator=generator) + 1).tolist()
    ends = [sum(num_pages[:i]) for i in range(len(lengths) + 1)]
    owned = [ids[start:end] for start, end in pairwise(ends)]
    cu_seqlen = [sum(new for _, new in lengths[:i]) for i in range(len(lengths) + 1)]

    stale = 2**30  # a page or a length that no pool has

    def filled(values: list[int], size: int) -> Tensor:
        return torch.tensor(values + [stale] * (size - len(values)), dtype=torch.int32)

    block_table, slot_mapping = ops.prepare_metadata(
        torch.zeros(1, cu_seqlen[-1] + padding, dtype=torch.int64),
        torch.tensor(BatchInfo(0, 0, len(lengths), cu_seqlen[-1], *[0] * 8), dtype=torch.int32),
        filled(cu_seqlen, max_batch_size + 1),
        filled([past for past, _ in lengths], max_batch_size),
        filled(ids, len(ids) + spare),
        filled(ends, max_batch_size + 1),
        max_blocks,
        page_size,
    )
    expected_table = torch.zeros(max_batch_size, max_blocks, dtype=torch.int32)
    expected_slots = []
    for row, ((past, new), pages) in enumerate(zip(lengths, owned, strict=True)):
        expected_table[row, : len(pages)] = torch.tensor(pages)
        for position in range(past, past + new):
            expected_slots.append(pages[position // page_size] * page_size + position % page_size)
    torch.testing.assert_close(block_table, expected_table, rtol=0, atol=0)
    expected = torch.tensor([*expected_slots, *[0] * padding], dtype=torch.int64)
    torch.testing.assert_close(slot_mapping, expected, rtol=0, atol=0)


def test_short_extends_may_go_to_the_decode_kernel() -> None:
    """With a bound on their length extends are taken apart from prefills, and give the same."""
    results = []
    for max_extend_len in (0, 4):
        batch = PagedBatch([(0, 7), (0, 3), (6, 4), (11, 2), (5, 3), (9, 1)], Shape())
        results.append(torch.cat(batch.run(Features(), max_extend_len=max_extend_len)))
    torch.testing.assert_close(*results)
