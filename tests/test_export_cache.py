"""Exported graphs that are kept: the same graph again, for that model alone, and never a file's code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ad_flashinfer_pass import export_cache, saved_graph
from ad_flashinfer_pass.errors import LoadError
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.transforms.export_model import Logits, export_model
from tests.transforms.small_models import context, tokens

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ad-flashinfer-pass" / "graphs"


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval().requires_grad_(False)


def exported(model: nn.Module) -> fx.GraphModule:
    gm = export_model(model, context())[0]
    assert isinstance(gm, fx.GraphModule)
    return gm


def no_export(*args: object, **kwargs: object) -> None:
    raise AssertionError("exported")


def described(gm: fx.GraphModule) -> list[Any]:
    symbols = dict[str, str]()

    def name(size: object) -> str:  # symbols have other names in another process, too
        text = str(size)
        return text if text.isdigit() else symbols.setdefault(text, f"size {len(symbols)}")

    def hint(size: int | torch.SymInt) -> int:  # what is read is simplified
        return size if isinstance(size, int) else size.node.hint

    def value(of: fx.Node) -> list[Any]:
        found = [[str(t.dtype), *map(name, t.shape), *map(hint, t.stride())] for t in g.tensors(of)]
        return found or [name(g.value(of)) if isinstance(g.value(of), torch.SymInt) else g.value(of)]

    return [
        (node.name, node.format_node(), str(node.kwargs), value(node), g.where(node), g.module_path(node))
        for node in gm.graph.nodes
    ]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_second_start_exports_nothing(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = exported(make())
    monkeypatch.setattr(torch.export, "export", no_export)
    second = exported(model := make())
    assert described(second) == described(first)
    ids, positions = tokens(2, 9)
    assert torch.equal(second(ids, positions), first(ids, positions))
    own = {id(tensor) for tensor in model.parameters()}
    assert all(id(tensor) in own for tensor in second.parameters())


def test_other_weights_are_those_of_the_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    exported(llama())
    monkeypatch.setattr(torch.export, "export", no_export)
    ids, positions = tokens(2, 9)
    other = llama(seed=1)
    assert torch.equal(exported(other)(ids, positions), other(ids, position_ids=positions).logits)


def rescaled(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.5


def other_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def untied(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


@pytest.mark.parametrize(
    "change", [rescaled, other_frequencies, untied, lambda model: model.to(torch.bfloat16)]
)
def test_another_model_has_another_key(change: Callable[[Any], None]) -> None:
    models = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    change(models[1])
    keys = [export_cache.key_of(model, max_seq_len=64) for model in models]
    assert None not in keys
    assert keys[0] != keys[1]
    assert export_cache.key_of(models[0], max_seq_len=65) not in keys


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *args: None)


def own_forward(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = MethodType(lambda self, x: x, layer)


def own_module(model: Any) -> None:
    class Mlp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model.model.layers[0].mlp = Mlp()


@pytest.mark.parametrize("change", [hooked, own_forward, own_module])
def test_code_of_somebody_else_is_exported_each_time(change: Callable[[Any], None]) -> None:
    change(model := llama())
    assert export_cache.key_of(model) is None


def test_a_function_put_into_the_module_of_a_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of kernels do it: the graph is that of the function."""
    from transformers.models.llama import modeling_llama

    assert export_cache.key_of(Logits(llama())) is not None
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert export_cache.key_of(Logits(llama())) is None


def test_a_method_put_in_place_of_transformers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", lambda self, x: x)
    assert export_cache.key_of(llama()) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"aten.silu", b"aten.relu", 1),
        lambda content: bytes(1000),
    ],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[bytes], bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = described(exported(llama()))
    (file,) = folder.iterdir()
    content = file.read_bytes()
    assert damage(content) != content
    file.write_bytes(damage(content))
    assert described(exported(llama())) == wanted
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(str(file))
    assert line.endswith("; it is made again")
    assert described(saved_graph.load(file, Logits(llama()), file.stem)) == wanted


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_others_can_enter_is_not_used(mode: int, folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(mode)
    exported(llama())
    assert not list(folder.iterdir())


def test_the_oldest_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_cache, "_MOST", 1)
    exported(llama())
    (first,) = folder.iterdir()
    exported(llama(num_hidden_layers=1))
    (second,) = folder.iterdir()
    assert first != second


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.silu.default", "os.system"),
        ("torch.ops.aten.silu.default", "torch.ops.aten.from_file.default"),
        ("Symbol", "__import__"),
        ("call_function", "call_module"),
        ('"@torch": "strided"', '"@torch": "load"'),
    ],
)
def test_nothing_that_a_file_holds_is_run(old: str, new: str, folder: Path) -> None:
    """Also if its digest is right."""
    exported(model := llama())
    (file,) = folder.iterdir()
    with safe_open(file, framework="pt") as opened:
        key, text = (opened.metadata()[name] for name in ("key", "graph"))
    changed = text.replace(old, new)
    assert changed != text
    json.loads(changed)
    save_file({}, file, {"key": key, "graph": changed, "digest": saved_graph._digest(key, changed, {})})
    with pytest.raises(LoadError, match=str(file)):
        saved_graph.load(file, model, key)
