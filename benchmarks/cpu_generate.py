"""Our generate and transformers' own, in turn, on the CPU.

    python benchmarks/cpu_generate.py [--rounds 5]

Same weights, dtype, threads, prompts and number of tokens. transformers runs with its dynamic cache, and
pads a ragged batch on the left. Prints tokens/s of both, the ratio (above 1: ours is faster), and the share
of our time that is spent outside the model's own matrix products, which are timed by themselves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.pipeline import transform_module
from ad_flashinfer_pass.runtime.llm import LLM
from ad_flashinfer_pass.runtime.sampling import SamplingParams

# Prompt lengths of the batches, in tokens.
_LENGTHS = {1: [32], 8: [8, 96, 24, 64, 32, 48, 16, 80]}


def demo_model() -> nn.Module:
    """The model that the package carries."""
    with resources.as_file(resources.files("ad_flashinfer_pass.demo")) as path:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def llama_100m() -> nn.Module:
    """A Llama of 110 M parameters with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompts_of(batch: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of the batch's lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS[batch]]


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
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def linear_seconds(llm: LLM, batch: int, num_tokens: int) -> float:
    """Seconds that the model's own linear layers take for this many decode steps."""
    weights = list(_linear_weights(llm.model.module))  # type: ignore[arg-type]
    inputs = {weight.shape[1]: torch.randn(batch, 1, weight.shape[1]) for weight in weights}

    def run() -> None:
        with torch.inference_mode():
            for _ in range(num_tokens):
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)

    run()
    return seconds_of(run)


def _linear_weights(module: torch.fx.GraphModule) -> Iterator[Tensor]:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = node.args[1]
        owner: Any = module
        for part in weight.target.split("."):
            owner = getattr(owner, part)
        yield owner


def compare(name: str, model: nn.Module, llm: LLM, batch: int, num_tokens: int, rounds: int) -> list[str]:
    """One row of the table: both in turn, the median of each and of their ratio."""
    prompts = prompts_of(batch, llm.model.vocab_size)
    ours, theirs = [], []
    for round_ in range(rounds + 1):
        mine = seconds_of(lambda: our_generate(llm, prompts, num_tokens))
        other = seconds_of(lambda: transformers_generate(model, prompts, num_tokens))
        print(f"{name} batch {batch}: {mine:.2f} s, transformers {other:.2f} s", file=sys.stderr)
        if round_:  # the first warms up
            ours.append(mine)
            theirs.append(other)
    tokens, mine = batch * num_tokens, statistics.median(ours)
    return [
        name,
        str(batch),
        f"{tokens / mine:.0f}",
        f"{tokens / statistics.median(theirs):.0f}",
        f"{statistics.median(t / o for o, t in zip(ours, theirs, strict=True)):.2f}",
        f"{1 - linear_seconds(llm, batch, num_tokens) / mine:.0%}",
    ]


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each; the median counts")
    parser.add_argument("--threads", type=int, default=0, help="default: what torch chooses")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    table = Table(
        "model",
        "batch",
        "ours tokens/s",
        "transformers tokens/s",
        "ratio",
        "outside matmuls",
        title=f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, float32",
    )
    for name, make, num_tokens in (("demo", demo_model, 128), ("llama 110M", llama_100m, 32)):
        model = make()
        llm = LLM(
            transform_module(model, AutoDeployConfig(device="cpu", max_batch_size=8, max_seq_len=512))[0],
            enable_block_reuse=False,  # the same prompts again and again
        )
        for batch in _LENGTHS:
            table.add_row(*compare(name, model, llm, batch, num_tokens, args.rounds))
    Console().print(table)


if __name__ == "__main__":
    main()
