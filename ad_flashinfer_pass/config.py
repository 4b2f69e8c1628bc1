"""The configuration: one pydantic model, read from Python keywords or from YAML.

The keys are AutoDeploy's. ``AutoDeployConfig(**keys)`` and ``AutoDeployConfig.from_yaml(path)`` accept
the same ones. Unknown keys are an error that names them all, each with the nearest known key; a key that
AutoDeploy has and that means nothing here is told once, on the log, and one that would change the answer is
refused (``autodeploy_keys``).
"""

from __future__ import annotations

import difflib
import logging
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml import YAMLError

from ad_flashinfer_pass import autodeploy_keys
from ad_flashinfer_pass.errors import ConfigError

# In the order in which they run: AutoDeploy's names, less those that have no transform here.
Stage = Literal[
    "factory",
    "export",
    "post_export",
    "pattern_matcher",
    "weight_load",
    "post_load_fusion",
    "cache_init",
    "compile",
]
STAGES: tuple[Stage, ...] = get_args(Stage)
CompileBackend = Literal["torch-simple", "torch-cudagraph", "torch-opt"]
AttentionKernel = Literal[
    "xqa", "trtllm_gen", "split_decode", "fmha_v2", "fa3", "tile_prefill", "fa2", "latent", "reference"
]
KvDtype = Literal["auto", "fp8", "bfloat16", "float16", "float32"]

# Kernels take scales and their reciprocals as float32, whose smallest normal number is 2**-126.
_SCALES = (2.0**-126, 2.0**126)

# Kernels count tokens in int32.
_LARGEST = 2**31 - 1
_log = logging.getLogger(__name__)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)

    if not TYPE_CHECKING:  # a signature of its own would hide the fields from type checkers and editors

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as err:
                raise ConfigError(" ".join(_sentences(err))) from None

        # A field of this type is not made by __init__: its errors are told with those of the other fields.
        __init__.__pydantic_base_init__ = True

    @field_validator("*", mode="before")
    @classmethod
    def _check_flag(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false, which pydantic takes for 1 and 0, where a number is wanted."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("must be a number")
        return value


class KvCacheConfig(_Strict):
    """The paged KV cache.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """

    dtype: KvDtype = "auto"
    """Element type of K and V; auto takes the model's, fp8 is float8_e4m3fn: half the memory of bfloat16."""
    k_scale: float | list[float] = 1.0
    """With fp8, K is divided by this when it is stored: one number, or one for each cache, in order."""
    v_scale: float | list[float] = 1.0
    """Likewise for V."""
    tokens_per_block: int = Field(default=32, ge=1)
    """Tokens of one page. The TRT-LLM kernels read 16, 32, 64 and 128; the reference reads any."""
    free_gpu_memory_fraction: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of the free memory, after the weights, that the pools may take."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Upper bound for the tokens that the pools hold; default: max_batch_size * max_seq_len."""
    enable_block_reuse: bool = True
    """Keep full pages of requests that have ended, and let requests that begin alike share them. Models with
    states, and those whose ropes depend on the length, compute every prompt."""

    @model_validator(mode="after")
    def _check_scales(self) -> KvCacheConfig:
        given = [x for s in (self.k_scale, self.v_scale) for x in (s if isinstance(s, list) else [s])]
        low, high = _SCALES
        if not all(low <= scale <= high for scale in given):
            raise ValueError(
                f"every k_scale and v_scale must lie within {low:g}..{high:g}, where float32 has it and "
                "its reciprocal"
            )
        if self.dtype != "fp8" and any(scale != 1.0 for scale in given):
            raise ValueError("k_scale and v_scale other than 1.0 need dtype: fp8")
        return self


class SpeculativeConfig(_Strict):
    """Drafts: tokens that are guessed, and verified several a step. The tokens of a request are the same.

    Raises:
        ConfigError: a key is unknown, or a value is out of range.
    """

    drafter: Literal["ngram", "model", "eagle3", "mtp"]
    """Who guesses. ngram: what followed the last tokens where they stood before, in the request itself;
    model: a smaller model; eagle3: an EAGLE-3 head; mtp: the MTP layer that came with the model."""
    model: str | None = None
    """The smaller model, with the same vocabulary, or the head, as for ``model`` above: a directory or hub
    id. Default of mtp: the model's own checkpoint."""
    num_tokens: int = Field(default=3, ge=1, le=15)
    """Drafts of a sequence in a step; 1, 3 and 7 fill the kernels' tiles."""

    @model_validator(mode="after")
    def _check_model(self) -> SpeculativeConfig:
        takes = {"ngram": "never", "mtp": ""}.get(self.drafter, "always")
        if takes == ("never" if self.model is not None else "always"):
            raise ValueError(
                f"model must be given with drafter: model and eagle3, may be with mtp, and cannot be with "
                f"ngram, got drafter: {self.drafter}, model: {self.model!r}"
            )
        return self

    @property
    def reads_hidden_states(self) -> bool:
        """Whether a head guesses."""
        return self.drafter in ("eagle3", "mtp")


class TransformConfig(_Strict):
    """One entry of ``transforms``; further keys are those of that transform's class below.

    Raises:
        ConfigError: a value is not of its type.
    """

    model_config = ConfigDict(extra="allow", validate_default=False)

    stage: Stage = None  # type: ignore[assignment]
    """When it runs; default: as in configs/default.yaml, which is filled in."""
    enabled: bool = True

    if TYPE_CHECKING:

        def __init__(self, *, stage: Stage = ..., enabled: bool = ..., **settings: Any) -> None: ...


class InsertCachedAttention(TransformConfig):
    """Settings of ``insert_cached_attention``."""

    max_extend_len: int = 0
    """If not 0, at most 32: sequences with a past and 2 to this many new tokens go to xqa.extend."""

    @field_validator("max_extend_len", mode="before")
    @classmethod
    def _check_length(cls, value: object) -> object:
        if value != 0 and not (isinstance(value, int) and 2 <= value <= 32):
            raise ValueError("must be 0 or within 2..32")
        return value


class TuneAttention(TransformConfig):
    """Settings of ``tune_attention``."""

    decode: Literal["auto", AttentionKernel] = "auto"
    """The provider that decodes at all sites; auto measures, and takes the fastest for each batch size."""


# They stand here, and not with their transforms, because a config is made before torch is imported.
SETTINGS = {"insert_cached_attention": InsertCachedAttention, "tune_attention": TuneAttention}
_T = TypeVar("_T", bound=TransformConfig)


class AutoDeployConfig(_Strict):
    """Everything that decides what is built and how it runs.

    ``kv_cache_config`` and the entries of ``transforms`` can be mappings, as in YAML, in place of their
    classes; type checkers know the classes alone.

    Raises:
        ConfigError: a key is unknown, renamed or removed, or a value is out of range.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    model: str = "demo"
    """HF directory, hub id, or ``demo`` for the model that the package carries."""
    tokenizer: str | None = None
    """Directory or id of the tokenizer; default: that of the model."""
    model_kwargs: dict[str, Any] = {}
    """Overrides of config.json, for example ``{num_hidden_layers: 2}``."""
    skip_loading_weights: bool = False
    """Draw random weights (seed 0) in place of reading a checkpoint."""
    dequantize: bool = False
    """Convert quantized weights to the model's dtype when they are read; activations are then left as they
    are."""
    generation_config: Literal["auto", "none"] = "auto"
    """Sampling of requests without parameters: auto does what the model's generation_config.json says, none
    takes the most likely token. The file's end tokens count in both cases."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto takes the checkpoint's."""
    device: str = Field(default_factory=lambda: _default_device())
    """torch device on which the model runs; default: cuda if there is a GPU, else cpu."""
    attn_implementation: Literal["sdpa", "eager"] | None = None
    """Attention code of transformers to export; default: what transformers picks for the model."""
    attn_backend: Literal["flashinfer_trtllm"] = "flashinfer_trtllm"
    """The cached attention. On a CPU its kernels are the reference provider."""
    compile_backend: CompileBackend = "torch-simple"
    """How the transformed graph runs: torch-simple op by op, torch-cudagraph by replays of captured CUDA
    graphs, torch-opt compiled by Inductor and, on CUDA, captured."""
    cuda_graph_batch_sizes: list[int] | None = None
    """Batch sizes for which torch-cudagraph captures a graph; default: powers of two up to max_batch_size."""
    cuda_graph_token_buckets: list[int] | None = None
    """Tokens of steps with prefill for which torch-cudagraph captures graphs; default: multiples of 64 up to
    512, then eight for each doubling, up to max_num_tokens. [] captures decode alone."""
    disable_overlap_scheduler: bool | None = None
    """Read the tokens of each step before the next one is enqueued; they are the same either way. Default:
    true on a CPU, where nothing runs beside the host."""
    world_size: int = Field(default=1, ge=1, le=64)
    """Ranks that compute the model together, each a part of it, on a GPU of its own."""
    max_batch_size: int = Field(default=8, ge=1, le=8192)
    """Sequences in one step."""
    max_seq_len: int | None = Field(default=None, ge=1, le=2**24)
    """Tokens of one sequence, prompt and continuation together; default: the positions of the model, at most
    4,096."""
    max_num_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one step, the chunked-prefill budget; default: max(512, max_batch_size), with drafts
    max(512, max_batch_size * (1 + num_tokens))."""
    kernel_dir: str | None = None
    """Folder that ``prebuild`` made: on a GPU, FlashInfer's modules are loaded from it, not compiled."""
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    speculative_config: SpeculativeConfig | None = None
    """Speculative decoding, with the keys [below](#speculative_config); null: every step gives a sequence one
    token."""
    transforms: dict[str, SerializeAsAny[TransformConfig]] = {}
    """Changes to the pipeline of configs/default.yaml, by transform name."""

    if not TYPE_CHECKING:

        def __init__(self, /, **data: Any) -> None:
            data, notes = _ours(data)
            super().__init__(**data)
            for note in notes:
                _tell(note)

    @field_validator("world_size", mode="before")
    @classmethod
    def _check_ranks(cls, value: object) -> object:
        # AutoDeploy's 0 and null: the process that there is.
        return 1 if value is None or (value == 0 and type(value) is int) else value

    @model_validator(mode="after")
    def _check_sizes(self) -> AutoDeployConfig:
        cache = self.kv_cache_config
        sizes = {
            "max_num_tokens": self.max_num_tokens,
            "kv_cache_config.tokens_per_block": cache.tokens_per_block,
        }
        for name, size in sizes.items():
            if size is not None and size > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, the largest int32, got {_shown(size)}")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> AutoDeployConfig:
        if self.max_num_tokens is not None and self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens must be at least max_batch_size ({self.max_batch_size}), so that every "
                f"sequence can decode in one step, got {self.max_num_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _check_drafts(self) -> AutoDeployConfig:
        if self.speculative_config is None:
            return self
        if self.world_size > 1:
            raise ValueError(
                f"speculative_config: one rank alone verifies drafts, got world_size {self.world_size}; "
                "leave one of them out"
            )
        page, verified = self.kv_cache_config.tokens_per_block, self.max_batch_size * (1 + self.num_drafts)
        if self.num_drafts >= page:
            raise ValueError(
                f"speculative_config.num_tokens must be less than kv_cache_config.tokens_per_block={page}, "
                f"got {self.num_drafts}"
            )
        if verified > self.token_budget:
            raise ValueError(
                f"max_num_tokens must be at least max_batch_size * (1 + speculative_config.num_tokens) = "
                f"{verified}, so that the drafts of all sequences fit one step, got {self.max_num_tokens}"
            )
        if self.settings(InsertCachedAttention).max_extend_len:
            raise ValueError(
                "transforms.insert_cached_attention.max_extend_len is for sessions of torch.compile: leave "
                "it out with speculative_config, which sets it"
            )
        return self

    @model_validator(mode="after")
    def _check_graphs(self) -> AutoDeployConfig:
        if self.compile_backend == "torch-cudagraph" and not self.device.startswith("cuda"):
            raise ValueError(
                f"compile_backend: torch-cudagraph captures CUDA graphs, got device: {self.device}; "
                "set device: cuda, or compile_backend: torch-simple."
            )
        sizes = self.cuda_graph_batch_sizes
        if sizes is not None and not (sizes and 1 <= min(sizes) <= max(sizes) <= self.max_batch_size):
            raise ValueError(
                f"cuda_graph_batch_sizes must lie within 1..max_batch_size={self.max_batch_size}, got {sizes}"
            )
        buckets = self.cuda_graph_token_buckets
        if buckets and not 2 <= min(buckets) <= max(buckets) <= self.token_budget:
            raise ValueError(
                f"cuda_graph_token_buckets must lie within 2..max_num_tokens={self.token_budget}, "
                f"got {buckets}"
            )
        return self

    @model_validator(mode="after")
    def _check_transforms(self) -> AutoDeployConfig:
        for name, transform in self.transforms.items():
            if name in needed() and not transform.enabled:
                raise ValueError(
                    f"transforms.{name}: cannot be left out, got enabled: false; others take what it makes. "
                    f"What can be: {', '.join(sorted(self.transforms.keys() - needed()))}"
                )
            for before in needs(name):
                if STAGES.index(transform.stage) < STAGES.index(self.transforms[before].stage):
                    raise ValueError(
                        f"transforms.{name}.stage: {transform.stage} comes before the stage of {before}, "
                        "whose result it takes; leave the stage as it is"
                    )
        return self

    def settings(self, kind: type[_T]) -> _T:
        """The entry of the transform whose settings are of that class."""
        return next(entry for entry in self.transforms.values() if isinstance(entry, kind))

    @property
    def steps_ahead(self) -> int:
        """Steps that are enqueued after a step before its tokens are read."""
        disabled = self.disable_overlap_scheduler
        return int(not (self.device == "cpu" if disabled is None else disabled))

    @property
    def sequence_limit(self) -> int:
        """max_seq_len, resolved: 4,096 where neither the config nor a model that was loaded sets it."""
        return self.max_seq_len or 4096

    @property
    def token_budget(self) -> int:
        """Tokens in one step, resolved."""
        return self.max_num_tokens or max(512, self.max_batch_size * (1 + self.num_drafts))

    @property
    def num_drafts(self) -> int:
        """Drafts of a sequence in a step; 0: nothing is drafted."""
        return 0 if self.speculative_config is None else self.speculative_config.num_tokens

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> AutoDeployConfig:
        """Read a YAML file; ``overrides`` win over it.

        Raises:
            ConfigError: the file cannot be read, is not a mapping, or holds a bad key or value.
        """
        return cls(**{**read_yaml(Path(path)), **overrides})


def check_type(name: str, value: object, *types: type) -> None:
    """Refuse what is none of some types, with the name of the argument.

    Raises:
        ConfigError: it is none of them.
    """
    if not isinstance(value, types):
        known = " or ".join(each.__name__ for each in types)
        raise ConfigError(f"{name} must be {known}, got {type(value).__name__}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with OmegaConf's interpolation resolved."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as err:
        # OmegaConf raises a bare OSError for a file that holds one number or word.
        reason = err.strerror or "must be a mapping of keys"
        raise ConfigError(f"config {path}: {reason}. Give the path of a YAML file.") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as err:
        # ValueError: text that is not UTF-8, or a number of more than 4,300 digits.
        raise ConfigError(f"config {path}: {' '.join(str(err).split())}") from None
    except AttributeError:  # PyYAML, of a text that is no date
        raise ConfigError(f"config {path}: a value is not of the type that its tag (!!...) says.") from None
    except RecursionError:
        raise ConfigError(f"config {path}: lists or mappings stand too deep in each other.") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"config {path}: must be a mapping of keys, got {type(loaded).__name__}.")
    return {str(key): value for key, value in loaded.items()}


def default_transforms() -> dict[str, TransformConfig]:
    """The pipeline of configs/default.yaml: the entries by name, in order."""
    stages = {name: entry["stage"] for name, entry in _pipeline().items()}
    return {name: SETTINGS.get(name, TransformConfig)(stage=stage) for name, stage in stages.items()}


@cache
def needs(name: str) -> tuple[str, ...]:
    """The transforms whose results a transform takes, in order."""
    last = _pipeline()[name].get("needs")
    return (*needs(last), last) if last else ()


@cache
def needed() -> frozenset[str]:
    """The transforms that cannot be left out: what others need, and the last one."""
    return frozenset(("compile_model",)).union(*map(needs, _pipeline()))


@cache
def _pipeline() -> dict[str, dict[str, Any]]:
    with resources.as_file(resources.files("ad_flashinfer_pass.configs") / "default.yaml") as path:
        return read_yaml(path)["transforms"]


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."


def _default_device() -> str:
    """The GPU, if there is one."""
    import torch  # takes seconds, which a config with a device does not need

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _tell(note: str) -> None:
    """Once a process, since a config is made anew from its own keys here and there."""
    _log.warning("note: %s", note)


def _ours(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keys as the fields take them, and notes on those of AutoDeploy.

    Raises:
        ConfigError: keys are unknown, or would change the answer.
    """
    transforms, default = default_transforms(), AutoDeployConfig.model_fields["max_batch_size"].default
    keys = {name: type(entry).model_fields for name, entry in transforms.items()}
    data, notes, refused = autodeploy_keys.taken(data, keys, default)
    data["transforms"], unknown = _merged_transforms(data.get("transforms") or {}, transforms)
    unknown = [*_unknown_keys(data), *unknown]
    if refused or unknown:
        raise ConfigError(" ".join([*(f"{text}." for text in refused), *unknown]))
    return data, notes


def _unknown_keys(data: dict[str, Any]) -> list[str]:
    """A sentence for each key that is unknown, with the nearest that is known."""
    levels: list[tuple[str, Any, type[BaseModel]]] = [("", data, AutoDeployConfig)]
    for name, model in (("kv_cache_config", KvCacheConfig), ("speculative_config", SpeculativeConfig)):
        levels += [(f"{name}.", data[name], model)] if isinstance(data.get(name), dict) else []
    return [
        f"unknown key {f'{prefix}{key}'!r}; {nearest(str(key), list(model.model_fields))}"
        for prefix, level, model in levels
        for key in level
        if key not in model.model_fields
    ]


def _merged_transforms(
    changes: Any, default: dict[str, TransformConfig]
) -> tuple[dict[str, TransformConfig], list[str]]:
    """The pipeline with changes, and a sentence for each name or setting that is unknown or wrong."""
    if not isinstance(changes, dict):
        raise ConfigError(f"transforms: must be a mapping of transform names, got {changes!r}.")
    merged, wrong = {**default}, []
    for name, change in changes.items():
        if isinstance(change, TransformConfig):
            change = change.model_dump(exclude_unset=True)
        if name not in default:
            wrong.append(f"transforms: unknown transform {name!r}; {nearest(str(name), list(default))}")
        elif not isinstance(change, dict):
            raise ConfigError(f"transforms.{name}: must be a mapping, got {change!r}.")
        else:
            fields = list(type(default[name]).model_fields)
            wrong += [
                f"transforms.{name}: unknown key {key!r}; {nearest(str(key), fields)}"
                for key, value in change.items()
                # A copy of default.yaml is a config, too.
                if key not in fields and (key, value) != ("needs", _pipeline()[name].get("needs"))
            ]
            given = {key: change[key] for key in fields if key in change}
            try:
                merged[name] = default[name].model_validate({"stage": default[name].stage, **given})
            except ValidationError as err:
                wrong += _sentences(err, f"transforms.{name}.")
    return merged, wrong


def _sentences(error: ValidationError, prefix: str = "") -> list[str]:
    # Of a key that can be of two types, pydantic tells an error for each.
    errors = {(each["loc"][:2], _shown(each["input"])): each for each in reversed(error.errors())}
    return [_said(each, prefix) for each in reversed(errors.values())]


def _said(error: Any, prefix: str) -> str:
    """One error of pydantic's in a sentence that names the key and the value."""
    where = prefix + ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and not where:
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, got {_shown(error['input'])}."


def _shown(value: object) -> str:
    """A value as Python writes it, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
