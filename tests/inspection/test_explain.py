"""What ``explain`` says, against what the model's config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.inspection.explain import Explanation, as_tables, explain, explain_run
from ad_flashinfer_pass.inspection.plan import answers
from ad_flashinfer_pass.inspection.report import report, to_html
from ad_flashinfer_pass.inspection.stages import Stages, run_stages
from tests import architectures
from tests.transforms.small_models import SmallModel, causal, eager, tokens


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma2")
    architectures.CONFIGS["gemma2"]().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def explained(gemma2: Path) -> Explanation:
    return explain(AutoDeployConfig(model=str(gemma2), max_seq_len=256))


def test_every_site_has_its_source_its_mask_and_its_items(explained: Explanation) -> None:
    """Three layers of Gemma 2: two with a window of 12, all with a cap of 50, 2 KV heads of 16."""
    sites = explained.sites

    assert [site.needs.get("sliding_window") for site in sites] == ["12", None, "12"]
    assert {site.needs["logit_cap"] for site in sites} == {"50.0"}
    assert ["sliding_window=12" in site.mask for site in sites] == [True, False, True]
    assert all("proved for 1 to 256 tokens" in site.mask for site in sites)
    assert all("modeling_gemma2.py:" in site.where for site in sites)
    assert [site.cache_bytes_per_token for site in sites] == [2 * 2 * 16 * 4] * 3
    assert [f"layers.{i}.self_attn" in site.module for i, site in enumerate(sites)] == [True] * 3


def test_nothing_outside_attention_keeps_gemma2_from_being_captured(explained: Explanation) -> None:
    assert explained.not_captured == []


def test_the_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--json`` is data alone on stdout, with a site for each layer."""
    config = architectures.CONFIGS["llama_mha"]()
    config.num_hidden_layers = 1
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["explain", "-m", str(tmp_path), "--json", "--max-seq-len", "256"])

    assert not stop.value.code
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 1


def test_kernels_are_chosen_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Llama in bfloat16 on SM90: XQA decodes, FMHA v2 prefills; on SM100 neither can."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.head_dim, config.dtype, config.num_hidden_layers = 64, "bfloat16", 1
    config.save_pretrained(tmp_path)
    deploy = AutoDeployConfig(model=str(tmp_path), max_seq_len=256)
    run = run_stages(deploy)

    here, hopper, blackwell = (explain_run(run, deploy, sm).sites[0] for sm in (None, 90, 100))

    assert here.decode.startswith("reference:")
    assert hopper.decode.startswith("xqa:")
    assert hopper.prefill.startswith("fmha_v2:")
    assert blackwell.decode.startswith("trtllm_gen:")
    assert "xqa: compute capability major 10" in blackwell.decode


def test_sites_are_shown_before_the_insertion(gemma2: Path) -> None:
    """After match_attention the masks are not classified, and there are no kernels."""
    deploy = AutoDeployConfig(model=str(gemma2), max_seq_len=256)
    matched = explain(deploy, stage="match_attention").sites

    assert [site.mask for site in matched] == ["not classified yet"] * 3
    assert all("logit cap 50" in site.folded for site in matched)
    assert not any(site.decode for site in matched)


def test_a_refusal_shows_the_node_its_source_and_the_first_difference(tmp_path: Path) -> None:
    """A mask that also shows the first three keys: query 0 sees keys 1 and 2, which causal hides."""

    def prefix(logits: Tensor, p: Tensor) -> Tensor:
        return logits.masked_fill(~(causal(p) | (p[:, None, None, :] < 3)), float("-inf"))

    file = tmp_path / "model.pt2"
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        SmallModel(eager(mask=prefix)), tokens(2, 13), dynamic_shapes=(dynamic, dynamic), strict=False
    )
    torch.export.save(program, file)

    found = explain(AutoDeployConfig(max_seq_len=64), graph=file)

    assert found.sites == []
    refusal = found.refusal
    assert refusal is not None
    assert (refusal.transform, refusal.error) == ("classify_mask", "MaskError")
    assert "at query 0 and key 1 the key is visible" in refusal.message
    assert "self.attend(" in next(line for line in refusal.source if line.startswith(">"))
    assert any(line.startswith("result: ") for line in refusal.shapes)
    first = next(line for line in refusal.picture if line.endswith("<-"))
    mask, causal_row = first.split()[2:4]
    assert (mask, causal_row) == ("##", "#.")  # of two tokens, with which they differ first
    assert "padding" in refusal.advice


def test_the_command_fails_with_the_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table on stdout, the one line on stderr, and exit code 1."""
    architectures.small_config("zaya").save_pretrained(tmp_path)

    with pytest.raises(SystemExit) as stop:
        main(["explain", "-m", str(tmp_path), "--max-seq-len", "128", "-q"])

    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert "Refused by check_packing (PackingError)" in out
    assert "aten.pad.default" in out
    assert err.startswith("error: node pad (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("sm", [90, 100])
def test_one_set_of_kernels_is_shown(tmp_path: Path, sm: int, one_run: Callable[..., Stages]) -> None:
    """The graph, what the transforms say, the sites, the report and the plan name the same."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.head_dim, config.dtype, config.num_hidden_layers = 64, "bfloat16", 1
    config.save_pretrained(tmp_path)

    found = report(AutoDeployConfig(model=str(tmp_path), max_seq_len=256), sm=sm)

    (site,) = found.explanation.sites
    named = {phase: getattr(site, phase).partition(":")[0] for phase in ("prefill", "decode")}
    assert {use.phase: use.kernel for use in found.kernels} == named
    (inserted,) = (each for each in found.transforms if each.name == "insert_cached_attention")
    for phase, kernel in named.items():
        assert any(note.startswith(f"{phase}: {kernel}, 1 sites: ") for note in inserted.notes)
    assert {row.name for row in found.memory.rows if row.name.startswith("workspace of ")} <= {
        f"workspace of {kernel}" for kernel in named.values()
    }
    text = to_html(found)
    assert "reference" not in text
    assert all("taken for built there" in use.reason for use in found.kernels)
    assert ("only `prebuild --sm 90` does" in site.prefill) == (sm == 90)
    graph = one_run(AutoDeployConfig(model=str(tmp_path), max_seq_len=256), sm=sm).module
    assert isinstance(graph, fx.GraphModule)
    (node,) = graph.graph.find_nodes(
        op="call_function", target=torch.ops.ad_flashinfer.cached_attention.default
    )
    assert {phase: node.kwargs[f"{phase}_kernel"] for phase in named} == named


@pytest.mark.parametrize("device", ["gpu", "", "meta", "xla:0"])
def test_a_device_that_there_is_not_is_one_line(device: str) -> None:
    """Before a model is looked for."""
    with pytest.raises(ConfigError, match=r"device: (torch knows no '.*'; for example|must be cpu, cuda or)"):
        explain(AutoDeployConfig(model="nothing", device=device))


def test_experts_are_shown_alike_everywhere(tmp_path: Path, one_run: Callable[..., Stages]) -> None:
    """Qwen3-MoE in bfloat16: three layers, 4 experts of 3 x 32 x 64 numbers, of which a token has 2."""
    config = architectures.small_config("qwen3_moe")
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    deploy = AutoDeployConfig(model=str(tmp_path), max_seq_len=256, max_batch_size=8)

    found = report(deploy)

    sites = found.explanation.experts
    assert [(site.num_experts, site.top_k, site.width, site.hidden) for site in sites] == [(4, 2, 32, 64)] * 3
    assert {(site.bytes_each, site.kernel) for site in sites} == {(3 * 32 * 64 * 2, "torch")}
    held = sum(row.bytes for row in found.memory.rows if row.name.startswith("weights"))
    read = found.memory.weights_read
    # Half of the experts, and no table.
    table = 128 * 64 * 2
    assert read == {1: held - table - 3 * 2 * 12288, 8: held - table - round(3 * 4 * 12288 / 2**8)}
    assert 'id="experts"' in to_html(found)
    assert "for 1, " in "".join(answers(found.memory))
    on_gpu = explain(deploy, sm=90).experts
    assert {site.kernel for site in on_gpu} == {"triton, chosen by time in the build"}
    graph = one_run(deploy, sm=90).module
    assert isinstance(graph, fx.GraphModule)
    op = torch.ops.ad_flashinfer.experts.default
    assert [node.kwargs["plan"] for node in graph.graph.find_nodes(op="call_function", target=op)] == [
        "triton"
    ] * 3
    title, total = as_tables(explain(deploy))[-3:-1]
    assert getattr(title, "title", None) == "Experts"
    assert total == "A token reads 73,728 bytes of the 147,456 of all experts"
