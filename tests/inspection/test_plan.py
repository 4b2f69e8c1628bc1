"""What ``plan`` says, against what is allocated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ad_flashinfer_pass import inspection, pipeline
from ad_flashinfer_pass.cli import main
from ad_flashinfer_pass.config import AutoDeployConfig, KvCacheConfig
from ad_flashinfer_pass.errors import CapacityError, ConfigError
from ad_flashinfer_pass.graph.data import NodeNames
from ad_flashinfer_pass.inspection.plan import peak
from ad_flashinfer_pass.kernels.attention import fa, fa2, fa3, fmha_v2, trtllm_gen
from ad_flashinfer_pass.kernels.attention.capability import Capability
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.runtime.cached_model import CachedModel
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep
from ad_flashinfer_pass.transforms import initialize_cache
from tests import architectures

MIB = 2**20


def storages(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("memory", "cache"),
    [
        (None, {"max_tokens": 1000, "dtype": "float16"}),
        (6 * MIB, {"tokens_per_block": 16, "free_gpu_memory_fraction": 0.5}),
    ],
    ids=["max_tokens", "limited"],
)
def test_the_plan_is_what_is_allocated(
    memory: int | None, cache: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, metadata, pages and pools of the demo, planned from its config and then built."""
    config = AutoDeployConfig(
        max_seq_len=300,
        max_batch_size=6,
        kv_cache_config=KvCacheConfig(**cache),
        model_kwargs={"num_hidden_layers": 2, "max_position_embeddings": 400},
        skip_loading_weights=True,
    )
    found = inspection.plan(config, memory=memory)

    weights = sum(row.bytes for row in found.rows if row.name.startswith("weights"))
    metadata = next(row.bytes for row in found.rows if row.name == "metadata")
    if memory is not None:
        # What the device has free once weights and metadata are there.
        monkeypatch.setattr(initialize_cache, "free_bytes", lambda device: memory - weights - metadata)
    cached, _ = pipeline.transform_module(load_model(config).module, config)

    module = cached.module
    assert weights == storages([*module.parameters(), *module.buffers()])
    info = cached.sequence_info
    args = {name: t for name, t in info.named_args().items() if name != "batch_info_host"}
    assert metadata == storages(list(args.values()))
    assert found.pages == cached.num_pages - 1
    pools = sum(row.bytes for row in found.rows if "KV cache pool" in row.name)
    assert pools == sum(cache.nbytes for cache in cached.caches.values())
    assert found.bytes_per_token * found.tokens_per_block * cached.num_pages == pools
    assert (memory is not None) == (found.pages < found.pages_wanted)


class Alive(fx.Interpreter):
    """Counts the bytes of the results that are alive after each node."""

    def __init__(self, module: fx.GraphModule, given: set[int]) -> None:
        super().__init__(module)
        self.given = given
        self.most = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        values = [*self.env.values(), result]
        tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
        fresh = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.given
        }
        self.most = max(self.most, sum(fresh.values()))
        return result


@pytest.mark.parametrize("tokens", [17, 96])
def test_intermediate_results_are_those_of_a_run(tokens: int) -> None:
    """The most bytes alive in a prefill of the demo, of which the graph is run node by node."""
    config = AutoDeployConfig(max_seq_len=128, max_batch_size=1, max_num_tokens=128)
    ctx = pipeline.context(config)
    without = pipeline.Pipeline.of(config).without("compile_model")
    gm, _ = without.run(load_model(config).module, ctx)
    assert isinstance(gm, fx.GraphModule)
    model = CachedModel(gm, ctx.caches, ctx.sequence_info, ctx.vocab_size)
    pages = list(range(1, -(-tokens // 32) + 1))
    ctx.sequence_info.nest_sequences([SequenceStep([1] * tokens, 0, pages)])
    inputs = {**ctx.sequence_info.named_args(), **model.caches}
    given = [*inputs.values(), *gm.parameters(), *gm.buffers()]
    runner = Alive(gm, {t.untyped_storage().data_ptr() for t in given})
    with torch.inference_mode():
        runner.run(*(inputs[node.name] for node in gm.graph.find_nodes(op="placeholder")))

    names = NodeNames()
    names.see(gm, None)
    planned, _, _ = peak(names.data(gm, "demo"), {"b": 1, "s": tokens})

    assert planned == runner.most


def test_too_little_memory_is_an_error_with_the_sum() -> None:
    """Weights of the demo take 3.7 MB."""
    with pytest.raises(
        CapacityError, match=r"of 3700000 bytes, weights and metadata take 3\d+; the KV cache"
    ):
        inspection.plan(AutoDeployConfig(), memory=3_700_000)
    with pytest.raises(
        CapacityError, match=r"take 3\d+ bytes, and there are 3000000; split .* several GPUs \(--tp\)"
    ):
        inspection.plan(AutoDeployConfig(), memory=3_000_000)


def test_a_gpu_that_is_not_here_needs_its_compute_capability() -> None:
    if torch.cuda.is_available():
        pytest.skip("the GPU is here")
    with pytest.raises(ConfigError, match="--sm 90"):
        inspection.plan(AutoDeployConfig(device="cuda"))


@pytest.mark.parametrize(
    ("capability", "make"),
    [
        (fa2.CAPABILITY, lambda device: fa._Eager(device).scratch),
        (fa3.CAPABILITY, lambda device: fa._Eager(device).scratch),
        (fmha_v2.CAPABILITY, fmha_v2._workspace),
        (trtllm_gen.CAPABILITY, trtllm_gen._workspace),
    ],
    ids=["fa2", "fa3", "fmha_v2", "trtllm_gen"],
)
def test_workspaces_are_declared_as_they_are_made(capability: Capability, make: Callable[..., Any]) -> None:
    made = make(torch.device("meta"))
    tensors = made if isinstance(made, tuple) else (made,)
    assert capability.workspace_bytes == sum(tensor.nbytes for tensor in tensors)


def test_the_command_plans_from_a_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes are decimal or binary; the JSON holds the sums."""
    config = architectures.CONFIGS["llama_gqa4"]()
    config.head_dim, config.dtype, config.num_hidden_layers = 64, "bfloat16", 1
    config.save_pretrained(tmp_path)
    args = ["plan", "-m", str(tmp_path / "config.json"), "--max-seq-len", "256", "--sm", "90"]

    with pytest.raises(SystemExit) as stop:
        main([*args, "--memory", "1GiB", "--json"])
    assert not stop.value.code
    data = json.loads(capsys.readouterr().out)
    assert data["memory"] == 2**30
    assert data["left"] == 2**30 - sum(row["bytes"] for row in data["rows"])
    assert data["tokens"] == 8 * 256
    assert {"workspace of xqa", "workspace of fmha_v2"} <= {row["name"] for row in data["rows"]}

    with pytest.raises(SystemExit) as stop:
        main([*args, "--memory", "lots"])
    assert stop.value.code == 2
    assert "as in 80GB, got 'lots'" in capsys.readouterr().err


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_plan_of_several_gpus_is_that_of_one_of_them(size: int) -> None:
    """Heads, columns and the vocabulary are shared, embeddings and norms are not; no GPU is needed."""
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "head_dim": 128}
    keys: dict[str, Any] = {
        "model_kwargs": {**shape, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 1024},
        "device": "cuda",
        "max_seq_len": 256,
    }
    one, some = (inspection.plan(AutoDeployConfig(**keys, world_size=n), sm=90) for n in (1, size))
    assert some.model.endswith(f", on each of {size} GPUs")
    assert (one.bytes_per_token, one.pages) == (size * some.bytes_per_token, some.pages)
    whole, part = ({row.name: row.bytes for row in each.rows} for each in (one, some))
    norms = 2 * 2 * 1024 * 4
    assert part["weights of 2 layers"] == (whole["weights of 2 layers"] - norms) // size + norms


def test_ranks_share_the_bytes_of_states(tmp_path: Path) -> None:
    """Of a convolution's channels and of a recurrence's heads."""
    architectures.small_config("qwen3_next", fewest_layers=2).save_pretrained(tmp_path)
    keys: dict[str, Any] = {"model": str(tmp_path), "device": "cpu", "max_seq_len": 64}
    one, two = (
        [
            row.bytes
            for row in inspection.plan(AutoDeployConfig(**keys, world_size=n)).rows
            if "states" in row.name
        ]
        for n in (1, 2)
    )
    assert len(one) == 2
    assert [2 * each for each in two] == one
