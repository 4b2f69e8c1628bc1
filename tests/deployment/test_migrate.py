"""Migration of AutoDeploy's YAML: what it means, and that the rest of the text stays byte by byte."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_flashinfer_pass import cli
from ad_flashinfer_pass.deployment.migrate import BACKEND, migrate
from ad_flashinfer_pass.errors import ConfigError

OLD = """\
# Nemotron on one H200
runtime: trtllm
compile_backend: torch-cudagraph   # keep
attn_backend: flashinfer  # the one that plans
free_mem_ratio: 0.65
attn_page_size: 64   # tokens
cuda_graph_batch_sizes:
  - 1
  - 8
use_pt_cache_backend: true
kv_cache_config:
  # not supported for hybrid models
  enable_block_reuse: false

transforms:
  detect_sharding:
    sharding_dims: ['ep', 'bmm']
  # rotation
  fuse_rope_into_trtllm_attention:
    stage: post_load_fusion
    enabled: true
  # cache
  insert_cached_attention:
    backend: flashinfer
    cache_config:
      dtype: float8_e4m3fn
max_batch_size: 64
"""
NEW = {
    "runtime": "trtllm",
    "compile_backend": "torch-cudagraph",
    "attn_backend": BACKEND,
    "kv_cache_config": {
        "enable_block_reuse": False,
        "tokens_per_block": 64,
        "free_gpu_memory_fraction": 0.65,
        "dtype": "fp8",
    },
    "transforms": {
        "detect_sharding": {"sharding_dims": ["ep", "bmm"]},
    },
    "max_batch_size": 64,
    "cuda_graph_config": {"batch_sizes": [1, 8]},
}


def test_a_config_of_1_2_becomes_one_of_main() -> None:
    """Every key that was renamed, removed or is another backend's."""
    result = migrate(OLD)
    assert yaml.safe_load(result.after) == NEW
    assert len(result.notes) == 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("free_mem_ratio: 0.8 # most\n", "  free_gpu_memory_fraction: 0.8 # most"),
        ("free_mem_ratio: 0.8 # most\nkv_cache_config: {dtype: fp8}\n", None),
        ("kv_cache_config: {dtype: fp8}  # one\nfree_mem_ratio: 0.8  # two\n", "one"),
        ("{free_mem_ratio: 0.8}  # all\n", "# all"),
    ],
)
def test_a_comment_goes_where_its_key_goes(text: str, line: str | None) -> None:
    """Into a mapping of its own line, or behind the braces that took the key."""
    after = migrate(text).after
    assert yaml.safe_load(after)["kv_cache_config"]["free_gpu_memory_fraction"] == 0.8
    expected = "kv_cache_config: {dtype: fp8, free_gpu_memory_fraction: 0.8} # most" if line is None else line
    assert any(each.endswith(expected) or expected in each for each in after.splitlines())


def test_comments_and_everything_else_stay() -> None:
    """Nothing but lines with migrated keys is touched."""
    after = migrate(OLD).after
    gone = [line[2:] for line in difflib.ndiff(OLD.splitlines(), after.splitlines()) if line.startswith("- ")]
    assert [line for line in gone if "#" in line] == [
        "attn_backend: flashinfer  # the one that plans",
        "attn_page_size: 64   # tokens",
    ]
    assert "  tokens_per_block: 64   # tokens\n" in after
    for line in OLD.splitlines():
        assert line in gone or line in after.splitlines()
    assert "attn_backend: flashinfer_trtllm  # the one that plans" in after
    assert "  # cache\n" in after


@pytest.mark.parametrize("text", ["", "a: 1", "transforms: {}\n", "transforms:\nb: 2\n", "# nothing\n"])
def test_keys_that_were_not_there(text: str) -> None:
    """An empty file, empty mappings and a last line without an end."""
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(migrate(text).after)
    assert after == {
        **before,
        "attn_backend": BACKEND,
    }


def test_arguments_below_args() -> None:
    """AutoDeploy's own examples keep them there, beside keys of the experiment."""
    text = "args:\n  attn_backend: triton  # ours\n  free_mem_ratio: 0.5\nbenchmark:\n  enabled: true\n"
    assert yaml.safe_load(migrate(text).after) == {
        "args": {
            "attn_backend": BACKEND,
            "kv_cache_config": {"free_gpu_memory_fraction": 0.5},
        },
        "benchmark": {"enabled": True},
    }


def test_a_page_size_that_no_kernel_reads_becomes_32() -> None:
    """An unpaged cache had pages as long as a sequence."""
    result = migrate("attn_page_size: 8192\n")
    assert yaml.safe_load(result.after)["kv_cache_config"] == {"tokens_per_block": 32}
    assert any("8192 -> 32" in note for note in result.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("free_mem_ratio: 0.5\nkv_cache_config:\n  free_gpu_memory_fraction: 0.9\n", "the file has both"),
        ("- a\n", "a config must be a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_what_cannot_be_migrated(text: str, message: str) -> None:
    """A contradiction, and what is no config."""
    with pytest.raises(ConfigError, match=message):
        migrate(text)


_names = st.sampled_from(
    ["max_batch_size", "runtime", "world_size", "model_kwargs", "kv_cache_config", "transforms"]
)
_leaves = st.one_of(st.integers(0, 9), st.booleans(), st.sampled_from(["x y", "'", "a # b", "1"]), st.none())
_values = st.recursive(
    _leaves, lambda inner: st.dictionaries(st.sampled_from("pqr"), inner, max_size=2), max_leaves=6
)


@settings(deadline=None, max_examples=60)
@given(
    config=st.dictionaries(_names, _values, max_size=4).map(
        lambda c: {
            k: v if isinstance(v, dict) or k not in ("kv_cache_config", "transforms") else {}
            for k, v in c.items()
        }
    ),
    free=st.one_of(st.none(), st.floats(0.1, 0.9)),
    flow=st.booleans(),
)
def test_any_config_keeps_its_other_keys_and_is_done_once(
    config: dict[str, Any], free: float | None, flow: bool
) -> None:
    """Whatever else is there means the same afterwards, and a second migration changes nothing."""
    config = dict(config) if free is None else {"free_mem_ratio": free, **config}
    text = yaml.safe_dump(config, default_flow_style=None if flow else False, sort_keys=False)
    once = migrate(text).after
    want = {k: v for k, v in config.items() if k != "free_mem_ratio"}
    cache = {**(config.get("kv_cache_config") or {})} | (
        {} if free is None else {"free_gpu_memory_fraction": free}
    )
    got = yaml.safe_load(once)
    transforms = got.pop("transforms", None) or {}
    assert got.pop("attn_backend") == BACKEND
    assert transforms == (want.pop("transforms", None) or {})
    assert got.pop("kv_cache_config", {}) == cache
    want.pop("kv_cache_config", None)
    assert got == want
    assert migrate(once).after == once


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["migrate", *arguments])
    return int(ended.value.code or 0)


def test_the_command_rewrites_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--check only shows, and exits with 1; without it the file is rewritten, once."""
    file = tmp_path / "config.yaml"
    file.write_text(OLD)
    assert run(str(file), "--check") == 1
    assert file.read_text() == OLD
    shown = capsys.readouterr()
    assert "+attn_backend: flashinfer_trtllm  # the one that plans" in shown.out
    assert "attn_page_size -> kv_cache_config.tokens_per_block" in shown.err
    assert run(str(file)) == 0
    assert yaml.safe_load(file.read_text()) == NEW
    capsys.readouterr()
    assert run(str(file)) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == ("", f"{file}: nothing to change\n")
    assert run(str(tmp_path / "none.yaml")) == 1


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parent.parent.parent / "configs").glob("autodeploy_*.yaml")),
    ids=lambda p: p.stem,
)
def test_the_configs_are_migrated_already(path: Path) -> None:
    """Each is what migrate makes of it, and has our backend."""
    text = path.read_text()
    assert migrate(text).after == text
    assert yaml.safe_load(text)["attn_backend"] == BACKEND


@pytest.mark.parametrize(
    "text",
    [
        "args:\n  max_batch_size: 1\nargs:\n  attn_backend: trtllm\n",
        "transforms:\n  insert_cached_attention: {backend: trtllm,\n    dtype: auto}\n  a\n",
        "attn_backend: [trtllm\n",
        "- 1\n",
        "{" * 50_000,
    ],
)
def test_what_cannot_be_rewritten_is_refused(text: str) -> None:
    """Rather than made into something that is no YAML, or that does not say what it should."""
    with pytest.raises(ConfigError):
        migrate(text)
