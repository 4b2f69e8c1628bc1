"""``transform``, ``to_program``, ``restore``: programs exported elsewhere, saved and loaded again."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ad_flashinfer_pass import AutoDeployConfig, exported, restore, to_program, transform
from ad_flashinfer_pass.errors import ConfigError, ExportError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.kernels import modules
from ad_flashinfer_pass.kernels.attention.capability import Site
from ad_flashinfer_pass.kernels.attention.select import Choice
from ad_flashinfer_pass.kernels.kernel_plan import Kernel
from ad_flashinfer_pass.records import CachedSite, SiteNotes
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import BatchInfo, SequenceStep
from tests import architectures
from tests.torch_compile.capture_on_cpu import capturing

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = {
    "max_batch_size": 4,
    "max_seq_len": 64,
    "kv_cache_config": {"tokens_per_block": 16},
}
PROMPTS = architectures.random_prompts((5, 9, 1, 14), vocab_size=128)


@cache
def model() -> nn.Module:
    config = architectures.CONFIGS["mistral"]()
    config.num_hidden_layers = 1
    return architectures.random_model(config)


@cache
def expected() -> list[list[int]]:
    return architectures.generated_by_transformers(model(), PROMPTS, 12)


def export(
    module: nn.Module, names: tuple[str, ...] = ("input_ids", "position_ids"), **flags: Any
) -> ExportedProgram:
    """With inputs of these names, in this order, and flags."""
    inputs = {name: torch.arange(13).repeat(2, 1) for name in names}
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {**dict.fromkeys(inputs, dynamic), **dict.fromkeys(flags)}
    with torch.no_grad():
        return torch.export.export(module, (), {**inputs, **flags}, dynamic_shapes=shapes, strict=False)


@cache
def cached() -> CachedModel:
    return transform(export(model(), ("position_ids", "input_ids"), use_cache=False), **SETTINGS)


@cache
def cached_in_8_bits() -> CachedModel:
    kv = {**SETTINGS["kv_cache_config"], "dtype": "fp8", "k_scale": 0.5, "v_scale": [0.25]}
    return transform(export(model(), use_cache=False), **{**SETTINGS, "kv_cache_config": kv})


@cache
def program_in_8_bits() -> ExportedProgram:
    program = to_program(cached_in_8_bits())
    assert [c.dtype for c in restore(program, **SETTINGS).caches.values()] == [torch.float8_e4m3fn]
    return program


def test_a_program_of_a_users_own_generates_the_tokens_of_transformers() -> None:
    """Exported by keywords, in another order, with a flag that is no tensor."""
    assert architectures.generated_by_engine(cached(), PROMPTS, 12) == expected()


def test_a_saved_program_is_loaded_and_generates_the_same(tmp_path: Path) -> None:
    """With its weights, and pools of its own."""
    program = to_program(cached())
    torch.export.save(program, tmp_path / "cached.pt2")
    loaded = torch.export.load(tmp_path / "cached.pt2")

    again = restore(loaded, AutoDeployConfig(**{**SETTINGS, "compile_backend": "torch-simple"}))
    assert architectures.generated_by_engine(again, PROMPTS, 12) == expected()

    # Called as it is, for a step of decode and one with prefill.
    caches = {name: torch.zeros_like(pool) for name, pool in cached().caches.items()}
    for steps in ([SequenceStep([5], 0, [1])], [SequenceStep([5, 3, 4], 0, [2]), SequenceStep([7], 0, [3])]):
        again.sequence_info.nest_sequences(steps)
        args = again.sequence_info.named_args()
        with torch.no_grad():
            found = loaded.module(check_guards=False)(**args, **caches)
            assert torch.equal(found, again.module(**args, **again.caches))


def test_a_loaded_program_is_captured_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tuned, and what kernels read on the host is not captured."""
    loaded = to_program(cached())
    seen = capturing(monkeypatch, by_inductor=False)
    again = restore(loaded, **SETTINGS, compile_backend="torch-opt")
    assert seen == ["tune_attention", "fuse_small_batch", "compile_model"]
    assert architectures.generated_by_engine(again, PROMPTS, 12) == expected()
    assert again.num_replays > 10
    assert all(reason.startswith("prefill by reference") for reason in again.eager_steps)


def test_a_program_from_a_file_is_compiled_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its number of pages has no value in the file."""
    torch.export.save(to_program(cached()), tmp_path / "cached.pt2")
    capturing(monkeypatch, by_inductor=False)
    again = restore(tmp_path / "cached.pt2", **SETTINGS, compile_backend="torch-opt")
    assert architectures.generated_by_engine(again, PROMPTS, 12) == expected()


def test_a_saved_program_is_loaded_in_another_process(tmp_path: Path) -> None:
    """Which has nothing but the file and the settings."""
    torch.export.save(to_program(cached()), tmp_path / "cached.pt2")
    code = (
        "import sys, torch, ad_flashinfer_pass\n"
        "from ad_flashinfer_pass.runtime.sequence_info import SequenceStep\n"
        f"model = ad_flashinfer_pass.restore(torch.export.load(sys.argv[1]), **{SETTINGS})\n"
        f"tokens, length = {PROMPTS[0]}, 0\n"
        "for _ in range(12):\n"
        "    logits = model.step([SequenceStep(tokens, length, [1, 2])])\n"
        "    length, tokens = length + len(tokens), [int(logits.argmax())]\n"
        "    print(*tokens)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "cached.pt2")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert [int(token) for token in result.stdout.split()] == expected()[0]


@cache
def program_with_drafts() -> ExportedProgram:
    return to_program(
        transform(export(model(), use_cache=False), **SETTINGS, speculative_config={"drafter": "ngram"})
    )


def test_a_program_made_for_drafts_verifies_them() -> None:
    """By the kernels that it names, which can be tuned and captured again."""
    again = restore(program_with_drafts(), **SETTINGS, speculative_config={"drafter": "ngram"})
    assert isinstance(again.module, fx.GraphModule)
    assert [site.verify for site in exported._sites(again.module)] == ["reference"]
    assert architectures.generated_by_engine(again, PROMPTS, 12) == expected()
    with pytest.raises(ConfigError, match="the program was transformed without 2 drafts a sequence"):
        restore(program_with_drafts(), **SETTINGS, speculative_config={"drafter": "ngram", "num_tokens": 2})


def test_a_program_made_for_drafts_reads_chunks_without_them() -> None:
    """A short chunk of a prompt is no draft: kernels of drafts take those of one length."""
    again = restore(program_with_drafts(), **SETTINGS)
    again.step([SequenceStep([1, 2, 3, 4], 0, [1])])
    again.nest([SequenceStep([5, 6, 7], 4, [1])])
    counts = BatchInfo._make(again.sequence_info.named_args()["batch_info_host"].tolist())
    assert (counts.num_prefill, counts.num_extend) == (1, 0)
    assert architectures.generated_by_engine(again, PROMPTS, 12) == expected()


def test_a_saved_program_keeps_to_its_sizes() -> None:
    program = to_program(cached())
    with pytest.raises(
        ConfigError, match=r"transformed for other sizes: .* with these settings\. Give max_batch"
    ):
        restore(program, **{**SETTINGS, "max_batch_size": 3})
    with pytest.raises(ConfigError, match="takes no cu_seqlen: it was not made by transform"):
        restore(export(Embedding(), ("input_ids", "where")), **SETTINGS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kv_cache_config": {"dtype": "bfloat16"}},
            "kv_cache_config.dtype: the program was .* got 'bfloat16'",
        ),
        ({"kv_cache_config": {"dtype": "auto"}}, "kv_cache_config.dtype: .* torch.float8_e4m3fn, got 'auto'"),
        ({"kv_cache_config": {"dtype": "fp8", "k_scale": 0.25}}, r"k_scale: .* \[0.5\], got 0.25; leave"),
        ({"dtype": "bfloat16"}, "dtype: the program was transformed for torch.float32, got 'bfloat16'"),
        ({"max_seq_len": 63}, "max_seq_len is 64, and 63 with these settings"),
        ({"max_num_tokens": 500}, "max_num_tokens is 512, and 500 with these settings"),
    ],
)
def test_a_setting_that_is_not_the_programs_is_refused(settings: dict[str, Any], said: str) -> None:
    """Of what is not a size, the program's own stands where nothing is given."""
    given = {**SETTINGS, **settings}
    given["kv_cache_config"] = {**SETTINGS["kv_cache_config"], **settings.get("kv_cache_config", {})}
    with pytest.raises(ConfigError, match=said):
        restore(program_in_8_bits(), **given)


def test_a_cache_of_8_bits_is_not_asked_of_a_program_without() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_config.dtype: .* torch.float32, got 'fp8'"):
        restore(
            to_program(cached()), **{**SETTINGS, "kv_cache_config": {"tokens_per_block": 16, "dtype": "fp8"}}
        )


class Embedding(nn.Module):
    """A model of nothing, that takes the positions by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, input_ids: Tensor, where: Tensor) -> Tensor:
        """[b, s, 8]."""
        return self.table(input_ids) + where[..., None]


def test_kernels_that_the_flashinfer_here_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer one chose them, also if only for a batch size."""
    bf16 = torch.bfloat16
    sizes: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "v_head_dim": 128,
        "page_size": 32,
    }
    site = Site(dtype=bf16, kv_dtype=bf16, scale=1.0, **sizes)
    decode = Choice("split_decode 8=xqa/2", "")
    sites = [CachedSite("node a", "", SiteNotes(""), site, Choice("fmha_v2", ""), decode, "kv_cache_0")]
    monkeypatch.setattr(modules, "installed", lambda: Version("0.6.17"))
    exported._check_versions(sites, 9)
    monkeypatch.setattr(modules, "installed", lambda: Version("0.6.16"))
    with pytest.raises(
        ConfigError, match=r"runs xqa at node a, but flashinfer-python 0.6.16 lacks .*; 0.6.17"
    ):
        exported._check_versions(sites, 9)
    sites[0].decode, sites[0].verify = Choice("split_decode", ""), "split_decode 8=xqa"
    sites[0].site = replace(site, kv_dtype=torch.float8_e4m3fn)  # which the older one decodes
    with pytest.raises(ConfigError, match=r"xqa at node a, but .* 0.6.16 lacks extends whose"):
        exported._check_versions(sites, 9)


@pytest.mark.parametrize(
    ("argument", "plan"),
    [
        ("decode_kernel", "reference 4=cutlass"),
        ("decode_kernel", "reference 1=xqa/two"),
        ("decode_kernel", "reference/3"),
        ("decode_kernel", ""),
        ("prefill_kernel", "xqa/2"),
        ("prefill_kernel", "reference 1=reference"),
    ],
)
def test_a_plan_of_other_kernels_is_refused_at_once(argument: str, plan: str) -> None:
    program = to_program(cached())
    attention = torch.ops.ad_flashinfer.cached_attention.default
    (node,) = program.graph.find_nodes(op="call_function", target=attention)
    node.args, node.kwargs = (), {**g.op_args(node), argument: plan}
    with pytest.raises(ConfigError, match=f"{argument} {plan!r} is nothing that this version runs; it has"):
        restore(program, **SETTINGS)


def test_plans_of_experts_and_linears_are_known() -> None:
    gemv = pytest.importorskip("ad_flashinfer_pass.kernels.experts.gemv", reason="triton is not installed")
    grouped = importlib.import_module("ad_flashinfer_pass.kernels.experts.grouped")
    small_gemm = importlib.import_module("ad_flashinfer_pass.kernels.linear.small_gemm")
    graph = fx.Graph()
    x = graph.placeholder("x")
    experts, linear = torch.ops.ad_flashinfer.experts.default, torch.ops.ad_flashinfer.linear.default
    plans = [
        *(f"triton 1={Kernel('gemv', config)} 2=torch" for config in gemv.candidates(1)),
        *(str(Kernel("grouped", config)) for config in grouped.candidates(64, torch.device("cpu"))),
    ]
    for plan in plans:
        graph.call_function(experts, (x,) * 5, {"plan": plan})
    for config in small_gemm.all_candidates(1):
        graph.call_function(linear, (x, x), {"plan": f"torch 1={Kernel('small_gemm', config)}"})
    gm = fx.GraphModule(nn.Module(), graph)
    exported._check_kernels(gm)
    node = graph.call_function(experts, (x,) * 5)
    for plan in ("triton 1=gemv/2", "gemv"):
        node.kwargs = {"plan": plan}
        with pytest.raises(ConfigError, match=rf"plan '{plan}' is nothing .* torch, triton, gemv, gr"):
            exported._check_kernels(gm)


def test_inputs_must_be_tokens_and_positions() -> None:
    other = export(Embedding(), ("input_ids", "where"))
    with pytest.raises(ExportError, match=r"takes input_ids, where: it must take input_ids and position_ids"):
        transform(other, **SETTINGS)
    with pytest.raises(
        ConfigError, match="give a config or its keys, not both, got config and max_batch_size"
    ):
        transform(other, AutoDeployConfig(), max_batch_size=2)


def test_only_a_plain_graph_can_be_saved() -> None:
    module = cached().module
    compiled = CachedModel(nn.Sequential(module), cached().caches, cached().sequence_info, 128)
    with pytest.raises(ConfigError, match="only a model of compile_backend 'torch-simple' can be saved"):
        to_program(compiled)
