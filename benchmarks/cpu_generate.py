"""Our generate and transformers' own, in turn, on one thread of a CPU.

    python benchmarks/cpu_generate.py --json benchmarks/results/cpu_generate.json

Same weights, dtype, prompts and number of tokens. transformers runs with its dynamic cache, and pads a ragged
batch on the left. Seconds are those of the processor, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from importlib.metadata import version
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own folder is all that it can import from
from benchmarks.inspection import processor

_ROUNDS = 6
_RAGGED = [8, 96, 24, 64, 32, 48, 16, 80]


def demo_model() -> nn.Module:
    """The model that the package carries."""
    with resources.as_file(resources.files("ad_flashinfer_pass.demo")) as path:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def smollm2_135m() -> nn.Module:
    """The shape of SmolLM2-135M, from its config.json, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


_CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[list[int], int]]]] = {
    "demo, 0.9 M": (demo_model, [([32], 128), (_RAGGED, 128)]),
    "SmolLM2-135M's shape": (
        smollm2_135m,
        [([32], 40), ([32], 128), ([1960], 40), ([32] * 8, 40), (_RAGGED, 40)],
    ),
}
"""Prompts' lengths and tokens of each, by model."""


def transformers_generate(model: Any, prompts: list[list[int]], num_tokens: int) -> None:
    """One batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generate(
        ids,
        attention_mask=mask,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def our_generate(llm: LLM, prompts: list[list[int]], num_tokens: int) -> None:
    """The same prompts through the paged model."""
    params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    for result in llm.generate(prompts, sampling_params=params):
        assert len(result.token_ids) == num_tokens, result.error


def seconds_of(run: Callable[[], None]) -> float:
    """Of the processor, of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(model: nn.Module, llm: LLM, lengths: list[int], num_tokens: int) -> dict[str, Any]:
    """In turns that begin with one or the other, after a round to warm up: medians, also of the ratio."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = llm.model.vocab_size
    prompts = [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    runs = partial(our_generate, llm), partial(transformers_generate, model)
    seconds: tuple[list[float], ...] = ([], [])
    for first in range(1 + _ROUNDS):
        for which in (first % 2, 1 - first % 2):
            seconds[which].append(seconds_of(partial(runs[which], prompts, num_tokens)))
    ours, theirs = (each[1:] for each in seconds)
    return {
        "prompts": lengths,
        "tokens": num_tokens,
        "seconds": round(statistics.median(ours), 3),
        "transformers_seconds": round(statistics.median(theirs), 3),
        "ratio": round(statistics.median(map(truediv, theirs, ours)), 3),
    }


def main() -> None:
    """Run every case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/cpu_generate.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, one thread, float32",
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "rows": [],
    }
    for name, (make, cases) in _CASES.items():
        model = make()
        llm = LLM(
            transform_module(model, AutoDeployConfig(device="cpu", max_batch_size=8, max_seq_len=2048))[0],
            enable_block_reuse=False,  # the same prompts again and again
        )
        for lengths, num_tokens in cases:
            record["rows"].append({"model": name, **compare(model, llm, lengths, num_tokens)})
            print(record["rows"][-1], flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
