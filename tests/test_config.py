"""The configuration: what is accepted, what it resolves to, and every message of a refusal."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from ad_flashinfer_pass import config as config_module
from ad_flashinfer_pass.config import (
    STAGES,
    AutoDeployConfig,
    InsertCachedAttention,
    KvCacheConfig,
    TransformConfig,
    TuneAttention,
    default_transforms,
    needs,
)
from ad_flashinfer_pass.errors import ConfigError


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message_of(**keys: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        AutoDeployConfig(**keys)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid_and_resolve() -> None:
    """No key is needed, and the token budget is 512 or one token a sequence, whichever is more."""
    assert AutoDeployConfig().token_budget == 512
    assert AutoDeployConfig(max_batch_size=600).token_budget == 600
    assert AutoDeployConfig(max_num_tokens=16).token_budget == 16


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_default_device_is_a_gpu_if_there_is_one(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a config and of a YAML of AutoDeploy alike; a device that is given is left as it is."""
    replaced: Any = config_module._default_device  # by tests/conftest.py
    monkeypatch.setattr(config_module, "_default_device", replaced.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    captured: dict[str, Any] = {"runtime": "trtllm", "compile_backend": "torch-cudagraph"}
    expected = ("cuda", "torch-cudagraph") if has_gpu else ("cpu", "torch-simple")
    config = AutoDeployConfig(**captured)
    assert (config.device, config.compile_backend) == expected
    assert AutoDeployConfig(device="cpu").device == "cpu"
    assert AutoDeployConfig(device="cuda:1").device == "cuda:1"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_batch": 3}, "unknown key 'max_batch'; did you mean 'max_batch_size'?"),
        (
            {"kv_cache_config": {"token_per_block": 32}},
            "unknown key 'kv_cache_config.token_per_block'; did you mean 'tokens_per_block'?",
        ),
        (
            {"speculative_config": {1: 2, "drafter": "ngram"}},
            "unknown key 'speculative_config.1'; known: drafter, model, num_tokens.",
        ),
        (
            {"kv_cache_config": {"zzz": 32}},
            "unknown key 'kv_cache_config.zzz'; "
            "known: dtype, enable_block_reuse, free_gpu_memory_fraction, k_scale, max_tokens, "
            "tokens_per_block, v_scale.",
        ),
        (
            {"transforms": {"match_atention": {}}},
            "transforms: unknown transform 'match_atention'; did you mean 'match_attention'?",
        ),
        (
            {"transforms": {"match_attention": {"enable": False}}},
            "transforms.match_attention: unknown key 'enable'; did you mean 'enabled'?",
        ),
        (
            {"transforms": {"tune_attention": {"kernel": "xqa"}}},
            "transforms.tune_attention: unknown key 'kernel'; known: decode, enabled, stage.",
        ),
        (
            {"transforms": {"classify_mask": {"needs": "export_model"}}},
            "transforms.classify_mask: unknown key 'needs'; known: enabled, stage.",
        ),
    ],
    ids=["top", "nested", "nothing_near", "no_text", "transform", "transform_key", "setting", "need"],
)
def test_unknown_key_names_the_nearest(keys: dict[str, Any], message: str) -> None:
    """An unknown key is an error with its full path and the nearest known key, or all of them."""
    assert message_of(**keys) == message


def test_unknown_key_is_named_before_bad_values() -> None:
    """A misspelt key is what the user must repair first, though other values are wrong too."""
    assert message_of(max_batch_size=0, max_seqlen=4).startswith("unknown key 'max_seqlen'")


# What the files of AutoDeploy's registry hold, and what it is here.
REGISTRY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dashboard": (
        {
            "runtime": "trtllm",
            "attn_backend": "trtllm",
            "compile_backend": "torch-cudagraph",
            "model_factory": "AutoModelForCausalLM",
            "skip_loading_weights": False,
            "max_seq_len": 512,
            "transforms": {
                "fuse_rmsnorm_quant_fp8": {"stage": "post_load_fusion"},
                "insert_cached_mla_attention": {"stage": "cache_init", "backend": "flashinfer_mla"},
                "multi_stream_mla_attn": {"stage": "compile", "enabled": True},
            },
            "cuda_graph_config": {"max_batch_size": 8},
        },
        {"compile_backend": "torch-simple", "skip_loading_weights": False, "max_seq_len": 512},
    ),
    "experts": (
        {
            "world_size": 2,
            "max_batch_size": 16,
            "enable_chunked_prefill": True,
            "cuda_graph_config": {"batch_sizes": [1, 2, 4, 32]},
            "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.8},
            "transforms": {
                "fuse_rope_into_trtllm_attention": {"enabled": True},
                "fuse_gemms": {"enabled": True},
            },
        },
        {
            "world_size": 2,
            "max_batch_size": 16,
            "cuda_graph_batch_sizes": [1, 2, 4],
            "kv_cache_config": {"enable_block_reuse": False, "free_gpu_memory_fraction": 0.8},
        },
    ),
    "piecewise": (
        {
            "attn_backend": "triton_paged",
            "enable_iter_perf_stats": True,
            "print_iter_log": False,
            "max_beam_width": 1,
            "skip_tokenizer_init": True,
            "mode": "graph",
            "kv_cache_config": {"copy_on_partial_reuse": False, "mamba_ssm_cache_dtype": "auto"},
            "transforms": {
                "compile_model": {"piecewise_enabled": True, "num_batched_inputs": 8},
                "gather_logits_before_lm_head": {"stage": "post_load_fusion", "enabled": True},
                "detect_sharding": {
                    "sharding_dims": ["ep"],
                    "manual_config": {"tp_plan": {"q_proj": "colwise"}},
                },
            },
        },
        {},
    ),
    "1.2": (
        {
            "attn_page_size": 64,
            "free_mem_ratio": 0.5,
            "compile_backend": "torch-compile",
            "runtime": "demollm",
        },
        {"kv_cache_config": {"tokens_per_block": 64, "free_gpu_memory_fraction": 0.5}},
    ),
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_yaml_of_autodeploys_registry_is_taken(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What has no meaning here is left out, what has another name gets it, and each is told."""
    given, ours = REGISTRY[name]
    config_module._tell.cache_clear()
    assert AutoDeployConfig.from_yaml(write(tmp_path, json.dumps(given))) == AutoDeployConfig(**ours)
    told = " ".join(record.getMessage() for record in caplog.records)
    for key in given.keys() - ours.keys() - {"kv_cache_config", "transforms"}:
        assert re.search(rf"\b{key}\b", told)
    for key in given.get("transforms", {}).keys() - {"fuse_gemms"}:
        assert f"transforms.{key}" in told
    caplog.clear()
    AutoDeployConfig(**given)
    assert not caplog.records


def test_every_config_for_autodeploy_is_taken() -> None:
    """Those that the package carries, too."""
    folder = resources.files("ad_flashinfer_pass.configs")
    names = [entry.name for entry in folder.iterdir() if entry.name.startswith("autodeploy_")]
    assert len(names) == 2
    for name in names:
        with resources.as_file(folder / name) as path:
            AutoDeployConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"pipeline_parallel_size": 4, "max_beam_width": 2},
            "pipeline_parallel_size: got 4, but several GPUs share heads and columns here, not layers or "
            "tokens; delete the key. max_beam_width: got 2, but there is no beam search here; delete the "
            "key.",
        ),
        (
            {"speculative_model_kwargs": {"num_hidden_layers": 1}},
            "speculative_model_kwargs: got {'num_hidden_layers': 1}, but speculative_config.model is taken "
            "as its files say; delete the key.",
        ),
        (
            {"attn_page_size": 64, "kv_cache_config": {"tokens_per_block": 32}},
            "attn_page_size is kv_cache_config.tokens_per_block here, and both are given: "
            "delete one of them.",
        ),
        ({"cuda_graph_config": 3}, "cuda_graph_config: must be a mapping, got 3."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_of_autodeploy_that_change_the_answer_are_refused(keys: dict[str, Any], message: str) -> None:
    """What would be computed in another way than the file says."""
    assert message_of(**keys) == message


def test_all_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    """Of every level, each with the nearest known one; numbers and self are keys like others."""
    text = (
        "max_batch: 1\nself: 1\n7: 8\nkv_cache_config: {dtyp: fp8, 9: 1}\n"
        "transforms: {match_atention: {}, 5: {}, fuse_gemms: {enable: true, 6: 1}}\n"
    )
    with pytest.raises(ConfigError) as raised:
        AutoDeployConfig.from_yaml(write(tmp_path, text))
    for said in (
        "unknown key 'max_batch'; did you mean 'max_batch_size'?",
        "unknown key 'self'; known: ",
        "unknown key '7'; known: ",
        "unknown key 'kv_cache_config.dtyp'; did you mean 'dtype'?",
        "unknown key 'kv_cache_config.9'; known: ",
        "transforms: unknown transform 'match_atention'; did you mean 'match_attention'?",
        "transforms: unknown transform 5; known: ",
        "transforms.fuse_gemms: unknown key 'enable'; did you mean 'enabled'?",
        "transforms.fuse_gemms: unknown key 6; known: ",
    ):
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size: input should be greater than or equal to 1, got 0."),
        ({"max_batch_size": 9000}, "max_batch_size: input should be less than or equal to 8192, got 9000."),
        ({"max_seq_len": 0}, "max_seq_len: input should be greater than or equal to 1, got 0."),
        (
            {"max_seq_len": "long"},
            "max_seq_len: input should be a valid integer, unable to parse string as an integer, got 'long'.",
        ),
        ({"dtype": "fp8"}, "dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'fp8'."),
        (
            {"attn_implementation": "flash_attention_2"},
            "attn_implementation: input should be 'sdpa' or 'eager', got 'flash_attention_2'.",
        ),
        ({"attn_backend": "xqa"}, "attn_backend: input should be 'flashinfer_trtllm', got 'xqa'."),
        (
            {"kv_cache_config": {"tokens_per_block": 0}},
            "kv_cache_config.tokens_per_block: input should be greater than or equal to 1, got 0.",
        ),
        (
            {"kv_cache_config": {"free_gpu_memory_fraction": 1.5}},
            "kv_cache_config.free_gpu_memory_fraction: input should be less than or equal to 1, got 1.5.",
        ),
        (
            {"kv_cache_config": {"dtype": "fp8", "k_scale": 0.0}},
            "kv_cache_config: every k_scale and v_scale must lie within 1.17549e-38..8.50706e+37, where "
            "float32 has it and its reciprocal, got {'dtype': 'fp8', 'k_scale': 0.0}.",
        ),
        *(
            (
                {"kv_cache_config": {"dtype": "fp8", "v_scale": [1.0, scale]}},
                "kv_cache_config: every k_scale and v_scale must lie within 1.17549e-38..8.50706e+37, where "
                f"float32 has it and its reciprocal, got {{'dtype': 'fp8', 'v_scale': [1.0, {scale}]}}.",
            )
            for scale in (1e-320, 1e-39, 3e38, float("nan"), float("inf"))
        ),
        (
            {"kv_cache_config": {"dtype": "fp8", "k_scale": "a"}},
            "kv_cache_config.k_scale.float: input should be a valid number, unable to parse string as a "
            "number, got 'a'.",
        ),
        (
            {"max_num_tokens": 10**12},
            "max_num_tokens must be at most 2147483647, the largest int32, got 1000000000000",
        ),
        (
            {"max_seq_len": 0, "model": 3},
            "model: input should be a valid string, got 3. max_seq_len: input "
            "should be greater than or equal to 1, got 0.",
        ),
        (
            {"kv_cache_config": {"k_scale": [0.5]}},
            "kv_cache_config: k_scale and v_scale other than 1.0 need dtype: fp8, got {'k_scale': [0.5]}.",
        ),
        *(
            (
                {"cuda_graph_batch_sizes": sizes},
                f"cuda_graph_batch_sizes must lie within 1..max_batch_size=8, got {sizes}",
            )
            for sizes in ([], [0, -1], [9])
        ),
        (
            {"max_num_tokens": 3, "max_batch_size": 8},
            "max_num_tokens must be at least max_batch_size (8), so that every sequence can decode in one "
            "step, got 3",
        ),
        (
            {"transforms": ["match_attention"]},
            "transforms: must be a mapping of transform names, got ['match_attention'].",
        ),
        (
            {"transforms": {"match_attention": False}},
            "transforms.match_attention: must be a mapping, got False.",
        ),
        (
            {"transforms": {"match_attention": {"enabled": "maybe"}}},
            "transforms.match_attention.enabled: input should be a valid boolean, unable to interpret input, "
            "got 'maybe'.",
        ),
        (
            {
                "transforms": {
                    "insert_cached_attention": TransformConfig(max_extend_len=33),
                    "fuse_gemms": {"enabled": "maybe"},
                }
            },
            "transforms.insert_cached_attention.max_extend_len: must be 0 or within 2..32, got 33. "
            "transforms.fuse_gemms.enabled: input should be a valid boolean, unable to interpret input, "
            "got 'maybe'.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_value_says_what_must_hold_and_what_was_found(keys: dict[str, Any], message: str) -> None:
    """A value that cannot be used is refused with its path, its bounds and itself."""
    assert message_of(**keys) == message


def test_unknown_stage_lists_the_known() -> None:
    """A transform can only be moved to a stage that exists; the message has them all."""
    message = message_of(transforms={"match_attention": {"stage": "later"}})
    assert message.startswith("transforms.match_attention.stage: ")
    assert all(repr(stage) in message for stage in STAGES)
    assert message.endswith("got 'later'.")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("export_model", {"enabled": False}, "cannot be left out.* fuse_gemms"),
        ("gather_logits_before_lm_head", {"enabled": False}, "cannot be left out"),
        ("compile_model", {"stage": "export"}, "stage: export comes before the stage of functionalize"),
        (
            "fuse_gemms",
            {"stage": "factory"},
            "fuse_gemms.stage: factory comes before the stage of export_model",
        ),
        ("classify_mask", {"stage": "compile"}, "comes before the stage of classify_mask"),
    ],
)
def test_what_others_need_stays_in_its_place(name: str, change: dict[str, Any], says: str) -> None:
    """Each transform that makes what the next one takes must run, and before it."""
    assert re.search(says, message_of(transforms={name: change}))


def test_transforms_change_only_what_they_name() -> None:
    """An entry of ``transforms`` is laid over the pipeline of default.yaml; the rest and the order stay."""
    changed = AutoDeployConfig(transforms={"check_packing": TransformConfig(enabled=False)}).transforms
    default = AutoDeployConfig().transforms
    assert list(changed) == list(default)
    assert not changed["check_packing"].enabled
    assert changed["check_packing"].stage == default["check_packing"].stage
    assert {n: t for n, t in changed.items() if n != "check_packing"} == {
        n: t for n, t in default.items() if n != "check_packing"
    }


def test_a_config_can_be_rebuilt_from_its_own_fields() -> None:
    """The records of one config are accepted by another, so that one can be made from the other."""
    first = AutoDeployConfig(max_batch_size=3, kv_cache_config=KvCacheConfig(tokens_per_block=16))
    second = AutoDeployConfig(**{name: getattr(first, name) for name in AutoDeployConfig.model_fields})
    assert second == first


def test_yaml_gives_the_same_as_keywords_and_overrides_win(tmp_path: Path) -> None:
    """from_yaml reads the keys of the constructor, resolves references, and yields to keywords."""
    lines = [
        "max_seq_len: 64",
        "max_batch_size: 3",
        "max_num_tokens: ${max_seq_len}",
        "kv_cache_config: {dtype: float32}",
    ]
    config = AutoDeployConfig.from_yaml(write(tmp_path, "\n".join(lines)), max_batch_size=5)
    assert config == AutoDeployConfig(
        max_seq_len=64, max_batch_size=5, max_num_tokens=64, kv_cache_config=KvCacheConfig(dtype="float32")
    )


def test_empty_yaml_is_the_default(tmp_path: Path) -> None:
    """A file of comments alone changes nothing."""
    assert AutoDeployConfig.from_yaml(write(tmp_path, "# nothing\n")) == AutoDeployConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "must be a mapping of keys, got list."),
        ("3\n", "must be a mapping of keys. Give the path of a YAML file."),
        ("model: [a\n", "expected ',' or ']'"),
        ("model: a\nmodel: b\n", "found duplicate key model"),
        ("model: ${nothing}\n", "Interpolation key 'nothing' not found"),
        (b"model: \xff\xfe\n", "'utf-8' codec can't decode"),
        ("model: !!python/object:os.system {}\n", "could not determine a constructor"),
        (f"max_seq_len: {'9' * 5000}\n", "4300 digits"),
        ("model: !!timestamp x\n", "not of the type that its tag"),
        (f"model: {'[' * 300}{']' * 300}\n", "stand too deep in each other"),
        ("[1]: 2\n", "found unhashable key"),
    ],
    ids=[
        *("list", "scalar", "syntax", "duplicate", "interpolation", "not_text", "python_object"),
        *("digits", "tag", "depth", "list_as_key"),
    ],
)
def test_unreadable_yaml_names_the_file_and_the_place(text: str | bytes, says: str, tmp_path: Path) -> None:
    """What is wrong with a YAML file is one line that begins with its path."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        AutoDeployConfig.from_yaml(path)
    message = str(raised.value)
    assert message.startswith(f"config {path}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "says"),
    [("none.yaml", "No such file or directory"), (".", "Is a directory")],
    ids=["missing", "folder"],
)
def test_missing_yaml_says_what_to_give(name: str, says: str, tmp_path: Path) -> None:
    """A path that is no file is refused with the system's reason."""
    path = tmp_path / name
    with pytest.raises(ConfigError) as raised:
        AutoDeployConfig.from_yaml(path)
    assert str(raised.value) == f"config {path}: {says}. Give the path of a YAML file."


def test_settings_of_a_transform_have_types_and_are_written_out() -> None:
    """Their class is found by itself, and a dump of the config has them."""
    config = AutoDeployConfig(transforms={"tune_attention": TransformConfig(decode="xqa")})
    assert config.settings(TuneAttention).decode == "xqa"
    assert config.settings(InsertCachedAttention).max_extend_len == 0
    written = config.model_dump()["transforms"]
    assert written["tune_attention"] == {"stage": "compile", "enabled": True, "decode": "xqa"}
    assert AutoDeployConfig(transforms=written) == config


def test_what_a_transform_needs_runs_before_it() -> None:
    """In default.yaml, where needs are declared, all of them stand before it."""
    names = list(default_transforms())
    for name in names:
        assert list(needs(name)) == [other for other in names if other in needs(name)]
        assert set(needs(name)) < set(names[: names.index(name) + 1])
    assert {name for name in names if not needs(name)} == {"export_model"}


def test_default_pipeline_is_written_in_the_order_in_which_it_runs() -> None:
    """default.yaml is in the order of STAGES, so that reading it from the top is reading the pipeline."""
    stages = [STAGES.index(entry.stage) for entry in default_transforms().values()]
    assert stages == sorted(stages)


def test_every_committed_config_is_valid() -> None:
    """Each YAML file that the package carries is accepted."""
    folder = resources.files("ad_flashinfer_pass.configs")
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    # Those for AutoDeploy are in its keys.
    names = [name for name in names if not name.startswith("autodeploy_")]
    assert "default.yaml" in names
    for name in names:
        with resources.as_file(folder / name) as path:
            AutoDeployConfig.from_yaml(path)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_batch_size": True},
        {"max_seq_len": False},
        {"max_num_tokens": True},
        {"kv_cache_config": {"tokens_per_block": True}},
        {"kv_cache_config": {"dtype": "fp8", "k_scale": True}},
        {"kv_cache_config": {"free_gpu_memory_fraction": True}},
    ],
    ids=str,
)
def test_a_flag_is_no_number(keys: dict[str, Any]) -> None:
    """YAML's yes and true, which Python counts as 1."""
    with pytest.raises(ConfigError, match=r"must be a number, got (True|False)\.$"):
        AutoDeployConfig(**keys)
    assert AutoDeployConfig(disable_overlap_scheduler=True, skip_loading_weights=True).steps_ahead == 0


def test_nested_settings_are_classes_or_mappings() -> None:
    """As type checkers know them and as YAML gives them; what is left out is the default's either way."""
    mappings: dict[str, Any] = {
        "kv_cache_config": {"dtype": "fp8"},
        "transforms": {"fuse_gemms": {"enabled": False}, "tune_attention": {"decode": "xqa"}},
    }
    config = AutoDeployConfig(
        kv_cache_config=KvCacheConfig(dtype="fp8"),
        transforms={
            "fuse_gemms": TransformConfig(enabled=False),
            "tune_attention": TransformConfig(decode="xqa"),
        },
    )
    assert config == AutoDeployConfig(**mappings)
    assert config.transforms["fuse_gemms"] == TransformConfig(stage="post_load_fusion", enabled=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: KvCacheConfig(tokens_per_block=0, max_tokens=0),
            "tokens_per_block: input should be greater than or equal to 1, got 0. "
            "max_tokens: input should be greater than or equal to 1, got 0.",
        ),
        (lambda: KvCacheConfig(k_scale=2.0), "k_scale and v_scale other than 1.0 need dtype: fp8"),
        (lambda: TransformConfig(enabled=3), "enabled: input should be a valid boolean, "),  # type: ignore[arg-type]
    ],
    ids=["values", "together", "transform"],
)
def test_nested_settings_are_checked_where_they_are_made(make: Any, message: str) -> None:
    """In the words of the whole config's errors."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_world_size_0_and_null_are_the_process_that_there_is() -> None:
    """As AutoDeploy's; false is no number."""
    assert [AutoDeployConfig(world_size=value).world_size for value in (0, None, 1, 2)] == [1, 1, 1, 2]  # type: ignore[arg-type]
    assert "world_size: must be a number, got False." in message_of(world_size=False)


def test_drafts_are_verified_by_one_rank() -> None:
    """Which is refused by name."""
    found = message_of(world_size=2, speculative_config={"drafter": "ngram", "num_tokens": 3})
    assert found == (
        "speculative_config: one rank alone verifies drafts, got world_size 2; leave one of them out"
    )
