"""The capture rules on small graphs. Whether these are captured, tests/gpu/test_lint.py sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.inspection.lint import RULES, lint_graph, lint_run
from ad_flashinfer_pass.inspection.stages import run_stages
from tests import architectures
from tests.inspection.capture_examples import EXAMPLES, Example


def traced(name: str) -> fx.GraphModule:
    """The graph of an example on a GPU that need not be there."""
    return graph_of(EXAMPLES[name])


def graph_of(example: Example) -> fx.GraphModule:
    """Likewise."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        made = {
            "x": torch.empty(8, 8, device="cuda"),
            "i": torch.empty(8, dtype=torch.int64, device="cuda"),
            "h": torch.empty(8, 8),
            "j": torch.empty(8, dtype=torch.int64),
            "s": torch.empty(()),
        }
        try:
            return make_fx(example.run)(*(made[letter] for letter in example.inputs))
        except NotImplementedError:
            pytest.skip("this torch cannot trace a generator")
        except RuntimeError as err:
            if not torch.cuda.is_available() and "cuda" in str(err).lower():
                pytest.skip("this torch cannot trace copies to a GPU")
            raise


@pytest.mark.parametrize("name", EXAMPLES)
def test_fires_where_a_rule_is_broken_and_nowhere_else(name: str) -> None:
    assert {finding.rule for finding in lint_graph(traced(name))} == EXAMPLES[name].rules


def test_every_rule_says_why_and_how_to_go_on() -> None:
    """And has an example; host-plan and missing-fake are tested by themselves."""
    assert all(rule.why and rule.fix and rule.example for rule in RULES.values())
    shown = {rule for example in EXAMPLES.values() for rule in example.rules}
    assert set(RULES) - shown == {"host-plan", "missing-fake"}
    assert len(EXAMPLES) >= 40


@pytest.mark.parametrize("name", sorted(set(RULES) - {"host-plan", "missing-fake"}))
def test_the_example_of_a_rule_breaks_it(name: str) -> None:
    """What the table of rules shows is Python."""
    run = eval(f"lambda x, i, h, s: {RULES[name].example}", {"torch": torch})
    assert name in {finding.rule for finding in lint_graph(graph_of(Example(run, "xihs")))}


def test_a_rule_can_be_left_out() -> None:
    assert {f.rule for f in lint_graph(traced("item"), suppress=["python-scalar"])} == {"host-sync"}
    with pytest.raises(ConfigError, match="did you mean 'host-sync'"):
        lint_graph(traced("item"), suppress=["hostsync"])


def test_a_static_input_may_be_written() -> None:
    gm = traced("input_written")
    name = gm.graph.find_nodes(op="placeholder")[0].name
    assert lint_graph(gm, static_inputs={name}) == []


def test_an_op_without_a_fake_is_told() -> None:
    """Its node has no value."""
    gm = traced("relu")
    next(n for n in gm.graph.nodes if n.op == "call_function").meta.pop("val")
    assert [f.rule for f in lint_graph(gm)] == ["missing-fake"]


def test_kernels_that_read_lengths_on_the_host_are_found_at_their_sites(tmp_path: Path) -> None:
    """On a CPU the reference prefills; on SM90 nothing is found in a Llama in bfloat16."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.head_dim, config.dtype, config.num_hidden_layers = 64, "bfloat16", 2
    config.save_pretrained(tmp_path)
    deploy = AutoDeployConfig(model=str(tmp_path), max_seq_len=256)
    run = run_stages(deploy)

    here = lint_run(run, deploy, None)
    assert {f.rule for f in here} == {"host-plan"}
    assert {f.module for f in here} == {f"model.model.layers.{i}.self_attn" for i in range(2)}
    assert lint_run(run, deploy, None, suppress=["host-plan"]) == []
    assert lint_run(run, deploy, 90) == []


def _small(directory: Path) -> str:
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    config.save_pretrained(directory)
    return str(directory)


def test_the_command_lists_rules_and_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 with findings, which name node and line."""
    with pytest.raises(SystemExit) as stop:
        main(["lint", "--rules", "-q"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert all(rule in out for rule in RULES)
    for args, message in (
        (["--suppress", "data-alocation"], "did you mean 'data-allocation'"),
        (["--sm", "-3"], "--sm is a compute capability without its point, 90 for 9.0, got -3"),
        (["--graph", str(tmp_path)], "is a directory; give one"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["lint", "-q", *args])
        assert stop.value.code
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["lint", "--json", "-q", "-m", _small(tmp_path)])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert {each["rule"] for each in found} == {"host-plan"}
    assert "modeling_llama.py:" in found[0]["where"]
