"""Deliberately broken copies of every rewrite rule: for each, an oracle of the tests fails.

``MUTATIONS`` is the list. An entry names the transform, breaks one rule of it, and names the oracle that
catches it: logits of the cached model in every kind of step against those of the dense model, as the tests of
the forms use it, or the refusal of a model that must be refused. Each oracle holds without the mutation.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ad_flashinfer_pass import masks, matching, registry
from ad_flashinfer_pass.config import STAGES
from ad_flashinfer_pass.errors import TransformError
from ad_flashinfer_pass.graph import axes, elements
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph import parts as graph_parts
from ad_flashinfer_pass.matching import eager as written_out
from ad_flashinfer_pass.matching import logits, operands, parts
from ad_flashinfer_pass.records import TransformContext, TransformReport
from ad_flashinfer_pass.transforms import (
    cache_latent,
    check_packing,
    classify_mask,
    eliminate_noops,
    expand_flex_attention,
    functionalize,
    insert_cached_attention,
    insert_cached_state,
    keep_hidden_states,
    match_repeat_kv,
    number_by_positions,
    shard,
)
from tests.transforms import test_hand_written as hand_written
from tests.transforms.latent_models import Form, LatentModel
from tests.transforms.serving import assert_serves_like, cached
from tests.transforms.sharding import Together
from tests.transforms.small_models import (
    HEADS,
    SCALE,
    SmallModel,
    additive,
    aten,
    causal,
    context,
    eager,
    repeat_kv,
    sdpa,
    softmax_with_sinks,
)
from tests.transforms.test_check_packing import Transposed
from tests.transforms.test_keep_hidden_states import assert_keeps, kept, leaking

Patch = pytest.MonkeyPatch
FORMS = hand_written.FORMS
WRITES, PACKING, READER = "functionalize", "check_packing", check_packing._Reader


@pytest.fixture(autouse=True)
def _exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of the export is broken: each model is exported once, and the pass gets a copy."""
    export = registry.get("export_model")

    def once(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
        if model not in _EXPORTED:
            _EXPORTED[model] = export(model, ctx)
        return copy.deepcopy(_EXPORTED[model])

    monkeypatch.setitem(registry._TRANSFORMS, "export_model", once)


_EXPORTED: dict[nn.Module, tuple[nn.Module, TransformReport]] = {}


@cache
def built(make: Callable[[], nn.Module]) -> nn.Module:
    return make().eval()


# Oracles. Each is a model of a few layers and what must hold of it.


def serves(make: Callable[[], nn.Module]) -> Callable[[], None]:
    """The cached model gives the logits of the dense one."""

    def check() -> None:
        model = built(make)
        assert_serves_like(cached(model), model)

    return check


def ranks_serve(make: Callable[[], nn.Module]) -> Callable[[], None]:
    """Two ranks together give the logits of the dense model."""

    def check() -> None:
        model = built(make)
        assert_serves_like(Together(model, 2), model)  # type: ignore[arg-type]

    return check


class Recurrent(nn.Module):
    """A gated delta rule behind one convolution; two heads of k, each of which two of v read; a decay of low
    rank; a norm of each head, with heads and tokens in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(29, 32)
        self.qkvz, self.convolution = nn.Linear(32, 96), nn.Parameter(torch.randn(64, 3) / 2)
        self.down, self.up, self.beta = nn.Linear(32, 3), nn.Linear(3, 4), nn.Linear(32, 4)
        self.log_decay = nn.Parameter(torch.randn(4))
        self.output, self.head = nn.Linear(32, 32), nn.Linear(32, 29)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        qkv, z = self.qkvz(x).split([64, 32], -1)
        qkv = torch.ops.ad_flashinfer.causal_conv1d(qkv, self.convolution, None, "silu")
        q, k, v = (each.unflatten(-1, (-1, 8)) for each in qkv.split([16, 16, 32], -1))
        decay = -self.log_decay.exp() * F.softplus(self.up(self.down(x)))
        beta = self.beta(x).sigmoid()
        o = torch.ops.ad_flashinfer.gated_delta_rule(q, k, v, decay, beta, True).reshape(-1, 8)
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * F.silu(z.reshape(-1, 8))
        logits: Tensor = self.head(x + self.output(o.reshape(x.shape)))
        return logits


def refuses(make: Callable[[], nn.Module]) -> Callable[[], None]:
    """The pass stops."""
    return refused(lambda: cached(built(make)))


def refused(run: Callable[[], object]) -> Callable[[], None]:
    """The pass stops."""

    def check() -> None:
        try:
            run()
        except TransformError:
            return
        raise AssertionError("not refused")

    return check


def chunked(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    rows, columns = p[:, None, :, None], p[:, None, None, :]
    visible = (columns <= rows) & (columns // 4 == rows // 4)
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)


def alibi(factor: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        slopes = torch.exp2(-torch.arange(1.0, HEADS + 1))[:, None, None]
        bias = slopes * (p[:, None, None, :] - p[:, None, :, None]) / factor
        return ((q @ repeat_kv(k).mT + bias + additive(causal(p))) * factor).softmax(-1) @ repeat_kv(v)

    return attend


def two_convolutions(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    for weight in (torch.ones(x.shape[-1], 3), torch.full((x.shape[-1], 3), -0.5)):
        x = x + torch.ops.ad_flashinfer.causal_conv1d(x, weight)
    return x


def rounded(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + (x * 3).to(torch.int32).to(torch.float32)


def averaged(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


def written_in_place(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k = q.contiguous(), k.clone()
    first = k[..., :2]
    q *= 0.35
    k.mul_(2)
    first *= 3
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)


def from_one(model: SmallModel, x: Tensor, p: Tensor) -> Tensor:
    return x + torch.arange(1, x.shape[1] + 1)[:, None]


def low_floor(logits: Tensor, p: Tensor) -> Tensor:
    return torch.clamp_min(logits, -0.5) + additive(causal(p))


def prefix(logits: Tensor, p: Tensor) -> Tensor:
    return logits.masked_fill(~(causal(p) | (p[:, None, None, :] < 3)), float("-inf"))


ORACLES: dict[str, Callable[[], None]] = {
    "two_layers": serves(lambda: SmallModel(sdpa, FORMS["sdpa_expanded"])),
    "two_ranks": ranks_serve(lambda: SmallModel(sdpa, FORMS["sdpa_expanded"])),
    "two_ranks_of_states": ranks_serve(Recurrent),
    "states": serves(lambda: SmallModel(sdpa, mix=two_convolutions)),
    "scaled": serves(lambda: SmallModel(FORMS["scaled_query"])),
    "grouped": serves(lambda: SmallModel(FORMS["grouped_matmul"])),
    "tiled": serves(lambda: SmallModel(FORMS["tiled"])),
    "cap": serves(lambda: SmallModel(eager(scores=capped))),
    "sinks": serves(lambda: SmallModel(eager(weights=softmax_with_sinks))),
    "sinks_by_scaling": serves(lambda: SmallModel(FORMS["sinks_by_scaling"])),
    "window": serves(lambda: SmallModel(FORMS["sdpa_window"])),
    "chunk": serves(lambda: SmallModel(hand_written.form(chunked))),
    "alibi": serves(lambda: SmallModel(hand_written.form(alibi(1.0)))),
    "scaled_alibi": serves(lambda: SmallModel(hand_written.form(alibi(0.5)))),
    "flex_cap": serves(lambda: SmallModel(FORMS["flex_window_and_cap"])),
    "heads_last": serves(lambda: SmallModel(FORMS["heads_last"])),
    "casts_that_round": serves(lambda: SmallModel(sdpa, mix=rounded)),
    "latent": serves(lambda: LatentModel(Form(rank=10, value=10))),
    "two_latents": serves(lambda: LatentModel(Form(flaw="other_latent"))),
    "activation": serves(lambda: LatentModel(Form(flaw="activation"))),
    "rotations": serves(lambda: LatentModel(Form(flaw="rope_of_heads"))),
    "refused_floor": refuses(lambda: SmallModel(eager(mask=low_floor))),
    "refused_prefix": refuses(lambda: SmallModel(eager(mask=prefix))),
    "refused_mean_over_tokens": refuses(lambda: SmallModel(sdpa, mix=averaged)),
    "written_in_place": serves(lambda: SmallModel(hand_written.form(written_in_place))),
    "refused_ramp_from_one": refuses(lambda: SmallModel(sdpa, mix=from_one)),
    "refused_number_of_tokens": refuses(lambda: SmallModel(sdpa, mix=lambda m, x, p: x / x.shape[1])),
    "refused_logits_by_token_and_batch": refuses(Transposed),
    "kept": lambda: assert_keeps(SmallModel(sdpa, FORMS["sdpa_expanded"]), ["layers.1", "layers.0"]),
    "refused_two_results": refused(lambda: kept(leaking(), ["parts.leaking"])),
    "refused_readers": refuses(lambda: SmallModel(hand_written.attend_with_weights)),
}


def capped(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT * SCALE / hand_written.CAP) * hand_written.CAP


# Mutations. Each breaks one thing.


def matches_with(patch: Patch, **changes: Any) -> None:
    """Every match has these values in place of its own."""
    for name in ("read_sdpa", "read_eager"):
        read = getattr(matching, name)

        def broken(node: fx.Node, read: Any = read) -> matching.AttentionMatch:
            match = read(node)
            for key, value in changes.items():
                setattr(match, key, value(match) if callable(value) else value)
            return match

        patch.setattr(matching, name, broken)


def swapped_k_and_v(patch: Patch) -> None:
    for name in ("read_sdpa", "read_eager"):
        read = getattr(matching, name)

        def broken(node: fx.Node, read: Any = read) -> matching.AttentionMatch:
            match = read(node)
            key, value = match.key, match.value
            match.key = matching.Operand(value.node, with_axes(value.dims, match.axes.value, match.axes.key))
            match.value = matching.Operand(key.node, with_axes(key.dims, match.axes.key, match.axes.value))
            return match

        patch.setattr(matching, name, broken)


def with_axes(dims: axes.Dims, old: axes.Dims, new: axes.Dims) -> axes.Dims:
    return tuple(new[old.index(dim)] for dim in axes.whole(dims))


def classes_with(patch: Patch, **changes: Any) -> None:
    """Every mask is classified with these values."""
    apply = classify_mask._apply

    def broken(gm: fx.GraphModule, node: fx.Node, found: masks.Certificate, slopes: Any) -> None:
        values = {k: v(getattr(found.mask_class, k)) for k, v in changes.items()}
        apply(
            gm,
            node,
            dataclasses.replace(found, mask_class=dataclasses.replace(found.mask_class, **values)),
            slopes,
        )

    patch.setattr(classify_mask, "_apply", broken)


def everything_is_causal(patch: Patch) -> None:
    certificate = masks.Certificate(
        masks.MaskClass(),
        (1, 64),
        0,
        (),
        reads_positions=False,
        starts_anywhere=True,
        shifts_rows=False,
    )
    patch.setattr(masks, "prove", lambda mask, max_seq_len: certificate)


def tile_for_repeat(patch: Patch) -> None:
    """Heads 0 1 0 1 in place of 0 0 1 1."""

    def replace(node: fx.Node, target: Any, source: fx.Node, repeats: int, dim: int) -> None:
        g.replace_op(node, aten.repeat.default, source, [repeats if d == dim else 1 for d in range(4)])

    patch.setattr(match_repeat_kv, "g", Shim(g, replace_op=replace))


class Shim:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **functions: Any) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def repeat_for_tile(patch: Patch) -> None:
    def broken(node: fx.Node, dims: axes.Dims) -> axes.Dims | None:
        (times,) = [n for n in g.args(node)[1] if n != 1]
        found = axes.regrouped((dims[1],), (g.shape(g.args(node)[0])[1], times))
        return None if found is None else (dims[0], found[0], *dims[2:])

    patch.setattr(axes, "_without_tiles", broken)


def inverse_permutation(patch: Patch) -> None:
    order = axes.order_of

    def broken(node: fx.Node) -> list[int] | None:
        found = order(node)
        return None if found is None else [found.index(dim) for dim in range(len(found))]

    patch.setattr(axes, "order_of", broken)


def group_first(patch: Patch) -> None:
    patch.setattr(parts.SiteAxes, "heads", property(lambda self: self.group + self.kv_heads))


def operand_scale_dropped(patch: Patch) -> None:
    taken = operands._taken
    patch.setattr(operands, "_taken", lambda *args: dataclasses.replace(taken(*args), factor=1.0))


def sink_share_dropped(patch: Patch) -> None:
    scaling = written_out.sinks_by_scaling
    patch.setattr(written_out, "sinks_by_scaling", lambda *args: (None, scaling(*args)[1]))


def any_floor(patch: Patch) -> None:
    patch.setattr(logits, "_hides", lambda fill, factor: True)


def nothing(*args: Any) -> int:
    return 0


def same_view(graph: fx.Graph, view: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
    return view


def same_source(graph: fx.Graph, view: fx.Node, source: fx.Node, new: fx.Node) -> fx.Node:
    return source


def replaced(owner: Any, name: str, by: Callable[..., Any]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, by)


def writes_ignored(patch: Patch) -> None:
    def broken(self: Any, write: fx.Node) -> None:
        write.replace_all_uses_with(write.all_input_nodes[0])
        write.graph.erase_node(write)

    patch.setattr(functionalize._Memory, "replace", broken)


def any_ramp(patch: Patch) -> None:
    patch.setattr(number_by_positions, "_is_numbering", lambda node, size: g.is_op(node, aten.arange))


def casts_dropped(patch: Patch) -> None:
    def same_shape(a: fx.Node, b: fx.Node) -> bool:
        return g.same_shape(g.shape(a), g.shape(b))

    patch.setattr(eliminate_noops, "_same_value_type", same_shape)


def ignored_readers(patch: Patch) -> None:
    patch.setattr(logits.LogitsReader, "check_readers", lambda self, softmax: None)
    patch.setattr(READER, "read", nothing)


def caches(choose: Callable[[list[fx.Node]], fx.Node]) -> Callable[[Patch], None]:
    """A site gets another site's cache."""

    def mutate(patch: Patch) -> None:
        add, made = insert_cached_attention._add_cache, []

        def broken(*args: Any) -> fx.Node:
            made.append(add(*args))
            return choose(made)

        patch.setattr(insert_cached_attention, "_add_cache", broken)

    return mutate


def stale_lengths(patch: Patch) -> None:
    """Kernels get the lengths before the step."""
    insert = insert_cached_attention._insert_inputs

    def broken(gm: fx.GraphModule, ctx: TransformContext) -> dict[str, fx.Node]:
        inputs = insert(gm, ctx)
        with gm.graph.inserting_after(inputs["cu_num_pages"]):
            stale = g.call_op(gm.graph, aten.clamp_min.default, inputs["input_pos"], 1)
        return {**inputs, "seq_len_with_cache": stale}

    patch.setattr(insert_cached_attention, "_insert_inputs", broken)


def states(swap: Callable[[list[Any], list[Any]], None]) -> Callable[[Patch], None]:
    """An op with a state gets other arguments: of the first one's and its own."""

    def mutate(patch: Patch) -> None:
        insert = insert_cached_state._insert

        def broken(gm: fx.GraphModule, *args: Any) -> None:
            insert(gm, *args)
            op = torch.ops.ad_flashinfer.cached_causal_conv1d.default
            first, *_, last = [*gm.graph.find_nodes(op="call_function", target=op)] * 2
            own = list(last.args)
            swap(list(first.args), own)
            last.args = tuple(own)

        patch.setattr(insert_cached_state, "_insert", broken)

    return mutate


def cut_elsewhere(patch: Patch) -> None:
    """W_UK and W_UV change places within the rows of a head."""
    cut = cache_latent._cut

    def broken(rows: Tensor, number: int) -> Any:
        found = cut(rows, number)
        return found._replace(start=found.stride - found.length - found.start)

    patch.setattr(cache_latent, "_cut", broken)


def transposed_up(patch: Patch) -> None:
    """W_UV is read as its transpose, of a square one."""

    def broken(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if target is torch.ops.ad_flashinfer.attention.default:
            args = (*args[:-1], g.call_op(graph, torch.ops.aten.transpose.int, args[-1], 1, 2))
        return g.call_op(graph, target, *args, **kwargs)

    patch.setattr(cache_latent, "g", Shim(g, call_op=broken))


def looked_through(op: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(elements, "_COPIES", (*elements._COPIES, op))


def first_pool(first: list[Any], own: list[Any]) -> None:
    own[4] = first[4]


def never_new(first: list[Any], own: list[Any]) -> None:
    own[-2] = own[-3]  # cu_seqlen, which is 0 for the first sequence alone


def first_row_for_all(patch: Patch) -> None:
    original = registry.get("gather_logits_before_lm_head")

    def broken(model: nn.Module, ctx: TransformContext) -> tuple[nn.Module, TransformReport]:
        gm, report = original(model, ctx)
        assert isinstance(gm, fx.GraphModule)
        (select,) = gm.graph.find_nodes(op="call_function", target=aten.index_select.default)
        with gm.graph.inserting_before(select):
            zero = g.call_op(gm.graph, aten.zeros_like.default, select.args[2])
        select.args = (*select.args[:2], zero)
        g.finish(gm)
        return gm, report

    patch.setitem(registry._TRANSFORMS, "gather_logits_before_lm_head", broken)


def flex_without(name: str) -> Callable[[Patch], None]:
    def mutate(patch: Patch) -> None:
        inlined = expand_flex_attention._Expansion._inlined

        def broken(self: Any, mod: str, graph: fx.Node, first: list[fx.Node], buffers: Any) -> fx.Node:
            return first[0] if mod == name else inlined(self, mod, graph, first, buffers)

        patch.setattr(expand_flex_attention._Expansion, "_inlined", broken)

    return mutate


def last_within(gm: fx.GraphModule, path: str) -> fx.Node:
    """The last node of a module, whatever it is."""
    return [node for node in gm.graph.nodes if f"model.{path}" in keep_hidden_states._modules(node)][-1]


def first_within(gm: fx.GraphModule, path: str) -> fx.Node:
    nodes = (node for node in gm.graph.nodes if f"model.{path}" in keep_hidden_states._modules(node))
    return next(node for node in nodes if g.is_tensor(node) and len(g.shape(node)) == 3)


def same_columns(patch: Patch) -> None:
    """All modules write to the first ones."""

    def broken(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
        return g.call_op(graph, target, *args[:2], 0)

    patch.setattr(keep_hidden_states, "g", Shim(g, call_op=broken))


def sums_of_one_rank(patch: Patch) -> None:
    patch.setattr(shard._Sharder, "_reduce", lambda self, node, part: self._replace(node, part))


def same_part_for_all(patch: Patch) -> None:
    patch.setattr(shard._Sharder, "_share", lambda self, size: ((0, size // self.size),))


def first_of_shared(patch: Patch) -> None:
    def broken(kept: graph_parts.Ranges, group: int) -> graph_parts.Ranges:
        return kept if group == 1 else ((0, graph_parts.length(kept) // group),)

    patch.setattr(graph_parts, "_shared", broken)


def keys_for_queries(patch: Patch) -> None:
    join = graph_parts.Parts.join

    def broken(self: graph_parts.Parts, op: Any) -> None:
        join(self, op)
        slices = self.gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
        first, second, _ = sorted(slices, key=lambda node: node.args[2])
        first.args, second.args = second.args, first.args

    patch.setattr(graph_parts.Parts, "join", broken)


@dataclass(frozen=True)
class Mutation:
    """One broken rule."""

    transform: str
    broken: str
    mutate: Callable[[Patch], None]
    caught_by: str
    """The oracle's name."""


def of(transform: str, broken: str, mutate: Callable[[Patch], None], caught_by: str) -> Mutation:
    return Mutation(transform, broken, mutate, caught_by)


MATCH, CLASSIFY, INSERT = "match_attention", "classify_mask", "insert_cached_attention"
LATENT, KEEP = "cache_latent", "keep_hidden_states"
MUTATIONS = [
    of("eliminate_noops", "casts dropped", casts_dropped, "casts_that_round"),
    of("expand_flex_attention", "score_mod dropped", flex_without("score_mod"), "flex_cap"),
    of("match_repeat_kv", "heads tiled", tile_for_repeat, "two_layers"),
    of(MATCH, "scale dropped", lambda p: matches_with(p, scale=1.0), "two_layers"),
    of(MATCH, "scale doubled", lambda p: matches_with(p, scale=lambda m: m.scale * 2), "two_layers"),
    of(MATCH, "scale of the query dropped", operand_scale_dropped, "scaled"),
    of(MATCH, "K and V swapped", swapped_k_and_v, "two_layers"),
    of(MATCH, "cap dropped", lambda p: matches_with(p, logit_cap=None), "cap"),
    of(MATCH, "cap halved", lambda p: matches_with(p, logit_cap=lambda m: m.logit_cap / 2), "cap"),
    of(MATCH, "sinks dropped", lambda p: matches_with(p, sinks=None), "sinks"),
    of(MATCH, "sinks' scaling dropped", sink_share_dropped, "sinks_by_scaling"),
    of(MATCH, "mask dropped", lambda p: matches_with(p, mask_terms=lambda m: [], is_causal=True), "window"),
    of(MATCH, "mask's factor dropped", lambda p: matches_with(p, mask_terms=unscaled_terms), "scaled_alibi"),
    of(MATCH, "wrong KV head of a group", group_first, "grouped"),
    of(MATCH, "tiles read as repeats", repeat_for_tile, "tiled"),
    of(MATCH, "permutations read backwards", inverse_permutation, "heads_last"),
    of(MATCH, "any floor accepted", any_floor, "refused_floor"),
    of(MATCH, "other readers of the logits ignored", ignored_readers, "refused_readers"),
    of(CLASSIFY, "window one longer", lambda p: classes_with(p, sliding_window=lambda w: w + 1), "window"),
    of(CLASSIFY, "window one shorter", lambda p: classes_with(p, sliding_window=lambda w: w - 1), "window"),
    of(CLASSIFY, "window dropped", lambda p: classes_with(p, sliding_window=lambda w: None), "window"),
    of(CLASSIFY, "chunk one longer", lambda p: classes_with(p, chunk=lambda c: c + 1), "chunk"),
    of(CLASSIFY, "chunk dropped", lambda p: classes_with(p, chunk=lambda c: None), "chunk"),
    of(CLASSIFY, "ALiBi dropped", lambda p: classes_with(p, alibi_slopes=lambda s: None), "alibi"),
    of(CLASSIFY, "ALiBi heads reversed", lambda p: classes_with(p, alibi_slopes=lambda s: s[::-1]), "alibi"),
    of(CLASSIFY, "no proof", everything_is_causal, "refused_prefix"),
    of(WRITES, "writes ignored", writes_ignored, "written_in_place"),
    of(WRITES, "views stay as they were", replaced(functionalize, "_again", same_view), "written_in_place"),
    of(WRITES, "parts lost", replaced(functionalize, "_with_part", same_source), "written_in_place"),
    of("number_by_positions", "from any start", any_ramp, "refused_ramp_from_one"),
    of(PACKING, "nothing checked", replaced(READER, "read", nothing), "refused_mean_over_tokens"),
    of(PACKING, "works along tokens", replaced(READER, "refuse_tokens", nothing), "refused_mean_over_tokens"),
    of(PACKING, "any layout", replaced(READER, "check_layout", nothing), "refused_logits_by_token_and_batch"),
    of(PACKING, "counts", replaced(check_packing, "_check_numbers", nothing), "refused_number_of_tokens"),
    of(LATENT, "rows cut elsewhere", cut_elsewhere, "latent"),
    of(LATENT, "W_UV transposed", transposed_up, "latent"),
    of(LATENT, "K and V of any latents", replaced(cache_latent, "_origin", nothing), "two_latents"),
    of(LATENT, "activations ignored", looked_through(aten.silu), "activation"),
    of(LATENT, "a head's own rotation ignored", looked_through(aten.mul), "rotations"),
    of(INSERT, "every layer has the first cache", caches(lambda made: made[0]), "two_layers"),
    of(INSERT, "lengths without this step's tokens", stale_lengths, "two_layers"),
    of(KEEP, "a value within", replaced(keep_hidden_states, "result_of", first_within), "kept"),
    of(KEEP, "the last value", replaced(keep_hidden_states, "result_of", last_within), "refused_two_results"),
    of(KEEP, "one over the other", same_columns, "kept"),
    of("shard", "sums of one rank alone", sums_of_one_rank, "two_ranks"),
    of("shard", "all ranks have the first part", same_part_for_all, "two_ranks"),
    of("shard", "all ranks have the first heads", same_part_for_all, "two_ranks_of_states"),
    of("shard", "heads of v read the first of k", first_of_shared, "two_ranks_of_states"),
    of("shard", "k for q behind a convolution", keys_for_queries, "two_ranks_of_states"),
    of("insert_cached_state", "every layer has the first pool", states(first_pool), "states"),
    of("insert_cached_state", "no sequence begins but the first", states(never_new), "states"),
    of("gather_logits_before_lm_head", "the first row for all", first_row_for_all, "two_layers"),
]  # fmt: skip


def unscaled_terms(match: matching.AttentionMatch) -> list[matching.MaskTerm]:
    return [dataclasses.replace(term, factor=1.0) for term in match.mask_terms]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", sorted({mutation.caught_by for mutation in MUTATIONS}))
def test_oracle_holds_of_the_pass_as_it_is(name: str) -> None:
    """What catches a mutation does not fail by itself."""
    ORACLES[name]()


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.transform}-{m.broken.replace(' ', '_')}")
def test_broken_rule_is_caught(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle fails, or the pass refuses what the broken rule made."""
    mutation.mutate(monkeypatch)

    with pytest.raises((AssertionError, TransformError)):
        ORACLES[mutation.caught_by]()


def test_every_transform_that_rewrites_is_in_the_list() -> None:
    """Of those between export and compilation; fusions have tests of their own numbers."""
    stages = STAGES[STAGES.index("post_export") : STAGES.index("compile")]
    # The one allocates; the other rewrites on CUDA alone, and its own tests compare before and after.
    others = {"initialize_cache", "tune_experts"}
    entries = context().config.transforms
    rewriting = {name for name, entry in entries.items() if entry.stage in stages}
    rewriting = {name for name in rewriting if not name.startswith("fuse_")}

    assert rewriting - others <= {mutation.transform for mutation in MUTATIONS}
