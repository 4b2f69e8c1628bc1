"""Our Triton kernels against the reference: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton", reason="triton is not installed")

from ad_flashinfer_pass.kernels import drafts as drafts_kernel  # noqa: E402
from ad_flashinfer_pass.kernels import sampling  # noqa: E402
from ad_flashinfer_pass.kernels.attention import reference  # noqa: E402
from ad_flashinfer_pass.kernels.cache import append, clear, prepare_metadata  # noqa: E402
from ad_flashinfer_pass.runtime.drafts.ngram import LEAST, MOST, guess  # noqa: E402
from ad_flashinfer_pass.runtime.sampling import Sampler, SamplingParams, most_likely  # noqa: E402
from ad_flashinfer_pass.runtime.sequence_info import Bucket, RowParams, SequenceInfo, SequenceStep  # noqa: E402

INPUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CACHE_DTYPES = [*INPUT_DTYPES, torch.float8_e4m3fn]
# Exact in every dtype: Triton's interpreter does not round to nearest, as a GPU does.
EXACT = torch.tensor([-448.0, -3.5, -1.25, -0.5, 0.0, 0.25, 1.0, 1.75, 6.0, 448.0])
POISON = 7.0


def exact(*sizes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(EXACT), sizes, generator=generator)
    return EXACT[index].to(dtype).to(DEVICE)


def pool(num_pages: int, heads: int, page: int, width: int, dtype: torch.dtype, layers: int) -> Tensor:
    """A pool that holds POISON; with several layers a strided view of a larger one."""
    memory = torch.full((num_pages, layers, 2, heads, page, width), POISON, device=DEVICE).to(dtype)
    return memory[:, layers // 2]


def test_clear_zeroes_some_pages_of_all_pools() -> None:
    """Of pages smaller and larger than a block; the others stay."""
    pools = [torch.full((7, width), 5, dtype=torch.int64, device=DEVICE) for width in (10, 4096, 9000)]
    clear.Pools(pools).clear(torch.tensor([2, 6], device=DEVICE))
    for pool in pools:
        assert not pool[[2, 6]].any()
        assert (pool[[0, 1, 3, 4, 5]] == 5).all()


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_append_converts_every_dtype(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Each pair of dtypes gives the reference's bytes in every slot of the pool."""
    check_append(exact(2, 3, 4, 16, dtype=dtype), exact(2, 3, 4, 16, dtype=dtype, seed=1), cache_dtype)


@pytest.mark.parametrize(
    ("heads", "head_dim", "v_head_dim"), [(1, 16, 16), (3, 80, 80), (8, 128, 128), (2, 24, 16), (5, 8, 40)]
)
@pytest.mark.parametrize("layers", [1, 3])
def test_append_fills_every_shape(heads: int, head_dim: int, v_head_dim: int, layers: int) -> None:
    """Odd numbers of heads, sizes that are no power of two, K and V of different size, and strided pools."""
    key = exact(1, 6, heads, head_dim, dtype=torch.float32)
    check_append(key, exact(1, 6, heads, v_head_dim, dtype=torch.float32, seed=1), torch.float32, layers)


def test_append_reads_any_strides() -> None:
    """K and V may be transposed views and slices of one fused projection."""
    fused = exact(2, 3, 8, 16, dtype=torch.float32)
    check_append(fused[:, :, :4], exact(2, 4, 3, 16, dtype=torch.float32).transpose(1, 2), torch.float32)
    check_append(fused[..., ::2], fused.flip(0)[..., 1::2], torch.float32)


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_append_divides_by_the_scales(dtype: torch.dtype) -> None:
    """K and V have each their own scale; what it takes beyond the range of 8 bits is clamped."""
    key, value = exact(2, 3, 4, 16, dtype=dtype), exact(2, 3, 4, 16, dtype=dtype, seed=1)
    check_append(key, value, torch.float8_e4m3fn, scales=(2.0, 0.25))
    check_append(key, value, torch.float8_e4m3fn, scales=(2.0**-9, 2.0**3))


def check_append(
    key: Tensor,
    value: Tensor,
    cache_dtype: torch.dtype,
    layers: int = 1,
    scales: tuple[float, float] = (1.0, 1.0),
) -> None:
    width = max(key.shape[-1], value.shape[-1])
    ours, theirs = (pool(5, key.shape[2], 8, width, cache_dtype, layers) for _ in range(2))
    slots = torch.tensor([9, 8, 39, 16, 17, 0][: key.shape[0] * key.shape[1]], device=DEVICE)
    append.append(key, value, slots, ours, *scales)
    reference.append(key, value, slots, theirs, *scales)
    assert torch.equal(ours.float(), theirs.float())


def test_append_clamps_what_8_bits_cannot_hold() -> None:
    """Numbers beyond the range of float8_e4m3fn become its largest, not NaN."""
    key = torch.tensor([1e4, -1e4, 449.0, 1.0, float("inf")], device=DEVICE).view(1, 1, 1, 5)
    cache = pool(2, 1, 8, 5, torch.float8_e4m3fn, 1)
    append.append(key, key, torch.tensor([8], device=DEVICE), cache)
    assert cache[1, 0, 0, 0].tolist() == [448.0, -448.0, 448.0, 1.0, 448.0]


def test_append_of_padding_touches_the_scratch_page_only() -> None:
    """Tokens with slot 0 leave every other page as it was."""
    cache = pool(3, 2, 8, 16, torch.float32, 1)
    key = exact(4, 1, 2, 16, dtype=torch.float32)
    append.append(key, key, torch.zeros(4, dtype=torch.int64, device=DEVICE), cache)
    assert bool((cache[1:] == POISON).all())


def step(past: int, new: int, first_page: int, page_size: int) -> SequenceStep:
    num_pages = -(-(past + new) // page_size)
    # Descending, so that the order of the pages matters.
    return SequenceStep(range(new), past, range(first_page + num_pages - 1, first_page - 1, -1))


@pytest.mark.parametrize("page_size", [4, 5, 16])
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1)],
        [(0, 17)],
        [(3, 1), (15, 1), (16, 1), (30, 1)],
        [(0, 5), (0, 16), (7, 2), (4, 1)],
        [(0, 33), (31, 3), (2, 1)],
    ],
    ids=str,
)
@pytest.mark.parametrize("padding", [0, 3])
def test_metadata_is_that_of_the_reference(
    lengths: list[tuple[int, int]], page_size: int, padding: int
) -> None:
    """Block table and slots are equal element by element, with page 0 and slot 0 where there is no token."""
    info = SequenceInfo(40, 6, 64, page_size, DEVICE)
    # What an earlier step left behind must not be read.
    info.nest_sequences([step(36, 1, 90, page_size)] * 6)
    info.nest_sequences([step(past, new, 1 + 20 * i, page_size) for i, (past, new) in enumerate(lengths)])
    args = info.named_args()
    inputs = (
        sum(new for _, new in lengths) + padding,
        len(lengths),
        args["cu_seqlen"],
        args["input_pos"],
        args["cache_loc"],
        args["cu_num_pages"],
        info.max_blocks_per_seq,
        page_size,
    )
    ours, theirs = prepare_metadata.prepare_metadata(*inputs), reference.prepare_metadata(*inputs)
    for got, expected in zip(ours, theirs, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)


def test_metadata_of_long_sequences() -> None:
    """A sequence longer than one block of the kernel, in tokens and in pages."""
    info = SequenceInfo(3000, 2, 3000, 2, DEVICE)
    info.nest_sequences([step(0, 2500, 1, 2), step(2800, 1, 2000, 2)])
    args = info.named_args()
    inputs = (
        2501,
        2,
        args["cu_seqlen"],
        args["input_pos"],
        args["cache_loc"],
        args["cu_num_pages"],
        info.max_blocks_per_seq,
        2,
    )
    for got, expected in zip(
        prepare_metadata.prepare_metadata(*inputs), reference.prepare_metadata(*inputs), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("num", [1, 7, 132])
def test_prefix_sums(num: int) -> None:
    """As torch has them, for a length that is no power of two, too."""
    lengths = torch.arange(3, 3 + num, dtype=torch.int32, device=DEVICE) % 11
    expected = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    assert torch.equal(prepare_metadata.prefix_sums(lengths), expected)


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("vocab_size", [40, 4096, 5000])
def test_advance_is_argmax_and_the_advance_of_the_metadata(dtype: torch.dtype, vocab_size: int) -> None:
    """Over steps with ties, NaN, infinities, stop tokens, rows that have stopped, and padding."""
    infos = [SequenceInfo(64, 6, 16, 4, DEVICE) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-6, 6, (6, vocab_size), generator=generator).to(dtype).to(DEVICE)
    stops = [[], [9, int(start[1].argmax())], [], [], []]
    row_params = [RowParams(stop_token_ids=stop) for stop in stops]
    for info in infos:
        steps = [SequenceStep([7], past, range(1 + 8 * past, 9 + 8 * past)) for past in range(5)]
        info.nest_sequences(steps, pad_to=Bucket(0, 6), row_params=row_params)
    for step in range(4):
        logits = torch.randint(-6, 6, (6, vocab_size), generator=generator).to(dtype).to(DEVICE)
        logits = logits if step else start.clone()
        if step == 1:
            logits[2, 3], logits[3, vocab_size - 1] = torch.nan, torch.inf
            logits[4, 5] = -torch.inf
        infos[0].advance(most_likely(logits))
        infos[1].sample_and_advance(logits, is_greedy=step % 2 == 0)
        expected, actual = (info.named_args() for info in infos)
        assert torch.equal(infos[1].tokens, infos[0].tokens)
        for name in ("input_ids", "position_ids", "input_pos", "seq_len_with_cache", "cache_loc"):
            assert torch.equal(actual[name], expected[name]), (step, name)
    assert infos[0].tokens.tolist()[1:4] == [-2, -2, -2], "they have stopped"
    assert infos[0].tokens.min() == -2 <= infos[0].tokens[4]


@dataclass(eq=False)
class Drawing:
    """A row that samples."""

    params: SamplingParams
    seed: int
    num_generated: int
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def row_params(self) -> RowParams:
        p = self.params
        tail = 1 - p.top_p if p.top_p < 1 else -1.0
        return RowParams((), p.temperature, p.top_k, tail, p.min_p, self.seed, self.num_generated)


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 7},
    "top_k_1": {"top_k": 1},
    "top_k_all": {"top_k": 5000},
    "top_p": {"top_p": 0.6},
    "top_p_0": {"top_p": 0.0},
    "min_p": {"min_p": 0.1},
    "min_p_1": {"min_p": 1.0},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
}


@pytest.mark.parametrize(
    ("dtype", "part"),
    [(torch.float32, 4096), (torch.bfloat16, 4096), (torch.float16, 4096), (torch.bfloat16, 128)],
    ids=str,
)
def test_samples_what_the_filters_leave_as_the_sampler_does(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each filter, alone and together, with cold and hot rows, against the sampler in plain torch.

    In one part and in three, the last of which is not full.
    """
    monkeypatch.setattr(sampling, "_PART", part)
    params = [SamplingParams(temperature=0.4 + i % 3, **f) for i, f in enumerate(FILTERS.values())]
    params.append(SamplingParams())
    vocab_size, generator = 300, torch.Generator().manual_seed(0)
    # No two alike in 16 bits either: which of several equal scores a filter drops is nobody's business.
    row = torch.linspace(-7, 7, vocab_size).to(dtype).unique()
    orders = [torch.randperm(len(row), generator=generator) for _ in params]
    scores = torch.stack([row[order] for order in orders]).to(DEVICE)
    info = SequenceInfo(64, len(params), 64, 4, DEVICE)
    for step in range(2):
        rows = [Drawing(p, 2**40 + i, step) for i, p in enumerate(params)]
        steps = [SequenceStep([7], 3, [1 + i]) for i in range(len(rows))]
        info.nest_sequences(steps, row_params=[r.row_params for r in rows])
        info.sample_and_advance(scores)
        assert info.tokens.tolist() == Sampler().sample(scores, rows).tolist()


def test_a_filter_keeps_all_equal_scores() -> None:
    """Top-k keeps more than k if they tie, and top-p all or none of those that are equal."""
    scores = torch.tensor([0.0, 3.0, 3.0, 3.0, -2.0, 3.0, -torch.inf]).to(DEVICE, torch.bfloat16)
    params = [
        RowParams((), 1.0, k, mass, seed=seed) for k, mass in ((2, -1.0), (0, 0.3)) for seed in range(11)
    ]
    info = SequenceInfo(64, len(params), 64, 4, DEVICE)
    info.nest_sequences([SequenceStep([7], 3, [1 + i]) for i in range(len(params))], row_params=params)
    info.sample_and_advance(scores.expand(len(params), -1))
    tokens = info.tokens.tolist()
    assert {*tokens[:11]} == {*tokens[11:]} == {1, 2, 3, 5}


def test_draws_in_one_row_of_many_steps_do_not_need_the_host() -> None:
    """The count of generated tokens goes up on the device: a row draws as if it were told each time."""
    scores = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    info = SequenceInfo(64, 1, 64, 4, DEVICE)
    params = SamplingParams(temperature=1.5)
    info.nest_sequences([SequenceStep([7], 3, range(1, 9))], row_params=[Drawing(params, 5, 0).row_params])
    drawn = []
    for step in range(5):
        info.sample_and_advance(scores)
        drawn.append(int(info.tokens[0]))
        assert drawn[-1] == int(Sampler().sample(scores, [Drawing(params, 5, step)])[0])
    assert len(set(drawn)) > 2


@pytest.mark.parametrize("num_drafts", [1, 3, 5, 7])
def test_accepts_as_the_metadata_do(num_drafts: int) -> None:
    """Over steps with right and wrong drafts, ends of pages, NaN, stop tokens, rows that rest, padding."""
    width = 1 + num_drafts
    infos = [SequenceInfo(64, 8, 64, 16, DEVICE, num_drafts=num_drafts) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for info in infos:
        steps = [
            SequenceStep([7] * width, past, [1 + 3 * row, 2 + 3 * row], slot=1 + row, max_cached=32)
            for row, past in enumerate((1, 14, 15, 30, 3, 4))
        ]
        rows = [RowParams(stop_token_ids=[9 - row], seed=row, num_generated=2) for row in range(6)]
        info.nest_sequences(steps, pad_to=Bucket(0, 8, num_drafts=num_drafts), row_params=rows, verifies=True)
    for step in range(6):
        drafts = torch.randint(5, 10, (8, width - 1), generator=generator).to(DEVICE)
        logits = torch.randn(8 * width, 40, generator=generator).to(DEVICE)
        for row in range(8):
            for place in range(width - 1 if row % 2 else step):
                if place < width - 1:
                    logits[row * width + place, drafts[row, place]] = 9.0
        if step == 2:
            logits[2 * width] = torch.nan
        for info in infos:
            info.drafts[:, 1:] = drafts
        infos[0].accept(most_likely(logits))
        infos[1].sample_and_accept(logits, is_greedy=step % 2 == 0)
        assert torch.equal(infos[1].tokens, infos[0].tokens), step
        names = ("input_ids", "position_ids", "input_pos", "seq_len_with_cache", "cache_loc", "is_stopped")
        for name in (*names, "num_generated"):
            assert torch.equal(*(info.views[name] for info in infos)), (step, name)


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
def test_sets_the_steps_of_a_head_as_the_metadata_do(num_drafts: int) -> None:
    """After a step that verified, with sequences of each number of kept tokens, one that rests, one at its
    end, and padding: what the head reads, and its first and its further guesses."""
    sizes = (64, 8, 64, 8, torch.device("cpu"), num_drafts)
    theirs, *ours = (SequenceInfo(*sizes, has_next=True) for _ in range(3))
    width = 1 + num_drafts
    pages = [list(range(1 + 9 * row, 10 + 9 * row)) for row in range(6)]
    starts = [0, 3, 17, 30, 62 - width, 63 - width]
    steps = [SequenceStep([5] * width, start, table) for start, table in zip(starts, pages, strict=True)]
    theirs.nest_sequences(
        steps, pad_to=Bucket(0, 8, num_drafts=num_drafts), row_params=[RowParams()] * 6, verifies=True
    )
    theirs.views["is_stopped"][2 * width : 3 * width] = 1
    generator = torch.Generator().manual_seed(num_drafts)
    got = torch.randint(0, 99, (8, width), generator=generator)
    got[torch.arange(width) > torch.arange(8)[:, None] % (1 + width) - 1] = -2  # one of them got none
    names = [name for name in ours[0].views if name not in ("seed", "num_generated", "next_ids")]
    for look, back in ((got, 0), (got[:, :1], 0), (None, 1), (None, 0)):
        if look is None:
            ours[0].follow(theirs, back)
        else:
            assert (
                ours[0].look_back(theirs, look).tolist() == ours[0].views["token_gather_indices"][:8].tolist()
            )
        copied, given_by = (
            {name: view.to(DEVICE) for name, view in info.views.items()} for info in (ours[1], theirs)
        )
        given = None if look is None else look.contiguous().to(DEVICE)
        lens = 1 if look is None else look.shape[1]
        drafts_kernel.set_step(8, lens, copied, given_by, given, back=back, stride=width, max_seq_len=64)
        rows = {"cu_num_pages": 9, "cu_seqlen": 9, "cache_loc": int(theirs.views["cu_num_pages"][8]) + 1}
        per_token = ("input_ids", "position_ids", "sequence_lengths")
        for name in names:
            count = rows.get(name, 8 * lens if name in per_token else 8)
            wanted = ours[0].views[name][:count]
            assert torch.equal(copied[name][:count].cpu(), wanted), (name, look is None, back)


@pytest.mark.parametrize("num_drafts", [1, 3, 5])
def test_matches_what_the_reference_guesses(num_drafts: int) -> None:
    """Texts of few tokens, longer than what a program looks at at once, and tokens of the step before."""
    rng = random.Random(0)
    texts = torch.zeros(9, 200, dtype=torch.int32, device=DEVICE)
    whole = [[rng.randrange(3) for _ in range(length)] for length in (1, 2, 3, 9, 64, 65, 130, 180)]
    got = [rng.randint(1, min(1 + num_drafts, len(text))) for text in whole]
    accepted = torch.full((8, 1 + num_drafts), -2, device=DEVICE)
    for row, text in enumerate(whole):
        texts[8 - row, : len(text) - got[row]] = torch.tensor(text[: len(text) - got[row]], dtype=torch.int32)
        accepted[row, : got[row]] = torch.tensor(text[len(text) - got[row] :])
    drafts = torch.full((8, 1 + num_drafts), 7, device=DEVICE)
    slots = torch.tensor([8 - row for row in range(8)], device=DEVICE)
    places = torch.tensor([len(text) - 1 for text in whole], dtype=torch.int32, device=DEVICE)
    texts[8, 0] = whole[0][0]
    drafts_kernel.match(texts, drafts, accepted, slots, places, most=MOST, least=LEAST)
    for row, text in enumerate(whole):
        assert texts[8 - row, : len(text)].tolist() == text
        assert drafts[row].tolist() == [7, *guess(torch.tensor(text), num_drafts).tolist()]
