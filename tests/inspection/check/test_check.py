"""Whether ``check`` finds faults that are planted into a cached graph, and names the right attention."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.inspection.check import float64
from ad_flashinfer_pass.inspection.check.check import CheckReport, Prepared, check, check_prepared, prepare
from ad_flashinfer_pass.models.loading import load_model
from tests import architectures
from tests.transforms.small_models import SmallModel, sdpa

ops = torch.ops.ad_flashinfer
aten = torch.ops.aten
SITE = 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model in which faults are planted, and where it runs."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    page: int = 4
    window: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16


@pytest.fixture(scope="module")
def gpt_oss() -> Prepared:
    """Three layers with sinks and rotary positions, the middle one with a window."""
    return prepared(Sizes())


@pytest.fixture(scope="module")
def gpt_oss_fp8() -> Prepared:
    return prepared(Sizes(), dtype="fp8", k_scale=0.5, v_scale=0.5)


class Linear(torch.nn.Module):
    """In place of experts, which are not what is looked at here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width) * 0.1, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight, None


def prepared(sizes: Sizes, *, stage: str | None = "insert_cached_attention", **cache: Any) -> Prepared:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.GptOssConfig(
        **{
            **architectures._COMMON,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
        },
        head_dim=sizes.head_dim,
        sliding_window=sizes.window,
        layer_types=kinds,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = architectures.random_model(config)
    for layer in model.model.layers:
        layer.mlp = Linear(config.hidden_size)
        layer.self_attn.sinks.data.fill_(1.0)
    keys = {"tokens_per_block": sizes.page, **cache}
    deploy = AutoDeployConfig(max_seq_len=64, device=sizes.device, kv_cache_config=KvCacheConfig(**keys))
    module: torch.nn.Module = model
    module = module.to(sizes.device, sizes.dtype)
    return prepare(module, deploy, stage=stage)


class Planted:
    """A cached graph that may be damaged."""

    def __init__(self, whole: Prepared) -> None:
        assert whole.cached is not None
        graph = copy.deepcopy(whole.cached.graph)
        self.gm = fx.GraphModule(whole.cached, graph)
        self.attends = graph.find_nodes(op="call_function", target=ops.cached_attention.default)
        self.appends = graph.find_nodes(op="call_function", target=ops.append_kv.default)
        self.attend, self.append = self.attends[SITE], self.appends[SITE]
        self.whole = whole
        self.page = whole.ctx.sequence_info.tokens_per_block
        self.window = whole.ctx.sites[SITE].site.sliding_window or 0

    def before(self, node: fx.Node, target: object, *args: object) -> fx.Node:
        """A new node in front of another."""
        with self.gm.graph.inserting_before(node):
            return self.gm.graph.call_function(target, args)  # type: ignore[arg-type]

    def check(self, directory: Path | None = None) -> CheckReport:
        self.gm.recompile()
        damaged = dataclasses.replace(self.whole, cached=self.gm)
        return check_prepared(damaged, "damaged", reproducer_dir=directory)


def scale_dropped(p: Planted) -> None:
    p.attend.update_arg(6, 1.0)


def window_off_by_one(p: Planted) -> None:
    p.attend.update_kwarg("sliding_window", p.window + 1)


def k_and_v_swapped(p: Planted) -> None:
    key, value, *rest = p.append.args
    p.append.args = (value, key, *rest)


def wrong_page(p: Planted) -> None:
    """The second page of every sequence is the first."""
    table = p.attend.args[5]
    width = p.whole.ctx.sequence_info.max_blocks_per_seq
    pages = torch.tensor([0, 0, *range(2, width)], device=p.whole.ctx.device)
    p.gm.register_buffer("wrong_pages", pages)
    with p.gm.graph.inserting_before(p.attend):
        index = p.gm.graph.get_attr("wrong_pages")
    p.attend.update_arg(5, p.before(p.attend, aten.index_select.default, table, 1, index))


def stale_length(p: Planted) -> None:
    lens = p.attend.args[4]
    is_long = p.before(p.attend, aten.gt.Scalar, lens, 1)
    is_long = p.before(p.attend, aten._to_copy.default, is_long)
    is_long.update_kwarg("dtype", torch.int32)
    p.attend.update_arg(4, p.before(p.attend, aten.sub.Tensor, lens, is_long))


def wrong_layers_cache(p: Planted) -> None:
    p.attend.update_arg(1, p.attends[SITE - 1].args[1])


def missing_rope(p: Planted) -> None:
    """The query as it was projected: what the first transposed view before the rotation holds."""
    node = p.attend.args[0]
    assert isinstance(node, fx.Node)
    found = next(n for n in g.ancestors(node, lambda n: g.is_op(n, aten.linear)) if g.is_op(n, aten.linear))
    sizes = g.shape(node)
    cut = p.before(p.attend, aten.slice.Tensor, found, 2, 0, sizes[2] * sizes[3])
    p.attend.update_arg(0, p.before(p.attend, aten.unflatten.int, cut, 2, [sizes[2], sizes[3]]))


def padding_on_page_1(p: Planted) -> None:
    """Slots on page 0 become slots of page 1, for the append of one layer."""
    slots = p.append.args[2]
    padding = p.before(p.append, aten.lt.Scalar, slots, p.page)
    elsewhere = p.before(p.append, aten.add.Scalar, slots, p.page)
    p.append.update_arg(2, p.before(p.append, aten.where.self, padding, elsewhere, slots))


def sink_ignored(p: Planted) -> None:
    p.attend.update_kwarg("sinks", None)


def fp8_scale_doubled(p: Planted) -> None:
    p.attend.update_kwarg("v_scale", 2 * p.whole.ctx.sites[SITE].site.v_scale)


FAULTS: dict[str, Callable[[Planted], None]] = {
    fault.__name__: fault
    for fault in (
        scale_dropped,
        window_off_by_one,
        k_and_v_swapped,
        wrong_page,
        stale_length,
        wrong_layers_cache,
        missing_rope,
        padding_on_page_1,
        sink_ignored,
    )
}


def assert_only_the_site_is_wrong(report: CheckReport) -> None:
    assert [site.index for site in report.sites if not site.is_ok] == [SITE]
    assert report.first is not None
    assert report.first.startswith(f"attention site {SITE} (model.model.layers.{SITE}.self_attn")


def test_all_agrees_without_a_fault(gpt_oss: Prepared, gpt_oss_fp8: Prepared) -> None:
    """Every site, and the logits of every kind of step."""
    for whole in (gpt_oss, gpt_oss_fp8):
        report = Planted(whole).check()
        assert report.is_ok
        assert {each.phase for each in report.logits} == {"prefill", "mixed", "decode", "padded", "captured"}
        assert [set(site.errors) for site in report.sites] == [{"prefill", "mixed", "decode", "padded"}] * 3
        assert report.lengths[0] > Sizes.window


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_a_fault_at_its_site(gpt_oss: Prepared, fault: str) -> None:
    """And at no other, although the ones behind it get other inputs."""
    planted = Planted(gpt_oss)
    FAULTS[fault](planted)
    assert_only_the_site_is_wrong(planted.check())


def test_float64_rounds_as_the_cache_does() -> None:
    """For numbers between two that 8 bits have, where dividing and multiplying by the reciprocal differ."""
    dtype = torch.float8_e4m3fn
    numbers = torch.arange(1, 127, dtype=torch.uint8).view(dtype).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    is_told_apart = False
    for scale in torch.linspace(0.003, 3.0, 300, dtype=torch.float64).tolist():
        x = (middles.double() * scale).float()
        x = torch.cat((x, x.nextafter(x * 2), x.nextafter(x * 0)))
        cache = torch.zeros(2, 2, 1, len(x), 1, dtype=dtype)
        ops.append_kv(
            x.view(1, -1, 1, 1), x.view(1, -1, 1, 1), torch.arange(len(x)) + len(x), cache, scale, 1.0
        )
        held = cache[1, 0, 0, :, 0]
        assert torch.equal(float64._rounded(x, scale, dtype), held.double() * scale)
        is_told_apart |= not torch.equal(
            (x.double() / scale).to(dtype).view(torch.uint8), held.view(torch.uint8)
        )
    assert is_told_apart


def test_finds_a_doubled_fp8_scale(gpt_oss_fp8: Prepared) -> None:
    planted = Planted(gpt_oss_fp8)
    fp8_scale_doubled(planted)
    assert_only_the_site_is_wrong(planted.check())


def test_padding_shows_in_padded_steps_alone(gpt_oss: Prepared) -> None:
    """The phase tells where to look."""
    planted = Planted(gpt_oss)
    padding_on_page_1(planted)
    errors = planted.check().sites[SITE].errors
    assert errors["padded"] > 1e-3
    assert errors["prefill"] < 1e-5


def test_the_reproducer_shows_the_error_alone(gpt_oss: Prepared, tmp_path: Path) -> None:
    """The script, run by another process, reports the error; it is ten lines and needs its tensors only."""
    planted = Planted(gpt_oss)
    scale_dropped(planted)
    report = planted.check(tmp_path)
    assert report.reproducer is not None
    script = Path(report.reproducer)
    assert script.parent == tmp_path
    assert len(script.read_text().splitlines()) <= 12

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)

    shown = float(done.stdout.split("largest error: ")[1].split()[0])
    first = report.sites[SITE]
    assert shown > first.tolerance
    assert shown <= max(first.errors.values()) * 3


def test_a_fault_outside_attention_is_named_by_its_node(gpt_oss: Prepared) -> None:
    """An activation that is doubled: all sites agree with their inputs, the logits do not."""
    planted = Planted(gpt_oss)
    adds = [
        n for n in planted.gm.graph.nodes if g.is_op(n, aten.add) and g.module_path(n).endswith("layers.1")
    ]
    adds[0].update_kwarg("alpha", 2)
    report = planted.check()
    assert all(site.is_ok for site in report.sites)
    assert report.first is not None
    assert report.first.startswith(f"node {adds[0].name} ")
    assert "after the insertion" in report.first


def test_a_saved_program_is_checked_with_its_own_weights(tmp_path: Path) -> None:
    """The source is the program as it was saved."""
    model = SmallModel(sdpa, sdpa).eval()
    ids, positions = torch.zeros(2, 13, dtype=torch.int64), torch.arange(13).repeat(2, 1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (ids, positions), dynamic_shapes=(dynamic, dynamic))
    torch.export.save(program, tmp_path / "program.pt2")
    report = check(AutoDeployConfig(max_seq_len=64), graph=tmp_path / "program.pt2")
    assert report.is_ok
    assert [site.index for site in report.sites] == [0, 1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of three layers alike."""
    directory = tmp_path_factory.mktemp("llama")
    config = architectures.CONFIGS["llama_gqa4"]()
    config.num_hidden_layers = 3
    config.save_pretrained(directory)
    return directory


def test_of_drawn_weights_few_layers_are_checked_and_the_page_says_so(
    llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", "-m", str(llama), "--random-weights", "--max-seq-len", "64", "--json", "-q"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["layers"]["taken"], found["layers"]["of"], len(found["sites"])) == (2, 3, 2)
    with pytest.raises(SystemExit) as stop:
        main(["check", "-m", str(llama), "--random-weights", "--max-seq-len", "64", "--layers", "1", "-q"])
    assert not stop.value.code
    assert "the first 1 of 3 layers (asked for; --layers 3 takes all)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "phases"),
    [("match_attention", ["dense"]), ("insert_cached_attention", ["prefill", "mixed", "decode", "padded"])],
)
def test_a_check_can_end_at_a_stage(llama: Path, stage: str, phases: list[str]) -> None:
    """Before the insertion it is the dense graph that is compared."""
    deploy = AutoDeployConfig(model=str(llama), skip_loading_weights=True, max_seq_len=64)
    report = check(deploy, stage=stage, layers=1)
    assert report.is_ok
    assert report.stage == stage
    assert [each.phase for each in report.logits][: len(phases)] == phases
    assert len(report.sites) == (stage == "insert_cached_attention")


def test_a_fault_before_the_insertion_is_named_by_its_node(llama: Path) -> None:
    """The check that ends there finds it, and the one that goes on does too."""
    deploy = AutoDeployConfig(model=str(llama), skip_loading_weights=True, max_seq_len=64)
    module = load_model(deploy).module
    damaged = prepare(module, deploy, stage="classify_mask")
    node = next(n for n in damaged.source.graph.nodes if g.is_op(n, aten.silu))
    node.target = aten.relu.default
    damaged.source.recompile()
    report = check_prepared(damaged, "damaged")
    assert report.first is not None
    assert report.first.startswith(f"node {node.name} ")
    assert "before the insertion" in report.first


def test_the_pools_are_as_small_as_the_steps_of_a_check(llama: Path) -> None:
    """Whatever max_seq_len says; and a window that no sequence can leave needs no long sequence."""
    deploy = AutoDeployConfig(model=str(llama), skip_loading_weights=True, max_seq_len=100_000)
    whole = prepare(load_model(deploy).module, deploy)
    assert whole.lengths == [64, 41, 28]
    assert {cache.shape[0] for cache in whole.ctx.caches.values()} == {1 + 3 * 2}


def test_a_saved_graph_has_the_layers_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layers: the layers of a saved graph"):
        check(AutoDeployConfig(), graph=tmp_path / "any.pt2", layers=1)


def test_routing_is_compared_by_layer() -> None:
    """The last of three layers sends each token to the two of four experts that the source does not take."""
    model = architectures.random_model(architectures.small_config("qwen3_moe"))
    config = AutoDeployConfig(max_seq_len=64, device="cpu")
    whole = prepare(model, config, stage="insert_cached_attention")

    found = check_prepared(whole, "whole")
    assert found.is_ok
    assert [layer.agreement for layer in found.routing] == [1.0, 1.0, 1.0]

    assert whole.cached is not None
    *_, last = whole.cached.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    last.args = (*last.args[:2], -1, False)
    whole.cached.recompile()
    found = check_prepared(whole, "damaged")
    assert not found.is_ok
    assert [layer.agreement for layer in found.routing] == [1.0, 1.0, 0.0]
    assert "layers.2.mlp.experts" in found.routing[-1].module


def test_the_ranks_of_a_model_are_checked_together() -> None:
    """As threads: the parts of the demo, summed, are the demo; and it is told what cannot be checked so."""
    config = AutoDeployConfig(device="cpu", world_size=2, model_kwargs={"num_hidden_layers": 2})
    report = check(config, layers=None)
    assert report.is_ok
    assert len(report.sites) == 2
    assert {each.phase for each in report.logits} >= {"prefill", "mixed", "decode"}
    with pytest.raises(
        ConfigError, match=r"2 ranks \(--tp\) runs them as threads on the CPU, got device: cuda"
    ):
        check(config.model_copy(update={"device": "cuda"}))
