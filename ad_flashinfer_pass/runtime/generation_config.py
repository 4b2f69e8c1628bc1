"""What a model's generation_config.json asks for, as transformers' ``generate`` would do it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ad_flashinfer_pass.errors import LoadError, RequestError
from ad_flashinfer_pass.runtime.sampling import SamplingParams
from ad_flashinfer_pass.runtime.values import as_ints

if TYPE_CHECKING:
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What decides about tokens in transformers and has no counterpart here, with the values that change none.
_LACKING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "max_time": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "constraints": (),
    "force_words_ids": (),
    "token_healing": (False,),
    "dola_layers": (),
    "watermarking_config": (),
}
_LACKING_WHEN_DRAWN: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_ALWAYS = ("max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
# transformers' own defaults where do_sample is set; top_k is 50 unless the file says something else.
_WHEN_DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
_WAY_OUT = (
    "Set generation_config: none (--generation-config none) to leave the file aside, or give LLM a "
    "default_sampling."
)


def default_sampling(
    config: GenerationConfig | None, where: str = "generation_config.json"
) -> SamplingParams:
    """Sampling of requests that give no parameters; where the config is None, the most likely tokens.

    Args:
        config: what a model's files say.
        where: the file that says it.

    Raises:
        LoadError: the config asks for something that changes tokens and is not supported, or for a value that
            is of no use; everything of that kind is named.
    """
    if config is None:
        return SamplingParams()
    is_drawn = getattr(config, "do_sample", None) is True
    lacking = {**_LACKING, **(_LACKING_WHEN_DRAWN if is_drawn else {})}
    unsupported = [
        f"{name}={getattr(config, name)!r:.60}"
        for name, neutral in lacking.items()
        if getattr(config, name, None) not in (None, [], {}, *neutral)
    ]
    if unsupported:
        raise LoadError(
            f"{where}: {', '.join(unsupported)}: not supported, and the tokens would differ without it. "
            + _WAY_OUT
        )
    values: dict[str, Any] = dict(_WHEN_DRAWN) if is_drawn else {}
    for name in (*_ALWAYS, *values):
        if getattr(config, name, None) is not None:
            values[name] = getattr(config, name)
    if getattr(config, "min_new_tokens", None):
        values["min_tokens"] = config.min_new_tokens
    if getattr(config, "max_length", None) is not None and "max_new_tokens" not in values:
        logger.warning(
            "%s: max_length %d is not used; max_new_tokens ends a text, %d unless it is given",
            where,
            config.max_length,
            SamplingParams.max_new_tokens,
        )
    stop = getattr(config, "stop_strings", None) or ()
    try:
        return SamplingParams(**values, stop=(stop,) if isinstance(stop, str) else stop)
    except RequestError as err:
        raise LoadError(f"{where}: {err} {_WAY_OUT}") from None


def end_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end a text: the config's and the tokenizer's.

    Where transformers made the config of a config.json, its token may be the default of a class.

    Raises:
        LoadError: one is no token id.
    """
    if getattr(config, "_from_model_config", False):
        config = None
    ids: set[int] = set()
    for where, owner in (("generation_config.json", config), ("the tokenizer", tokenizer)):
        found = getattr(owner, "eos_token_id", None)
        try:
            ids.update(as_ints("eos_token_id", found if isinstance(found, list | tuple) else [found]))
        except RequestError as err:
            if found is not None:
                raise LoadError(f"{where}: {err}") from None
    return tuple(sorted(ids))
