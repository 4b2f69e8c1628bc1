"""``check_packing``: ops that mix tokens are refused by name, and what works token by token passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ad_flashinfer_pass import ops
from ad_flashinfer_pass.errors import PackingError
from tests.transforms.small_models import (
    HEAD_DIM,
    HEADS,
    VOCAB,
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


def checked(mix: Mix, *attends: object) -> None:
    """Check the model with this mix; the graph computes what the model does."""
    model = SmallModel(*attends, mix=mix, tables=Tables())  # type: ignore[arg-type]
    ctx = context()
    names = ["match_attention"] if attends else []
    gm, _ = run(exported(model, *names, ctx=ctx), ctx, "check_packing")
    assert_computes(gm, model)


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
    """Ops that keep each token by itself are accepted by their rules."""
    checked(ALLOWED[mix])


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
    "conv1d": (conv, "conv1d reads a token's neighbours (a kernel of 3)"),
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


# What no run of a few tokens could see: every op is read, for every number of tokens.


def far_back(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """From the 33rd token on, reads the token 32 places before: by its place in the batch."""
    place = (torch.arange(x.shape[1]) - 32).clamp(min=0)
    return x + x[:, place] * (p >= 32)[..., None]


def temperature_by_place(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """As Llama-4 has it: 1 in the first 8,192 places."""
    place = torch.arange(x.shape[1], device=x.device) + 0
    return x * (torch.floor((place + 1.0) / 8192).log1p() * 0.1 + 1)[None, :, None]


def blind_to_means(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """Turned by place, then of mean 0: an average over the width shows nothing of it."""
    angles = torch.arange(x.shape[1])[:, None] * 0.1
    return F.layer_norm(x * torch.cos(angles) + x.roll(1, -1) * torch.sin(angles), (WIDTH,))


def capacity(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """Only the first tokens, in order of their expert, are computed."""
    expert = tables(model).router(x.flatten(0, 1)).argmax(-1)
    kept = (expert.argsort().argsort() < 60)[:, None] * x.flatten(0, 1)
    return x + tables(model).down(tables(model).up(kept)).view(x.shape)


def sorted_dispatch(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """Right, but no rule can see that what was sorted is put back."""
    flat = x.flatten(0, 1)
    expert = tables(model).router(flat).argmax(-1)
    order = expert.argsort()
    out = torch.bmm(flat[order][:, None], tables(model).experts[expert[order]])[:, 0]
    return x + torch.zeros_like(flat).index_put((order,), out).view(x.shape)


def batch_before_heads_as_heads_before_batch(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """[b, s] and [s, b] flattened have one size and another order."""
    b, s, width = x.shape
    return x + (x.reshape(b * s, width) + x.transpose(0, 1).reshape(s * b, width)).view(b, s, width)


def last_of_table(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + tables(model).positions[x.shape[1] - 1]


def one_of_two(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """[s, 2] and [2, s] flattened, the one equal for all tokens, but not for both of a token."""
    pairs = F.layer_norm(torch.zeros(*x.shape[:2], 2), (2,), bias=torch.tensor([1.0, -1.0]))
    both = x[..., :2].transpose(1, 2).flatten(1) * pairs.flatten(1)
    return x + both.unflatten(1, (2, x.shape[1])).transpose(1, 2).sum(-1, keepdim=True)


def difference_to_nothing(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    """As above, with what was put in front of zeros that are equal for all tokens."""
    pairs = torch.diff(torch.zeros(*x.shape[:2], 2), prepend=x[..., :1])
    both = x[..., :2].transpose(1, 2).flatten(1) * pairs.flatten(1)
    return x + both.unflatten(1, (2, x.shape[1])).transpose(1, 2).sum(-1, keepdim=True)


FIRST = torch.zeros(1, 1, 1, dtype=torch.int64)
UNSEEN: dict[str, tuple[Mix, str]] = {
    "a_token_far_back": (far_back, "arange numbers the tokens by their place in the batch"),
    "temperature_that_starts_late": (temperature_by_place, "arange numbers the tokens by their place"),
    "rotation_whose_mean_is_0": (blind_to_means, "arange numbers the tokens by their place"),
    "capacity_of_experts": (capacity, "argsort works along the tokens"),
    "sorted_dispatch": (sorted_dispatch, 'model.set_experts_implementation("ad_flashinfer")'),
    "two_orders_of_tokens": (batch_before_heads_as_heads_before_batch, "brings different tokens together"),
    "entry_of_a_table_by_length": (last_of_table, "computes with the number of tokens"),
    "last_token_by_list": (lambda m, x, p: x + x[:, [-1]], "index looks tokens up by index"),
    "what_is_equal_for_tokens_alone": (one_of_two, "brings different tokens together"),
    "what_is_put_in_front": (difference_to_nothing, "brings different tokens together"),
    "first_token_alone": (lambda m, x, p: x.scatter(-1, FIRST, 0.0), "writes to the first token alone"),
    "added_to_the_first_token": (
        lambda m, x, p: x.scatter_add(-1, FIRST, x[..., :1]),
        "writes to the first token alone",
    ),
    "of_all_dimensions": (
        lambda m, x, p: x + torch.take_along_dim(x, FIRST[0, 0]),
        "reads from all dimensions as if they were one",
    ),
    "dropout_as_in_training": (lambda m, x, p: F.dropout(x, 0.5, True), "drops numbers at random"),
    "as_many_as_there_are_positive": (lambda m, x, p: x + x[x > 0].sum(), "picks as many elements"),
    "normalised_as_in_training": (
        lambda m, x, p: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
        "normalises over tokens, as in training",
    ),
}


@pytest.mark.parametrize("mix", UNSEEN)
def test_what_no_run_can_see_is_read(mix: str) -> None:
    """Ops that mix tokens, or know places, only from some length on are refused without being run."""
    wrong, named = UNSEEN[mix]
    with pytest.raises(PackingError) as raised:
        checked(wrong, sdpa)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_experts_as_a_dense_product_need_no_contract() -> None:
    """Each expert on each token, weighted, works token by token by the rules alone."""

    def every_expert_on_every_token(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        weights = F.one_hot(tables(model).router(x).argmax(-1), EXPERTS).to(x.dtype)
        return x + torch.einsum("bsd,edf,bse->bsf", x, tables(model).experts, weights)

    checked(every_expert_on_every_token)


def test_copies_of_tokens_pass_where_they_are_told_apart() -> None:
    """As Llama-4 sends every token to every expert: [t, d] -> [e * t, d] -> [e, t, d]; and one by one."""

    def copied(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        each = torch.bmm(rows.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH), tables(model).experts)
        twice = rows.repeat_interleave(2, 0).view(-1, 2, WIDTH)
        return x + (each.sum(0) + twice.sum(1)).view(x.shape)

    checked(copied)
    with pytest.raises(PackingError, match="moves tokens"):
        checked(lambda m, x, p: x.repeat(1, 2, 1).view(x.shape[0], x.shape[1], 2, WIDTH).sum(2))


def test_a_table_is_read_by_gather() -> None:
    """As GPT-J has it in some versions of transformers: a copy of the table for each row of the batch."""

    def gathered(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        table = tables(model).positions.repeat(x.shape[0], 1, 1)
        return x + table.gather(1, p[..., None].repeat(1, 1, WIDTH))

    checked(gathered)
    with pytest.raises(PackingError, match="gather works along the tokens"):
        checked(lambda m, x, p: x + x.gather(1, p[..., None].repeat(1, 1, WIDTH)))


def test_layers_over_channels_pass() -> None:
    """A convolution with a kernel of one token, and a normalisation by fixed moments."""
    moments = torch.linspace(0, 1, WIDTH), torch.linspace(1, 2, WIDTH)

    def channels(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        weight = tables(model).up.weight[..., None]
        wide = F.conv1d(x.transpose(1, 2), weight).transpose(1, 2)
        return x + tables(model).down(wide) + F.batch_norm(x.mT, *moments).mT

    checked(channels)


def test_views_of_nothing_pass() -> None:
    """As a rotation of part of the width has them, where that part is all."""
    checked(lambda m, x, p: x + x[..., :0].unflatten(-1, (2, 0)).flatten(2).sum(-1, keepdim=True))
    checked(lambda m, x, p: torch.cat((x, x[..., :0].unflatten(-1, (2, 0)).flatten(2)), -1))


def test_heads_that_are_expanded_and_merged_pass() -> None:
    """As Falcon-40B has it: K of [b, s, groups, 1, d] broadcast to the query's heads, then flattened."""

    def broadcast(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
        b, s, _ = x.shape
        groups = x.view(b, s, HEADS // 2, 2, HEAD_DIM)
        first = torch.broadcast_to(groups[:, :, :, [-2]], groups.shape).flatten(2, 3)
        return x + first.flatten(2)

    checked(broadcast)


def over_the_batch(layer: Layer, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Causal attention whose tokens are the sequences of the batch."""
    q, k, v = (x.permute(2, 1, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 1, 0, 3)


def test_attention_over_another_axis_is_refused() -> None:
    """That an attention is over tokens is told by where its axes come from, not by where they stand."""
    with pytest.raises(PackingError, match=r"takes a query of shape .* which is not by batch and token"):
        checked(lambda m, x, p: x, over_the_batch)


def test_logits_by_token_and_batch_are_refused() -> None:
    """The rows of logits are the tokens; a model that returns them transposed is not served."""
    gm = exported(Transposed(), "match_attention")
    with pytest.raises(PackingError, match=r"takes the logits of shape .* which is not by batch and token"):
        run(gm, context(), "check_packing")


class OfTheLastToken(nn.Module):
    """A head that reads one token, found by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x[:, [-1]])
        return out


def test_logits_of_the_last_token_alone_are_refused() -> None:
    model = SmallModel(sdpa)
    model.lm_head = OfTheLastToken().requires_grad_(False)  # type: ignore[assignment]
    with pytest.raises(PackingError, match="index looks tokens up by index"):
        run(exported(model, "match_attention"), context(), "check_packing")


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = SmallModel(sdpa)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids, position_ids).transpose(0, 1)


@torch.library.custom_op("ad_flashinfer_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """A kernel of the user's that works token by token."""
    return x * 2


doubled.register_fake(torch.empty_like)


def test_op_of_the_users_is_taken_at_its_word() -> None:
    """No rule can look into it and no run proves it: it is refused until its contract is declared."""
    way_out = r"TOKEN_BY_TOKEN.add\(torch.ops.ad_flashinfer_tests.doubled\)"
    with pytest.raises(PackingError, match=way_out):
        checked(lambda model, x, p: doubled(x))
    ops.TOKEN_BY_TOKEN.add(torch.ops.ad_flashinfer_tests.doubled)
    try:
        checked(lambda model, x, p: doubled(x))
        with pytest.raises(PackingError, match="is given tokens in its last dimension"):
            checked(lambda model, x, p: doubled(x.mT).mT)
    finally:
        ops.TOKEN_BY_TOKEN.discard(torch.ops.ad_flashinfer_tests.doubled)
