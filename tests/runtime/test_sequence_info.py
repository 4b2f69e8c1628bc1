"""``SequenceInfo``: every tensor against the formula in the module's table, and every refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_flashinfer_pass.runtime.sequence_info import (
    METADATA_ARGS,
    BatchInfo,
    RowParams,
    SequenceInfo,
    SequenceStep,
)

PAGE, MAX_SEQ_LEN, MAX_BATCH, MAX_TOKENS = 4, 20, 5, 48


def make_info() -> SequenceInfo:
    return SequenceInfo(MAX_SEQ_LEN, MAX_BATCH, MAX_TOKENS, PAGE, torch.device("cpu"))


def step(past: int, new: int, gather: bool = True, first_page: int = 1) -> SequenceStep:
    num_pages = -(-(past + new) // PAGE)
    return SequenceStep(range(100, 100 + new), past, range(first_page, first_page + num_pages), gather)


def kind(sequence: SequenceStep) -> int:
    """Place in the order prefill, extend, decode."""
    if len(sequence.token_ids) == 1:
        return 2
    return 0 if sequence.input_pos == 0 else 1


@st.composite
def batches(draw: st.DrawFn) -> list[SequenceStep]:
    """Sequences that fit ``make_info``, in order."""
    sequences = []
    for _ in range(draw(st.integers(1, MAX_BATCH))):
        past = draw(st.integers(0, 12))
        new = draw(st.integers(1, min(8, MAX_SEQ_LEN - past)))
        ids = draw(st.lists(st.integers(0, 9), min_size=new, max_size=new))
        num_pages = -(-(past + new) // PAGE)
        pages = draw(st.lists(st.integers(1, 99), min_size=num_pages, max_size=num_pages))
        sequences.append(SequenceStep(ids, past, pages, draw(st.booleans())))
    return sorted(sequences, key=kind)


@given(first=batches(), second=batches())
@settings(max_examples=60, deadline=None)
def test_tensors_equal_their_formulas(first: list[SequenceStep], second: list[SequenceStep]) -> None:
    """Each tensor holds what the table says for this step, whatever the step before left in it."""
    info = make_info()
    info.nest_sequences(first)
    info.nest_sequences(second)
    args = info.named_args()
    n = len(second)
    lens = [len(s.token_ids) for s in second]
    ends = [sum(lens[: i + 1]) for i in range(n)]
    num_pages = [len(s.pages) for s in second]
    positions = [s.input_pos + i for s in second for i in range(len(s.token_ids))]
    assert args["input_ids"].flatten().tolist() == [t for s in second for t in s.token_ids]
    assert args["position_ids"].flatten().tolist() == positions
    assert args["cu_seqlen"][: n + 1].tolist() == [0, *ends]
    assert args["input_pos"][:n].tolist() == [s.input_pos for s in second]
    assert args["seq_len_with_cache"][:n].tolist() == [
        s.input_pos + k for s, k in zip(second, lens, strict=True)
    ]
    assert args["cache_loc"][: sum(num_pages)].tolist() == [p for s in second for p in s.pages]
    assert args["cu_num_pages"][: n + 1].tolist() == [sum(num_pages[:i]) for i in range(n + 1)]
    gather = [end - 1 for s, end in zip(second, ends, strict=True) if s.gather]
    assert args["token_gather_indices"].tolist() == gather
    counts = [
        sum(value for s, value in zip(second, values, strict=True) if kind(s) == k)
        for k in range(3)
        for values in ([1] * n, lens)
    ]
    batch_info = BatchInfo(*args["batch_info_host"].tolist())
    assert list(batch_info[:6]) == counts
    assert batch_info.num_tokens_to_gather == len(gather)
    assert batch_info.max_blocks_per_seq == MAX_SEQ_LEN // PAGE
    assert batch_info.max_context_length == MAX_SEQ_LEN
    assert batch_info.max_batch_size == MAX_BATCH


@given(sequences=batches())
@settings(max_examples=30, deadline=None)
def test_tokens_are_a_column_only_if_every_sequence_decodes(sequences: list[SequenceStep]) -> None:
    """A decode step is [b, 1], any other is [1, total]."""
    info = make_info()
    info.nest_sequences(sequences)
    total = sum(len(s.token_ids) for s in sequences)
    shape = (total, 1) if all(kind(s) == 2 for s in sequences) else (1, total)
    assert info.named_args()["input_ids"].shape == shape
    assert info.named_args()["position_ids"].shape == shape


def test_dtypes_and_capacities_follow_the_table() -> None:
    """Metadata is int32 at full capacity; ids, positions and gather rows are int64."""
    info = make_info()
    info.nest_sequences([step(0, 3)])
    args = info.named_args()
    sizes = {name: tuple(args[name].shape) for name in METADATA_ARGS}
    assert sizes == {
        "batch_info_host": (12,),
        "cu_seqlen": (info.max_rows + 1,),
        "input_pos": (info.max_rows,),
        "seq_len_with_cache": (info.max_rows,),
        "cache_loc": (MAX_BATCH * MAX_SEQ_LEN // PAGE + 1,),
        "cu_num_pages": (info.max_rows + 1,),
    }
    assert all(args[name].dtype == torch.int32 for name in METADATA_ARGS)
    rest = set(args) - set(METADATA_ARGS)
    assert rest == {"input_ids", "position_ids", "token_gather_indices"}
    assert all(args[name].dtype == torch.int64 for name in rest)


def test_addresses_are_the_same_at_every_step() -> None:
    """Steps write in place: a captured graph may bake the addresses."""
    info = make_info()
    info.nest_sequences([step(0, 5), step(3, 1)])
    first = {name: tensor.data_ptr() for name, tensor in info.named_args().items()}
    info.nest_sequences([step(6, 1), step(9, 1), step(1, 1)])
    assert {name: tensor.data_ptr() for name, tensor in info.named_args().items()} == first


def test_of_each_row_the_first_eight_stop_tokens_are_written() -> None:
    """Rows have any number of them; -1 stands for none."""
    info = make_info()
    stops = [[], range(10, 20), [5, 6]]
    info.nest_sequences([step(0, 2), step(3, 1), step(4, 1)], row_params=[RowParams(stop) for stop in stops])
    expected = [[-1] * 8, list(range(10, 18)), [5, 6] + [-1] * 6]
    assert info.views["stop_token_ids"][:3].tolist() == expected


def test_a_last_page_may_be_partial() -> None:
    """The width of the block table is max_seq_len in pages, rounded up."""
    assert SequenceInfo(9, 1, 9, 4, torch.device("cpu")).max_blocks_per_seq == 3


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "a step must hold at least one sequence, each with at least one token"),
        ([step(0, 3), SequenceStep([], 4, [1])], "each with at least one token"),
        (
            [step(0, 1)] * (MAX_BATCH + 1),
            "at most max_batch_size=5 sequences and max_num_tokens=48 tokens, got 6 and 6",
        ),
        ([step(0, 20)] * 3, "max_num_tokens=48 tokens, got 3 and 60"),
        ([step(3, 1), step(0, 3)], "sequences must be ordered prefill, extend, decode"),
        ([step(3, 2), step(0, 3)], "sequences must be ordered prefill, extend, decode"),
        ([step(19, 2)], "sequence 0: positions 19..20 must lie within max_seq_len=20"),
        ([step(0, 2), SequenceStep([1], -1, [1])], r"sequence 1: positions -1..-1 must lie within"),
        (
            [SequenceStep([1], 4, [7])],
            r"sequence 0: 5 tokens need 2 pages or more, up to 5, other than page 0, got \[7\]",
        ),
        ([SequenceStep([1], 3, range(1, 7))], "4 tokens need 1 pages or more, up to 5, other than page 0"),
        ([SequenceStep([1], 4, [7, 0])], r"5 tokens need 2 pages or more, .* got \[7, 0\]"),
    ],
    ids=[
        "empty",
        "no_tokens",
        "too_many_sequences",
        "too_many_tokens",
        "decode_before_prefill",
        "extend_before_prefill",
        "too_long",
        "negative_position",
        "too_few_pages",
        "too_many_pages",
        "scratch_page",
    ],
)
def test_a_bad_step_is_refused_before_anything_is_written(
    sequences: list[SequenceStep], message: str
) -> None:
    """A step that does not fit raises, and the metadata of the step before stands unchanged."""
    info = make_info()
    info.nest_sequences([step(0, 5), step(3, 1)])
    before = {name: tensor.clone() for name, tensor in info.named_args().items()}
    with pytest.raises(ValueError, match=message):
        info.nest_sequences(sequences)
    after = info.named_args()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
