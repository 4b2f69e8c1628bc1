"""``build_model``: from a config to a model that generates text."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ad_flashinfer_pass.collector import rare_collection
from ad_flashinfer_pass.config import AutoDeployConfig, check_type
from ad_flashinfer_pass.errors import ConfigError
from ad_flashinfer_pass.heads.load import load_head
from ad_flashinfer_pass.models.loading import LoadedModel, load_model
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.following import follow
from ad_flashinfer_pass.runtime.generation_config import default_sampling
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.ranks import join


def build_model(config: AutoDeployConfig, *, on_event: Callable[[str], None] | None = None) -> LLM:
    """Load, export and transform a model.

    With ``world_size`` N the other N - 1 ranks are processes that this one starts, unless torchrun has; they
    end with this process, or when another such model is built. In a rank that is not the first this does not
    return.

    Args:
        config: what to build.
        on_event: called with the name of each phase as it begins.

    Raises:
        ConfigError: a setting does not fit the model, or an argument is of a wrong type; or there are fewer
            GPUs than ranks.
        LoadError: the checkpoint cannot be read, or its generation_config.json asks for what is not
            supported.
        TransformError: the pass refuses the model.
        CapacityError: the caches do not fit in memory.
    """
    check_type("config", config, AutoDeployConfig)
    if config.world_size == 1:
        return _built(config, on_event)
    config, ranks = join(config)
    try:
        llm = _built(config, on_event)
    except BaseException:
        ranks.close()
        raise
    if ranks.rank > 0:
        follow(llm.model, ranks)
        raise SystemExit(0)
    llm.model.ranks, ranks.is_followed = ranks, True
    return llm


@rare_collection()
def _built(config: AutoDeployConfig, on_event: Callable[[str], None] | None) -> LLM:
    if on_event is not None:
        on_event("load_model")
    loaded = load_model(config)
    said, file = loaded.generation
    sampling = default_sampling(said if config.generation_config == "auto" else None, f"{file}")
    draft = _draft_of(loaded)
    model, reports = transform_module(
        loaded.module, loaded.resolved, draft=draft, on_event=on_event, stored=loaded.stored
    )
    return LLM(
        model,
        loaded.tokenizer,
        loaded.eos_token_ids,
        reports,
        default_sampling=sampling,
        steps_ahead=config.steps_ahead,
        enable_block_reuse=config.kv_cache_config.enable_block_reuse,
    )


def _draft_of(loaded: LoadedModel) -> nn.Module | None:
    """The model that guesses, if the config names one."""
    config = loaded.resolved
    spec = config.speculative_config
    if spec is None or spec.drafter == "ngram":
        return None
    if spec.reads_hidden_states:
        return load_head(spec.drafter, spec.model or loaded.name, loaded.module)
    keys = {name: getattr(config, name) for name in config.model_fields_set - {"model_kwargs", "tokenizer"}}
    draft = load_model(AutoDeployConfig(**{**keys, "model": spec.model}))
    ours, theirs = (each.tokenizer and each.tokenizer.get_vocab() for each in (loaded, draft))
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"speculative_config.model: {draft.name} has another vocabulary than {loaded.name}: its tokens "
            "stand for other texts. Give a model with the same tokenizer."
        )
    return draft.module
