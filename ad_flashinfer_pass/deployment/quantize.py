"""A checkpoint with float8 weights from a plain one, and how near to it its logits are."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import ConfigError, RequestError
from ad_flashinfer_pass.experts import goes_through_the_interface
from ad_flashinfer_pass.kernels.linear.float8 import LARGEST
from ad_flashinfer_pass.models.checkpoint import read_headers
from ad_flashinfer_pass.models.json_file import read_json
from ad_flashinfer_pass.models.loading import LoadedModel, load_model
from ad_flashinfer_pass.models.quantization import find_quantized, find_quantized_tensor
from ad_flashinfer_pass.models.quantized.places import Modules
from ad_flashinfer_pass.models.source import Source, find_source

_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "*.md", "LICENSE*")
_INDEX = "model.safetensors.index.json"
_DRAWN, _LENGTH = 4, 128
"""Prompts of random tokens, and tokens of each, where none is given."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What became of a checkpoint."""

    weights: int
    """Those that became float8."""
    plain: list[str]
    """Modules of matrices that stay as they are, but for embeddings."""
    bytes_before: int
    """Of all tensors."""
    bytes_after: int
    """Likewise."""
    num_tokens: int
    """Those on which the logits are compared."""
    kl: float
    """Mean over tokens of the divergence of the source's distribution of the next token from the other's, in
    nats."""
    largest_kl: float
    """Of one token."""
    same_top_1: float
    """Share of tokens for which both have the same most likely next token."""


def quantize(
    config: AutoDeployConfig,
    output: Path,
    prompts: Sequence[str | Sequence[int]] = (),
    *,
    on_event: Callable[[str], None] | None = None,
) -> Quantization:
    """Write a compressed-tensors checkpoint: float8_e4m3fn, a scale a row, activations by token.

    Linears and experts that are stored one by one become float8. The head, embeddings, routers, experts that
    are stored together, and linears whose weights the model reads without calling them stay plain. It is read
    by this package, by vLLM, and by transformers with compressed-tensors, if there are no experts, whose
    scales it leaves away. Both models are in memory at the end, to be compared.

    Args:
        config: of a model whose weights are not quantized.
        output: a folder that is not there yet.
        prompts: texts or token ids on which logits are compared, of each at most max_seq_len tokens. Default:
            random tokens.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: the output is there, or the model has no weights of its own or quantized ones.
        RequestError: a prompt has no tokens.
    """
    tell = on_event or (lambda phase: None)
    config = config.model_copy(update={"world_size": 1})  # one process writes all
    if output.exists():
        raise ConfigError(f"--output {output}: is there already; give a folder that is not.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder {output.absolute().parent} is not there.")
    with ExitStack() as stack:
        source = find_source(config, stack)
        raw = read_json(source.config_file)
        if config.skip_loading_weights or source.config_file.parent != source.directory:
            raise ConfigError("quantize needs the weights of a checkpoint, not random ones.")
        headers = read_headers(source.directory)
        found = find_quantized(source, raw) or find_quantized_tensor(headers.tensors)
        if found is not None:
            raise ConfigError(f"{source.directory}: the weights are {found} already; give plain ones.")
        tell("load_weights")
        plain = load_model(config)
        token_ids = _token_ids(plain, prompts)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output.absolute().parent)))
        made = folder / "made"
        tell("quantize")
        shapes = {name: stored.shape for name, stored in headers.tensors.items()}
        names = _names(plain.module, shapes, _called(plain.module, token_ids[0]))
        sizes = _write(source, headers.files, raw, names, made)
        tell("compare")
        quantized = load_model(config.model_copy(update={"model": str(made), "tokenizer": None}))
        kl, same = _compared(plain.module, quantized.module, token_ids)
        made.rename(output)
    return Quantization(
        weights=len(names.quantized),
        plain=names.plain,
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        num_tokens=len(kl),
        kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        same_top_1=float(same.double().mean()),
    )


@dataclass(frozen=True)
class _Names:
    quantized: set[str]
    """Tensors."""
    plain: list[str]
    """Modules."""

    ignored: list[str]
    """Likewise, and patterns of what lies in experts."""


@torch.no_grad()
def _called(model: Any, ids: Sequence[int]) -> set[str]:
    """The linears that a model calls; of others, as Jamba's dt_proj, it reads the weight."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return called


def _names(model: Any, shapes: dict[str, tuple[int, ...]], called: set[str]) -> _Names:
    """What becomes of the matrices of a checkpoint."""
    modules = Modules(model)
    head = model.get_output_embeddings()
    heads = [path for path, module in model.named_modules() if module is head]
    tables = [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]
    quantized, taken, plain = set(), set(), dict.fromkeys(heads)
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path == name or len(shape) != 2 or modules.path(path) in tables:
            continue
        linear, experts = modules.linear(name), modules.experts(name)
        is_router = not {"router", "gate"}.isdisjoint(path.split("."))
        if (linear in called and linear not in heads and not is_router) or experts is not None:
            quantized.add(name)
            taken.add(experts)
        else:
            plain[path] = None
    together = [
        path
        for path, module in model.named_modules()
        if goes_through_the_interface(module) and path not in taken
    ]
    if not quantized:
        raise ConfigError("quantize: the checkpoint has no linear, nor experts that are stored one by one.")
    ignored = [*plain, *(f"re:{re.escape(path)}([.]|$)" for path in together)]
    return _Names(quantized, [*plain, *together], ignored)


def _write(
    source: Source, files: Sequence[Path], raw: dict[str, Any], names: _Names, made: Path
) -> tuple[int, int]:
    """The checkpoint, file by file; bytes of its tensors before and after."""
    made.mkdir()
    for pattern in _COPIED:
        for file in source.directory.glob(pattern):
            shutil.copyfile(file, made / file.name)
    before, total = 0, 0
    weight_map: dict[str, str] = {}
    for file in files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                tensor = opened.get_tensor(name)
                before += tensor.nbytes
                if name in names.quantized:
                    tensors[name], tensors[f"{name}_scale"] = float8_by_rows(tensor)
                else:
                    tensors[name] = tensor
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file.name)
        save_file(tensors, made / file.name, metadata={"format": "pt"})
    if (made / _INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (made / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    said = {**raw, "quantization_config": _settings(names.ignored)}
    (made / "config.json").write_text(json.dumps(said, indent=2), encoding="utf-8")
    return before, total


def float8_by_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [rows, depth], and the scale of each row, [rows, 1], in the dtype of the weight."""
    scale = weight.float().abs().amax(1, keepdim=True) / LARGEST
    # First rounded to what is stored; a row of zeros, or of nearly that, has no scale of its own.
    scale = scale.to(weight.dtype).float()
    scale = scale.masked_fill(scale == 0, 1.0)
    values = (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return values, scale.to(weight.dtype)


def _settings(ignored: list[str]) -> dict[str, Any]:
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _token_ids(model: LoadedModel, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    length = model.resolved.max_seq_len
    assert length is not None
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    if not prompts:
        draw = torch.Generator().manual_seed(0)
        ids: list[list[int]] = torch.randint(
            0, vocab_size, (_DRAWN, min(length, _LENGTH)), generator=draw
        ).tolist()
        return ids
    found = []
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str) and model.tokenizer is None:
            raise RequestError("the model has no tokenizer: give prompts as token ids.")
        given = model.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt  # type: ignore[misc]
        ids_of_it = list(given)[:length]
        if not ids_of_it or not all(0 <= token < vocab_size for token in ids_of_it):
            raise RequestError(f"prompt {number}: needs tokens, each within 0..{vocab_size - 1}.")
        found.append(ids_of_it)
    return found


@torch.no_grad()
def _compared(
    plain: nn.Module, quantized: nn.Module, token_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Of each token the divergence, and whether the most likely next one is the same."""
    divergences, same = [], []
    device = next(plain.parameters()).device
    for ids in token_ids:
        given = torch.tensor([ids], device=device)
        wanted, found = (
            model(input_ids=given, use_cache=False).logits[0].float().log_softmax(-1)
            for model in (plain, quantized)
        )
        divergences.append((wanted.exp() * (wanted - found)).sum(-1).cpu())
        same.append((wanted.argmax(-1) == found.argmax(-1)).cpu())
    return torch.cat(divergences), torch.cat(same)
