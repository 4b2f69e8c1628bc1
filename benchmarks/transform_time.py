"""What the pass costs beside the export.

    python benchmarks/transform_time.py

Llama layers of small width with random weights, 32 and 64 of them. Prints the seconds of each transform,
everything after the export as a share of the export, and how 64 layers compare with 32.
"""

from __future__ import annotations

import gc

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ad_flashinfer_pass.config import AutoDeployConfig
from ad_flashinfer_pass.pipeline import transform_module


def transform_seconds(num_layers: int) -> dict[str, float]:
    """Seconds of each transform, by name."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _, reports = transform_module(model, AutoDeployConfig(device="cpu", max_seq_len=2048))
    gc.collect()
    return {report.name: report.seconds for report in reports}


def main() -> None:
    """Measure and print the table."""
    transformers.logging.set_verbosity_error()
    transform_seconds(2)  # imports and first-use caches
    layers = (32, 64)
    seconds = {n: transform_seconds(n) for n in layers}
    table = Table("transform", *(f"{n} layers, s" for n in layers), title=f"torch {torch.__version__}")
    for name in seconds[32]:
        table.add_row(name, *(f"{seconds[n][name]:.3f}" for n in layers))
    after = {n: sum(seconds[n].values()) - seconds[n]["export_model"] for n in layers}
    table.add_section()
    table.add_row("after the export", *(f"{after[n]:.3f}" for n in layers))
    table.add_row(
        "as a share of the export",
        *(f"{after[n] / seconds[n]['export_model']:.1%}" for n in layers),
    )
    Console().print(table)
    Console().print(f"64 layers take {after[64] / after[32]:.2f} times 32 layers after the export.")


if __name__ == "__main__":
    main()
