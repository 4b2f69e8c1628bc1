"""``check_packing``: ops that mix tokens are refused by name, and what works token by token passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass.errors import PackingError
from tests.transforms.small_models import (
    HEAD_DIM,
    HEADS,
    Layer,
    Mix,
    SmallModel,
    assert_computes,
    context,
    exported,
    run,
    sdpa,
    snapshot,
)

WIDTH = HEADS * HEAD_DIM
EXPERTS = 4


class Tables(nn.Module):
    """Weights that the mixes below use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)
        self.angles = nn.Buffer(torch.randn(HEAD_DIM // 2))
        self.positions = nn.Parameter(torch.randn(64, WIDTH))
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.requires_grad_(False)


def tables(model: SmallModel) -> Tables:
    part = model.parts["tables"]
    assert isinstance(part, Tables)
    return part


def checked(mix: Mix, *attends: object) -> tuple[SmallModel, list[str]]:
    """The model with this mix, after the check; and the notes of the report."""
    model = SmallModel(*attends, mix=mix, tables=Tables())  # type: ignore[arg-type]
    ctx = context()
    names = ["match_attention"] if attends else []
    gm, reports = run(exported(model, *names, ctx=ctx), ctx, "check_packing")
    assert_computes(gm, model)
    return model, reports["check_packing"].notes


# What works token by token.


def mlp(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    gate, up = tables(model).up(x).chunk(2, -1)
    return x + tables(model).down(torch.cat([F.silu(gate) * up, x], -1))


def norms(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    x = F.layer_norm(x, (WIDTH,)) + F.rms_norm(x, (WIDTH,))
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


def rope(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    heads = x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
    angles = (tables(model).angles[None, :, None] * p[:, None, :].float()).transpose(1, 2)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    left, right = heads[..., : HEAD_DIM // 2], heads[..., HEAD_DIM // 2 :]
    turned = heads * cos + torch.cat([-right, left], -1) * sin
    return turned.transpose(1, 2).reshape(x.shape)


def heads_apart_and_merged(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    b, s, _ = x.shape
    qkv = tables(model).qkv(x).view(b, s, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return (q * k + v).transpose(1, 2).contiguous().view(b, s, WIDTH)


def over_heads(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    heads = x.unflatten(-1, (HEADS, HEAD_DIM))
    total = heads.sum(-1, keepdim=True).squeeze(-1)[..., None]
    return (heads.softmax(2) + heads.cumsum(-1) + heads.flip(2) + total).flatten(2)


def all_tokens_in_one_row(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    b, s, width = x.shape
    rows = tables(model).up(x.reshape(b * s, width))
    return x + tables(model).down(rows).view(b, s, width)


def position_table(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + tables(model).positions[p] + torch.where(p > 3, 1.0, -1.0)[..., None]


ALLOWED: dict[str, Mix] = {
    "mlp": mlp,
    "norms": norms,
    "rope_by_position_ids": rope,
    "heads_apart_and_merged": heads_apart_and_merged,
    "ops_over_heads": over_heads,
    "all_tokens_in_one_row": all_tokens_in_one_row,
    "table_read_at_position_ids": position_table,
}


@pytest.mark.parametrize("mix", ALLOWED)
def test_what_works_token_by_token_passes(mix: str) -> None:
    """Ops that keep each token by itself are accepted by their rules alone, without running the graph."""
    _, notes = checked(ALLOWED[mix])
    assert notes == []


def test_canonical_attention_passes_and_the_graph_is_unchanged() -> None:
    """Attention that was matched is the one place where tokens may meet; the check edits nothing."""
    ctx = context()
    gm = exported(SmallModel(sdpa, sdpa), "match_attention", ctx=ctx)
    before = snapshot(gm)
    checked_gm, reports = run(gm, ctx, "check_packing")
    assert checked_gm is gm
    assert snapshot(gm) == before
    assert reports["check_packing"].num_matches > 0
    assert reports["check_packing"].skipped == []


# What mixes tokens.


def conv(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + tables(model).conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def outer_softmax(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def linear_attention(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x @ (x.transpose(1, 2) @ x)


def last_token_everywhere(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + x[:, -1:]


def shifted(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + F.pad(x, (0, 0, 1, 0))[:, :-1]


def heads_before_tokens(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x + x.view(b, s, HEADS, HEAD_DIM).transpose(1, 2).reshape(b, s, WIDTH)


def tokens_across_sequences(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    b, s, width = x.shape
    return x + x.transpose(0, 1).reshape(b, s, width)


MIXING: dict[str, tuple[Mix, str]] = {
    "conv1d": (conv, "conv1d is not known to work token by token"),
    "cumsum": (lambda m, x, p: x + x.cumsum(1), "cumsum works along the tokens (dimension 1)"),
    "mean": (lambda m, x, p: x + x.mean(1, keepdim=True), "mean works along the tokens (dimension 1)"),
    "mean_over_batch": (lambda m, x, p: x + x.mean(0), "mean works along the tokens (dimension 0)"),
    "total": (lambda m, x, p: x / x.abs().sum(), "sum works along the tokens"),
    "maximum": (lambda m, x, p: x + x.amax(1, keepdim=True), "amax works along the tokens"),
    "softmax": (lambda m, x, p: x.softmax(1), "softmax works along the tokens"),
    "flip": (lambda m, x, p: x.flip(1), "flip works along the tokens"),
    "roll": (lambda m, x, p: x + x.roll(1, 1), "roll works along the tokens"),
    "roll_of_all": (lambda m, x, p: x + x.roll(1), "roll works along the tokens"),
    "last_token": (last_token_everywhere, "slice works along the tokens"),
    "shift": (shifted, "pads along the tokens"),
    "heads_before_tokens": (heads_before_tokens, "reshape moves tokens"),
    "tokens_across_sequences": (tokens_across_sequences, "reshape moves tokens"),
    "attention_outside_the_op": (outer_softmax, "makes a tensor over pairs of tokens"),
    "linear_attention": (linear_attention, "sums over tokens"),
    "einsum_over_tokens": (
        lambda m, x, p: x + torch.einsum("bsd,bse->bde", x, x).sum(1, keepdim=True)[..., :WIDTH],
        "sums over tokens",
    ),
    "norm_over_tokens": (
        lambda m, x, p: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2),
        "group_norm is not known to work token by token",
    ),
    "count_of_tokens": (lambda m, x, p: x / x.shape[1], "computes with the number of tokens"),
    "table_cut_to_length": (
        lambda m, x, p: x + tables(m).positions[: x.shape[1]],
        "numbers the tokens by their place in the batch",
    ),
    "dimension_dropped_for_one_token": (lambda m, x, p: x + x.squeeze(1), "squeeze works along the tokens"),
    "every_dimension_of_one_dropped": (lambda m, x, p: x + x.squeeze(), "squeeze works along the tokens"),
    "sorted_by_value": (lambda m, x, p: x.sort(1).values, "sort"),
    "positions_from_arange": (
        lambda m, x, p: x + tables(m).positions[torch.arange(x.shape[1])],
        "arange",
    ),
}


@pytest.mark.parametrize("mix", MIXING)
def test_what_mixes_tokens_is_named(mix: str) -> None:
    """An op through which tokens meet stops the pass, with its node, its line and what it does to tokens."""
    wrong, named = MIXING[mix]
    with pytest.raises(PackingError) as raised:
        checked(wrong)
    message = str(raised.value)
    assert message.startswith("node ")
    assert named in message
    assert ".py:" in message
    assert "so sequences cannot share a batch" in message
    assert "\n" not in message


def test_attention_that_was_not_matched_is_named() -> None:
    """A site that match_attention passed over does not slip through: its logits are pairs of tokens."""

    def strange(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.repeat_interleave(2, 1).transpose(2, 3)) @ v.repeat_interleave(2, 1)

    with pytest.raises(PackingError, match="makes a tensor over pairs of tokens"):
        checked(lambda m, x, p: x, sdpa, strange)


# Mixture of experts: tokens are sorted by expert and put back.


def expert_of(model: SmallModel, x: Tensor) -> Tensor:
    chosen: Tensor = tables(model).router(x).argmax(-1)
    return chosen


def sorted_dispatch(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    expert = expert_of(model, flat)
    order = expert.argsort()
    out = torch.bmm(flat[order][:, None], tables(model).experts[expert[order]])[:, 0]
    return x + torch.zeros_like(flat).index_put((order,), out).view(x.shape)


def every_expert_on_every_token(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    weights = F.one_hot(expert_of(model, x), EXPERTS).to(x.dtype)
    return x + torch.einsum("bsd,edf,bse->bsf", x, tables(model).experts, weights)


def capacity(limit: int) -> Mix:
    """Only the first ``limit`` tokens, in order of their expert, are computed."""

    def mix(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        expert = expert_of(model, x.flatten(0, 1))
        place = expert.argsort(stable=True).argsort(stable=True)
        kept = (place < limit)[:, None] * x.flatten(0, 1)
        return x + tables(model).down(tables(model).up(kept)).view(x.shape)

    return mix


def neighbour(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """Each token is mixed with the one that has its place when they are sorted."""
    flat = x.flatten(0, 1)
    return x + 0.1 * flat[flat[:, 0].argsort()].view(x.shape)


def test_dispatch_that_puts_tokens_back_passes_by_running_it() -> None:
    """Sorting tokens by expert and putting them back is accepted, with what was run as evidence."""
    _, notes = checked(sorted_dispatch)
    assert len(notes) == 1
    assert "dispatch ops run on" in notes[0]
    assert notes[0].endswith("same logits")


def test_experts_as_a_dense_product_need_no_run() -> None:
    """Each expert on each token, weighted, works token by token by the rules alone."""
    _, notes = checked(every_expert_on_every_token)
    assert notes == []


@pytest.mark.parametrize(
    "mix",
    [capacity(8), capacity(60), neighbour],
    ids=["small_capacity", "capacity_near_the_token_budget", "mixes_sorted_neighbours"],
)
def test_dispatch_that_depends_on_other_tokens_is_refused(mix: Mix) -> None:
    """A capacity limit, or an expert that sees its neighbours, shows when the graph is run."""
    with pytest.raises(
        PackingError, match=r"a token's logits depend on .*, so sequences cannot share a batch"
    ):
        checked(mix)


def test_dispatch_is_checked_beside_attention() -> None:
    """The run leaves attention out, which is right to mix tokens, and keeps the dispatch."""
    _, notes = checked(sorted_dispatch, sdpa)
    assert notes[0].endswith("same logits")
    with pytest.raises(PackingError, match="depend on"):
        checked(neighbour, sdpa)


@torch.library.custom_op("ad_flashinfer_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """A kernel of the user's that works token by token."""
    return x * 2


@torch.library.custom_op("ad_flashinfer_tests::summed_so_far", mutates_args=())
def summed_so_far(x: Tensor) -> Tensor:
    """A kernel of the user's that does not."""
    return x.cumsum(1)


for _op in (doubled, summed_so_far):
    _op.register_fake(torch.empty_like)


def test_op_of_the_users_is_run_to_see() -> None:
    """No rule can look into it; the run shows whether a token's logits depend on the others."""
    _, notes = checked(lambda model, x, p: doubled(x))
    assert any("same logits" in note for note in notes)

    with pytest.raises(PackingError, match=r"summed_so_far .*depend on the order of the tokens"):
        checked(lambda model, x, p: summed_so_far(x))
