"""Experts of whole models: one op a layer, whatever door a graph came through, and the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn

from ad_flashinfer_pass import CacheSession, restore, to_program, transform
from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ExportError, PackingError, UnsupportedError
from ad_flashinfer_pass.experts import as_one_op
from ad_flashinfer_pass.models.weightless import load_weightless
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.inductor import Piece
from tests import architectures
from tests.transforms.small_models import context, run

EXPERTS = torch.ops.ad_flashinfer.experts.default
SIZES: dict[str, Any] = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 32}
PROMPTS = architectures.random_prompts((1, 2, 9, 14), vocab_size=128)
NUM_NEW_TOKENS = 12


def small(family: str, **changes: Any) -> Any:
    """A model of this family with random weights; skips what the installed version has not."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return architectures.random_model(architectures.small_config(family, fewest_layers=2, **changes))


def num_experts_ops(gm: nn.Module) -> int:
    assert isinstance(gm, fx.GraphModule)
    return len(gm.graph.find_nodes(op="call_function", target=EXPERTS))


def cached(model: nn.Module, **settings: Any) -> CachedModel:
    return transform_module(model, AutoDeployConfig(**SIZES, **settings))[0]


@pytest.mark.parametrize(("family", "count"), [("gpt_oss", 2), ("llama4_text", 4)])
def test_one_op_a_layer(family: str, count: int) -> None:
    """And nothing else of the dispatch; for other numbers of tokens than the example's it is right, too."""
    model = small(family)
    gm, _ = run(model, context(), "export_model")
    assert num_experts_ops(gm) == count
    names = {str(node.target) for node in gm.graph.nodes}
    dispatch = ("grouped_mm", "histc", "sort", "index_add", "index_put", "bmm", "nonzero")
    assert not [name for name in names if any(op in name for op in dispatch)]
    assert not [module for module in model.modules() if "forward" in vars(module)]
    for batch, seq in ((3, 5), (1, 21)):
        ids = torch.randint(0, 128, (batch, seq), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(seq).repeat(batch, 1)
        wanted = model(input_ids=ids, position_ids=positions).logits
        torch.testing.assert_close(gm(ids, positions), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "count"), [("dbrx", 2), ("jetmoe", 2), ("longcat_flash", 1)])
def test_code_of_their_own(family: str, count: int) -> None:
    """Families whose own loop over experts cannot be exported give the tokens of transformers."""
    model = small(family)
    served = cached(model)
    assert num_experts_ops(served.module) == count
    found = architectures.generated_by_engine(served, PROMPTS, NUM_NEW_TOKENS)
    assert found == architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)


def test_code_that_was_not_read_is_not_taken_for_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name says nothing: another version of a module with code of its own may compute something else."""
    layer = small("llama4_text").model.layers[0].feed_forward
    with as_one_op(layer):
        assert "forward" in vars(layer)

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        return original(self, hidden_states * 2)

    original = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", forward)
    with as_one_op(layer):
        assert "forward" not in vars(layer)


def test_an_export_that_fails_leaves_the_model_as_it_was() -> None:
    model = small("mixtral", num_hidden_layers=1)
    before = model.config.to_dict(), model.config._experts_implementation
    model.lm_head.forward = lambda x: x if x.sum() > 0 else -x
    with pytest.raises(ExportError):
        run(model, context(), "export_model")
    assert (model.config.to_dict(), model.config._experts_implementation) == before
    assert [m for m in model.modules() if "forward" in vars(m)] == [model.lm_head]


def test_experts_that_the_op_has_not_are_refused_by_name() -> None:
    model = small("mixtral", hidden_act="gelu_new", num_hidden_layers=1)
    with pytest.raises(
        UnsupportedError, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\) has a gate"
    ):
        run(model, context(), "export_model")


def test_weightless_and_in_bfloat16(tmp_path: Path) -> None:
    """Commands that read no weights see the same op, of gpt-oss in bfloat16, which is served."""
    architectures.small_config("gpt_oss", fewest_layers=2, dtype="bfloat16").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json")
        .read_text()
        .replace('"model_type"', '"architectures": ["GptOssForCausalLM"], "model_type"')
    )
    model, _ = load_weightless(AutoDeployConfig(model=str(tmp_path), **SIZES))
    gm, _ = run(model, context(), "export_model")
    assert num_experts_ops(gm) == 2


def test_what_torch_opt_compiles_stands_around_the_experts() -> None:
    """Pieces end at the op: they hold for every number of tokens."""
    model = small("qwen3_moe", num_hidden_layers=1)
    opt = cached(model, compile_backend="torch-opt")
    pieces = [module for module in opt.module.modules() if isinstance(module, Piece)]
    assert [piece.num_calls for piece in pieces] == [1, 1, 1]
    found = architectures.generated_by_engine(opt, PROMPTS, NUM_NEW_TOKENS)
    assert found == architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
            return logits

    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    example = (torch.zeros((2, 13), dtype=torch.int64), torch.arange(13).repeat(2, 1))
    with torch.no_grad():
        return torch.export.export(Logits(), example, dynamic_shapes=(dynamic, dynamic), strict=False)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_of_transformers_becomes_the_op(implementation: str) -> None:
    """Where this package exports the model, it is the same whichever was chosen, and stays chosen."""
    model = small("mixtral", num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    gm, _ = run(model, context(), "export_model")
    assert num_experts_ops(gm) == 1
    assert model.config._experts_implementation == implementation


WAY_OUT = r'model\.set_experts_implementation\("ad_flashinfer"\)'
REFUSED = pytest.mark.parametrize(
    ("implementation", "seen"),
    [("grouped_mm", "sort works along"), ("batched_mm", "copies a matrix of .*experts")],
)


@REFUSED
def test_a_program_with_another_dispatch_is_refused_by_name(implementation: str, seen: str) -> None:
    """A sort cannot be proved, and copies of weights for each token fit small models alone."""
    model = small("mixtral", num_hidden_layers=1, layer_types=None)
    model.set_experts_implementation(implementation)
    with pytest.raises(PackingError, match=f"{seen}.*{WAY_OUT}"):
        transform(exported(model), **SIZES)


def test_a_given_program_and_a_saved_one(tmp_path: Path) -> None:
    """With the op in it, a program that the user exported is served, and so is a file of what came out."""
    model = small("mixtral", num_hidden_layers=1, layer_types=None)
    model.set_experts_implementation("ad_flashinfer")
    served = transform(exported(model), **SIZES)
    torch.export.save(to_program(served), tmp_path / "cached.pt2")
    again = restore(torch.export.load(tmp_path / "cached.pt2"), **SIZES)
    model.set_experts_implementation("eager")
    wanted = architectures.generated_by_transformers(model, PROMPTS, NUM_NEW_TOKENS)
    for one in (served, again):
        assert num_experts_ops(one.module) == 1
        assert architectures.generated_by_engine(one, PROMPTS, NUM_NEW_TOKENS) == wanted


def logits_of_compiled(model: nn.Module) -> torch.Tensor:
    torch._dynamo.reset()
    session = CacheSession(max_batch_size=4, max_seq_len=64)
    options: dict[str, Any] = {"session": session, "compile_backend": "torch-simple"}
    compiled = torch.compile(model, backend="flashinfer_trtllm", options=options, fullgraph=True)
    with session.prefill([PROMPTS[2], PROMPTS[3]]) as batch:
        return batch.last_logits(compiled(**batch.inputs, use_cache=False).logits)


def test_torch_compile() -> None:
    """Likewise where Dynamo captures the model."""
    model = small("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation("ad_flashinfer")
    found = logits_of_compiled(model)
    model.set_experts_implementation("eager")
    wanted = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS[2:]]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-3)


@REFUSED
def test_torch_compile_with_another_dispatch_is_refused_by_name(implementation: str, seen: str) -> None:
    model = small("qwen3_moe", num_hidden_layers=1)
    model.set_experts_implementation(implementation)
    with pytest.raises(PackingError, match=f"{seen}.*{WAY_OUT}"):
        logits_of_compiled(model)


def test_torch_compile_of_code_of_their_own() -> None:
    """What transformers' interface does not reach is the op within ``as_one_op``."""
    model = small("jetmoe", num_hidden_layers=1)
    wanted = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS[2:]]
    with as_one_op(model):
        found = logits_of_compiled(model)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-3)
