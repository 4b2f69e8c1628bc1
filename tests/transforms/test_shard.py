"""The parts of a model, computed together, are the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, UnsupportedError
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.models.quantized.modules import QuantizedLinear
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from tests import architectures
from tests.models import float8_checkpoints, four_bit_checkpoints
from tests.transforms.serving import assert_serves_like
from tests.transforms.sharding import Together
from tests.transforms.small_models import VOCAB, SmallModel, count, sdpa

_ours = torch.ops.ad_flashinfer
# Linears that no rank can have a part of, by family: those that a norm over all heads reads.
_WHOLE = {"olmo2": 2, "llama_gqa4": 2, "mixtral": 1}
"""A layer's: OLMo 2's query and key, the only KV head's key and value, and a router."""

_LENGTH = {"max_seq_len": 128}
"""That of test_end_to_end, which exports the same models: a graph is kept by it."""


class Logits(nn.Module):
    """A model of transformers as a function of tokens and positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


def check(module: nn.Module, size: int, tolerance: float = 5e-4, **config: Any) -> Together:
    together = Together(module, size, **config)
    assert_serves_like(together, Logits(module), tolerance)  # type: ignore[arg-type]
    return together


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_two_ranks_compute_the_model(name: str) -> None:
    """Every kind of step, against transformers' logits of whole sequences; half of all that is large."""
    module = architectures.random_model(architectures.CONFIGS[name](2))
    together = check(module, 2, **_LENGTH)
    (report, _) = together.reports
    assert together.are_logits_alike
    assert len(report.skipped) == 2 * _WHOLE.get(name, 0)
    reads = [rank.weights for rank in together.ranks]
    whole = sum(p.numel() for p in module.parameters())
    if not report.skipped:
        # Embeddings and norms are whole.
        assert all(4 * read.bytes < 4 * 0.52 * 4 * whole for read in reads)
    num_heads = module.config.num_key_value_heads if name != "gpt_neox" else 4
    assert {cache.shape[2] for cache in together.ranks[0].paged} == {max(1, num_heads // 2)}


@pytest.mark.parametrize("name", ["llama_gqa4", "qwen3", "gpt_neox", "mixtral"])
def test_four_ranks_compute_the_model(name: str) -> None:
    """Where there are fewer KV heads than ranks, each has the one that its heads read."""
    together = check(architectures.random_model(architectures.CONFIGS[name](2)), 4, **_LENGTH)
    assert {cache.shape[2] for cache in together.ranks[0].paged} == {1}


@pytest.mark.parametrize(
    ("family", "splits"),
    [
        ("deepseek_v3", {"kv_b_proj": (80, 16), "q_b_proj": (48, 24)}),
        ("gpt_oss", {"sinks": (2,), "gate_up_proj_part": (4, 64, 128)}),
        ("qwen3_next", {"experts_gate_up_proj": (4, 32, 64)}),
        ("falcon", {"query_key_value": (32, 64)}),
        ("gpt2", {"c_fc": (64, 64)}),
        ("opt", {}),
    ],
)
def test_other_families(family: str, splits: dict[str, tuple[int, ...]]) -> None:
    """A latent and the projections of heads from it, sinks, experts beside states, fused projections of one
    KV head, transposed weights, tables of positions."""
    together = check(architectures.random_model(architectures.small_config(family, fewest_layers=2)), 2)
    for name, shape in splits.items():
        assert shape in together.sizes(name)


@pytest.mark.parametrize(
    ("family", "size", "changes", "channels", "state"),
    [
        ("qwen3_next", 2, {}, 64, (2, 16, 16)),
        ("qwen3_5_text", 4, {}, 48, (1, 16, 16)),
        ("kimi_linear", 4, {}, 48, (1, 16, 16)),
        ("nemotron_h", 2, {"n_groups": 2}, 80, (2, 32, 8)),
        ("nemotron_h", 4, {"n_groups": 4}, 48, (1, 32, 8)),
        ("falcon_h1", 4, {}, 48, (1, 32, 8)),
        ("zamba2", 2, {"mamba_ngroups": 2}, 80, (4, 16, 8)),
        ("jamba", 4, {}, 32, (32, 8)),
        ("mamba", 2, {}, 64, (64, 8)),
        ("lfm2", 4, {}, 16, None),
    ],
)
def test_ranks_have_the_states_of_their_heads(
    family: str, size: int, changes: dict[str, Any], channels: int, state: tuple[int, ...] | None
) -> None:
    """And the channels that they read: a head of K, or a group of B and C, that several ranks read is on
    each. Projections by rows of q, k, v and z, or of z, x, B, C and dt; gates of low rank; a norm of whole
    groups; time steps, B and C of all channels, which are a sum of the ranks."""
    config = architectures.small_config(family, fewest_layers=2, **changes)
    together = check(architectures.random_model(config), size)
    pools = together.ranks[0].caches
    assert pools["conv_state_0"].shape[1] == channels
    assert state is None or tuple(pools["recurrent_state_0"].shape[1:]) == state
    if state:  # one convolution for each, of all that it reads
        assert sum("conv" in name for name in pools) == sum("recurrent" in name for name in pools)
    for name, _ in together.graph.named_parameters():
        if any(each in name for each in ("in_proj", "out_proj", "x_proj", "conv1d", "f_b_proj", "_conv_")):
            assert name.rstrip("_").endswith("_part"), name


@pytest.mark.parametrize(
    ("family", "size", "changes", "reason"),
    [
        ("mamba2", 2, {}, r"node pow_\d+ \(.* reads all of what would be cut"),
        ("nemotron_h", 4, {"n_groups": 2}, "has 64 elements that belong together"),
        ("qwen3_next", 4, {}, "has 2 elements that belong together"),
        (
            "qwen3_5_text",
            6,
            {
                **{"linear_num_key_heads": 4, "linear_num_value_heads": 12},
                **{"num_attention_heads": 6, "num_key_value_heads": 6},
            },
            "has 3 heads that read one",
        ),
        (
            "falcon_h1",
            6,
            {
                **{"mamba_n_groups": 4, "mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_ssm": 96},
                **{"num_attention_heads": 6, "num_key_value_heads": 3},
            },
            "has 3 heads that read one",
        ),
    ],
)
def test_what_mixes_heads_of_several_ranks_keeps_states_whole(
    family: str, size: int, changes: dict[str, Any], reason: str
) -> None:
    """A norm over all channels, or over a group of them that ranks would share; rows of a projection by heads
    of K where there are fewer of these than ranks; two heads a rank of which three read one of K, so that the
    first rank could have its own and the second could not."""
    config = architectures.small_config(family, fewest_layers=2, **changes)
    together = check(architectures.random_model(config), size)
    pools = together.ranks[0].caches
    assert pools["recurrent_state_0"].shape[1] == (4 if size < 6 else 12)
    assert any(re.search(reason, skip.reason) for skip in together.reports[0].skipped)


def test_sums_of_parallel_branches_are_one() -> None:
    """GPT-NeoX adds attention and MLP; so does a mixture with a shared expert."""
    neox = Together(architectures.random_model(architectures.CONFIGS["gpt_neox"](2)), 2, **_LENGTH)
    assert count(neox.graph, _ours.all_reduce) == 2
    config = architectures.small_config("deepseek_v3", fewest_layers=2)
    shared = Together(architectures.random_model(config), 2)
    assert count(shared.graph, _ours.all_reduce) == 4


def test_the_vocabulary_need_not_be_a_multiple() -> None:
    """131 rows: 66 and 65; tied to the embeddings, which are in memory once."""
    config = architectures.CONFIGS["qwen2"](1)
    config.vocab_size, config.tie_word_embeddings = 131, True
    together = check(architectures.random_model(config), 2)
    heads = [dict(rank.module.named_parameters())["model_lm_head_weight_part"] for rank in together.ranks]
    assert [tuple(head.shape) for head in heads] == [(66, 64), (65, 64)]
    # In memory once: the embeddings, of which the head is a view.
    memory = {p.untyped_storage().data_ptr() for p in together.graph.parameters() if p.shape[-1] == 64}
    large = [p for p in together.graph.parameters() if p.shape[0] in (66, 131)]
    assert len(large) == 2
    assert len({p.untyped_storage().data_ptr() for p in large} & memory) == 1


@pytest.mark.parametrize("form", ["modelopt", "compressed_dynamic", "compressed_weights", "block"])
def test_float8_checkpoints(form: str, tmp_path: Path) -> None:
    """Scales are cut with their weights, in float64, where no activation is rounded the other way.

    A token's scale over all of its columns is another where a rank has some: that makes less of a difference
    than the rounding does.
    """
    config = float8_checkpoints.small_config(256, 512, 2)
    float8_checkpoints.write(tmp_path, float8_checkpoints.FORMATS[form], config=config)
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module.double()
    if form == "compressed_dynamic":
        ids, together = torch.arange(12)[None], Together(module, 2)
        rounded = Logits(module)(ids, ids)
        for linear in module.modules():
            if isinstance(linear, QuantizedLinear):
                linear.activation = "none"
        found = together.step([SequenceStep(ids[0].tolist(), 0, [1, 2, 3])])
        assert (found - rounded[:, -1]).abs().max() < (Logits(module)(ids, ids) - rounded).abs().max()
    else:
        together = check(module, 2, 1e-9)
    scales = {"block": (2, 2), "compressed_dynamic": (256, 1), "compressed_weights": (256, 1), "modelopt": ()}
    assert set(together.sizes("down_proj_weight_scale")) == {scales[form]}
    told = [note for note in together.reports[0].notes if "largest magnitude" in note]
    assert bool(told) == (form == "compressed_dynamic")


def test_a_block_of_one_scale_is_not_cut(tmp_path: Path) -> None:
    """192 columns are one block and a half: those linears stay whole, and it says why."""
    config = float8_checkpoints.small_config(256, 192, 2)
    float8_checkpoints.write(tmp_path, float8_checkpoints.FORMATS["block"], config=config)
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module.double()
    together = check(module, 2, 1e-9)
    whole = [skip.reason for skip in together.reports[0].skipped]
    assert sum("128 elements that belong together" in reason for reason in whole) == 2


@pytest.mark.parametrize("form", ["block", "compressed_block"])
def test_a_block_that_two_ranks_would_share_is_not_cut(form: str, tmp_path: Path) -> None:
    """Query heads of 192 rows are a block and a half, not two blocks of 96."""
    config = architectures.small_config(
        "qwen3", fewest_layers=2, hidden_size=256, num_attention_heads=6, head_dim=32, intermediate_size=512
    )
    float8_checkpoints.write(tmp_path, float8_checkpoints.FORMATS[form], config=config)
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module.double()
    assert (192, 256) in check(module, 2, 1e-6).sizes("q_proj")


def test_mxfp4_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up by turns, biases that one rank adds, a scale for 32 columns, which are not cut."""
    for width, num_whole in ((128, 0), (96, 2)):
        config = four_bit_checkpoints.gpt_oss()
        config.intermediate_size = width
        monkeypatch.setattr(four_bit_checkpoints, "gpt_oss", lambda config=config: config)
        folder = tmp_path / str(width)
        four_bit_checkpoints.write_mxfp4(folder)
        module = load_model(AutoDeployConfig(model=str(folder), device="cpu")).module
        skipped = check(module, 2).reports[0].skipped
        assert sum("32 elements that belong together" in skip.reason for skip in skipped) == num_whole


def test_linears_of_integers(tmp_path: Path) -> None:
    """With scales and zero points of groups."""
    config = four_bit_checkpoints.llama()
    config.intermediate_size = 128
    four_bit_checkpoints.write_integers(tmp_path, four_bit_checkpoints.INTEGERS["awq"], config=config)
    module = load_model(AutoDeployConfig(model=str(tmp_path), device="cpu")).module
    assert not check(module, 2).reports[0].skipped


def test_each_rank_reads_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    """Of float8 experts and plain weights: what is in its memory is the parts, as a whole model's are cut."""
    config = architectures.small_config(
        "qwen3_moe", hidden_size=128, moe_intermediate_size=256, num_hidden_layers=2
    )
    form = float8_checkpoints.FORMATS["block"]
    form = form._replace(settings={**form.settings, "modules_to_not_convert": ["lm_head", "mlp.gate"]})
    float8_checkpoints.write(tmp_path, form, config=config)
    keys: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "max_seq_len": 64}
    together = Together(load_model(AutoDeployConfig(**keys)).module, 2)
    for rank in range(2):
        loaded = load_model(AutoDeployConfig(**keys, world_size=2))
        assert all(isinstance(parameter, FakeTensor) for parameter in loaded.module.parameters())
        model, _ = transform_module(loaded.module, loaded.resolved, rank=rank, stored=loaded.stored)
        wanted = dict(together.ranks[rank].module.named_parameters())
        found = dict(model.module.named_parameters())
        assert found.keys() == wanted.keys()
        for name, parameter in found.items():
            assert torch.equal(parameter.view(torch.uint8), wanted[name].view(torch.uint8)), name
            if name.endswith("_part"):
                assert parameter.is_contiguous()
                assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_random_weights_are_the_same_for_any_number_of_ranks() -> None:
    """Each is drawn by its name, and then cut."""
    keys: dict[str, Any] = {"device": "cpu", "max_seq_len": 64, "skip_loading_weights": True}
    parts = []
    for size in (2, 2, 4):
        loaded = load_model(
            AutoDeployConfig(**keys, world_size=size, model_kwargs={"num_key_value_heads": 4})
        )
        model, _ = transform_module(loaded.module, loaded.resolved, rank=1, stored=loaded.stored)
        weights = dict(model.module.named_parameters())
        parts.append(weights["model_model_layers_0_mlp_down_proj_weight_part"])
    assert torch.equal(parts[0], parts[1])
    assert parts[2].shape[1] * 2 == parts[0].shape[1]
    assert 0.5 < float(parts[0].std() * parts[0].shape[0] ** 0.5) < 2


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "Qwen3Config", "Gemma3TextConfig", "SmolLM3Config", "Phi3Config"]
)
def test_what_transformers_splits_is_split(name: str) -> None:
    """Each linear of base_model_tp_plan, which the transform does not read; Phi's, which it gathers, too."""
    family = {"Gemma3TextConfig": "gemma3_text"}.get(name, name.removesuffix("Config").lower())
    config = architectures.CONFIGS.get(family, architectures.CONFIGS["llama_mha"])(1)
    together = Together(architectures.random_model(config), 2)
    names = [name for name, _ in together.graph.named_parameters()]
    for pattern in config.base_model_tp_plan or ():
        if pattern.endswith("_proj"):
            place = pattern.replace("*", "0").replace(".", "_")
            assert any(place in each and each.rstrip("_").endswith("_part") for each in names), pattern


def test_heads_that_cannot_be_shared_are_refused() -> None:
    """By name, with the numbers and the way out."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=6
    )
    module = architectures.random_model(config)
    with pytest.raises(UnsupportedError, match="4 ranks cannot have equal parts of this attention's 6 heads"):
        Together(module, 4)


def test_ranks_have_the_same_number_of_kv_heads() -> None:
    """Of 4 KV heads that 6 ranks read, the second one would have two, and fewer pages than the first."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    with pytest.raises(UnsupportedError, match="12 heads and 4 of K and V: set a world_size"):
        Together(architectures.random_model(config), 6)


class Joined(nn.Module):
    """Attention and MLP side by side, which one linear takes together."""

    def __init__(self, width: int, has_norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCAB, 32)
        self.qkv, self.up = nn.Linear(32, 96), nn.Linear(32, width)
        self.norm = nn.LayerNorm(width) if has_norm else nn.SiLU()
        self.down, self.head = nn.Linear(32 + width, 32), nn.Linear(32, VOCAB)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        q, k, v = (each.unflatten(-1, (4, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x + self.down(torch.cat([heads, self.norm(self.up(x))], -1)))
        return logits


@pytest.mark.parametrize(("width", "has_norm", "size"), [(32, False, 2), (32, True, 4), (96, True, 4)])
def test_what_only_some_ranks_can_split_stays_whole(width: int, has_norm: bool, size: int) -> None:
    """Columns of which one rank has those of the attention and another those of the MLP: else the sums of the
    ranks would not be of the same linears."""
    model = Joined(width, has_norm)
    together = Together(model, size)
    assert_serves_like(together, model)  # type: ignore[arg-type]
    assert [report.num_matches for report in together.reports] == [0] * size


class Held(nn.Module):
    """A tensor."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.randn(shape), requires_grad=False)


@pytest.mark.parametrize(
    ("added", "add", "num_sums"),
    [
        ((32,), lambda x, h, w, b: torch.addmm(b, h, w, beta=0.5, alpha=2.0), 2),
        ((1,), lambda x, h, w, b: torch.addmm(b, h, w), 2),
        ((1,), lambda x, h, w, b: torch.addmm(x, h, w), 1),
        ((32,), lambda x, h, w, b: torch.addmm(b + 1.0, h, w), 1),
        ((32, 64), lambda x, h, w, b: F.linear(h, b, w.amax(0).exp()), 1),
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_what_a_sum_adds_is_added_once(added: tuple[int, ...], add: Any, num_sums: int, size: int) -> None:
    """With its factors. One that is computed leaves the linear whole: of zeros it need not be zero."""

    def mix(model: SmallModel, x: Tensor, position_ids: Tensor) -> Tensor:
        first, second, bias, one = (each.get_parameter("tensor") for each in model.parts.children())
        hidden = torch.addmm(one, x.flatten(0, 1), first).tanh()
        out: Tensor = add(x.flatten(0, 1), hidden, second, bias).view(x.shape)
        return out

    torch.manual_seed(0)
    parts = {"first": Held(32, 64), "second": Held(64, 32), "bias": Held(*added), "one": Held(1)}
    model = SmallModel(sdpa, mix=mix, **parts)  # type: ignore[arg-type]
    together = Together(model, size)
    assert_serves_like(together, model)  # type: ignore[arg-type]
    assert together.reports[0].num_matches == num_sums


@pytest.mark.parametrize("rank", [2, -1])
def test_a_rank_is_one_of_the_world(rank: int) -> None:
    module = architectures.random_model(architectures.CONFIGS["qwen2"](1))
    with pytest.raises(ConfigError, match=rf"rank must lie in 0\.\.1, by world_size, got {rank}"):
        transform_module(module, AutoDeployConfig(device="cpu", world_size=2, max_seq_len=64), rank=rank)


def test_a_rank_needs_a_group() -> None:
    module = architectures.random_model(architectures.CONFIGS["qwen2"](1))
    with pytest.raises(ConfigError, match=r"world_size: got 2, but torch\.distributed has no group"):
        transform_module(module, AutoDeployConfig(device="cpu", world_size=2, max_seq_len=64))
