"""Scales of an 8-bit KV cache from what a model puts into its cache for a few prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.errors import RequestError
from ad_flashinfer_pass.runtime.sequence_info import SequenceStep

if TYPE_CHECKING:
    from ad_flashinfer_pass.runtime.cached_model import CachedModel
    from ad_flashinfer_pass.runtime.llm import LLM

HEADROOM = 2.0
"""How much larger than here K and V may be before they saturate.

It costs no precision: a floating-point number of 8 bits has as many digits at half its range.
"""


@dataclass(frozen=True, kw_only=True)
class KvScales:
    """One number for each cache, in the order kv_cache_0, kv_cache_1, ..."""

    k_scale: list[float]
    v_scale: list[float]
    num_tokens: int
    """Tokens that they were made from."""


def calibrate(
    config: AutoDeployConfig,
    prompts: Sequence[str | Sequence[int]],
    *,
    on_event: Callable[[str], None] | None = None,
) -> KvScales:
    """Run prompts through a model whose cache is not quantized, and measure the cache.

    Args:
        config: the model and its settings; kv_cache_config.dtype, compile_backend and
            world_size are not read.
        prompts: texts or token ids; of each, at most max_seq_len tokens are taken.
        on_event: called with the name of each phase as it begins.

    Raises:
        RequestError: there is no prompt, or one without tokens.
    """
    from ad_flashinfer_pass.build import build_model

    keys = {name: getattr(config, name) for name in AutoDeployConfig.model_fields}
    cache = config.kv_cache_config.model_copy(update={"dtype": "auto", "k_scale": 1.0, "v_scale": 1.0})
    plain = {
        "kv_cache_config": cache,
        "compile_backend": "torch-simple",
        "cuda_graph_batch_sizes": None,
        "generation_config": "none",
        "world_size": 1,  # which sees K and V of all heads
    }
    llm = build_model(AutoDeployConfig(**{**keys, **plain}), on_event=on_event)
    token_ids = [_token_ids(llm, prompt)[: llm.model.sequence_info.max_seq_len] for prompt in prompts]
    if not token_ids or not all(token_ids):
        raise RequestError("calibration needs prompts, each of at least one token.")
    for number, ids in enumerate(token_ids, 1):
        wrong = next((token for token in ids if not 0 <= token < llm.model.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"prompt {number}: token ids must lie within 0..{llm.model.vocab_size - 1}, got {wrong}."
            )
    if on_event is not None:
        on_event("calibrate")
    model: CachedModel = llm.model
    largest = torch.stack([_largest(model, ids) for ids in token_ids]).amax(0)
    scales = (largest * HEADROOM / torch.finfo(torch.float8_e4m3fn).max).tolist()
    # A K or V that is all zeros has no scale of its own.
    k_scale, v_scale = ([float(f"{pair[i]:.4g}") or 1.0 for pair in scales] for i in (0, 1))
    return KvScales(k_scale=k_scale, v_scale=v_scale, num_tokens=sum(map(len, token_ids)))


def _token_ids(llm: LLM, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if llm.tokenizer is None:
        raise RequestError("the model has no tokenizer: give prompts as token ids.")
    return list(llm.tokenizer(prompt)["input_ids"])


def _largest(model: CachedModel, token_ids: list[int]) -> torch.Tensor:
    """float32 [caches, 2], host: the largest magnitude in K and in V after one prompt; a latent is both."""
    info = model.sequence_info
    if -(-len(token_ids) // info.tokens_per_block) >= model.num_pages:
        raise RequestError(
            f"a prompt of {len(token_ids)} tokens does not fit in {model.num_pages - 1} pages of "
            f"{info.tokens_per_block} tokens: raise kv_cache_config.max_tokens."
        )
    for start in range(0, len(token_ids), info.max_num_tokens):
        chunk = token_ids[start : start + info.max_num_tokens]
        pages = range(1, -(-(start + len(chunk)) // info.tokens_per_block) + 1)
        model.step([SequenceStep(chunk, start, pages, slot=1)])
    used = slice(1, -(-len(token_ids) // info.tokens_per_block) + 1)
    largest = [cache[used].abs().amax((0, 2, 3, 4)).float().cpu().expand(2) for cache in model.paged]
    model.clear_pages(range(1, used.stop))
    return torch.stack(largest)


def as_yaml(data: dict[str, Any], scales: KvScales) -> str:
    """The keys of a config, with an fp8 cache and its scales, as YAML."""
    found = {"dtype": "fp8", "k_scale": scales.k_scale, "v_scale": scales.v_scale}
    cache = {**(data.get("kv_cache_config") or {}), **found}
    text = yaml.safe_dump({**data, "kv_cache_config": cache}, sort_keys=False, width=110)
    return f"# k_scale and v_scale were measured on {scales.num_tokens} tokens.\n{text}"
