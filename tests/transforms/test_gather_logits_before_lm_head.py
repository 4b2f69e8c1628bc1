"""``gather_logits_before_lm_head``: only the wanted rows are computed, and they are the same rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from ad_flashinfer_pass.graph import edit as g
from tests.transforms.small_models import (
    VOCAB,
    SmallModel,
    aten,
    context,
    exported,
    find,
    run,
    tokens,
)

Head = Callable[["WithHead", Tensor], Tensor]


class WithHead(SmallModel):
    """A model whose logits go through ``head`` after lm_head."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.bias = nn.Parameter(torch.randn(VOCAB), requires_grad=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [b, s, VOCAB]."""
        return self.head(self, super().forward(input_ids, position_ids))


HEADS: dict[str, tuple[Head, str]] = {
    "plain": (lambda m, x: x, "linear"),
    "scaled": (lambda m, x: x / 3.0, "linear"),
    "capped": (lambda m, x: torch.tanh(x / 5.0) * 5.0, "linear"),
    "cast": (lambda m, x: x.double().float(), "linear"),
    "learned_bias": (lambda m, x: x + m.bias, "output"),
    "two_uses": (lambda m, x: x + x.sin(), "output"),
    "softmax": (lambda m, x: x.log_softmax(-1), "output"),
}


def gathered(head: str) -> tuple[fx.GraphModule, WithHead, str]:
    model, ctx = WithHead(HEADS[head][0]), context()
    gm, reports = run(exported(model, ctx=ctx), ctx, "gather_logits_before_lm_head")
    assert ctx.vocab_size == VOCAB
    report = reports["gather_logits_before_lm_head"]
    assert report.num_matches == 1
    return gm, model, report.notes[0]


@pytest.mark.parametrize("head", HEADS)
def test_rows_are_those_asked_for(head: str) -> None:
    """For any indices, in any order and repeated, the logits are those rows of all the logits."""
    gm, model, note = gathered(head)
    assert note == f"before {HEADS[head][1]}"
    for batch, size in ((1, 9), (4, 1), (3, 5)):
        ids, positions = tokens(batch, size)
        everything = model(ids, positions).flatten(0, 1)
        for rows in ([batch * size - 1], [2, 0, 2], [], list(range(batch * size))):
            found = gm(ids, positions, torch.tensor(rows, dtype=torch.int64))
            assert found.shape == (1, len(rows), VOCAB)
            torch.testing.assert_close(found[0], everything[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_gather_stands_before_lm_head_where_that_is_right(head: str) -> None:
    """Only if pointwise ops alone follow lm_head does it run on gathered rows; else the logits are cut."""
    gm, _, _ = gathered(head)
    (gather,) = find(gm, aten.index_select)
    is_before = any(user.target is aten.linear.default for user in gather.users)
    assert is_before == (HEADS[head][1] == "linear")


def test_the_input_is_appended() -> None:
    """token_gather_indices is the last input, int64."""
    gm, _, _ = gathered("plain")
    *_, last = gm.graph.find_nodes(op="placeholder")
    assert last.name == "token_gather_indices"
    assert g.value(last).dtype == torch.int64


@pytest.mark.parametrize("head", HEADS)
def test_shapes_behind_the_gather_are_those_of_the_rows(head: str) -> None:
    """meta["val"] says one row for each sequence of the largest batch, to the end of the graph."""
    gm, _, _ = gathered(head)
    logits = gm.graph.output_node().args[0]
    assert isinstance(logits, fx.Node)
    assert g.shape(logits) == (1, context().config.max_batch_size, VOCAB)
