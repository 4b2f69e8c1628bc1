"""Models with quantized weights on a GPU, against the stated arithmetic in float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ad_flashinfer_pass.config import AutoDeployConfig, CompileBackend
from ad_flashinfer_pass.models.loading import load_model
from benchmarks.end_to_end import NEW_TOKENS, PROMPTS, VOCAB, _cached
from tests import architectures
from tests.gpu.test_end_to_end import transformed
from tests.models.test_random_quantized import CONFIGS, compressed

TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
CASES = {
    **{name: (family, settings) for name, (family, settings, _) in CONFIGS.items()},
    "dynamic": ("llama", compressed("float-quantized", weights=CHANNEL, input_activations=TOKEN)),
    "weights": ("llama", compressed("float-quantized", weights=CHANNEL)),
    "block_dense": ("llama", CONFIGS["block"][1]),
}
SIZES = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph", "torch-opt"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_stated_arithmetic(
    case: str, backend: CompileBackend, tmp_path: Path
) -> None:
    """As near as the uncached model on the GPU, within a factor: activations are rounded to float8, where a
    rounding of bfloat16 before it may change much, or are left in 16 bits.
    """
    family, settings = CASES[case]
    architectures.small_config(family, **SIZES).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    config: dict[str, Any] = {"model": str(tmp_path), "skip_loading_weights": True, "max_seq_len": 128}
    model = load_model(AutoDeployConfig(**config, device="cuda", dtype="bfloat16")).module
    reference = load_model(AutoDeployConfig(**config, device="cpu", dtype="float32")).module
    with torch.no_grad():
        for ours, theirs in zip(reference.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    cached, _ = transformed(model, backend)
    generated = architectures.generated_by_engine(cached, PROMPTS, NEW_TOKENS)
    errors = torch.zeros(2)
    for prompt, tokens, found in zip(PROMPTS, generated, _cached(cached, generated), strict=True):
        ids = torch.tensor([[*prompt, *tokens]])[:, :-1]
        with torch.inference_mode():
            wanted, uncached = (
                each(ids.to(device)).logits[0, len(prompt) - 1 :].float().cpu()
                for each, device in ((reference, "cpu"), (model, "cuda"))
            )
        errors += torch.stack([(x - wanted).square().sum() for x in (found.cpu(), uncached)])
    print(case, backend, errors.sqrt().tolist())
    assert errors[0].sqrt() < 2 * errors[1].sqrt()
