"""What ``diff`` lists, against what the transforms did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic_core import to_json
from torch import fx

from ad_flashinfer_pass import inspection
from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.data import NodeData, NodeNames, TensorType
from ad_flashinfer_pass.graph.text_format import to_text
from ad_flashinfer_pass.inspection.diff import diff, diff_graphs
from ad_flashinfer_pass.inspection.sizes import allocated_bytes, size
from ad_flashinfer_pass.inspection.stages import Stages, run_stages
from ad_flashinfer_pass.transforms.fuse_small_batch import with_fused_linears
from tests import architectures


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Three layers of Gemma 3: a window, none, a window."""
    directory = tmp_path_factory.mktemp("gemma3")
    architectures.CONFIGS["gemma3_text"]().save_pretrained(directory)
    return run_stages(AutoDeployConfig(model=str(directory), max_seq_len=256))


def test_diff_lists_exactly_the_nodes_of_the_transforms_report(gemma: Stages) -> None:
    """Before and after each transform: the nodes that it removed, added and rewired, and no other."""
    graphs = list(gemma.graphs.values())
    changed = 0
    for before, after, report in zip(graphs, graphs[1:], gemma.reports[1:], strict=False):
        found = diff_graphs(before, after)
        fx_names = {node.name: node.fx_name for node in (*before.nodes, *after.nodes)}
        for kind in ("removed", "added", "rewired"):
            listed = sorted(fx_names[name] for name in getattr(found, kind))
            assert listed == sorted(getattr(report, kind)), (report.name, kind)
            changed += len(listed)
    assert changed > 100


def test_an_attention_is_removed_for_each_match_and_a_cached_one_added(gemma: Stages) -> None:
    """num_matches counts what the diff shows."""
    found = diff_graphs(gemma.graphs["check_packing"], gemma.graphs["insert_cached_attention"])
    report = next(r for r in gemma.reports if r.name == "insert_cached_attention")
    calls = {op.op: (op.before, op.after) for op in found.ops}
    assert calls["ad_flashinfer.attention"] == (report.num_matches, 0)
    assert calls["ad_flashinfer.cached_attention"] == (0, report.num_matches)


def test_a_graph_does_not_differ_from_itself(gemma: Stages) -> None:
    for graph in gemma.graphs.values():
        assert diff_graphs(graph, graph).is_empty


def test_layers_that_changed_alike_are_one(gemma: Stages) -> None:
    """The windowed layers 0 and 2 are folded, the one without a window stands alone."""
    found = diff_graphs(gemma.graphs["check_packing"], gemma.graphs["insert_cached_attention"])
    assert [layer.layers for layer in found.layers] == [(), (0, 2), (1,)]


def test_bytes_are_those_of_the_tensors() -> None:
    """Counted by hand: a product of 2 x 5 x 7 float32 and a softmax in bfloat16; a view costs nothing."""

    def node(name: str, target: str, dtype: str, *shape: int | str, read: str = "x") -> NodeData:
        value = TensorType(dtype=dtype, shape=shape, device="cpu")
        return NodeData(
            name=name,
            fx_name=name,
            op="call_function",
            target=target,
            args=(f"%{read}",),
            value=value,
            is_view=name == "view",
        )

    source = NodeData(
        name="x",
        fx_name="x",
        op="placeholder",
        target="x",
        value=TensorType(dtype="f32", shape=("b", "s", 7), device="cpu"),
    )
    nodes = (
        source,
        node("product", "aten.mul.Tensor", "f32", "b", "s", 7),
        node("view", "aten.view.default", "f32", "b*s", 7, read="product"),
        node("weights", "aten.softmax.int", "bf16", "b*s", "Max(1,s)", read="view"),
    )
    taken = [allocated_bytes(node, {"b": 2, "s": 5}) for node in nodes]
    assert sum(taken) == 2 * 5 * 7 * 4 + 2 * 5 * 5 * 2


@pytest.mark.parametrize(
    ("expression", "value"),
    [(7, 7), ("8*b*s", 240), ("((s//2))+1", 6), ("b**2-s", -1), ("u0", None), ("__import__('os')", None)],
)
def test_sizes_are_arithmetic_and_nothing_else(expression: int | str, value: int | None) -> None:
    assert size(expression, {"b": 3, "s": 10}) == value


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return int(stop.value.code or 0)


def test_the_command_exits_with_1_if_files_differ(
    gemma: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two text dumps; as JSON the data of the Python function."""
    before, after = gemma.graphs["eliminate_noops"], gemma.graphs["match_attention"]
    for name, graph in (("a.txt", before), ("b.txt", after)):
        (tmp_path / name).write_text(to_text(graph))

    assert run("diff", str(tmp_path / "a.txt"), str(tmp_path / "a.txt")) == 0
    assert "no difference" in capsys.readouterr().out
    assert run("diff", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "--json") == 1
    assert json.loads(capsys.readouterr().out) == json.loads(diff_graphs(before, after).model_dump_json())
    assert run("diff", str(tmp_path / "a.txt"), str(tmp_path / "b.txt")) == 1
    out = capsys.readouterr().out
    assert "@@ layers 0, 2, 2 alike" in out
    assert "saved" in out or "more" in out


def test_dump_and_diff_work_from_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What dump writes by the ending of its file, diff reads."""
    model = tmp_path / "config.json"
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    old = str(tmp_path / "old.json")
    assert run("dump", "-m", str(model), "--stage", "pattern_matcher", "-o", old) == 0
    assert run("diff", old, "pattern_matcher", "-m", str(model)) == 0
    assert run("dump", "-m", str(model), "--format", "png") == 2
    assert "must be one of text, json, graphml, dot, svg, model-explorer" in capsys.readouterr().err


def test_what_a_gpu_would_run_is_seen_without_one(tmp_path: Path, one_run: Callable[..., Stages]) -> None:
    """Its fusion of rotation and append, of which the diff lists exactly what the transform reported."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.head_dim, config.dtype, config.num_hidden_layers = 64, "bfloat16", 2
    config.save_pretrained(tmp_path)
    deploy = AutoDeployConfig(model=str(tmp_path), max_seq_len=256)
    stages = one_run(deploy, None, ["insert_cached_attention", "fuse_rope_append"], sm=90)
    report = next(report for report in stages.reports if report.name == "fuse_rope_append")
    found = diff_graphs(*stages.graphs.values())
    names = {node.name: node.fx_name for graph in stages.graphs.values() for node in graph.nodes}
    assert report.num_matches == 2
    for kind in ("removed", "added", "rewired"):
        assert sorted(names[name] for name in getattr(found, kind)) == sorted(getattr(report, kind)), kind
    assert diff(deploy, "insert_cached_attention", "fuse_rope_append").is_empty
    assert not diff(deploy, "insert_cached_attention", "fuse_rope_append", sm=90).is_empty


def test_the_graph_of_few_tokens_is_a_diff_away(gemma: Stages) -> None:
    """fuse_small_batch makes a second graph: linears take in what stood around them, all else stays."""
    gm = gemma.module
    assert isinstance(gm, fx.GraphModule)
    names = NodeNames()
    names.see(gm, None)
    small, count, skipped = with_fused_linears(gm)
    names.see(small, "fuse_small_batch")
    found = diff_graphs(names.data(gm, "all"), names.data(small, "few tokens"))
    calls = {op.op: (op.before, op.after) for op in found.ops}
    assert count + len(skipped) == sum(g.is_op(n, torch.ops.aten.linear) for n in gm.graph.nodes)
    assert calls.get("ad_flashinfer.linear", (0, 0)) == (0, count)


def test_each_command_has_a_function_of_its_name_that_returns_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_run: object
) -> None:
    """Typed data; what --json prints is the same."""
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    deploy = AutoDeployConfig(model=str(tmp_path), max_seq_len=64)
    stage = {"stage": "insert_cached_attention"}
    for name, options in {"dump": stage, "diff": {}, "explain": stage, "lint": stage, "plan": stage}.items():
        found = getattr(inspection, name)(deploy, **options)
        given = [part for key, value in options.items() for part in (f"--{key}", value)]
        run(name, "-m", str(tmp_path), "--max-seq-len", "64", "--json", "-q", *given)
        assert json.loads(capsys.readouterr().out) == json.loads(to_json(found)), name
    found = inspection.report(deploy, stage="match_attention")
    assert found.captures == []
    assert [site.prefill for site in found.explanation.sites] == [""]
    assert not found.memory.pools
