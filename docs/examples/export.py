"""Transform a program that you exported, save it, load it, and generate with it.

python docs/examples/export.py
"""

import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer

from ad_flashinfer_pass import AutoDeployConfig, restore, to_program, transform
from ad_flashinfer_pass.runtime.llm import LLM

demo = resources.files("ad_flashinfer_pass.demo")
tokenizer = AutoTokenizer.from_pretrained(demo)
model = AutoModelForCausalLM.from_pretrained(demo).eval()

# Batch and sequence dynamic, and no cache in the graph: the pass puts it there.
dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
inputs = {"input_ids": torch.zeros((2, 13), dtype=torch.int64), "position_ids": torch.arange(13).repeat(2, 1)}
with torch.no_grad():
    program = torch.export.export(
        model,
        (),
        {**inputs, "use_cache": False},
        dynamic_shapes={"input_ids": dynamic, "position_ids": dynamic, "use_cache": None},
        strict=False,
    )

config = AutoDeployConfig(device="cpu", max_batch_size=4, max_seq_len=256)
cached = transform(program, config)
print(f"{len(cached.caches)} caches of {cached.num_pages} pages")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "cached.pt2"
    torch.export.save(to_program(cached), path)
    loaded = restore(torch.export.load(path), config)

for served in (cached, loaded):
    llm = LLM(served, tokenizer)
    for result in llm.generate(["Once upon a time", "The little dog"], max_new_tokens=24):
        print(result.text)
