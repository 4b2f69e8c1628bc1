"""The configuration: what is accepted, what it resolves to, and every message of a refusal."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ad_flashinfer_pass.config import STAGES, AutoDeployConfig, KvCacheConfig, default_transforms
from ad_flashinfer_pass.errors import ConfigError

OURS = "set attn_backend: flashinfer_trtllm"


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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_batch": 3}, "unknown key 'max_batch'; did you mean 'max_batch_size'?"),
        (
            {"kv_cache_config": {"token_per_block": 32}},
            "unknown key 'kv_cache_config.token_per_block'; did you mean 'tokens_per_block'?",
        ),
        (
            {"kv_cache_config": {"zzz": 32}},
            "unknown key 'kv_cache_config.zzz'; "
            "known: dtype, free_gpu_memory_fraction, k_scale, max_tokens, tokens_per_block, v_scale.",
        ),
        (
            {"transforms": {"match_atention": {}}},
            "transforms: unknown transform 'match_atention'; did you mean 'match_attention'?",
        ),
        (
            {"transforms": {"match_attention": {"enable": False}}},
            "transforms.match_attention: unknown key 'enable'; did you mean 'enabled'?",
        ),
    ],
    ids=["top", "nested", "nothing_near", "transform", "transform_key"],
)
def test_unknown_key_names_the_nearest(keys: dict[str, Any], message: str) -> None:
    """An unknown key is an error with its full path and the nearest known key, or all of them."""
    assert message_of(**keys) == message


def test_unknown_key_is_named_before_bad_values() -> None:
    """A misspelt key is what the user must repair first, though other values are wrong too."""
    assert message_of(max_batch_size=0, max_seqlen=4).startswith("unknown key 'max_seqlen'")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"attn_backend": "trtllm"},
            f"attn_backend: trtllm is TensorRT-LLM's own attention, which needs TensorRT-LLM; here {OURS}",
        ),
        ({"attn_backend": "triton"}, f"attn_backend: triton is one of AutoDeploy's; here {OURS}"),
        (
            {"use_pt_cache_backend": True},
            "use_pt_cache_backend: it was removed: paged caches come from this package; delete the key and "
            + OURS,
        ),
        ({"attn_page_size": 64}, "attn_page_size: it is now kv_cache_config.tokens_per_block"),
        ({"free_mem_ratio": 0.8}, "free_mem_ratio: it is now kv_cache_config.free_gpu_memory_fraction"),
        ({"cuda_graph_config": {}}, "cuda_graph_config: give its batch_sizes as cuda_graph_batch_sizes"),
        ({"runtime": "demollm"}, "runtime: generation always runs in this process; delete the key"),
        (
            {"world_size": 2},
            "world_size: tensor parallelism is TensorRT-LLM's, through its AutoDeploy plugin; delete the key",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_of_autodeploy_say_what_took_their_place(keys: dict[str, Any], message: str) -> None:
    """A key or value that AutoDeploy has or had gets its own migration message."""
    assert message_of(**keys) == message


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
            "kv_cache_config: every k_scale and v_scale must be above 0 and finite, got "
            "{'dtype': 'fp8', 'k_scale': 0.0}.",
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
        ("classify_mask", {"stage": "compile"}, "comes before the stage of classify_mask"),
    ],
)
def test_what_others_need_stays_in_its_place(name: str, change: dict[str, Any], says: str) -> None:
    """Each transform that makes what the next one takes must run, and before it."""
    assert re.search(says, message_of(transforms={name: change}))


def test_transforms_change_only_what_they_name() -> None:
    """An entry of ``transforms`` is laid over the pipeline of default.yaml; the rest and the order stay."""
    changed = AutoDeployConfig(transforms={"check_packing": {"enabled": False}}).transforms
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
        max_seq_len=64, max_batch_size=5, max_num_tokens=64, kv_cache_config={"dtype": "float32"}
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
    ],
    ids=["list", "scalar", "syntax", "duplicate", "interpolation", "not_text", "python_object"],
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


def test_default_pipeline_is_written_in_the_order_in_which_it_runs() -> None:
    """default.yaml is in the order of STAGES, so that reading it from the top is reading the pipeline."""
    stages = [STAGES.index(entry["stage"]) for entry in default_transforms().values()]
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
