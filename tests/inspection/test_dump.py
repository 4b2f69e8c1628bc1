"""What ``dump`` shows, against the FX graph itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import shutil
import sys
from collections import deque
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from pydantic import TypeAdapter
from torch import fx

from ad_flashinfer_pass import CacheSession, pipeline
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import AdFlashinferError, ConfigError, LoadError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.graph.data import GraphData, NodeNames
from ad_flashinfer_pass.graph.text_format import from_text, to_text
from ad_flashinfer_pass.inspection import formats
from ad_flashinfer_pass.inspection.dump import dump
from ad_flashinfer_pass.inspection.stages import Stages, read_graph, run_stages
from ad_flashinfer_pass.torch_compile.backend import flashinfer_trtllm
from tests import architectures
from tests.transforms.small_models import SmallModel, causal, context, eager, exported, sdpa


@pytest.fixture(scope="module")
def demo() -> Stages:
    return run_stages(AutoDeployConfig())


@pytest.fixture(scope="module")
def last(demo: Stages) -> GraphData:
    return list(demo.graphs.values())[-1]


def test_every_stage_is_read_back_from_text_and_json(demo: Stages) -> None:
    """Nothing of a graph is lost in either."""
    assert len(demo.graphs) >= 8
    for graph in demo.graphs.values():
        assert from_text(to_text(graph)) == graph
        assert GraphData.model_validate_json(formats.to_json(graph)) == graph


def test_data_is_the_fx_graph(demo: Stages, last: GraphData) -> None:
    """Each node has the target, the inputs and the shape of its FX node, in order."""
    assert isinstance(demo.module, fx.GraphModule)
    nodes = list(demo.module.graph.nodes)
    stable = {data.fx_name: data.name for data in last.nodes}
    symbols = dict(zip(map(str, g.shape(nodes_by_name(nodes)["input_ids"])), "bs", strict=True))

    assert [data.fx_name for data in last.nodes] == [node.name for node in nodes]
    for data, node in zip(last.nodes, nodes, strict=True):
        assert data.inputs == tuple(stable[source.name] for source in node.all_input_nodes)
        if isinstance(node.target, torch._ops.OpOverload):
            assert data.target == str(node.target)
        if g.is_tensor(node):
            (tensor,) = data.tensors
            assert len(tensor.shape) == g.value(node).dim()
            for shown, size in zip(tensor.shape, g.shape(node), strict=True):
                assert str(shown) == symbols.get(str(size), str(size)) or "*" in str(shown)


def nodes_by_name(nodes: list[fx.Node]) -> dict[str, fx.Node]:
    return {node.name: node for node in nodes}


def test_weights_are_not_read(demo: Stages) -> None:
    """Parameters have shapes and no memory."""
    assert isinstance(demo.module, fx.GraphModule)
    assert not g.has_weights(demo.module)


def test_a_layer_more_renames_nothing_in_the_others() -> None:
    """Lines of layers 0 and 1 are the same in a model of two layers and in one of three."""
    texts = [
        to_text(dump(AutoDeployConfig(model_kwargs={"num_hidden_layers": n}), stage="eliminate_noops"))
        for n in (2, 3)
    ]
    lines = [{line for line in text.splitlines() if line.startswith("%model.layers.")} for text in texts]
    assert lines[0] < lines[1]
    assert all("%model.layers.2." in line for line in lines[1] - lines[0] if " = " in line)


def test_names_are_kept_over_the_stages(demo: Stages) -> None:
    """A node of the export that is still there at the end has the same name, and no other node has it."""
    first, *_, final = demo.graphs.values()
    before = {node.fx_name: node.name for node in first.nodes}
    for node in final.nodes:
        assert (node.made_by is None) == (node.fx_name in before)
        assert before.get(node.fx_name, node.name) == node.name
    assert len({node.name for node in final.nodes}) == len(final.nodes)


def test_a_layer_holds_its_nodes_weights_and_cache(last: GraphData) -> None:
    """What it reads from other layers is there without its own inputs."""
    layer = last.layer(2)
    ops = [node.opname for node in layer.nodes]
    assert ops.count("ad_flashinfer.cached_attention") == 1
    assert {"kv_cache_2", "model.layers.2.mlp.down_proj.weight"} <= set(layer.by_name)
    assert layer.by_name["model.layers.1.add_1"].op == "outside"
    assert all(name in layer.by_name for node in layer.nodes for name in node.inputs)
    assert from_text(to_text(layer)) == layer
    with pytest.raises(ConfigError, match=r"--layer 9: .* layers 0 to 3"):
        last.layer(9)


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_around_takes_the_nodes_within_that_many_edges(demo: Stages, last: GraphData, hops: int) -> None:
    """Distances are those of a breadth-first search over FX's own users and inputs."""
    assert isinstance(demo.module, fx.GraphModule)
    start = demo.module.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.cached_attention.default
    )[1]
    near, queue = {start: 0}, deque([start])
    while queue:
        node = queue.popleft()
        for other in (*node.all_input_nodes, *node.users):
            if other not in near and near[node] < hops:
                near[other] = near[node] + 1
                queue.append(other)

    cut = last.around(start.name, hops)

    assert {n.fx_name for n in cut.nodes if n.op != "outside"} == {node.name for node in near}


def test_a_node_is_found_by_the_end_of_its_name(last: GraphData) -> None:
    """An end that several names have is refused, as is a name that nothing has."""
    assert last.find("layers.1.self_attn.append_kv").name == "model.layers.1.self_attn.append_kv"
    with pytest.raises(ConfigError, match="is the end of 4 names, such as"):
        last.find("append_kv")
    with pytest.raises(ConfigError, match=r"did you mean lm_head\.linear\?"):
        last.find("lm_head.linea")


def test_graphml_has_every_edge(last: GraphData) -> None:
    """Read back by networkx."""
    read = nx.read_graphml(io.BytesIO(formats.to_graphml(last).encode()))
    assert set(read.edges) == {(name, node.name) for node in last.nodes for name in node.inputs}
    assert read.nodes["kv_cache_1"]["layer"] == "1"


def test_model_explorer_has_namespaces_edges_and_colours(last: GraphData) -> None:
    """Each edge ends at a node; attention is coloured unlike the rest."""
    (graph,) = json.loads(formats.to_model_explorer(last))["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert all(edge["sourceNodeId"] in nodes for node in nodes.values() for edge in node["incomingEdges"])
    attention = nodes["model.layers.1.self_attn.cached_attention"]
    assert attention["namespace"] == "model/layers/1/self_attn"
    assert attention["style"] != nodes["model.layers.1.add"]["style"]


def test_model_explorers_own_classes_take_it(last: GraphData) -> None:
    """Those of the package ai-edge-model-explorer, of which one file is loaded; its viewer shows it, too."""
    spec = importlib.util.find_spec("model_explorer")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs ai-edge-model-explorer")
    file = Path(spec.submodule_search_locations[0], "graph_builder.py")
    own = importlib.util.spec_from_file_location("model_explorer_graph_builder", file)
    assert own is not None
    assert own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules[own.name] = module
    own.loader.exec_module(module)
    data = json.loads(formats.to_model_explorer(last))
    assert set(data) <= {field.name for field in dataclasses.fields(module.GraphCollection)}
    for graph in data["graphs"]:
        made = TypeAdapter(module.Graph).validate_python(graph)
        assert len(made.nodes) == len(last.nodes)
        known = {field.name for field in dataclasses.fields(module.GraphNode)}
        assert all(set(node) <= known for node in graph["nodes"])


def test_svg_is_drawn_or_says_what_is_missing(last: GraphData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Graphviz's program the error names its package."""
    assert 'label="layer 1"' in formats.to_dot(last.layer(1))
    if shutil.which("dot") is not None:
        drawn = ElementTree.fromstring(formats.to_svg(last.layer(1)))
        titles = {each.text for each in drawn.iter("{http://www.w3.org/2000/svg}title")}
        assert {node.name for node in last.layer(1).nodes} <= titles
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AdFlashinferError, match="apt-get install graphviz"):
        formats.to_svg(last.layer(1))


def test_strings_with_marks_of_the_format_are_read_back() -> None:
    """Quotes, brackets, commas, percent signs and hashes in an argument are no syntax."""
    gm = exported(SmallModel(sdpa))
    odd = 'a "b", (c) %d  # e\\'
    gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0].kwargs = {"x": odd}
    names = NodeNames()
    names.see(gm, None)
    graph = names.data(gm, "odd")
    assert from_text(to_text(graph)) == graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[5:], "not a text dump"),
        (lambda text: text[: len(text) // 3], "cut short"),
        (lambda text: text.replace("%input_ids: i64[b, s]", "%input_ids: tokens"), "'tokens' is not a type"),
    ],
)
def test_a_damaged_dump_is_refused(last: GraphData, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "graph.txt"
    file.write_text(change(to_text(last)))
    with pytest.raises(LoadError, match=message):
        read_graph(file)


def test_stages_are_named_as_transforms_or_as_stages() -> None:
    """A stage stands for its last transform; a name that is neither is refused with the nearest."""
    config = AutoDeployConfig(model_kwargs={"num_hidden_layers": 1})
    assert dump(config, stage="post_export").title.endswith("after eliminate_noops")
    with pytest.raises(ConfigError, match="did you mean 'match_attention'"):
        dump(config, stage="match_attentoin")


def test_a_refused_model_can_be_seen_before_the_refusal(tmp_path: Path) -> None:
    """With ``stage`` the run ends there: the mask that classify_mask refuses is in the dump."""

    def lower_left(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return logits + torch.where(causal(positions).transpose(2, 3), 0.0, -1e9)

    ids = torch.zeros(2, 13, dtype=torch.int64)
    positions = torch.arange(13).repeat(2, 1)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        SmallModel(eager(mask=lower_left)).eval(), (ids, positions), dynamic_shapes=(dynamic, dynamic)
    )
    file = tmp_path / "program.pt2"
    torch.export.save(program, file)
    config = AutoDeployConfig(max_seq_len=64)

    found = dump(config, graph=file, stage="match_attention")

    assert [node.opname for node in found.nodes].count("ad_flashinfer.attention") == 1
    with pytest.raises(AdFlashinferError, match="mask"):
        dump(config, graph=file)
    assert len(read_graph(file).nodes) > 20


def test_every_stage_is_written_to_the_directory_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file a transform, in order; leftovers of a longer run go, other files stay."""
    (tmp_path / "099_compile_old.txt").write_text("ad-flashinfer-pass graph 1\ntitle: graph after old\n")
    mine = {
        "notes.txt": "mine",
        "042_answers.txt": "mine",  # named as a stage is
        "043_export_mine.txt": "ad-flashinfer-pass graph 1\ntitle: demo after export\n",  # of dump -o
    }
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    linked = tmp_path / "044_export_link.txt"
    linked.symlink_to(tmp_path / "notes.txt")
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(tmp_path))

    _, reports = pipeline.transform_module(SmallModel(sdpa), context().config)

    assert linked.is_symlink()
    linked.unlink()
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    files = sorted(file.name for file in tmp_path.glob("[0-9]*") if file.name not in mine)
    assert [name.split("_", 1)[0] for name in files] == [f"{i:03}" for i in range(len(reports))]
    assert all(name.endswith(f"_{report.name}.txt") for name, report in zip(files, reports, strict=True))
    assert "ad_flashinfer.cached_attention" in (tmp_path / files[-1]).read_text()
    assert len(read_graph(tmp_path / files[0]).nodes) > 20


def test_a_stage_does_not_replace_a_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds a file under the very name of the first stage."""
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(tmp_path))
    pipeline.transform_module(SmallModel(sdpa), context().config)
    first = min(tmp_path.iterdir())
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / first.name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{first.name} is not a dump of a stage; name another folder"):
        pipeline.transform_module(SmallModel(sdpa), context().config)
    assert (tmp_path / "other" / first.name).read_text() == "mine"


def test_views_are_those_of_eager_torch() -> None:
    """Which results of a graph share memory with an input, against a run on real tensors.

    The graph has reshapes that copy, after an expand and after a transpose, and some that do not.
    """
    gm = exported(SmallModel(eager()))
    ids, positions = torch.zeros(2, 13, dtype=torch.int64), torch.arange(13).repeat(2, 1)
    seen: dict[str, bool] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                inputs = [self.env[source] for source in n.all_input_nodes]
                storages = [t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.Tensor)]
                seen[n.name] = result.untyped_storage()._cdata in storages
            return result

    Recorder(gm, garbage_collect_values=False).run(ids, positions)
    names = NodeNames()
    names.see(gm, None)
    shown = {node.fx_name: node.is_view for node in names.data(gm, "").nodes if node.fx_name in seen}

    assert shown == seen
    reshapes = [seen[n.name] for n in gm.graph.nodes if g.is_op(n, torch.ops.aten.reshape)]
    assert True in seen.values()
    assert False in reshapes


def test_torch_compile_writes_its_graphs_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of Dynamo, whose transforms run in several parts; the numbers go on."""
    monkeypatch.setenv("AD_DUMP_GRAPHS_DIR", str(tmp_path))
    torch._dynamo.reset()
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    session = CacheSession(max_batch_size=2, max_seq_len=64, kv_cache_config={"tokens_per_block": 16})
    options: dict[str, Any] = {"session": session, "compile_backend": "torch-simple"}
    compiled = torch.compile(architectures.random_model(config), backend=flashinfer_trtllm, options=options)
    with session.prefill([[1, 2, 3]]) as batch:
        compiled(**batch.inputs, use_cache=False)

    files = sorted(tmp_path.iterdir())
    names = [file.stem.split("_", 1) for file in files]
    assert [number for number, _ in names] == [f"{i:03}" for i in range(len(files))]
    stages = [name for _, name in names]
    assert stages.index("pattern_matcher_match_attention") < stages.index(
        "cache_init_insert_cached_attention"
    )
    inserted = read_graph(files[stages.index("cache_init_insert_cached_attention")])
    (append,) = (node for node in inserted.nodes if node.kind == "append")
    assert append.made_by == "insert_cached_attention"
