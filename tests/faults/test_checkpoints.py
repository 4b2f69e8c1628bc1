"""Every file of a checkpoint, and the YAML of a config, damaged."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ad_flashinfer_pass import AutoDeployConfig
from ad_flashinfer_pass.models.loading import load_model
from ad_flashinfer_pass.runtime.generation_config import default_sampling
from tests.faults.harness import TIMES, damaged, refusal_of

DEMO = Path(str(resources.files("ad_flashinfer_pass.demo")))
INDEX = "model.safetensors.index.json"
GENERATION = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 9}
YAML = b"""model: demo  # of the package
max_batch_size: 4
max_seq_len: ${max_batch_size}
kv_cache_config:
  dtype: fp8
  k_scale: [0.5, 0.25]
  v_scale: 1.5e-2
  tokens_per_block: 16
transforms:
  fuse_gemms: {enabled: false}
  insert_cached_attention: {stage: cache_init}
cuda_graph_batch_sizes: [1, 2]
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards, with all files that are read."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    tensors = load_file(DEMO / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    load_model(AutoDeployConfig(model=str(folder)))
    return folder


@pytest.mark.parametrize("seed", range(12 * TIMES))
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
        "a.safetensors",
    ],
)
def test_damaged_checkpoint(name: str, seed: int, whole: Path, tmp_path: Path) -> None:
    """It is loaded as what it now says, or refused in one line."""
    for file in filter(Path.is_file, whole.iterdir()):
        (tmp_path / file.name).symlink_to(file)
    content = (whole / name).read_bytes()
    (tmp_path / name).unlink()
    # Of weights, what says what they are: nothing can tell other numbers from the right ones.
    head = content[:3_000] if name.endswith(".safetensors") else content
    (tmp_path / name).write_bytes(damaged(head, seed) + content[len(head) :])

    def read() -> None:
        found, file = load_model(AutoDeployConfig(model=str(tmp_path))).generation
        default_sampling(found, str(file))

    refusal_of(read, str(tmp_path))


@pytest.mark.parametrize("seed", range(60 * TIMES))
def test_damaged_yaml(seed: int, tmp_path: Path) -> None:
    """What it says is taken, or every fault is told in one line."""
    file = tmp_path / "config.yaml"
    file.write_bytes(damaged(YAML, seed))
    refusal_of(lambda: AutoDeployConfig.from_yaml(file))
