"""Exported graphs that are kept: the same graph again, for that model alone, and never a file's code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama

from ad_flashinfer_pass import export_cache, saved_graph
from ad_flashinfer_pass.errors import ExportError, LoadError
from ad_flashinfer_pass.files import cache_folder
from ad_flashinfer_pass.graph import edit as g
from ad_flashinfer_pass.models.fake_weights import with_fake_weights
from ad_flashinfer_pass.transforms.export_model import Logits, export_model
from tests.architectures import random_model, small_config
from tests.transforms.small_models import context, run, tokens

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ad-flashinfer-pass" / "graphs"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The key of a graph, and what its file holds."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        exported(llama())
    (file,) = (home / "ad-flashinfer-pass" / "graphs").iterdir()
    return file.stem, file.read_bytes()


def keep(kept: tuple[str, bytes]) -> Path:
    file = export_cache._file(kept[0])
    assert file is not None
    file.write_bytes(kept[1])
    return file


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval().requires_grad_(False)


def exported(model: nn.Module) -> fx.GraphModule:
    gm = export_model(model, context())[0]
    assert isinstance(gm, fx.GraphModule)
    return gm


def weightless(model: nn.Module) -> nn.Module:
    for part in model.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    with_fake_weights(model, torch.device("cpu"))
    return model


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


@pytest.mark.parametrize("family", ["youtu", "mixtral"])
def test_a_graph_that_writes_in_place_is_kept_with_its_views(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told by shared memory: without it writes would be lost, and with them Youtu's keys."""
    model = random_model(small_config(family, fewest_layers=1))
    first = exported(model)
    assert any(g.mutates_input(node) for node in first.graph.nodes if node.op == "call_function")
    monkeypatch.setattr(torch.export, "export", no_export)
    second, _ = run(exported(model), context(), "functionalize")
    assert not any(g.mutates_input(node) for node in second.graph.nodes if node.op == "call_function")
    ids, positions = tokens(2, 9)
    wanted = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(second(ids, positions), wanted, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("of_weights", [False, True])
def test_a_model_without_weights_has_the_graph_of_one_with(
    of_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As commands that only look have it; what was compared with no model is not for one that runs."""
    first = exported(llama() if of_weights else weightless(llama()))
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", no_export)
        second = exported(model := weightless(llama()))
        own = {id(tensor) for tensor in model.parameters()}
        assert described(second) == described(first)
        assert all(id(tensor) in own for tensor in second.parameters())
    monkeypatch.setattr(torch.export, "export", no_export)
    if of_weights:
        exported(llama())
    else:
        with pytest.raises(ExportError):
            exported(llama())


def test_other_weights_are_those_of_the_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    exported(llama())
    monkeypatch.setattr(torch.export, "export", no_export)
    ids, positions = tokens(2, 9)
    other = llama(seed=1)
    assert torch.equal(exported(other)(ids, positions), other(ids, position_ids=positions).logits)


def rescaled(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.5


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


def test_activations_of_torch_are_told_apart() -> None:
    """They are functions of C, in some models with arguments that they keep."""
    keys = {
        export_cache.key_of(llama(hidden_act=name))
        for name in ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")
    }
    assert len(keys - {None}) == 4


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
    assert export_cache.key_of(Logits(llama())) is not None
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    assert export_cache.key_of(Logits(llama())) is None


def by_other_name(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return q, k


def changes_around(patch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """What changes the graph of a model that is the same."""
    llama_code, masks = (
        "transformers.models.llama.modeling_llama",
        "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
    )
    rope = wraps(modeling_llama.apply_rotary_pos_emb)(by_other_name)
    mlp = wraps(modeling_llama.LlamaMLP.forward)(lambda self, x: x)
    attention = modeling_llama.ALL_ATTENTION_FUNCTIONS
    return {
        "method": lambda: patch.setattr(f"{llama_code}.LlamaMLP.forward", lambda self, x: x),
        "wrapped method": lambda: patch.setattr(f"{llama_code}.LlamaMLP.forward", mlp),
        "method of transformers": lambda: patch.setattr(
            f"{llama_code}.LlamaRMSNorm.forward", GemmaRMSNorm.forward
        ),
        "property": lambda: patch.setattr(
            f"{llama_code}.LlamaMLP.up_proj", property(lambda self: self.gate_proj), raising=False
        ),
        "number": lambda: patch.setattr(f"{llama_code}.LlamaMLP.down_proj", 1, raising=False),
        "module": lambda: patch.setattr(f"{llama_code}.LlamaMLP.act_fn", nn.ReLU(), raising=False),
        "wrapped function": lambda: patch.setattr(f"{llama_code}.apply_rotary_pos_emb", rope),
        "partial": lambda: patch.setattr(f"{llama_code}.apply_rotary_pos_emb", partial(by_other_name)),
        "function of transformers": lambda: patch.setattr(
            f"{llama_code}.rotate_half", modeling_llama.repeat_kv
        ),
        "attention": lambda: patch.setitem(attention._global_mapping, "sdpa", by_other_name),
        "attention of one module": lambda: patch.setitem(attention._local_mapping, "sdpa", by_other_name),
        "masks": lambda: patch.setattr(f"{masks}._global_mapping", {"sdpa": by_other_name}),
        "mask": lambda: patch.setattr("transformers.masking_utils.causal_mask_function", by_other_name),
        "sdpa": lambda: patch.setattr(
            "torch.nn.functional.scaled_dot_product_attention", lambda *args, **kwargs: args[0]
        ),
    }


@pytest.mark.parametrize("name", changes_around(pytest.MonkeyPatch()))
def test_code_put_in_place_of_transformers_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it bears the name of what it replaces, or is of transformers itself."""
    key = export_cache.key_of(model := Logits(llama()))
    assert key is not None
    changes_around(monkeypatch)[name]()
    assert export_cache.key_of(model) != key


def test_what_torch_does_for_all_models_is_seen() -> None:
    key = export_cache.key_of(model := Logits(llama()))
    with torch.autocast("cpu", torch.bfloat16):
        assert export_cache.key_of(model) != key
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert export_cache.key_of(model) is None
    hook.remove()
    torch.set_default_dtype(torch.float64)
    try:
        assert export_cache.key_of(model) != key
    finally:
        torch.set_default_dtype(torch.float32)
    assert export_cache.key_of(model) == key


def hidden_module(model: Any) -> None:
    layer = model.model.layers[0].mlp
    vars(layer)["down_proj"] = layer._modules.pop("down_proj")


def hidden_weight(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    vars(layer)["weight"] = layer._parameters.pop("weight")


def weight_of_another_kind(model: Any) -> None:
    class Weight(torch.Tensor):
        pass

    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight), requires_grad=False)


@pytest.mark.parametrize("change", [hidden_module, hidden_weight, weight_of_another_kind])
def test_weights_that_are_not_parameters_of_the_model_are_exported(change: Callable[[Any], None]) -> None:
    """Their numbers would be constants of the graph, which the next model would get."""
    change(model := llama())
    assert export_cache.key_of(Logits(model)) is None


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
    damage: Callable[[bytes], bytes], kept: tuple[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    file = keep(kept)
    wanted = described(saved_graph.load(file, Logits(llama()), file.stem))
    assert damage(kept[1]) != kept[1]
    file.write_bytes(damage(kept[1]))
    assert described(exported(llama())) == wanted
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(str(file))
    assert line.endswith("; it is made again")
    assert described(saved_graph.load(file, Logits(llama()), file.stem)) == wanted


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_folder_that_others_can_enter_is_not_used(mode: int, folder: Path) -> None:
    assert cache_folder(folder.name) == folder
    folder.chmod(mode)
    exported(llama())
    assert not list(folder.iterdir())


def test_the_oldest_are_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_cache, "_MOST", 1)
    exported(llama())
    (first,) = folder.iterdir()
    exported(llama(num_hidden_layers=2))
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
def test_nothing_that_a_file_holds_is_run(old: str, new: str, kept: tuple[str, bytes], folder: Path) -> None:
    """Also if its digest is right."""
    file, model = keep(kept), llama()
    with safe_open(file, framework="pt") as opened:
        key, text = (opened.metadata()[name] for name in ("key", "graph"))
    changed = text.replace(old, new)
    assert changed != text
    json.loads(changed)
    save_file({}, file, {"key": key, "graph": changed, "digest": saved_graph._digest(key, changed, {})})
    with pytest.raises(LoadError, match=str(file)):
        saved_graph.load(file, model, key)
