"""``number_by_positions``: models that number their tokens by arange are served as what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass.errors import ConfigError, ExportError, PackingError
from ad_flashinfer_pass.pipeline import transform_module
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.small_models import HEAD_DIM, Attend, SmallModel, context, eager, sdpa, tokens

Numbering = Callable[[Any, Tensor], Tensor]
"""(table, tokens' vectors [b, s, d]) -> what is added to them."""


def size(x: Tensor) -> int:
    return x.shape[1]


NUMBERINGS: dict[str, Numbering] = {
    "row": lambda table, x: table(torch.arange(size(x), device=x.device)),
    "row_of_batch": lambda table, x: table(torch.arange(0, size(x), dtype=torch.long).unsqueeze(0)),
    "expanded": lambda table, x: table(torch.arange(size(x)).expand(x.shape[0], size(x))),
    "like_the_tokens": lambda table, x: table(torch.arange(size(x))[None].expand_as(x[..., 0])),
    "int32": lambda table, x: table(torch.arange(size(x), dtype=torch.int32)),
    "offset": lambda table, x: table(torch.arange(size(x)) + 2),
    "viewed": lambda table, x: table(torch.arange(size(x)).view(1, size(x), 1).expand(x.shape[0], -1, 1))[
        :, :, 0
    ],
    "first_rows": lambda table, x: table.weight[: size(x)],
    "first_rows_of_batch": lambda table, x: table.weight[None][:, : size(x)],
    "computed": lambda table, x: (
        torch.arange(size(x))[:, None].float() * torch.linspace(0.1, 1, x.shape[-1])
    ).sin(),
}


class Numbered(nn.Module):
    """Takes no position_ids, as nanoGPT does."""

    def __init__(self, attend: Attend, numbering: Numbering) -> None:
        super().__init__()
        self.model, self.numbering = SmallModel(attend), numbering
        self.model.positions, self.table = nn.Embedding(1, 32), self.model.positions
        self.model.mix = lambda _, x, p: x + self.numbering(self.table, x)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(input_ids, torch.zeros_like(input_ids))
        return logits


class WithPositions(nn.Module):
    """The same for whoever gives positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(input_ids)
        return logits


@pytest.mark.parametrize("name", NUMBERINGS)
def test_every_numbering_is_served_packed(name: str) -> None:
    """Sequences in one batch, in chunks and step by step, each from its own position."""
    model = Numbered(sdpa, NUMBERINGS[name])

    assert_serves_like(cached(model), WithPositions(model))


@pytest.mark.parametrize("name", NUMBERINGS)
def test_a_table_of_positions_bounds_max_seq_len(name: str) -> None:
    """Of 256 rows; what is computed has none."""
    model, most = Numbered(sdpa, NUMBERINGS[name]), 254 if name == "offset" else 256
    transform_module(model, context(max_seq_len=300 if name == "computed" else most).config)
    if name != "computed":
        with pytest.raises((ConfigError, ExportError), match=rf"\b300\b.* set max_seq_len: {most}\."):
            transform_module(model, context(max_seq_len=300).config)


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, p: table[p + 1],
        lambda table, p: table.index_select(0, p.flatten()).view(*p.shape, -1),
        lambda table, p: table.gather(0, p.reshape(-1, 1).expand(-1, table.shape[1])).view(*p.shape, -1),
        lambda table, p: F.embedding(p[None].expand(1, -1, -1).int(), table).squeeze(0),
    ],
)
def test_a_table_is_found_however_it_is_read(look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
    """By ``position_ids`` themselves."""
    table = nn.Embedding(41, 32)
    model = SmallModel(sdpa, mix=lambda self, x, p: x + look_up(table.weight, p), table=table)
    transform_module(model, context(max_seq_len=40).config)
    with pytest.raises(
        ConfigError, match=r"of 41 positions, and max_seq_len is 64; set max_seq_len: 4[01]\."
    ):
        transform_module(model, context().config)


@pytest.mark.parametrize(
    ("rows", "place", "most"),
    [
        (40, lambda p: p // 2, None),
        (30, lambda p: p // 2, 60),
        (80, lambda p: p * 2, 40),
        (40, lambda p: p.clamp(max=39), None),
        (40, lambda p: p.clamp(max=45), 40),
        (49, lambda p: p % 50, 49),
        (64, lambda p: -1 - p, None),
        (40, lambda p: -1 - p, 40),
        (40, lambda p: 39 - p, None),
        (19, lambda p: 39 - p, 0),
        (40, lambda p: p.int() + 1, 39),
        (40, lambda p: p.float().floor().long(), 40),
    ],
)
def test_every_position_is_looked_up(rows: int, place: Callable[[Tensor], Tensor], most: int | None) -> None:
    """Not the last one alone: what it says is the longest sequence of which torch finds all positions."""
    table = nn.Embedding(rows, 32)
    model = SmallModel(sdpa, mix=lambda self, x, p: x + table.weight[place(p)], table=table)
    found = [n for n in range(1, 65) if ((at := place(torch.arange(n))) < rows).all() and (at >= -rows).all()]
    assert (max(found, default=0) if most is not None else None) == most
    if most is None:
        transform_module(model, context().config)
        return
    way = f"set max_seq_len: {most}" if most else "the first is none of them: give another model"
    with pytest.raises(ConfigError, match=rf"of {rows} positions, and max_seq_len is 64; {way}\."):
        transform_module(model, context().config)
    if most:
        transform_module(model, context(max_seq_len=most).config)


def test_rows_that_a_table_names_are_looked_up() -> None:
    """A table of 40 rows, by another one that names row 40 for the token at 40."""
    table = nn.Embedding(40, 32)
    places = torch.arange(64) % 41
    table.register_buffer("places", places)
    model = SmallModel(
        sdpa, mix=lambda self, x, p: x + table.weight[table.get_buffer("places")[p]], table=table
    )
    with pytest.raises(ConfigError, match=r"of 40 positions, and max_seq_len is 64; set max_seq_len: 40\."):
        transform_module(model, context().config)
    places %= 40
    transform_module(model, context().config)


def rotated(x: Tensor, by_table: bool) -> Tensor:
    """[b, n, s, d] by the place in the sequence."""
    inv_freq = 1.0 / 100 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    places = torch.arange(64 if by_table else x.shape[2])
    freqs = torch.outer(places.float(), inv_freq)
    angles = torch.cat((freqs, freqs), dim=-1)
    cos, sin = (t[: x.shape[2]][None, None] if by_table else t for t in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


@pytest.mark.parametrize("by_table", [False, True])
def test_rotations_by_place_are_served(by_table: bool) -> None:
    """Computed for the tokens, or cut from a table."""

    def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        form = eager(mask=lambda logits, _: logits.masked_fill(~mask, float("-inf")))
        return form(layer, rotated(q, by_table), rotated(k, by_table), v, p)  # type: ignore[arg-type]

    model = Numbered(attend, lambda table, x: torch.zeros(()))

    assert_serves_like(cached(model), WithPositions(model))


def test_queries_and_keys_of_mean_0_are_served() -> None:
    """What a mean over the head does not show, and each token's logits do."""

    def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        angles = torch.arange(q.shape[2])[:, None].float() * torch.linspace(1.0, 0.1, HEAD_DIM // 2)
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        turned = (
            x * cos + torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1) * sin for x in (q, k)
        )
        q, k = (F.layer_norm(x, (HEAD_DIM,)) for x in turned)
        return sdpa(layer, q, k, v, p)  # type: ignore[arg-type]

    model = Numbered(attend, lambda table, x: torch.zeros(()))

    assert_serves_like(cached(model), WithPositions(model))


@pytest.mark.parametrize(
    "numbering",
    [
        lambda table, x: table(torch.arange(x.shape[1]).flip(0)),
        lambda table, x: table(torch.arange(x.shape[1]).cumsum(0)),
        lambda table, x: table(torch.arange(1, x.shape[1] + 1).roll(1)),
        lambda table, x: table(torch.arange(x.shape[0]))[:, None],
    ],
    ids=["from_the_end", "sums", "rolled", "of_the_batch"],
)
def test_another_numbering_is_refused(numbering: Numbering) -> None:
    """Only a position that the token has by itself is one."""
    with pytest.raises(PackingError):
        cached(Numbered(sdpa, numbering))


def test_the_wrong_positions_would_show() -> None:
    """The models depend on the numbers."""
    ids, _ = tokens(1, 9)
    one, other = (Numbered(sdpa, NUMBERINGS[name])(ids) for name in ("row", "offset"))

    assert float((one - other).abs().max()) > 0.1
