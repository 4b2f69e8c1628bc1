"""``step_weights``: the bytes that a step reads, counted from the modules of transformers."""

from __future__ import annotations

from itertools import product

import pytest
from torch import fx, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.graph.weights import ExpertsSite, StepWeights, step_weights
from ad_flashinfer_pass.pipeline import Pipeline, context
from tests import architectures

SITE = ExpertsSite("mlp", "node experts", 4, 2, hidden=64, width=32, dtype="", bytes_each=10, kernel="torch")


def exported(model: nn.Module) -> fx.GraphModule:
    config = AutoDeployConfig(max_batch_size=2, max_seq_len=64)
    gm, _ = Pipeline.of(config).upto("eliminate_noops").run(model, context(config))
    assert isinstance(gm, fx.GraphModule)
    return gm


@pytest.mark.parametrize(
    ("family", "width"), [("qwen3_moe", 32), ("gpt_oss", 128), ("dbrx", 32), ("deepseek_v3", 32)]
)
def test_bytes_are_those_of_the_modules(family: str, width: int) -> None:
    """Of dbrx the weights are views, of gpt-oss they lie transposed, of DeepSeek some layers have none."""
    model = architectures.random_model(architectures.small_config(family, fewest_layers=2)).bfloat16()
    found = step_weights(exported(model))

    experts = [module for name, module in model.named_modules() if name.endswith(".experts")]
    assert [site.num_experts * site.bytes_each for site in found.experts] == [
        sum(weight.nbytes for weight in module.parameters()) for module in experts
    ]
    assert {(site.num_experts, site.top_k, site.hidden, site.width) for site in found.experts} == {
        (4, 2, 64, width)
    }
    assert {site.dtype for site in found.experts} == {"bfloat16"}
    table = next(module for module in model.modules() if isinstance(module, nn.Embedding)).weight.nbytes
    weights = {id(tensor): tensor.nbytes for tensor in model.parameters()}
    assert found.bytes - (sum(weights.values()) - table) in range(2000)  # and buffers, as of RoPE


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_distinct_experts_are_counted_in_every_case(num_tokens: int) -> None:
    """Two of four experts for each token: six choices, all of which are tried."""
    choices = [set(pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    cases = [set().union(*case) for case in product(choices, repeat=num_tokens)]
    mean = sum(map(len, cases)) / len(cases)
    assert SITE.distinct(num_tokens) == pytest.approx(mean)
    assert StepWeights(100, (SITE, SITE)).bytes_at(num_tokens) == pytest.approx(100 + 20 * mean, abs=0.5)


def test_one_token_reads_its_experts_and_many_read_all() -> None:
    weights = StepWeights(100, (SITE,))
    assert (weights.bytes_at(1), weights.bytes_at(1000), weights.bytes) == (120, 140, 140)


def test_a_graph_without_experts_reads_all_its_weights_but_tables() -> None:
    model = architectures.random_model(architectures.CONFIGS["llama_gqa4"]())
    found = step_weights(exported(model))
    assert found.experts == ()
    assert found.bytes == found.bytes_at(1) == found.always
